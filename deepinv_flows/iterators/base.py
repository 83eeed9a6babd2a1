"""What the iterations share: the terms of an objective, its cost for each sample, and parameters of an iteration."""

from collections.abc import Callable

import torch
from deepinv.optim import DataFidelity, Prior
from deepinv.optim.optim_iterators import OptimIterator
from deepinv.optim.prior import ZeroPrior
from torch import Tensor

from ..checks import check_finite, iteration


def coefficient(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one for each sample, as something that multiplies ``x``."""
    if not torch.is_tensor(value):
        return value
    if value.numel() == 1:
        return value.reshape(())
    if value.numel() != x.shape[0]:
        raise ValueError(f"expected one number or one for each of {x.shape[0]} samples; got shape {tuple(value.shape)}")
    return value.reshape(-1, *[1] * (x.ndim - 1))


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """The value of a term as (B,)."""
    if value.ndim == 0 and x.shape[0] == 1:
        return value.reshape(1)
    if value.ndim == 0 or value.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected a term of the objective to have a value for each of {x.shape[0]} samples; "
            f"got shape {tuple(value.shape)}"
        )
    return value.flatten(1).sum(1) if value.ndim > 1 else value


def check_not_nan(what: str, value: Tensor) -> None:
    """Infinite it may be, where a constraint is not met."""
    if bool(torch.isnan(value.detach()).any()):
        raise ValueError(f"{what} of samples {torch.isnan(value).nonzero().flatten().tolist()} is NaN{iteration()}")


def square(x: Tensor) -> Tensor:
    """Squared norm of each sample."""
    return x.flatten(1).pow(2).sum(1)


def flat(value: float | Tensor) -> float | Tensor:
    """A :func:`coefficient` as it multiplies values (B,)."""
    return value.reshape(-1) if torch.is_tensor(value) else value


def rounding(value: Tensor) -> Tensor:
    """What two evaluations of ``value`` may differ by."""
    return 10 * torch.finfo(value.dtype).eps * value.abs()


def _guarded(x: Tensor) -> Tensor:
    # deepinv's default grad sets requires_grad on its argument: without a graph, on a copy that nobody sees
    return x if torch.is_grad_enabled() else x.detach()


class DataTerm:
    """The data fidelity f, its measurements bound."""

    explicit = True

    def __init__(self, data_fidelity: DataFidelity, y, physics):
        self.data_fidelity, self.bound = data_fidelity, (y, physics)

    def value(self, x: Tensor) -> Tensor:
        return per_sample(self.data_fidelity(x, *self.bound), x)

    def grad(self, x: Tensor) -> Tensor:
        return self.data_fidelity.grad(_guarded(x), *self.bound)

    def prox(self, x: Tensor, gamma) -> Tensor:
        return self.data_fidelity.prox(x, *self.bound, gamma=gamma)


class PriorTerm:
    """A prior times its regularization parameter."""

    def __init__(self, prior: Prior | None, weight: float | Tensor = 1.0, g_param=None):
        self.prior, self.weight, self.g_param = ZeroPrior() if prior is None else prior, weight, g_param

    @property
    def explicit(self) -> bool:
        """Whether it has a value; a denoiser's has not."""
        return self.prior.explicit_prior

    def value(self, x: Tensor) -> Tensor:
        return flat(coefficient(self.weight, x)) * per_sample(self.prior(x, self.g_param), x)

    def grad(self, x: Tensor) -> Tensor:
        return coefficient(self.weight, x) * self.prior.grad(_guarded(x), self.g_param)

    def prox(self, x: Tensor, gamma) -> Tensor:
        return self.prior.prox(x, self.g_param, gamma=gamma * coefficient(self.weight, x))

    def prox_conjugate(self, x: Tensor, gamma) -> Tensor:
        return self.prior.prox_conjugate(x, self.g_param, gamma=gamma, lamb=coefficient(self.weight, x))


class Problem:
    """One iteration's terms ``f``, ``g``, ``g_2`` and parameters."""

    def __init__(self, iteration: "Iteration", data_fidelity: DataFidelity, prior: Prior, params: dict, y, physics):
        self.params = {**iteration.defaults, **params}
        self.y, self.physics = y, physics
        self.f = DataTerm(data_fidelity, y, physics)
        self.g = PriorTerm(prior, self.params["lambda"], self.params["g_param"])
        self.g_2 = PriorTerm(self.params.get("prior_2"), self.params.get("lambda_2", 1.0), self.params.get("g_param_2"))
        # by its gradient, and by its proximity operator
        self.smooth, self.proximable = (self.g, self.f) if iteration.g_first else (self.f, self.g)

    def __getitem__(self, name: str):
        return self.params[name]

    def coefficient(self, name: str, x: Tensor) -> float | Tensor:
        return coefficient(self.params[name], x)


class Iteration(OptimIterator):
    """
    Base of our iterations: a subclass writes :meth:`step`.

    Its cost is one for each sample, :math:`f(x) + \\lambda g(x)` and what :meth:`objective` adds; terms without a value (a
    denoiser's) are left out. A ``cost_fn`` of the user's replaces it; the one that ``deepinv.optim.optim_builder``
    writes, which sums the prior over the batch, does not.

    :param bool g_first: exchanges the roles of data fidelity and prior, where the iteration has such a variant.
    :param Callable cost_fn: ``cost_fn(x, data_fidelity, prior, cur_params, y, physics)``, one number for each sample.
    :param bool has_cost: whether to compute the cost; deepinv's optimizers set it.
    """

    # parameters that deepinv does not set; those of them that no gradient reaches; options that cannot be right, and why
    defaults: dict = {}
    constants: tuple[str, ...] = ()
    refuses: dict[str, str] = {}
    #: ``start(X, problem)`` makes the first iterate of deepinv's where that is not one of this iteration
    start: Callable | None = None

    def __init__(self, g_first: bool = False, cost_fn: Callable | None = None, has_cost: bool = True, **kwargs):
        super().__init__(g_first=g_first, has_cost=has_cost)
        injected = getattr(cost_fn, "__qualname__", "") == "create_iterator.<locals>.cost_fn"
        self.user_cost = None if injected else cost_fn
        self.cost_fn = self.cost

    def cost(self, x: Tensor, data_fidelity: DataFidelity, prior: Prior, cur_params: dict, y, physics) -> Tensor:
        """The objective at ``x``, (B,); what deepinv calls ``cost_fn``."""
        return self.evaluate((x,), data_fidelity, prior, cur_params, y, physics)

    def evaluate(self, est: tuple[Tensor, ...], data_fidelity, prior, cur_params: dict, y, physics) -> Tensor:
        """The cost of the iterate ``est``, (B,)."""
        if self.user_cost is not None:
            return self.user_cost(est[0], data_fidelity, prior, cur_params, y, physics)
        return self.objective(est, Problem(self, data_fidelity, prior, cur_params, y, physics))

    def objective(self, est: tuple[Tensor, ...], problem: Problem) -> Tensor:
        """At the iterate ``est``, which may be (x,) alone."""
        values = [problem.f.value(est[0])]
        values += [term.value(est[0]) for term in (problem.g, problem.g_2) if term.explicit]
        return sum(values)

    def reasons(self, params: dict, unfolded: bool = False) -> dict[str, str]:
        """Why options of deepinv's are refused, by their names."""
        return self.refuses

    def own_backtracking(self, params: dict, backtracking, unfolded: bool = False):
        """What is left of ``backtracking`` for deepinv."""
        return backtracking

    def step(self, X: dict, problem: Problem) -> dict:
        """The next iterate as ``{"est": (x, ...)}`` with whatever else the iteration remembers."""
        raise NotImplementedError

    def forward(self, X: dict, cur_data_fidelity, cur_prior, cur_params: dict, y, physics, *args, **kwargs) -> dict:
        """
        One iteration, as :class:`deepinv.optim.FixedPoint` calls it.

        :param dict X: ``{"est": (x, ...)}`` as the last call returned it; missing variables take their initial values.
        :param deepinv.optim.DataFidelity cur_data_fidelity: f.
        :param deepinv.optim.Prior cur_prior: g.
        :param dict cur_params: the parameters and operands of this iteration.
        :param torch.Tensor, deepinv.utils.TensorList y: measurements.
        :param deepinv.physics.Physics physics: their physics.
        :return: ``{"est": (x, ...), "cost": F}`` with F of shape (B,), or ``None`` without a cost.
        :raises ValueError: naming the iteration, when an iterate is not finite or its cost is NaN.
        """
        X = self.step(X, Problem(self, cur_data_fidelity, cur_prior, cur_params, y, physics))
        check_finite("the iterate", *X["est"])
        if "cost" not in X:
            wanted = self.has_cost and cur_data_fidelity is not None and cur_prior is not None
            args = (X["est"], cur_data_fidelity, cur_prior, cur_params, y, physics)
            X["cost"] = self.evaluate(*args) if wanted else None
        if X["cost"] is not None:
            check_not_nan("the cost", X["cost"])
        return X
