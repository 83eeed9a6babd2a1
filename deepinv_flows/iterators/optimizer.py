"""What the optimizers share: parameters are normalised and checked, and options that cannot be right are refused."""

from collections.abc import Callable

import torch
from deepinv.loss.metric import PSNR
from deepinv.optim import BaseOptim, DEQConfig
from deepinv.optim.optim_iterators import OptimIterator
from torch import Tensor

from ..checks import positive_int
from .base import Iteration, Problem
from .parameters import RANGES, arguments, check_keywords, check_ranges, describe, normalise, trained
from .terms import coefficient


def estimate(X: dict) -> Tensor:
    """deepinv's default output. It is a function with a name, so that models can be pickled."""
    return X["est"][0]


class Optim(BaseOptim):
    """
    deepinv's optimizer, whose parameters are normalised, and which refuses options that cannot be right when it is made.

    A subclass names its ``iteration`` and passes its own parameters to ``__init__``; the builders pass an ``iterator``.
    """

    iteration: type[Iteration]
    _like: Tensor | None = None  # shape of the estimate

    def __init__(
        self,
        parameters: dict,
        *,
        iterator: OptimIterator | None = None,
        g_param: float | Tensor | list | None = None,
        sigma_denoiser: float | Tensor | list | None = None,
        params_algo: dict | None = None,
        g_first: bool = False,
        cost_fn: Callable | None = None,
        unfold: bool = False,
        trainable_params: list[str] | None = None,
        DEQ: DEQConfig | bool | None = None,
        get_output: Callable[[dict], Tensor] = estimate,
        has_cost: bool = True,
        **options,
    ):
        iterator = self.iteration(g_first=g_first, cost_fn=cost_fn) if iterator is None else iterator
        check_keywords(type(self).__name__, options, arguments(type(self).__init__) | arguments(Optim.__init__))
        if "max_iter" in options:
            positive_int(max_iter=options["max_iter"])
        g_param = sigma_denoiser if g_param is None else g_param
        params = normalise({"g_param": g_param, **parameters}) | normalise(dict(params_algo or {}))
        check_ranges(params)
        if unfold or DEQ:
            params, trainable_params = trained(trainable_params, params, iterator)
        super().__init__(
            iterator,
            params_algo=params,
            unfold=unfold,
            trainable_params=trainable_params,
            DEQ=DEQ,
            get_output=get_output,
            **options,
        )
        # deepinv derives it from the prior alone and ignores what the user asked for
        self.has_cost: bool = has_cost and (self.has_cost or cost_fn is not None)
        iterator.has_cost = self.has_cost
        if not has_cost and (self.backtracking or self.crit_conv == "cost"):
            raise ValueError("expected has_cost=True for backtracking or crit_conv='cost'; got has_cost=False")

    def init_iterate_fn(self, y: Tensor, physics: object, init: object = None, cost_fn: Callable | None = None) -> dict:
        """The first iterate, as in deepinv, or that of ``iterator.start`` if the iteration has one."""
        iterator = self.fixed_point.iterator
        if not isinstance(iterator, Iteration) or iterator.start is None:
            X = super().init_iterate_fn(y, physics, init, cost_fn)
            self._like = X["est"][0].to("meta")
            return X
        X = super().init_iterate_fn(y, physics, init)
        parts = (self.update_data_fidelity_fn(0), self.update_prior_fn(0), self.update_params_fn(0), y, physics)
        X = iterator.start(X, Problem(iterator, *parts))
        X["cost"] = iterator.evaluate(X["est"], *parts) if self.has_cost else None
        return X

    def update_params_fn(self, it: int) -> dict:
        """As in deepinv; numbers for each sample are shaped so that deepinv's iterations can multiply images by them."""
        params = super().update_params_fn(it)
        if self._like is None or isinstance(self.fixed_point.iterator, Iteration):
            return params
        each = [name for name in RANGES.keys() & params if torch.is_tensor(params[name]) and params[name].ndim == 1]
        return params | {name: coefficient(params[name], self._like) for name in each}

    def DEQ_additional_step(self, X: dict, y: Tensor, physics: object, **kwargs) -> Tensor:
        """As in deepinv, followed by ``get_output``."""
        x = super().DEQ_additional_step(X, y, physics, **kwargs)
        return self.get_output({**X, "est": (x, *X["est"][1:])})

    def check_conv_fn(self, it: int, X_prev: dict, X: dict) -> bool:
        """
        As in deepinv, or when all samples have converged, for iterations that know it. The backward iteration of DEQ has neither
        cost nor output, so its vector decides.
        """
        if "settled" in X:
            self.has_converged = bool(X["settled"].all())
            return self.has_converged
        # a backward iteration has no cost; if it is accelerated, its cost is None and its estimate a list
        if "cost" in X and not (X["cost"] is None and isinstance(X["est"], list)):
            return super().check_conv_fn(it, X_prev, X)
        v_prev, v = X_prev["est"][0].flatten(1), X["est"][0].flatten(1)
        return bool((v - v_prev).norm(dim=1).mean() < self.thres_conv * v.norm(dim=1).mean())

    def extra_repr(self) -> str:
        return f"{describe(self.init_params_algo)}, max_iter={self.max_iter}, unfold={self.unfold}, DEQ={self.DEQ}"

    # deepinv's metric holds a lambda, which cannot be pickled
    def __getstate__(self) -> dict:
        modules = {name: module for name, module in self._modules.items() if name != "psnr"}
        return {**self.__dict__, "_modules": modules}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.psnr = PSNR()
