"""One iteration of non-monotone accelerated proximal gradient descent, on any smooth and any proximable term."""

import functools
from dataclasses import dataclass, fields, replace

import torch
from deepinv.optim import BacktrackingConfig
from torch import Tensor

from ..checks import check_finite
from ..solvers import dot, rounding
from .search import DEFAULT, shorten
from .terms import ProximableTerm, Term, check_not_nan, coefficient, pick, square

# energies may hardly rise until t_k reaches this size: early on, far from a minimum, a step that rises may rise far
PATIENCE = 8


@dataclass
class History:
    """What an iteration remembers of the iterations before it; each tensor has a row for each sample."""

    # the step from which the next search begins, (B, 1, ...)
    step: Tensor
    # the acceleration: the previous x, and the numbers t_{k-1} and t_k
    x_before: Tensor
    t_before: Tensor
    t: Tensor
    # the last extrapolated point and the gradient there, from which the curvature is estimated
    y: Tensor
    grad_y: Tensor
    # F(x); the ceiling c of the next energy, which is a mean of energies; and the weight q of that mean
    F: Tensor
    c: Tensor
    q: Tensor
    # whether the last iteration accepted a step
    accepted: Tensor

    @classmethod
    def starting(cls, x: Tensor, F: Tensor, step: Tensor) -> "History":
        """The history before the first iteration. With y = x, no curvature is known, whatever the gradient there."""
        one = torch.ones_like(F)
        return cls(step, x, 0 * one, one, x, x, F, F, one, torch.ones_like(F, dtype=torch.bool))

    def after(self, x: Tensor, y: Tensor, grad_y: Tensor) -> "History":
        """The history that the next iteration finds, after this one went from x through y."""
        t = (torch.sqrt(4 * self.t**2 + 1) + 1) / 2
        return replace(self, x_before=x, t_before=self.t, t=t, y=y, grad_y=grad_y)

    def with_energy(self, F: Tensor, eta: float | Tensor, accepted: Tensor) -> "History":
        """With F added to the mean c of those samples that accepted a step. The mean begins with the first finite F."""
        q = eta * (1 - 1 / self.t) ** PATIENCE * self.q + 1
        known = torch.isfinite(self.c)
        c, q = torch.where(known, self.c + (F - self.c) / q, F), torch.where(known, q, torch.ones_like(q))
        c, q = torch.where(accepted, c, self.c), torch.where(accepted, q, self.q)
        return replace(self, F=F, c=c, q=q, accepted=accepted)

    def restarted(self, x: Tensor, which: Tensor) -> "History":
        """With the acceleration of some samples started anew."""
        t_before, t = self.t_before.masked_fill(which, 0), self.t.masked_fill(which, 1)
        return replace(self, x_before=pick(which, x, self.x_before), t_before=t_before, t=t)

    def rows(self, which: Tensor) -> "History":
        """The history of some samples."""
        return History(*(value[which] for value in self._values()))

    def with_rows(self, which: Tensor, rows: "History") -> "History":
        """With ``rows`` as the history of these samples."""
        return History(*(a.index_put((which,), b) for a, b in zip(self._values(), rows._values())))

    def _values(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass
class Trial:
    """A proximal gradient step of each sample: the point that it leads to, and the smooth term and the energy there."""

    step: Tensor
    point: Tensor
    f: Tensor
    F: Tensor
    # the decrease of F that is asked for, and whether the search ended because a step achieved it
    fall: Tensor
    enough: Tensor

    def admitted(self, c: Tensor) -> Tensor:
        """Whether F is below the ceiling c by the decrease asked for or, where c is infinite, whether the search found a step."""
        return below(c, self.F + self.fall) | (~torch.isfinite(c) & self.enough)

    def not_above(self, c: Tensor) -> Tensor:
        """As :meth:`admitted`, without the decrease."""
        return below(c, self.F) | (~torch.isfinite(c) & self.enough)

    def unless(self, condition: Tensor, other: "Trial") -> "Trial":
        """``other`` for the samples for which the condition holds, this trial for the rest."""
        pairs = ((getattr(other, field.name), getattr(self, field.name)) for field in fields(self))
        return Trial(*(pick(condition, a, b) for a, b in pairs))


def below(bound: Tensor, F: Tensor) -> Tensor:
    """Whether F is at most a finite bound, up to rounding."""
    return torch.isfinite(bound) & (bound + rounding(bound) >= F)


def barzilai_borwein(move: Tensor, change: Tensor, otherwise: Tensor) -> Tensor:
    """The squared move of each sample over its curvature, and ``otherwise`` where that is not positive."""
    curvature = dot(move, change)
    step = square(move) / curvature
    return pick((curvature > 0) & torch.isfinite(step) & (step > 0), step.view_as(otherwise), otherwise)


class Advance:
    """
    The iteration from x to the next x that :class:`deepinv_flows.NMAPG` defines: extrapolate to y and take a step from y; for
    samples whose energy is then above the ceiling c, take a step from x too. With ``config=None`` the steps of the history are
    taken as they are.
    """

    def __init__(self, smooth: Term, proximable: ProximableTerm, config: BacktrackingConfig | None, eta: float):
        self.smooth, self.proximable, self.config, self.eta = smooth, proximable, config, eta
        self.gamma = (DEFAULT if config is None else config).gamma
        self.monitored = smooth.explicit and proximable.explicit

    @torch.no_grad()
    def values(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The smooth term and the energy F at u."""
        f = self.smooth.value(u)
        return f, f + self.proximable.value(u)

    def energy(self, x: Tensor) -> Tensor:
        """F(x), or 0 if a term does not have a value."""
        return self.values(x)[1] if self.monitored else torch.zeros_like(x.detach().real.flatten(1)[:, 0])

    def __call__(self, x: Tensor, z: Tensor, past: History) -> tuple[Tensor, Tensor, History]:
        """The next x, z and history."""
        y, grad_y = self.extrapolated(x, z, past)
        if not self.monitored:
            z = self.stepped(y, grad_y, past.step)
            return z, z, past.after(x, y, grad_y)
        from_y = best = self.searched(y, grad_y, past, or_below_start=True)
        good = from_y.admitted(past.c)
        step = from_y.step
        if not good.all():
            from_x = self.searched(x, self.smooth.grad(x), past)
            best = from_x.unless(good | (torch.isfinite(past.c) & (from_y.F <= from_x.F)), from_y)
            check_not_nan("the energy", best.F)
            step = pick(from_y.enough, step, from_x.step)
        accepted = good | best.not_above(past.c) if self.config is not None else torch.ones_like(good)
        return self.settled(x, past.after(x, y, grad_y), from_y, best, accepted, step)

    def extrapolated(self, x: Tensor, z: Tensor, past: History) -> tuple[Tensor, Tensor]:
        """The point y and the gradient there; for samples whose gradient at y is not finite, y is x."""
        t, t_before = coefficient(past.t, x), coefficient(past.t_before, x)
        y = x + t_before / t * (z - x) + (t_before - 1) / t * (x - past.x_before)
        grad = self.smooth.grad(y)
        inside = torch.isfinite(grad).flatten(1).all(1)
        if not inside.all():
            y = pick(inside, y, x)
            grad = self.smooth.grad(y)
            check_finite("the gradient", grad)
        return y, grad

    def stepped(self, u: Tensor, grad: Tensor, step: Tensor) -> Tensor:
        """The point that a proximal gradient step from u leads to."""
        return self.proximable.prox(u - step * grad, coefficient(step, u))

    def tried(self, u: Tensor, grad: Tensor, step: Tensor) -> Trial:
        point = self.stepped(u, grad, step)
        f, F = self.values(point)
        fall = self.gamma / step.detach().flatten() * square(point.detach() - u.detach())
        return Trial(step, point, f, F, fall, torch.ones_like(F, dtype=torch.bool))

    def searched(self, u: Tensor, grad: Tensor, past: History, or_below_start: bool = False) -> Trial:
        """
        The first step from u that leads below the ceiling c. With ``or_below_start``, and where c is infinite, a step that leads
        below F(u) is enough too, or, where F(u) is infinite, a step after which the smooth term is below the quadratic model
        that proximal gradient descent minimises.
        """
        if self.config is None:
            return self.tried(u, grad, past.step)
        start = functools.cache(lambda: self.values(u))

        def enough(step: Tensor, trial: Trial) -> Tensor:
            ok = below(past.c, trial.F + trial.fall)
            asked = ~ok & (or_below_start | ~torch.isfinite(past.c))
            if not asked.any():
                return ok
            f_u, F_u = start()
            move = trial.point - u
            model = f_u + dot(grad, move) + square(move) / (2 * step) + rounding(f_u)
            return ok | asked & torch.where(torch.isfinite(F_u), below(F_u, trial.F + trial.fall), trial.f <= model)

        first = barzilai_borwein(u - past.y, grad - past.grad_y, past.step)
        (trial,), step, ok = shorten(lambda step: (self.tried(u, grad, step),), enough, first, self.config)
        return replace(trial, step=step, enough=ok)

    def settled(self, x: Tensor, past: History, from_y: Trial, best: Trial, accepted: Tensor, step: Tensor):
        """
        The next x, z and history.

        Samples that accepted no step keep x. Their acceleration starts anew, as does that of samples whose search from y failed.
        """
        x_new, F = pick(accepted, best.point, x), torch.where(accepted, best.F, past.F)
        going = accepted & from_y.enough
        z = pick(going, from_y.point, x_new)
        past = replace(past.with_energy(F, self.eta, accepted), step=step)
        return x_new, z, past if going.all() else past.restarted(x_new, ~going)
