r"""
The objective of a reconstruction, :math:`F(x) = f(x) + \lambda\, g(x) + c(x)`, split by what its terms allow.

f is the data fidelity, g the prior, and c a constraint or a second prior known by its proximity operator. Every term has one
value for each image, and so has :math:`\lambda`.
"""

import copy
from collections.abc import Sequence

import torch
from deepinv.optim import DataFidelity, Prior
from deepinv.optim.data_fidelity import L2, PoissonLikelihood, StackedPhysicsDataFidelity
from deepinv.optim.potential import Potential
from deepinv.optim.prior import SmoothedTVPrior, TVPrior
from deepinv.physics import StackedPhysics
from deepinv.utils import TensorList
from torch import Tensor

from ..iterators import exact_prox, poisson, poisson_grad
from ..latent import FlowPrior
from ..patchnr import PatchNR
from ..solvers import finite, per_sample


class Box(Prior):
    """
    The constraint that every entry lies between two bounds: 0 where it does, infinite elsewhere.

    :param float low: lower bound.
    :param float high: upper bound.

    >>> import torch
    >>> from deepinv_flows.reconstruction import Box
    >>> Box(0, 1).prox(torch.tensor([[[[-1.0, 0.5, 2.0]]]])).flatten()
    tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, low: float = 0.0, high: float = float("inf")):
        super().__init__()
        if not low < high:
            raise ValueError(f"expected bounds low < high; got {low} and {high}")
        self.explicit_prior, self.low, self.high = True, low, high

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        inside = ((x >= self.low) & (x <= self.high)).flatten(1).all(1)
        return torch.zeros_like(inside, dtype=x.dtype).masked_fill(~inside, torch.inf)

    def prox(self, x: Tensor, *args, gamma: float | Tensor = 1.0, **kwargs) -> Tensor:
        return x.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        return f"{self.low}, {self.high}"


def parts(y: Tensor | TensorList) -> list[Tensor]:
    """Measurements of each operator of a stack, or of the only one."""
    return list(y.x) if isinstance(y, TensorList) else [y]


def frozen(prior: Prior) -> Prior:
    """The prior with its weights as constants: they are shared, not copied, and the user's module is left as it is."""
    shared: dict = {id(p): p.detach() for p in prior.parameters()} | {id(b): b for b in prior.buffers()}
    for module in prior.modules():
        shared |= {id(v): v for v in vars(module).values() if isinstance(v, torch.Generator)}
    try:
        own = copy.deepcopy(prior, shared)
    except Exception:  # not every module of a user's copies
        return prior
    if isinstance(own, PatchNR):
        own.image_range = None  # starts and trial steps may lie outside; what is returned is looked at
    return own


def is_smooth(prior: Prior) -> bool:
    """Whether a prior is minimised by its gradient: not one that brings a proximity operator and nothing else."""
    if isinstance(prior, TVPrior):
        return isinstance(prior, SmoothedTVPrior)
    return type(prior).grad is not Potential.grad or type(prior).prox is Potential.prox


