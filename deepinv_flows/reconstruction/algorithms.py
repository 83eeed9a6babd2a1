r"""
How an objective is minimised, by name; each algorithm sees it in units of its start.

With images :math:`x = s u` and :math:`G(u) = F(s u) / k`, where s is a tenth of the norm of the start and k the norm of the
gradient of :math:`F(s u)` there, the first step of any of them has a length that suits, whatever unit images and measurements
are in. Where no proximity operator mixes pixels, s has, besides, a factor for each of them, from
:mod:`~deepinv_flows.reconstruction.metric`.
"""

import contextlib
import copy
import math
from collections.abc import Callable

import torch
from deepinv.optim import Prior
from torch import Tensor

from ..checks import at_iteration
from ..iterators import DavisYinIteration, IPianoIteration, nmapg
from ..patchnr import PatchNR
from ..solvers import lbfgs, per_sample
from .metric import metric
from .objective import Box, Constraint, Objective, PriorTerm, Term
from .progress import Finished, Progress, size

BESIDE = 1e-6  # of an image, a step to what lies beside it
FLAT = 1e-2  # of the gradient at the start: at a minimum it is less
LARGE = 500_000  # patches of an image from which on a random grid of them does for a step
GRID = 16  # patches for each that a random grid takes
LONGEST, ADAM_LONGEST = 500, 200  # iterations, unless others are asked for; the step of Adam falls to its end
ADAM_STEP = 0.12  # times the standard deviation of the start


class Scaled:
    """The objective in units of its start, as optimizers of torch, ours and deepinv's each want it."""

    explicit_prior = True

    def __init__(self, objective: Objective, x: Tensor):
        # the projection onto bounds is the same in any metric that is diagonal
        alone = all(isinstance(getattr(term, "prior", None), Box) for term in objective.proximable)
        self.objective, self.r = objective, metric(objective, x) if alone else torch.ones_like(x)
        s = 0.1 * size(x / self.r)
        self.s = torch.where(s > 0, s, torch.ones_like(s))
        k = self.s * size(self.r * objective.value_and_grad(x)[1])
        self.k = torch.where(k > 0, k, torch.ones_like(k))

    def image(self, u: Tensor) -> Tensor:
        return per_sample(self.s, u) * self.r * u

    def of(self, x: Tensor) -> Tensor:
        return x / (per_sample(self.s, x) * self.r)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self.objective.value_and_grad(self.image(u))
        return value / self.k, per_sample(self.s / self.k, u) * self.r * grad

    def smooth(self, u: Tensor, *args) -> Tensor:
        """Smooth terms, (B,); autograd finds the gradient that they say themselves."""
        if torch.is_grad_enabled() and u.requires_grad:
            return _Known.apply(u, self)
        with torch.no_grad():
            return torch.stack([term.value(self.image(u)) for term in self.objective.smooth]).sum(0) / self.k

    __call__ = smooth

    def grad(self, u: Tensor, *args) -> Tensor:
        return self.value_and_grad(u)[1]

    def watch(self, progress: Progress) -> Callable[[Tensor, Tensor], None]:
        """``progress`` as a callback that is shown u and G(u)."""
        return lambda u, value: progress(self.image(u), self.k * value)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, scaled):
        value, grad = scaled.value_and_grad(u)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx, weight):
        (grad,) = ctx.saved_tensors
        return per_sample(weight, grad) * grad, None


class ScaledTerm(Prior):
    """A proximable term in these units, as a prior of deepinv's."""

    def __init__(self, scaled: Scaled, term):
        super().__init__()
        self.explicit_prior, self.scaled, self.term = True, scaled, term

    def fn(self, u: Tensor, *args, **kwargs) -> Tensor:
        return self.term.value(self.scaled.image(u)) / self.scaled.k

    def prox(self, u: Tensor, *args, gamma: float | Tensor = 1.0, **kwargs) -> Tensor:
        gamma = torch.as_tensor(gamma, dtype=u.dtype, device=u.device) * per_sample(self.scaled.s**2 / self.scaled.k, u)
        return self.scaled.of(self.term.prox(self.scaled.image(u), gamma))


def by_lbfgs(objective: Objective, x: Tensor, progress: Progress) -> None:
    scaled = Scaled(objective, x)
    _check_beside(
        scaled, lbfgs(scaled.value_and_grad, scaled.of(x), progress.max_iter, callback=scaled.watch(progress))
    )


def _check_beside(scaled: Scaled, u: Tensor) -> None:
    """Where every step was refused there is a minimum, or there are no numbers beside u, which is an error."""
    value, grad = scaled.value_and_grad(u)
    length = size(grad)
    step = BESIDE * size(u) / length.clamp_min(torch.finfo(u.dtype).tiny)
    beside, _ = scaled.value_and_grad(u - per_sample(step, u) * grad)
    if (broken := beside.isnan() & (length > FLAT)).any():
        raise ValueError(
            f"the objective of images {broken.nonzero().flatten().tolist()} of the batch is NaN beside the iterate at which the "
            f"search ended, of objective {(scaled.k * value)[broken].tolist()}"
        )


def by_nmapg(objective: Objective, x: Tensor, progress: Progress) -> None:
    scaled = Scaled(objective, x)
    prior = ScaledTerm(scaled, objective.proximable[0]) if objective.proximable else None
    nmapg(
        scaled.smooth,
        scaled.of(x),
        prior,
        max_iter=progress.max_iter,
        tol=0.0,
        callback=scaled.watch(progress),
        verbose=False,
    )


