r"""
L-BFGS on a batch in which each sample is a problem of its own.

It is L-BFGS (Nocedal 1980) with the bracketing line search of Lewis & Overton (2013), which asks for

.. math::

    f(z + t d) \le f(z) + c_1 t \langle \nabla f(z), d \rangle, \qquad
    \langle \nabla f(z + t d), d \rangle \ge c_2 \langle \nabla f(z), d \rangle

and works for functions with kinks. A step to a point where the value or the gradient is not finite counts as too long. It differs
from ``torch.optim.LBFGS``, which treats a batch as one problem and accepts such points.
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
    A local minimiser for each sample, starting from z; the value of a sample never rises.

    :param Callable value_and_grad: the objective; maps z (B, ...) to values (B,) and gradients (B, ...).
    :param torch.Tensor z: where to start, (B, ...), with finite values.
    :param int max_iter: largest number of iterations.
    :param float step: first trial step of an iteration, as a multiple of the quasi-Newton step. While no curvature is known, as
        in the first iteration, it is the length of the step.
    :param float tol: a sample is done when an iteration lowers its value by less than ``tol`` times the value, or when the value
        is less than ``tol**2`` times the value at the start. The first condition waits until some curvature is known.
    :param int history: number of pairs of steps and gradient differences that are kept.
    :param Callable callback: called after each iteration with the iterate and its values.
    :return: tensor like z.
    :raises ValueError: when the value or gradient at an accepted iterate is not finite any more; the message names the iteration.
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
        # A sample without descent along the quasi-Newton direction forgets its pairs; one that has none is done
        alive = alive & (moved | memory.forget(alive & ~moved))
        alive = alive & ~(moved & (little | (value_new.abs() <= negligible)))
        t = torch.where(moved, torch.full_like(t, step), step / dot(grad, grad).sqrt().clamp_min(1))
        z, value, grad = z_new, value_new, grad_new
        callback(z, unit * value)
        if not alive.any():
            break
    return z


class _Memory:
    """The last steps and gradient differences; a pair has weight zero for the samples for which it does not count."""

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
        """Forget the pairs of some samples, and return which of these samples had any."""
        had = which & self.known
        self.known = self.known & ~which
        self.scale = torch.where(which, torch.ones_like(self.scale), self.scale)
        self.pairs = [(s, y, torch.where(which, torch.zeros_like(rho), rho)) for s, y, rho in self.pairs]
        return had


def _line_search(value_and_grad, z, value, grad, direction, t, alive):
    """
    Find, for each live sample, a step that satisfies both conditions, or the longest one found that satisfies the first.

    :return: which samples moved, and z, value and gradient after the step.
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
        # where the value is constant up to rounding, only the slope shows progress
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
