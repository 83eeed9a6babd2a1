"""What the optimizers share: parameters normalised and checked, and what cannot be right refused."""

from collections.abc import Callable, Iterable
from numbers import Real

import torch
from deepinv.loss.metric import PSNR
from deepinv.optim import AndersonAccelerationConfig, BacktrackingConfig, BaseOptim, DataFidelity, DEQConfig, Prior
from deepinv.optim.optim_iterators import OptimIterator
from torch import Tensor, nn

from ..checks import positive_int
from .base import Iteration, Problem

ALIASES = {"lambda_reg": "lambda", "sigma_denoiser": "g_param", "lambda_reg_2": "lambda_2"}


def estimate(X: dict) -> Tensor:
    """deepinv's default output; a function with a name, so that models pickle."""
    return X["est"][0]


def as_parameters(params: dict) -> dict:
    """
    ``params_algo`` with deepinv's own names and one value, or a list of ``max_iter``, for each.

    A tensor that is not 1-D is one value, and so is a module, even one that can be iterated over (a FrEIA chain); lists of
    modules become :class:`torch.nn.ModuleList`, so that their weights are the model's.
    """
    found = {}
    for name, value in params.items():
        if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList | nn.ParameterList):
            value = nn.ModuleList([value])
        elif torch.is_tensor(value) and value.ndim != 1:
            value = [value]
        elif isinstance(value, list | tuple) and value and all(isinstance(v, nn.Module) for v in value):
            value = nn.ModuleList(value)
        found[ALIASES.get(name, name)] = value
    return found


def _numbers(value) -> bool:
    values = value if isinstance(value, Iterable) else [value]
    return all(isinstance(v, int | float | Tensor) and not isinstance(v, bool) for v in values)


def trainable(names: list[str] | None, params: dict, constants: tuple[str, ...] = ()) -> list[str]:
    """The names to train: all that are numbers unless given, and every one given is there to be trained."""
    able = [name for name, value in params.items() if name not in constants and _numbers(value)]
    names = able if names is None else [ALIASES.get(name, name) for name in names]
    if not set(names) <= set(able):
        raise ValueError(f"expected trainable_params among {able}, which are numbers; got {names}")
    return names


RANGES = {
    "stepsize": ("positive", lambda v: v > 0),
    "stepsize_dual": ("positive", lambda v: v > 0),
    "lambda": ("non-negative", lambda v: v >= 0),
    "lambda_2": ("non-negative", lambda v: v >= 0),
    "beta": ("real", lambda v: v == v),
    "inertia": ("in [0, 1)", lambda v: (v >= 0) & (v < 1)),
    "eta": ("in [0, 1)", lambda v: (v >= 0) & (v < 1)),
}


def _within(value, admissible: Callable[[Tensor], Tensor]) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        return False
    value = torch.as_tensor(value).detach()
    return not value.is_complex() and bool((admissible(value) & torch.isfinite(value)).all())


def _check_ranges(params: dict) -> None:
    for name in RANGES.keys() & params.keys():
        kind, admissible = RANGES[name]
        given = params[name]
        values = list(given) if isinstance(given, Iterable) and not isinstance(given, str | dict) else [given]
        if not values or not all(_within(v, admissible) for v in values):
            raise ValueError(f"expected {name} to be finite and {kind}, or a list of such; got {given!r}")


