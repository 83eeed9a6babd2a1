"""One iteration of non-monotone accelerated proximal gradient descent, on any smooth and any proximable term."""

import functools
from dataclasses import dataclass, fields, replace

import torch
from deepinv.optim import BacktrackingConfig
from torch import Tensor

from ..checks import check_finite
from .search import DEFAULT, shorten
from .terms import DataTerm, EnergyTerm, PriorTerm, check_not_nan, coefficient, flat, inner, pick, rounding, square

Term = DataTerm | PriorTerm | EnergyTerm


@dataclass
class History:
    """What an iteration remembers of those before it; each tensor has a row for each sample."""

    x_before: Tensor
    t_before: Tensor
    t: Tensor
    # F(x), and the ceiling c of the next energy with the weight q of the mean that c is
    F: Tensor | None = None
    c: Tensor | None = None
    q: Tensor | None = None
    # the last extrapolated point, the gradient there, the step from there, and whether a step was accepted
    y: Tensor | None = None
    grad_y: Tensor | None = None
    step: Tensor | None = None
    accepted: Tensor | None = None

    @classmethod
    def starting(cls, x: Tensor, F: Tensor | None) -> "History":
        zero = torch.zeros(x.shape[0], dtype=x.real.dtype, device=x.device)
        return cls(x, zero, zero + 1, F, F, zero + 1)

    def after(self, x: Tensor, y: Tensor, grad_y: Tensor) -> "History":
        """As the next iteration, from x by y, finds it."""
        t = (torch.sqrt(4 * self.t**2 + 1) + 1) / 2
        return replace(self, x_before=x, t_before=self.t, t=t, y=y, grad_y=grad_y)

    def with_energy(self, F: Tensor, eta: float | Tensor, counts: Tensor | None = None) -> "History":
        """The mean goes on with F, of the samples that count; it begins with the first finite F."""
        q = eta * self.q + 1
        c, known = self.c + (F - self.c) / q, torch.isfinite(self.c)
        c, q = torch.where(known, c, F), torch.where(known, q, torch.ones_like(q))
        if counts is not None:
            c, q = torch.where(counts, c, self.c), torch.where(counts, q, self.q)
        return replace(self, F=F, c=c, q=q)

    def restarted(self, x: Tensor, which: Tensor) -> "History":
        """Without acceleration, of some samples."""
        t_before, t = self.t_before.masked_fill(which, 0), self.t.masked_fill(which, 1)
        return replace(self, x_before=pick(which, x, self.x_before), t_before=t_before, t=t)

    def rows(self, which: Tensor) -> "History":
        """Of some samples."""
        return History(*(None if v is None else v[which] for v in self._values()))

    def with_rows(self, which: Tensor, rows: "History") -> "History":
        """With ``rows`` in the place of those samples."""
        return History(*(b if a is None else a.index_put((which,), b) for a, b in zip(self._values(), rows._values())))

    def _values(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass
class Trial:
    """A proximal gradient step: where it leads, the values there, by how much F should fall, and whether it does."""

    point: Tensor
    step: Tensor | float
    f: Tensor | None = None
    F: Tensor | None = None
    fall: Tensor | None = None
    enough: Tensor | None = None

    def admitted(self, c: Tensor) -> Tensor:
        """Whether F falls enough below the ceiling c; where that is infinite, whether the search was content."""
        if self.enough is None:
            return below(c, self.F + self.fall) | ~torch.isfinite(c)
        return below(c, self.F + self.fall) | (~torch.isfinite(c) & self.enough)

    def not_above(self, c: Tensor) -> Tensor:
        """Whether F is at most the ceiling c, or the search was content where that is infinite."""
        return below(c, self.F) | (~torch.isfinite(c) & self.enough)

    def unless(self, condition: Tensor, other: "Trial") -> "Trial":
        """This trial of the samples for which the condition does not hold, ``other`` of those for which it does."""
        enough = None if self.enough is None else torch.where(condition, other.enough, self.enough)
        return Trial(
            pick(condition, other.point, self.point),
            other.step,
            F=torch.where(condition, other.F, self.F),
            enough=enough,
        )


def below(bound: Tensor, F: Tensor) -> Tensor:
    """Whether F is at most a finite bound, up to rounding."""
    return torch.isfinite(bound) & (bound + rounding(bound) >= F)


def barzilai_borwein(move: Tensor, change: Tensor, otherwise: Tensor) -> Tensor:
    """Squared move over its curvature, of each sample, where that is positive."""
    curvature = inner(move, change)
    step = square(move) / curvature
    return pick((curvature > 0) & torch.isfinite(step) & (step > 0), step.view_as(otherwise), otherwise)


class Advance:
    """
    The iteration from x to the next x as :class:`NMAPG` defines it: extrapolate to y, take a step from y, and where the
    energy there is above the ceiling c, take one from x too. ``config=None`` takes the given steps.
    """

    def __init__(self, smooth: Term, proximable: Term, config: BacktrackingConfig | None, eta: float):
        self.smooth, self.proximable, self.config, self.eta = smooth, proximable, config, eta
        self.gamma = (DEFAULT if config is None else config).gamma
        self.monitored = smooth.explicit and proximable.explicit

    @torch.no_grad()
    def values(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The smooth term and the energy F at u."""
        f = self.smooth.value(u)
        return f, f + self.proximable.value(u)

    def energy(self, x: Tensor) -> Tensor | None:
        return self.values(x)[1] if self.monitored else None

    def __call__(self, x: Tensor, z: Tensor, past: History, step) -> tuple[Tensor, Tensor, History]:
        """The next x, z and history; the search begins with ``step`` where no curvature is known."""
        y, grad_y = self.extrapolated(x, z, past)
        step_y = self.first_step(y, grad_y, past, step)
        if not self.monitored:
            z = self.stepped(y, grad_y, step_y).point
            return z, z, past.after(x, y, grad_y)
        from_y = self.searched(y, grad_y, step_y, past.c, or_below_start=True)
        good = from_y.admitted(past.c)
        best, from_x = from_y, None
        if not good.all():
            grad_x = self.smooth.grad(x)
            from_x = self.searched(x, grad_x, self.first_step(x, grad_x, past, step), past.c)
            best = from_x.unless(good | (torch.isfinite(past.c) & (from_y.F <= from_x.F)), from_y)
            check_not_nan("the energy", best.F)
        if self.config is None:
            return best.point, from_y.point, past.after(x, y, grad_y).with_energy(best.F, self.eta)
        accepted = good | best.not_above(past.c)
        return self.settled(x, past.after(x, y, grad_y), from_y, from_x, best, accepted)

    def extrapolated(self, x: Tensor, z: Tensor, past: History) -> tuple[Tensor, Tensor]:
        """The point y and the gradient there; x where the gradient at y is not finite."""
        t, t_before = coefficient(past.t, x), coefficient(past.t_before, x)
        y = x + t_before / t * (z - x) + (t_before - 1) / t * (x - past.x_before)
        grad = self.smooth.grad(y)
        inside = torch.isfinite(grad).flatten(1).all(1)
        if not inside.all():
            y = pick(inside, y, x)
            grad = self.smooth.grad(y)
            check_finite("the gradient", grad)
        return y, grad

    def first_step(self, u: Tensor, grad: Tensor, past: History, step):
        """What the search from u begins with."""
        if self.config is None or past.y is None:
            return step
        return barzilai_borwein(u - past.y, grad - past.grad_y, step)

    def stepped(self, u: Tensor, grad: Tensor, step) -> Trial:
        """A proximal gradient step from u."""
        gamma = coefficient(step, u)
        point = self.proximable.prox(u - gamma * grad, gamma)
        if not self.monitored:
            return Trial(point, step)
        f, F = self.values(point)
        return Trial(point, step, f, F, self.gamma / flat(step) * square(point.detach() - u.detach()))

    def searched(self, u: Tensor, grad: Tensor, step, c: Tensor, or_below_start: bool = False) -> Trial:
        """
        The first step from u to below the ceiling c; with ``or_below_start``, and where c is infinite, also one to below
        F(u), or where F(u) is infinite to below the model of the smooth term that proximal gradient descent minimises.
        """
        if self.config is None:
            return self.stepped(u, grad, step)
        start = functools.cache(lambda: self.values(u))

        def enough(step: Tensor, trial: Trial) -> Tensor:
            ok = below(c, trial.F + trial.fall)
            asked = ~ok & (or_below_start | ~torch.isfinite(c))
            if not asked.any():
                return ok
            f_u, F_u = start()
            move = trial.point - u
            model = f_u + inner(grad, move) + square(move) / (2 * step) + rounding(f_u)
            return ok | asked & torch.where(torch.isfinite(F_u), below(F_u, trial.F + trial.fall), trial.f <= model)

        (trial,), step, ok = shorten(lambda step: (self.stepped(u, grad, step),), enough, step, self.config)
        return replace(trial, step=step, enough=ok)

    def settled(self, x, past: History, from_y: Trial, from_x: Trial | None, best: Trial, accepted: Tensor):
        """x stays where no step was accepted, and the acceleration starts anew where the search from y or from x failed."""
        x_new, F = pick(accepted, best.point, x), torch.where(accepted, best.F, past.F)
        going = accepted & from_y.enough
        step = from_y.step if from_x is None else pick(going, from_y.step, from_x.step)
        z = pick(going, from_y.point, x_new)
        past = replace(past.with_energy(F, self.eta, accepted), step=step, accepted=accepted)
        return x_new, z, past.restarted(x_new, ~going)
