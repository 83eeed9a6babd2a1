r"""
L-BFGS on a batch of samples, each a problem with its own state.

L-BFGS (Nocedal 1980) with the bracketing line search of Lewis & Overton (2013), which asks for

.. math::

    f(z + t d) \le f(z) + c_1 t \langle \nabla f(z), d \rangle, \qquad
    \langle \nabla f(z + t d), d \rangle \ge c_2 \langle \nabla f(z), d \rangle

and copes with kinks. A step to where value or gradient is not finite counts as too long. torch's LBFGS treats a batch as one
problem, and steps into such places.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import at_iteration
from .batch import dot, finite, norm, per_sample, rounding
from .objective import Objective, check_still_finite, in_unit

SUFFICIENT_DECREASE, CURVATURE = 1e-4, 0.9
MAX_TRIALS = 20


@torch.no_grad()
def lbfgs(
    value_and_grad: Objective,
    z: Tensor,
    max_iter: int = 100,
    step: float = 1.0,
    tol: float = 0.0,
    history: int = 10,
    callback: Callable[[Tensor, Tensor], None] = lambda z, value: None,
) -> Tensor:
    """
    A local minimiser for each sample, from z; no sample's value ever rises.

    :param Callable value_and_grad: z (B, ...) to values (B,) and gradients (B, ...).
    :param torch.Tensor z: where to start, (B, ...), with finite values.
    :param int max_iter: bound on the number of iterations.
    :param float step: first trial step of an iteration, as a multiple of the quasi-Newton step; without any curvature known, as
        in the first iteration, the length of the step.
    :param float tol: a sample is done once an iteration lowers its value by less than ``tol`` times the value, or to less
        than ``tol**2`` times the value at the start; a step that was taken without any curvature known never ends it.
    :param int history: pairs of steps and gradient differences that are remembered.
    :param Callable callback: is shown iterate and values after each iteration.
    :return: tensor like z.
    :raises ValueError: naming the iteration, when an accepted iterate's value or gradient is not finite any more.
    """
    value, grad = value_and_grad(z)
    value_and_grad, unit = in_unit(value_and_grad, norm(grad))
    value, grad = value / unit, grad / per_sample(unit, grad)
    memory, negligible = _Memory(history, value), tol**2 * value.abs()
    t = step / dot(grad, grad).sqrt()
    alive = torch.ones_like(value, dtype=torch.bool)
    for it in range(max_iter):
        direction = memory.direction(grad)
        with at_iteration(it):
            trial = _line_search(value_and_grad, z, value, grad, direction, t, alive)
            moved, z_new, value_new, grad_new = trial
            check_still_finite(value_and_grad, z, alive & ~moved)
        little = memory.known & (value - value_new <= tol * value_new.abs())
        memory.remember(z_new - z, grad_new - grad)
        # no way down along the quasi-Newton direction: forget the past; none along the gradient either: done
        alive = alive & (moved | memory.forget(alive & ~moved))
        alive = alive & ~(moved & (little | (value_new.abs() <= negligible)))
        t = torch.where(moved, torch.full_like(t, step), step / dot(grad, grad).sqrt().clamp_min(1))
        z, value, grad = z_new, value_new, grad_new
        callback(z, unit * value)
        if not alive.any():
            break
    return z


class _Memory:
    """The last steps and gradient differences; pairs of a sample that do not count have weight zero."""

    def __init__(self, size: int, like: Tensor):
        self.size = size
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scale = torch.ones_like(like)
        self.known = torch.zeros_like(like, dtype=torch.bool)

    def direction(self, grad: Tensor) -> Tensor:
        q, alphas = grad, []
        for s, y, rho in reversed(self.pairs):
            alphas.append(rho * dot(s, q))
            q = q - per_sample(alphas[-1], q) * y
        q = per_sample(self.scale, q) * q
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas)):
            q = q + per_sample(alpha - rho * dot(y, q), q) * s
        return -q

    def remember(self, s: Tensor, y: Tensor) -> None:
        sy, yy = dot(s, y), dot(y, y)
        good = sy > torch.finfo(s.dtype).eps * (dot(s, s) * yy).sqrt()
        rho = torch.where(good, 1 / sy, torch.zeros_like(sy))
        self.scale = torch.where(good, sy / yy, self.scale)
        self.known = self.known | good
        self.pairs = [*self.pairs, (s, y, rho)][-self.size :]

    def forget(self, which: Tensor) -> Tensor:
        """Forget the pairs of some samples; returns which of them had any."""
        had = which & self.known
        self.known = self.known & ~which
        self.scale = torch.where(which, torch.ones_like(self.scale), self.scale)
        self.pairs = [(s, y, torch.where(which, torch.zeros_like(rho), rho)) for s, y, rho in self.pairs]
        return had


def _line_search(value_and_grad, z, value, grad, direction, t, alive):
    """
    For each live sample a step that satisfies both conditions, or the longest found that satisfies the first.

    :return: which samples moved, and z, value and gradient there.
    """
    slope = dot(grad, direction)
    t = torch.where(alive & (slope < 0), t, torch.zeros_like(t))
    lo, hi = torch.zeros_like(t), torch.full_like(t, torch.inf)
    moved, searching = torch.zeros_like(alive), t > 0
    best = z, value, grad
    slack = rounding(value)
    for _ in range(MAX_TRIALS):
        if not searching.any():
            break
        z_trial = torch.where(per_sample(searching, z), z + per_sample(t, z) * direction, z)
        value_trial, grad_trial = value_and_grad(z_trial)
        slope_trial = dot(grad_trial, direction)
        low = value_trial <= value + SUFFICIENT_DECREASE * t * slope
        # where the value is flat to rounding only the slope still tells
        low |= (value_trial <= value + slack) & (slope_trial.abs() < CURVATURE * slope.abs())
        low &= finite(value_trial, grad_trial) & searching
        keep = per_sample(low, z)
        best = (
            torch.where(keep, z_trial, best[0]),
            torch.where(low, value_trial, best[1]),
            torch.where(keep, grad_trial, best[2]),
        )
        moved = moved | low
        lo, hi = torch.where(low, t, lo), torch.where(searching & ~low, t, hi)
        searching = searching & ~(low & (slope_trial >= CURVATURE * slope))
        t = torch.where(searching, torch.where(hi.isinf(), 2 * t, (lo + hi) / 2), t)
        searching = searching & ~(moved & (hi - lo < 1e-3 * hi))
    return moved, *best