class Optim(BaseOptim):
    """
    deepinv's optimizer with its parameters normalised, and with what cannot be right refused when it is made.

    A subclass names its ``iteration`` and gives its own parameters to ``__init__``; the builders give an ``iterator``.
    """

    iteration: type[Iteration]

    def __init__(
        self,
        parameters: dict,
        *,
        iterator: OptimIterator | None = None,
        data_fidelity: DataFidelity | list[DataFidelity] | None = None,
        prior: Prior | list[Prior] | None = None,
        g_param: float | Tensor | None = None,
        sigma_denoiser: float | Tensor | None = None,
        params_algo: dict | None = None,
        g_first: bool = False,
        cost_fn: Callable | None = None,
        unfold: bool = False,
        trainable_params: list[str] | None = None,
        DEQ: DEQConfig | bool | None = None,
        anderson_acceleration: AndersonAccelerationConfig | bool = False,
        backtracking: BacktrackingConfig | bool | None = None,
        get_output: Callable[[dict], Tensor] = estimate,
        has_cost: bool = True,
        **kwargs,
    ):
        iterator = self.iteration(g_first=g_first, cost_fn=cost_fn) if iterator is None else iterator
        g_param = sigma_denoiser if g_param is None else g_param
        params = as_parameters({"g_param": g_param, **parameters}) | as_parameters(params_algo or {})
        _check_ranges(params)
        if "max_iter" in kwargs:
            positive_int(max_iter=kwargs["max_iter"])
        constants = ()
        if isinstance(iterator, Iteration):
            constants = iterator.constants
            wanted = {"DEQ": DEQ, "anderson_acceleration": anderson_acceleration, "backtracking": backtracking}
            for option, reason in iterator.reasons(params, unfolded=unfold and not DEQ).items():
                if wanted[option]:
                    name = type(iterator).__name__.removesuffix("Iteration")
                    raise ValueError(f"{name} has no {option}: {reason}; got {option}={wanted[option]}")
            backtracking = iterator.own_backtracking(params, backtracking, unfolded=unfold and not DEQ)
        super().__init__(
            iterator,
            data_fidelity=data_fidelity,
            prior=prior,
            params_algo=params,
            unfold=unfold,
            trainable_params=trainable(trainable_params, params, constants) if unfold or DEQ else None,
            DEQ=DEQ,
            anderson_acceleration=anderson_acceleration,
            backtracking=backtracking,
            get_output=get_output,
            **kwargs,
        )
        # deepinv's asks the prior alone, not the user
        self.has_cost = iterator.has_cost = has_cost and (self.has_cost or cost_fn is not None)
        if not has_cost and (self.backtracking or self.crit_conv == "cost"):
            raise ValueError("expected has_cost=True for backtracking or crit_conv='cost'; got has_cost=False")

    def init_iterate_fn(self, y, physics, init=None, cost_fn=None) -> dict:
        """As deepinv's; where the iteration has a start of its own, from that."""
        iterator = self.fixed_point.iterator
        if not isinstance(iterator, Iteration) or iterator.start is None:
            return super().init_iterate_fn(y, physics, init, cost_fn)
        X = super().init_iterate_fn(y, physics, init)
        parts = (self.update_data_fidelity_fn(0), self.update_prior_fn(0), self.update_params_fn(0), y, physics)
        X = iterator.start(X, Problem(iterator, *parts))
        X["cost"] = iterator.evaluate(X["est"], *parts) if self.has_cost else None
        return X

    def DEQ_additional_step(self, X: dict, y, physics, **kwargs) -> Tensor:
        """As deepinv's, then ``get_output``."""
        x = super().DEQ_additional_step(X, y, physics, **kwargs)
        return self.get_output({**X, "est": (x, *X["est"][1:])})

    def check_conv_fn(self, it: int, X_prev: dict, X: dict) -> bool:
        """As deepinv's; the backward iteration of DEQ has no cost and no output, only a vector."""
        # there X has no cost; accelerated it has None, beside a list, where a forward iteration would have its cost
        if "cost" in X and not (X["cost"] is None and isinstance(X["est"], list)):
            return super().check_conv_fn(it, X_prev, X)
        v_prev, v = X_prev["est"][0].flatten(1), X["est"][0].flatten(1)
        return bool((v - v_prev).norm(dim=1).mean() < self.thres_conv * v.norm(dim=1).mean())

    # deepinv's metric holds a lambda, which does not pickle
    def __getstate__(self) -> dict:
        modules = {name: module for name, module in self._modules.items() if name != "psnr"}
        return {**self.__dict__, "_modules": modules}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.psnr = PSNR()
