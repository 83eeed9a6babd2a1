"""Step sizes by line search, each sample its own."""

from collections.abc import Callable

import torch
from deepinv.optim import BacktrackingConfig
from torch import Tensor

from .base import Iteration, Problem, coefficient

#: of our line searches; deepinv's own default shortens a step by a tenth at most twenty times
DEFAULT = BacktrackingConfig(gamma=1e-4, eta=0.5, max_iter=40)


def as_config(backtracking: BacktrackingConfig | bool | None) -> BacktrackingConfig | None:
    """``True`` is :data:`DEFAULT`, ``False`` and ``None`` no search; checked."""
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
    """A step for each sample, (B, 1, ...)."""
    return torch.as_tensor(stepsize, dtype=x.dtype, device=x.device) * x.new_ones(x.shape[0], *[1] * (x.ndim - 1))


def shorten(trial: Callable[[Tensor], tuple], enough: Callable[..., Tensor], step: Tensor, config: BacktrackingConfig):
    """
    The first of the steps s, eta s, eta^2 s, ... for which ``enough(step, *trial(step))`` holds, for each sample; with the
    last trial. Samples that have theirs keep it while the others go on.
    """
    for _ in range(config.max_iter):
        found = trial(step)
        ok = enough(step.flatten(), *found)
        if ok.all():
            break
        step = torch.where(ok.view_as(step), step, step * config.eta)
    return found, step


class SearchIteration(Iteration):
    """
    Base of the iterations that search their steps where no graph is recorded, and take the given ones where one is.

    A DEQ model runs to its fixed point without a graph, then records two iterations, the second without their history.
    Both take the shortest step of that run: any would give the same derivative, but the backward iteration needs one at
    which the iteration contracts, and a step that was accepted along one direction need not.
    """

    defaults = {"backtracking": True}

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.shortest = None

    def reasons(self, params: dict, unfolded: bool = False) -> dict[str, str]:
        return {**self.refuses, "backtracking": "unfolded, the given steps are taken"} if unfolded else self.refuses

    def own_backtracking(self, params: dict, backtracking, unfolded: bool = False) -> None:
        if unfolded:
            backtracking = False
        if backtracking is not None:
            params["backtracking"] = [backtracking]
        config = params.get("backtracking")
        as_config(config[0] if isinstance(config, list) else config)

    def first_step(
        self, problem: Problem, x: Tensor, last: Tensor | None
    ) -> tuple[float | Tensor, BacktrackingConfig | None]:
        """The step to begin with, and how to search from it, if at all; then it is a tensor (B, 1, ...)."""
        given, config = problem.coefficient("stepsize", x), as_config(problem["backtracking"])
        if config is None:
            return given, None
        if torch.is_grad_enabled():
            fits = self.shortest is not None and self.shortest.shape[0] == x.shape[0]
            return (coefficient(self.shortest.to(x), x) if fits else given), None
        if last is None:
            self.shortest = None
            last = as_steps(given, x)
        return last, config

    def check_explicit(self, *terms) -> None:
        if not all(term.explicit for term in terms):
            raise ValueError(
                f"the line search of {type(self).__name__} needs the value of its terms, and this prior has none; "
                "got backtracking=True in params_algo: give a stepsize and backtracking=False"
            )

    def accept(self, step: Tensor) -> Tensor:
        self.shortest = step if self.shortest is None else torch.minimum(self.shortest, step)
        return step
