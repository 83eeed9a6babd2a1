"""Samples of a batch that have converged: which they are, and the objective without them."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from deepinv.utils import TensorList
from torch import Tensor, nn

from ..solvers import norm
from .base import Problem
from .terms import DataTerm, PriorTerm, ProximableTerm, Term


@dataclass
class Criterion:
    """Whether a sample has converged, by deepinv's ``crit_conv`` and ``thres_conv``, for each sample on its own."""

    kind: str
    threshold: float

    def __call__(self, x_before: Tensor, x: Tensor, F_before: Tensor, F: Tensor) -> Tensor:
        moved, size = ((F - F_before).abs(), F.abs()) if self.kind == "cost" else (norm(x - x_before), norm(x))
        return moved <= self.threshold * size


@dataclass
class Part:
    """The terms of an objective for some samples of a batch; ``smooth`` is ``None`` where they cannot be had."""

    rows: Tensor
    smooth: Term | None = None
    proximable: ProximableTerm | None = None

    @classmethod
    def of(cls, problem: Problem, x: Tensor, rows: Tensor) -> "Part":
        """
        The terms at these rows of x, if they are the same functions there.

        Nothing says which tensors of a physics have an entry for each sample. All whose length is that of the batch are cut, and
        the result is compared with the whole at x: a tensor cut by mistake, or not cut, shows there.
        """
        whole = problem.smooth, problem.proximable
        try:
            part = _terms(problem, rows, len(x))
            same = all(_agree(*pair, x, rows) for pair in zip(whole, part)) and _close(
                whole[0].grad(x)[rows], part[0].grad(x[rows])
            )
        except Exception:  # whatever a user's physics raises when it is copied or cut
            same = False
        return cls(rows, *part) if same else cls(rows)


def cut(value, rows: Tensor, batch: int):
    """The rows of a tensor with an entry for each sample; of a module a copy whose tensors are cut, with the same weights."""
    if isinstance(value, TensorList):
        return TensorList([cut(v, rows, batch) for v in value])
    if torch.is_tensor(value):
        return value[rows] if value.ndim and len(value) == batch else value
    if not isinstance(value, nn.Module):
        return value
    memo: dict = {
        id(v): v if isinstance(v, nn.Parameter | torch.Generator) else cut(v, rows, batch) for v in _held(value)
    }
    return copy.deepcopy(value, memo)


def _held(value, seen: set | None = None) -> Iterator:
    """The tensors and generators in a module, also those in lists and dicts and in modules that these hold."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor | torch.Generator):
        yield value
    elif isinstance(value, nn.Module | dict | list | tuple):
        parts = vars(value) if isinstance(value, nn.Module) else value
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _held(part, seen)


def _terms(problem: Problem, rows: Tensor, batch: int) -> tuple[ProximableTerm, ProximableTerm]:
    f, g = problem.f, problem.g
    data = DataTerm(cut(f.data_fidelity, rows, batch), *(cut(part, rows, batch) for part in f.bound))
    prior = PriorTerm(g.prior, cut(g.weight, rows, batch), cut(g.g_param, rows, batch))
    return (data, prior) if problem.smooth is f else (prior, data)


def _agree(whole: Term, part: Term, x: Tensor, rows: Tensor) -> bool:
    return _close(whole.value(x)[rows], part.value(x[rows]))


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what a batch of another size changes by rounding."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    largest = float(a.abs().nan_to_num(posinf=0.0).max())
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest)
