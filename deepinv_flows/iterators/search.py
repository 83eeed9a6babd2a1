"""Line search of step sizes, for each sample on its own."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepinv.optim import BacktrackingConfig, BaseOptim
from torch import Tensor

from .base import Iteration, Problem, is_unfolded
from .terms import coefficient

#: the default of our line searches; that of deepinv multiplies a step by 0.9 at most twenty times, which is too little
DEFAULT = BacktrackingConfig(gamma=1e-4, eta=0.5, max_iter=40)


def as_config(backtracking: BacktrackingConfig | bool | None) -> BacktrackingConfig | None:
    """The checked configuration of a line search: ``True`` is ``DEFAULT``; ``False`` and ``None`` are ``None``, no search."""
    if backtracking is None or backtracking is False:
        return None
    config = DEFAULT if backtracking is True else backtracking
    if not isinstance(config, BacktrackingConfig):
        raise TypeError(
            f"expected backtracking to be a bool or a deepinv.optim.BacktrackingConfig; got {backtracking!r}"
        )
    if not (0 <= config.gamma < 1 and 0 < config.eta < 1 and config.max_iter >= 1):
        raise ValueError(f"expected 0 <= gamma < 1, 0 < eta < 1 and max_iter >= 1; got {config}")
    return config


def as_steps(stepsize: float | Tensor, x: Tensor) -> Tensor:
    """A real step size for each sample, of shape (B, 1, ...), so that it multiplies ``x``."""
    step = torch.as_tensor(coefficient(stepsize, x), dtype=x.real.dtype, device=x.device)
    return step * torch.ones(x.shape[0], *[1] * (x.ndim - 1), dtype=step.dtype, device=x.device)


def shorten(trial: Callable[[Tensor], tuple], enough: Callable[..., Tensor], step: Tensor, config: BacktrackingConfig):
    """
    Try the steps s, eta s, eta^2 s, ... of each sample until ``enough(step, *trial(step))`` holds. Samples for which it
    holds keep their step while the search goes on for the others.

    :return: the last trial; its steps, shortened once more for samples for which the condition does not hold; and the samples
        for which it holds, (B,).
    """
    for _ in range(config.max_iter):
        found = trial(step)
        ok = enough(step.flatten(), *found)
        if ok.all():
            break
        step = torch.where(ok.view_as(step), step, step * config.eta)
    return found, step, ok


class SearchIteration(Iteration):
    """
    Base of the iterations that search their step sizes. Unfolded, or with a list of step sizes, they take the given steps.

    A DEQ model runs to its fixed point without a graph and then records two iterations, the second without the history of the
    first. Both take the shortest step of that run. Every step would give the same derivative, but the backward iteration
    converges only if the recorded iteration is a contraction, which a step accepted along one direction does not ensure.
    """

    defaults = {"backtracking": True}
    #: these three are set when an optimizer adopts the iteration
    unfolded = False
    scheduled = False
    backtracking: BacktrackingConfig | bool | None = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.shortest = None

    def reasons(self, params: dict, unfolded: bool = False) -> dict[str, str]:
        return {**self.refuses, "backtracking": "an unfolded model takes the given steps"} if unfolded else self.refuses

    def adopted(self, optimizer: BaseOptim, params: dict, options: dict) -> None:
        """As the base class; ``backtracking`` then means our line search, and that of deepinv is switched off."""
        super().adopted(optimizer, params, options)
        self.unfolded, self.backtracking = is_unfolded(optimizer), options.get("backtracking")
        optimizer.backtracking, optimizer.backtracking_config = False, None
        wanted = self.backtracking
        if wanted is None:
            given = params.get("backtracking", self.defaults["backtracking"])
            wanted = given[0] if isinstance(given, list) else given
        searches = as_config(wanted) is not None and not self.unfolded
        steps = params.get("stepsize", 1.0)
        self.scheduled = isinstance(steps, Iterable) and len(list(steps)) > 1
        if searches and self.scheduled:
            warnings.warn(
                "the line search is switched off, since stepsize is a list: each iteration takes the step given for it "
                "(backtracking=False avoids this warning)",
                stacklevel=6,
            )

    def first_step(self, problem: Problem, x: Tensor, last: Tensor | None) -> tuple[Any, BacktrackingConfig | None]:
        """The step, and ``None`` if it is taken as it is; or else the first step to try, (B, 1, ...), and how to search."""
        given = problem.coefficient("stepsize", x)
        config = as_config(problem["backtracking"] if self.backtracking is None else self.backtracking)
        if config is None or self.unfolded or self.scheduled:
            return given, None
        if torch.is_grad_enabled():
            fits = self.shortest is not None and self.shortest.shape[0] == x.shape[0]
            return (coefficient(self.shortest.to(x.device), x) if fits else given), None
        if last is None:
            self.shortest = None
            last = as_steps(given, x)
        return last, config

    def check_explicit(self, *terms) -> None:
        check_explicit(type(self).__name__, *terms)

    def accept(self, step: Tensor) -> Tensor:
        self.shortest = step if self.shortest is None else torch.minimum(self.shortest, step)
        return step


def check_explicit(name: str, *terms) -> None:
    """Refuse a line search with a term that does not have a value."""
    if not all(term.explicit for term in terms):
        raise ValueError(
            f"the line search of {name} needs the value of each term, and this prior does not have one; "
            "got backtracking=True: pass a stepsize and backtracking=False"
        )
