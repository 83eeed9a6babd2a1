"""What the iterations share: one problem at a time, its cost for each sample, and what an optimizer may ask of them."""

import sys
from collections.abc import Callable
from types import FrameType

from deepinv.optim import BaseOptim, DataFidelity, Prior
from deepinv.optim.optim_iterators import OptimIterator
from deepinv.unfolded import BaseDEQ, BaseUnfold
from torch import Tensor

from ..checks import check_finite
from .parameters import check_keywords, check_ranges, normalise
from .terms import DataTerm, PriorTerm, ProximableTerm, check_not_nan, coefficient


class Problem:
    """One iteration's terms ``f``, ``g``, ``g_2`` and parameters."""

    def __init__(
        self, iteration: "Iteration", data_fidelity: DataFidelity | None, prior: Prior | None, params: dict, y, physics
    ):
        self.params = {**iteration.defaults, **params}
        self.y, self.physics = y, physics
        self.f = DataTerm(data_fidelity, y, physics)
        self.g = PriorTerm(prior, self.params["lambda"], self.params["g_param"])
        self.g_2 = PriorTerm(self.params.get("prior_2"), self.params.get("lambda_2", 1.0), self.params.get("g_param_2"))
        # the term that enters by its gradient, and the one that enters by its proximity operator
        self.smooth: ProximableTerm = self.g if iteration.g_first else self.f
        self.proximable: ProximableTerm = self.f if iteration.g_first else self.g

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

    #: parameters that deepinv does not set, and their values
    defaults: dict = {}
    #: those that no gradient reaches
    constants: tuple[str, ...] = ()
    #: options of deepinv's that cannot be right, and why
    refuses: dict[str, str] = {}
    #: ``start(X, problem)`` makes the first iterate of deepinv's where that is not one of this iteration
    start: Callable | None = None

    def __init__(self, g_first: bool = False, cost_fn: Callable | None = None, has_cost: bool = True, **kwargs):
        super().__init__(g_first=g_first, has_cost=has_cost)
        injected = getattr(cost_fn, "__qualname__", "") == "create_iterator.<locals>.cost_fn"
        self.user_cost = None if injected else cost_fn
        self.cost_fn = self.cost

    def cost(
        self, x: Tensor, data_fidelity: DataFidelity, prior: Prior, cur_params: dict, y: Tensor, physics: object
    ) -> Tensor:
        """The objective at ``x``, (B,); what deepinv calls ``cost_fn``."""
        return self.evaluate((x,), data_fidelity, prior, cur_params, y, physics)

    def evaluate(
        self,
        est: tuple[Tensor, ...],
        data_fidelity: DataFidelity,
        prior: Prior,
        cur_params: dict,
        y: Tensor,
        physics: object,
    ) -> Tensor:
        """The cost of the iterate ``est``, (B,)."""
        if self.user_cost is not None:
            return self.user_cost(est[0], data_fidelity, prior, cur_params, y, physics)
        return self.objective(est, Problem(self, data_fidelity, prior, cur_params, y, physics))

    def objective(self, est: tuple[Tensor, ...], problem: Problem) -> Tensor:
        """The objective at the iterate ``est``, which may be (x,) alone."""
        values = [problem.f.value(est[0])]
        values += [term.value(est[0]) for term in (problem.g, problem.g_2) if term.explicit]
        return sum(values[1:], values[0])

    def reasons(self, params: dict, unfolded: bool = False) -> dict[str, str]:
        """Why options of deepinv's are refused, by their names."""
        return self.refuses

    def adopted(self, optimizer: BaseOptim, params: dict, options: dict) -> None:
        """
        Called once by the optimizer that will run this iteration, deepinv's or ours, when it is made.

        :param deepinv.optim.BaseOptim optimizer: the optimizer, not yet complete.
        :param dict params: its ``params_algo``, normalised in place.
        :param dict options: its arguments by name, as they were given.
        :raises ValueError: for a parameter out of its range, or an option that the iteration refuses.
        :raises TypeError: for an argument that does not exist.
        """
        name = type(self).__name__.removesuffix("Iteration")
        check_keywords(name, options.get("kwargs", {}), options)
        normalise(params)
        check_ranges(params)
        for option, reason in self.reasons(params, unfolded=is_unfolded(optimizer)).items():
            if options.get(option):
                raise ValueError(f"{name} has no {option}: {reason}; got {option}={options[option]}")

    @property
    def has_cost(self) -> bool:
        """Whether the cost is computed; deepinv's optimizers set it when they are made, and so adopt this iteration."""
        return self.__dict__.get("has_cost", True)

    @has_cost.setter
    def has_cost(self, value: bool) -> None:
        self.__dict__["has_cost"] = value
        # BaseOptim tells an iteration nothing else of itself: whose assignment this is stands in the calling frame
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name == "__setattr__":
            frame = frame.f_back
        if frame is not None and frame.f_code is BaseOptim.__init__.__code__:
            options = dict(frame.f_locals)
            params = options.pop("params_algo")
            self.adopted(options.pop("self"), params if isinstance(params, dict) else dict(params), options)

    def step(self, X: dict, problem: Problem) -> dict:
        """The next iterate as ``{"est": (x, ...)}`` with whatever else the iteration remembers."""
        raise NotImplementedError

    def forward(
        self,
        X: dict,
        cur_data_fidelity: DataFidelity,
        cur_prior: Prior,
        cur_params: dict,
        y: Tensor,
        physics: object,
        *args,
        **kwargs,
    ) -> dict:
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


def is_unfolded(optimizer: BaseOptim) -> bool:
    """Whether gradients run through all iterations of an optimizer, so not of a DEQ model."""
    deq = optimizer.DEQ or isinstance(optimizer, BaseDEQ)
    return not deq and (optimizer.unfold or isinstance(optimizer, BaseUnfold))
