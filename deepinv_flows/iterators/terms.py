"""The terms of an objective as iterations use them: a value for each sample, gradients and proximity operators."""

from collections.abc import Callable
from typing import Protocol

import torch
from deepinv.optim import DataFidelity, PoissonLikelihood, Prior, WaveletPrior
from deepinv.optim.distance import PoissonLikelihoodDistance
from deepinv.optim.prior import ZeroPrior
from torch import Tensor

from ..checks import iteration
from ..solvers import dot, per_sample


def coefficient(value: float | Tensor, x: Tensor) -> float | Tensor:
    """One number, or a tensor with a number for each sample, shaped so that it multiplies ``x``."""
    if not torch.is_tensor(value):
        return value
    if value.numel() == 1:
        return value.reshape(())
    if value.numel() != x.shape[0]:
        raise ValueError(f"expected one number or one for each of {x.shape[0]} samples; got shape {tuple(value.shape)}")
    return per_sample(value, x)


def flat(value: float | Tensor) -> float | Tensor:
    """The result of ``coefficient``, shaped so that it multiplies values (B,)."""
    return value.reshape(-1) if torch.is_tensor(value) else value


def pick(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The samples of ``a`` where the condition (B,) holds, those of ``b`` elsewhere."""
    return torch.where(per_sample(condition, a), a, b)


def square(x: Tensor) -> Tensor:
    """Squared norm of each sample, (B,)."""
    return dot(x, x)


def check_not_nan(what: str, value: Tensor) -> None:
    """Refuse NaN. A value may be infinite, where a constraint is violated."""
    if bool(torch.isnan(value.detach()).any()):
        raise ValueError(f"{what} of samples {torch.isnan(value).nonzero().flatten().tolist()} is NaN{iteration()}")


def _values(value: Tensor, x: Tensor) -> Tensor:
    """The output of a term as one real value for each sample of ``x``."""
    if value.ndim == 0 and x.shape[0] == 1:
        value = value.reshape(1)
    if value.ndim == 0 or value.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected a term of the objective to have a value for each of {x.shape[0]} samples; "
            f"got shape {tuple(value.shape)}"
        )
    value = value.real if value.is_complex() else value
    return value.flatten(1).sum(1) if value.ndim > 1 else value


def poisson(d: PoissonLikelihoodDistance, u: Tensor, y: Tensor) -> Tensor:
    """
    :math:`\\sum_i z_i - y_i - y_i \\log z_i` of each sample, with z = u / gain + bkg; infinite where some z is negative.

    That of deepinv adds the logarithms of the whole batch to the value of each sample, and 0 log 0 is NaN there.
    """
    y, z = _counts(d, u, y)
    value = _values(z - y - torch.xlogy(y, z.clamp_min(0)), u)
    return value.masked_fill((z < 0).flatten(1).any(1), torch.inf)


def poisson_grad(d: PoissonLikelihoodDistance, u: Tensor, y: Tensor) -> Tensor:
    """The gradient of :func:`poisson` in u; that of deepinv is this times the square of the gain."""
    y, z = _counts(d, u, y)
    return (1 - torch.where(y == 0, 0, y / torch.where(y == 0, 1, z))) / d.gain


def _counts(d: PoissonLikelihoodDistance, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Counts, and what is expected of them."""
    return y / d.gain if d.denormalize else y, u / d.gain + d.bkg


def _guarded(x: Tensor) -> Tensor:
    # deepinv's default grad sets requires_grad on its argument: outside of a graph it gets a copy instead
    return x if torch.is_grad_enabled() else x.detach()


def _constant(value: object) -> object:
    """A copy of a parameter, with which later values are compared even if the parameter is changed in place."""
    return value.detach().clone() if torch.is_tensor(value) else value


def unchanged(before: tuple, now: tuple) -> bool:
    """Whether two tuples hold the same objects, or equal numbers and tensors."""

    def same(a, b) -> bool:
        if a is b:
            return True
        if torch.is_tensor(a) and torch.is_tensor(b):
            return a.shape == b.shape and torch.equal(a, b.to(a))
        return isinstance(a, int | float) and isinstance(b, int | float) and a == b

    return len(before) == len(now) and all(same(a, b) for a, b in zip(before, now))


class Term(Protocol):
    """A term of an objective."""

    @property
    def explicit(self) -> bool: ...

    @property
    def identity(self) -> tuple: ...

    def value(self, x: Tensor) -> Tensor: ...

    def grad(self, x: Tensor) -> Tensor: ...


class ProximableTerm(Term, Protocol):
    """A term with a proximity operator."""

    def prox(self, x: Tensor, gamma: float | Tensor) -> Tensor: ...


class DataTerm:
    """The data fidelity f with its measurements bound."""

    explicit = True

    def __init__(self, data_fidelity: DataFidelity, y, physics):
        self.data_fidelity, self.bound = data_fidelity, (y, physics)

    @property
    def identity(self) -> tuple:
        """The objects and numbers that ``unchanged`` compares to decide whether a later term is the same function."""
        return (self.data_fidelity, *self.bound)

    def value(self, x: Tensor) -> Tensor:
        if isinstance(self.data_fidelity, PoissonLikelihood):
            y, physics = self.bound
            return poisson(self.data_fidelity.d, physics.A(x), y)
        return _values(self.data_fidelity(x, *self.bound), x)

    def grad(self, x: Tensor) -> Tensor:
        if isinstance(self.data_fidelity, PoissonLikelihood):
            x, (y, physics) = _guarded(x), self.bound
            return physics.A_vjp(x, poisson_grad(self.data_fidelity.d, physics.A(x), y))
        return self.data_fidelity.grad(_guarded(x), *self.bound)

    def prox(self, x: Tensor, gamma: float | Tensor) -> Tensor:
        return self.data_fidelity.prox(x, *self.bound, gamma=gamma)


class PriorTerm:
    """A prior times its regularization parameter."""

    def __init__(self, prior: Prior | None, weight: float | Tensor = 1.0, g_param=None):
        self.prior, self.weight, self.g_param = ZeroPrior() if prior is None else prior, weight, g_param

    @property
    def identity(self) -> tuple:
        """The objects and numbers that ``unchanged`` compares to decide whether a later term is the same function."""
        prior = ZeroPrior if isinstance(self.prior, ZeroPrior) else self.prior
        return prior, _constant(self.weight), _constant(self.g_param)

    @property
    def explicit(self) -> bool:
        """Whether the prior has a value; a denoiser does not."""
        return self.prior.explicit_prior

    def value(self, x: Tensor) -> Tensor:
        return flat(coefficient(self.weight, x)) * _values(self.prior(x, self.g_param), x)

    def grad(self, x: Tensor) -> Tensor:
        return coefficient(self.weight, x) * self.prior.grad(_guarded(x), self.g_param)

    def prox(self, x: Tensor, gamma: float | Tensor) -> Tensor:
        return self._prox(x, gamma * coefficient(self.weight, x))

    def prox_conjugate(self, x: Tensor, gamma: float | Tensor) -> Tensor:
        weight = coefficient(self.weight, x)
        if isinstance(self.prior, WaveletPrior):
            return x - gamma * self._prox(x / gamma, weight / gamma)
        return self.prior.prox_conjugate(x, self.g_param, gamma=gamma, lamb=weight)

    def _prox(self, x: Tensor, gamma: float | Tensor) -> Tensor:
        return exact_prox(self.prior, x, gamma, self.g_param)


def exact_prox(prior: Prior, x: Tensor, gamma: float | Tensor, *g_param) -> Tensor:
    """The proximity operator of a prior of deepinv's, for a stepsize, or one for each sample (B, 1, ...)."""
    if isinstance(prior, WaveletPrior):
        # it takes thresholds of shape (B,); by default they are a tenth of those of the true proximity operator
        exact = {"ths": 1.0} if prior.p == 1 else {}
        return prior.prox(x, *g_param, gamma=flat(gamma), **exact)
    return prior.prox(x, *g_param, gamma=gamma)


class EnergyTerm:
    """A function that maps (B, ...) to (B,) as a smooth term; autograd computes its gradient, which does not have a graph."""

    explicit = True

    def __init__(self, function: Callable[..., Tensor], data: tuple[Tensor, ...] = ()):
        self.function, self.data = function, data

    @property
    def identity(self) -> tuple:
        return (self.function, *self.data)

    def value(self, x: Tensor) -> Tensor:
        return _values(self.function(x, *self.data), x)

    def grad(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf).sum(), leaf)[0]