def by_ipiano(objective: Objective, x: Tensor, progress: Progress) -> None:
    scaled = Scaled(objective, x)
    prior = ScaledTerm(scaled, objective.proximable[0]) if objective.proximable else None
    params = {"stepsize": 1.0, "lambda": 1.0, "inertia": 0.8, "g_param": None}
    _iterate(IPianoIteration(has_cost=False), scaled, prior, params, x, progress)


def by_davis_yin(objective: Objective, x: Tensor, progress: Progress) -> None:
    scaled = Scaled(objective, x)
    first, *second = [ScaledTerm(scaled, term) for term in objective.proximable]
    params = {"stepsize": 1 / _curvature(scaled, scaled.of(x)), "lambda": 1.0, "beta": 1.0, "g_param": None}
    if second:
        params["prior_2"] = second[0]
    _iterate(DavisYinIteration(has_cost=False), scaled, first, params, x, progress)


def _iterate(iteration, scaled: Scaled, prior, params: dict, x: Tensor, progress: Progress) -> None:
    """Iterations of deepinv's kind; the images that are looked at meet the constraint."""
    X, constraint = {"est": (scaled.of(x), scaled.of(x))}, scaled.objective.constraint
    for it in range(progress.max_iter):
        with at_iteration(it):
            X = iteration(X, scaled, prior, params, None, None)
        x = scaled.image(X["est"][0])
        x = x if constraint is None else constraint.feasible(x)
        progress(x, scaled.objective.value(x))


def _curvature(scaled: Scaled, u: Tensor, steps: int = 20) -> Tensor:
    """An upper bound (B, 1, ...) on the curvature of a quadratic term, by the power method."""
    v, grad = torch.ones_like(u) + u, scaled.grad(u)
    length = size(v)
    for _ in range(steps):
        v = v / per_sample(size(v).clamp_min(torch.finfo(v.dtype).tiny), v)
        v = scaled.grad(u + v) - grad
        length = size(v)
    return per_sample(1.1 * length.clamp_min(torch.finfo(v.dtype).tiny), u)


def by_adam(objective: Objective, x: Tensor, progress: Progress) -> None:
    """On random grids of patches, if there are many; the objective on all of them is looked at ten times on the way."""
    constraint, steps = objective.constraint, progress.max_iter
    terms: list[Term] = objective.smooth
    count = _patches(objective.term.prior, x)
    if thinned := count > LARGE and objective.term.prior.n_patches == -1:
        terms = [objective.data, _on_a_grid(objective.term, count // GRID)]
    x, spread, looks = x.clone(), _spread(x), max(1, steps // 10)
    optimizer, progress.tol = torch.optim.Adam([x], lr=1.0), 0.0  # the step has to fall to its end
    unit = per_sample(size(objective.value_and_grad(x)[1]) / x[0].numel() ** 0.5, x)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    for it in range(steps):
        x.grad = torch.stack([term.value_and_grad(x)[1] for term in terms]).sum(0) / unit
        before = x.clone()
        optimizer.step()
        step = ADAM_STEP * (0.01 + 0.99 * math.cos(math.pi * it / steps / 2) ** 2) * spread
        x.copy_(before + per_sample(step, x) * (x - before))
        if constraint is not None:
            x.copy_(_projected(x, constraint))
        unknown = thinned and (it + 1) % looks and it + 1 < steps
        progress(x.clone(), torch.full_like(progress.value, torch.inf) if unknown else objective.value(x))


def _projected(x: Tensor, constraint: Constraint) -> Tensor:
    value = constraint.value(x)
    if bool((torch.isfinite(value) & (value != 0)).any()):
        raise ValueError(
            f"solver='adam' takes a constraint that is 0 or infinite; {type(constraint.prior).__name__} is a second prior"
        )
    return constraint.feasible(x)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each image; the size of its entries where it is constant."""
    rms = size(x) / x[0].numel() ** 0.5
    spread = x.flatten(1).std(1)
    spread = torch.where(spread > 1e-3 * rms, spread, rms)
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def _on_a_grid(term: PriorTerm, n_patches: int) -> PriorTerm:
    """The term on random grids of patches; the prior's weights are shared."""
    term = copy.copy(term)
    term.prior = copy.copy(term.prior)
    term.prior.n_patches, term.prior.subset = n_patches, "grid"
    return term


def _patches(prior: Prior, x: Tensor) -> int:
    if not isinstance(prior, PatchNR):
        return 0
    height, width = (side - prior.patch_size + 1 for side in x.shape[2:])
    return height * width


ALGORITHMS = {
    "lbfgs": by_lbfgs,
    "nmapg": by_nmapg,
    "ipiano": by_ipiano,
    "davis_yin": by_davis_yin,
    "adam": by_adam,
}
NEEDS_GRADIENT = ("lbfgs", "adam")  # of the prior


def longest(name: str) -> int:
    """The bound on the iterations of an algorithm for which none is given."""
    return ADAM_LONGEST if name == "adam" else LONGEST


def automatic(objective: Objective, x: Tensor) -> str:
    """The algorithm that the terms allow."""
    if len(objective.proximable) > 1:
        return "davis_yin"
    if not objective.proximable and _patches(objective.term.prior, x) > LARGE:
        return "adam"
    return "nmapg" if objective.proximable else "lbfgs"


@torch.no_grad()
def minimise(algorithm: str, objective: Objective, x: Tensor, progress: Progress) -> Tensor:
    """The best iterate of each sample by one of :data:`ALGORITHMS`; its objective is never above that of x."""
    with contextlib.suppress(Finished):
        ALGORITHMS[algorithm](objective, x, progress)
    value = objective.value(progress.x)  # in their own units, where rounding may differ
    better = value <= progress.first
    progress.value = torch.where(better, value, progress.first)
    return torch.where(per_sample(better, x), progress.x, x)