class Term:
    """A term of the objective, with a value (B,) for images (B, ...); what it has of the other two depends on its kind."""

    def value(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def prox(self, x: Tensor, gamma: Tensor) -> Tensor:
        raise NotImplementedError


class DataTerm(Term):
    """f with its measurements bound; A and its adjoint are applied once for value and gradient together."""

    def __init__(self, data_fidelity: DataFidelity, y, physics):
        self.data_fidelity, self.y, self.physics = data_fidelity, y, physics
        kind = type(data_fidelity)
        self.chained = kind.fn is DataFidelity.fn and kind.grad in (DataFidelity.grad, L2.grad)
        self.poisson = kind is PoissonLikelihood

    def value(self, x: Tensor) -> Tensor:
        if self.poisson:
            return poisson(self.data_fidelity.d, self.physics.A(x), self.y)
        return _each("data fidelity", self.data_fidelity(x, self.y, self.physics), x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.chained:
            return self.value(x), self.data_fidelity.grad(x.clone(), self.y, self.physics).detach()
        u, d = self.physics.A(x), self.data_fidelity.d
        if self.poisson:
            value, grad = poisson(d, u, self.y), poisson_grad(d, u, self.y)
        else:
            value, grad = _each("data fidelity", d(u, self.y), x), d.grad(u, self.y)
        return value, self.physics.A_vjp(x, grad).detach()


class StackedTerm(DataTerm):
    """f of several operators: the sum over them, each with a data fidelity of its own or the same."""

    def __init__(self, data_fidelity: DataFidelity, y: TensorList, physics):
        super().__init__(data_fidelity, y, physics)
        stacked = isinstance(data_fidelity, StackedPhysicsDataFidelity)
        each = data_fidelity.data_fidelity_list if stacked else [data_fidelity] * len(y)
        if not len(each) == len(y) == len(physics):
            raise ValueError(
                f"expected as many data fidelities and measurements as operators; got {len(each)}, {len(y)} and {len(physics)}"
            )
        self.parts = [DataTerm(one, part, physics[k]) for k, (one, part) in enumerate(zip(each, y))]

    def value(self, x: Tensor) -> Tensor:
        return torch.stack([part.value(x) for part in self.parts]).sum(0)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _summed(self.parts, x)


def data_term(data_fidelity: DataFidelity, y, physics) -> DataTerm:
    kind = StackedTerm if isinstance(y, TensorList) and isinstance(physics, StackedPhysics) else DataTerm
    return kind(data_fidelity, y, physics)


class PriorTerm(Term):
    """:math:`\\lambda g` with one weight for each image."""

    def __init__(self, prior: Prior, weight: Tensor):
        self.prior, self.weight = frozen(prior), weight
        self.last: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None
        # where the gradient is that of autograd, it is taken together with the value
        self.jointly = isinstance(prior, PatchNR | FlowPrior) or type(prior).grad is Potential.grad

    def value(self, x: Tensor) -> Tensor:
        return self.weight * _each("prior", self.prior(x), x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # the start is asked for by its choice, by the metric and by the units
        if self.last is None or self.last[0] is not x or self.last[1] != x._version:
            self.last = x, x._version, self._value_and_grad(x)
        return self.last[2]

    def _value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.jointly:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                value = _each("prior", self.prior(leaf), leaf)
                (grad,) = torch.autograd.grad(value.sum(), leaf)
            return self.weight * value.detach(), per_sample(self.weight, x) * grad
        return self.value(x), per_sample(self.weight, x) * self.prior.grad(x.clone()).detach()

    def prox(self, x: Tensor, gamma: Tensor) -> Tensor:
        return exact_prox(self.prior, x, gamma * per_sample(self.weight, x))


class Constraint(Term):
    """c, whose weight is 1: 0 or infinite, or a second prior."""

    def __init__(self, prior: Prior):
        self.prior = prior

    def value(self, x: Tensor) -> Tensor:
        return _each("constraint", self.prior(x), x)

    def prox(self, x: Tensor, gamma: Tensor) -> Tensor:
        return exact_prox(self.prior, x, gamma)

    def feasible(self, x: Tensor) -> Tensor:
        """The images, those at which c is infinite projected."""
        outside = torch.isinf(self.value(x))
        return torch.where(per_sample(outside, x), self.prox(x, x.new_ones(())), x)


class Objective:
    """
    F as a sum of terms that are known by their gradients (``smooth``) or by their proximity operators (``proximable``).

    :param DataTerm data: f.
    :param deepinv.optim.Prior prior: g.
    :param torch.Tensor weight: :math:`\\lambda`, (B,).
    :param deepinv.optim.Prior constraint: c, or ``None``.
    :param bool by_gradient: whether g is known by its gradient.
    """

    def __init__(self, data: DataTerm, prior: Prior, weight: Tensor, constraint: Prior | None, by_gradient: bool):
        self.data, self.term = data, PriorTerm(prior, weight)
        self.constraint = None if constraint is None else Constraint(constraint)
        self.smooth: list[Term] = [data, self.term] if by_gradient else [data]
        self.proximable: list[Term] = [] if by_gradient else [self.term]
        if self.constraint is not None:
            self.proximable.append(self.constraint)

    @torch.no_grad()
    def value(self, x: Tensor) -> Tensor:
        """F(x), (B,)."""
        return torch.stack([term.value(x) for term in [*self.smooth, *self.proximable]]).sum(0)

    @torch.no_grad()
    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the smooth terms: (B,), and a tensor like x."""
        return _summed(self.smooth, x)

    @torch.no_grad()
    def finite(self, x: Tensor) -> Tensor:
        """Samples (B,) where the smooth terms and their gradients are finite."""
        return finite(*self.value_and_grad(x))


def _summed(terms: Sequence[Term], x: Tensor) -> tuple[Tensor, Tensor]:
    values, grads = zip(*(term.value_and_grad(x) for term in terms))
    return torch.stack(values).sum(0), torch.stack(grads).sum(0)


def _each(who: str, value: Tensor, x: Tensor) -> Tensor:
    if value.ndim == 0 and len(x) == 1:
        return value.reshape(1)
    if value.shape[:1] != x.shape[:1]:
        raise ValueError(f"expected a {who} with one value for each of {len(x)} images; got shape {tuple(value.shape)}")
    return value if value.ndim == 1 else value.flatten(1).sum(1)
