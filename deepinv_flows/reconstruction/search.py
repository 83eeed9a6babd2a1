"""Searches for a positive number on a log scale, each sample of a batch on its own."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

STEP = math.log(4.0)  # until the answer is enclosed
FAR = 6 * math.log(10.0)  # from the start, where a search gives up


@torch.no_grad()
def root(function: Callable[[Tensor], Tensor], start: Tensor, tol: float = 0.02, max_iter: int = 25) -> Tensor:
    r"""
    Where an increasing function of :math:`\log \lambda` is 0, each sample on its own: enclosed by steps of 4, then by Illinois.

    :param Callable function: weights (B,) to values (B,).
    :param torch.Tensor start: first weights (B,).
    :param float tol: values nearer to 0 than this are 0.
    :return: weights (B,).
    :raises ValueError: naming the samples for which there is no sign change within six decades.
    """
    t = start.log()
    bounds = {-1: (torch.full_like(t, torch.nan),) * 2, 1: (torch.full_like(t, torch.nan),) * 2}
    found = torch.zeros_like(t, dtype=torch.bool)
    for _ in range(max_iter):
        value = function(t.exp())
        if bool(value.isnan().any()):
            raise ValueError(f"the residual of images {value.isnan().nonzero().flatten().tolist()} of the batch is NaN")
        found = found | (value.abs() <= tol)
        for sign, (at, known) in bounds.items():
            mine = (value * sign > 0) & ~found
            # Illinois: an end that stays counts half
            bounds[sign] = torch.where(mine, t, at), torch.where(mine, value, torch.where(found, known, known / 2))
        (low, below), (high, above) = bounds[-1], bounds[1]
        enclosed = ~(low.isnan() | high.isnan())
        inside = low - below * (high - low) / (above - below)
        new = torch.where(enclosed, inside, torch.where(low.isnan(), high - STEP, low + STEP))
        t = torch.where(found, t, new)
        if found.all() or (enclosed & ((high - low) < 1e-3) | found).all():
            break
        if bool((lost := (t - start.log()).abs() > FAR).any()):
            raise ValueError(
                f"no lambda_reg makes the residual of images {lost.nonzero().flatten().tolist()} of the batch as large as "
                "the noise: is the noise level of physics.noise_model right?"
            )
    return t.exp()


@torch.no_grad()
def highest(
    function: Callable[[Tensor], Tensor], start: Tensor, go_on: Callable[[], bool] = lambda: True
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    r"""
    Where a function of :math:`\log \lambda` is highest: enclosed by steps of 4, then by steps of 2, then by the parabola there.

    :param Callable function: weights (B,) to values (B,); NaN counts as lowest.
    :param torch.Tensor start: first weights (B,).
    :param Callable go_on: asked before each evaluation but the first; the best so far is returned once it says no.
    :return: weights (B,), and all weights and values that were tried.
    """
    tried: list[tuple[Tensor, Tensor]] = []  # in steps of 2 from the start

    def look(at: Tensor) -> None:
        if not tried or go_on():
            value = function(start * 2.0**at)
            tried.append((at, torch.where(value.isnan(), -torch.inf, value)))

    def best() -> Tensor:
        at, value = (torch.stack(column) for column in zip(*tried))
        return at.gather(0, value.argmax(0, keepdim=True))[0]

    zero = torch.zeros_like(start)
    for at in (zero, zero + 2, zero - 2):
        look(at)
    while go_on():
        top, ends = best(), torch.stack([at for at, _ in tried]).aminmax(dim=0)
        outward = 2.0 * (top >= ends.max).to(top) - 2.0 * (top <= ends.min).to(top)
        if not outward.any() or (top.abs() * math.log(2.0) > FAR).any():
            break
        look(top + outward)
    top = best()
    for side in (-1, 1):
        look(top + side)
    top = best()
    return start * 2.0 ** (top + _vertex(tried, top)), [(start * 2.0**at, value) for at, value in tried]


def _vertex(tried: list[tuple[Tensor, Tensor]], top: Tensor) -> Tensor:
    """Offset of the vertex of the parabola through the best point and its nearest neighbours; 0 if one is not known."""
    at, value = (torch.stack(column) for column in zip(*tried))
    away = at - top
    middle, far = value.gather(0, (away == 0).to(at).argmax(0, keepdim=True))[0], torch.full_like(away, torch.inf)
    sides = []
    for sign in (-1.0, 1.0):
        distance, which = torch.where(sign * away > 0, sign * away, far).min(0)
        sides.append((distance, sign * (value.gather(0, which[None])[0] - middle) / distance))
    (left, before), (right, after) = sides  # distances, and slopes there
    slope, curvature = (before * right + after * left) / (left + right), 2 * (after - before) / (left + right)
    offset = torch.minimum(torch.maximum(-slope / curvature, -left / 2), right / 2)
    return torch.where(torch.isfinite(offset) & (curvature < 0), offset, torch.zeros_like(offset))
