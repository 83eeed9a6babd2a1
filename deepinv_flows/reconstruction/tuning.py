"""Finding the weight of a prior by reconstructing: for an image to come by its measurements, or beforehand by clean images."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from deepinv.loss.metric import PSNR
from deepinv.optim import Prior
from torch import Tensor, nn

from ..checks import check_positive, randomness
from ..console import Console
from ..patchnr import PatchNR
from .choices import checked_weight
from .objective import Objective, data_term, frozen
from .progress import Progress
from .search import highest, root
from .starts import candidates
from .strength import (
    balance,
    by_rule,
    check_sure,
    deviation,
    dimension,
    discrepancy,
    signs,
    small_shift,
    sure,
)

if TYPE_CHECKING:
    from .map import MAP

SEARCH = 0.75  # of the time, the rest of which is for the reconstruction that tells how it went
STRENGTHS, ITERATIONS = 6, 100  # of a search, and of a reconstruction, that the time should last for
WORSE = 1e-2  # relative, of a metric from which on stopping early is better for an image


def weight(model: "MAP", y, physics, found: dict[str, Tensor], update: Callable[..., None]) -> tuple[Tensor, str]:
    """The weight (B,) for some measurements, and how it was found; a search adds its last images to ``found``."""
    x = next(iter(found.values()))
    checked_weight(model.lambda_reg)  # a user may have set it
    if not isinstance(model.lambda_reg, str):
        return model.weight_for(x), "tuned" if is_tuned(model) else "given"
    if model.lambda_reg == "rule":
        return by_rule(model.prior, model.data_fidelity, y, physics, x), "rule"
    reconstruct = _warm(model, y, physics, found, update)
    start, by_a_rule = first_guess(model, y, physics, x)
    generator = torch.Generator().manual_seed(0)
    if model.lambda_reg == "discrepancy":
        discrepancy(physics, y, x)  # is the noise known?
        excess = _excess(model, y, physics, reconstruct, signs(y, generator), update)
        return _consistent(excess, start, deviation(physics, y, x), by_a_rule), "discrepancy"
    prior = frozen(model.prior)
    check_sure(prior, model.constraint, model.data_fidelity, y, physics, x, generator)
    probe = signs(y, generator)

    def quality(value: Tensor) -> Tensor:
        return -sure(model.data_fidelity, prior.grad, value, y, physics, reconstruct(value), probe)

    return highest(quality, start)[0], "sure"


def _excess(model: "MAP", y, physics, reconstruct: Callable, probe: Tensor, update: Callable[..., None]):
    """:func:`discrepancy` of the reconstruction by a weight."""

    def excess(value: Tensor) -> Tensor:
        x = reconstruct(value)
        shift = small_shift(physics, y, x, probe)
        moved = model.solve(y + shift, physics, value, {"that of the measurements": x}, update=update)[0]
        return discrepancy(physics, y, x, shift, moved)

    return excess


def _consistent(excess: Callable[[Tensor], Tensor], start: Tensor, deviation: Tensor, near: bool) -> Tensor:
    """
    Of the weights whose excess is 0 up to two deviations the nearest to the start; unless ``near``, that of one deviation.

    A strong blur has nearly no excess at any small weight, so that an excess of 0 would tell nothing there.
    """
    target = list[Tensor]()

    def beyond(value: Tensor) -> Tensor:
        found = excess(value)
        if not target:
            target.append(torch.clamp(found, -2 * deviation, 2 * deviation) if near else deviation)
        return found - target[0]

    return root(beyond, start, min(0.02, float(deviation.min()) / 2))


def is_tuned(model: "MAP") -> bool:
    """Whether the weight is the one that :func:`tune` found, not one that was set since."""
    return bool(model.tuned) and isinstance(model.lambda_reg, float) and model.lambda_reg == model.tuned["lambda_reg"]


def told(model: "MAP", reason: str, x: Tensor) -> str:
    """How the weight was found, in words."""
    grown = dimension(model.prior, x) / model.tuned["dimension"] if reason == "tuned" else 1.0
    return reason if grown == 1 else f"{reason} on {1 / grown:.3g} times as many patches"


def first_guess(model: "MAP", y, physics, x: Tensor) -> tuple[Tensor, bool]:
    """Where a search for the weight begins, (B,), and whether by the rule."""
    try:
        return by_rule(model.prior, model.data_fidelity, y, physics, x), True
    except ValueError:  # none for this prior, or this noise
        return balance(frozen(model.prior).grad, data_term(model.data_fidelity, y, physics), x), False


def _warm(model: "MAP", y, physics, found: dict[str, Tensor], update: Callable[..., None]):
    """Reconstruction by weight, each from where the last ended if that is better than the other starts."""

    name = list[str]()

    def reconstruct(value: Tensor) -> Tensor:
        x, _, _, start = model.solve(y, physics, value, found, update=update)
        if not name:
            name.append(f"{' and '.join(sorted(set(start)))} by way of other weights")
        found[name[0]] = x
        return x

    return reconstruct


def tune(model: "MAP", images, physics, metric: nn.Module | None, n: int, max_seconds, generator) -> None:
    """See :meth:`deepinv_flows.MAP.tune`."""
    x, metric, clock = _images(images, n), PSNR() if metric is None else metric, _Clock(max_seconds)
    sign, bound = _sign(metric, x), _restored_bound(model)
    with torch.no_grad(), Console("MAP.tune", None, model.verbose) as console:
        y = simulated(x, physics, generator)
        found = candidates(y, physics)
        start = first_guess(model, y, physics, x)[0].log().mean().exp().reshape(1)

        def solve(value: Tensor, seconds: float, **options) -> tuple[Tensor, Progress, str, list[str]]:
            # from the starts that images to come have: that of the last weight may lead to another minimum
            options |= dict(update=console.update, max_seconds=seconds)
            return model.solve(y, physics, value.expand(len(x)), found, **options)

        tried, prior = list[list[float]](), _affordable(model, y, physics, x, start.expand(len(x)), clock)

        def quality(value: Tensor) -> Tensor:
            seconds = min(clock.left(SEARCH), SEARCH * clock.bound / STRENGTHS)  # none takes the time of the others
            score = metric(solve(value, seconds, prior=prior)[0], x).mean().reshape(1)
            if clock.left(SEARCH) <= 0 and tried:  # cut short, and so not comparable
                return torch.full_like(score, torch.nan)
            tried.append([float(f"{float(value):.6g}"), round(float(score), 6)])
            console.milestone(f"lambda_reg {float(value):.4g}, {type(metric).__name__} {float(score):.4g}")
            return sign * score

        best = highest(quality, start, lambda: clock.left(SEARCH) > 0)[0]
        _, progress, name, _ = solve(best, clock.left(), x_gt=x, metric=metric)
        iterations, score = _stop(progress.metrics["psnr"], sign, cut=name != "adam")
        early = iterations < progress.iterations
        model.lambda_reg, model.max_iter = float(best), iterations if early else bound
        model.tuned = {
            "lambda_reg": float(best),
            "dimension": dimension(model.prior, x),
            "metric": type(metric).__name__,
            "score": score,
            "iterations": iterations,
            "images": len(x),
            "seconds": round(clock.seconds, 1),
            "tried": sorted(tried),
            **({} if prior is model.prior else {"stride": prior.stride}) | ({"bound": bound} if early else {}),
        }
        console.result = _said(model.tuned, early, clock.left(SEARCH) <= 0)


def _sign(metric: nn.Module, x: Tensor) -> float:
    """What to multiply a metric by, so that more is better; it is tried on the true images first."""
    if not hasattr(metric, "lower_better"):
        raise TypeError(
            f"expected a metric of deepinv's, which knows whether lower is better; got {type(metric).__name__}"
        )
    if (known := metric(x, x)).is_complex() or known.numel() != len(x):
        raise ValueError(
            f"expected a metric with a real value for each of {len(x)} images, so without a reduction; got {known.dtype} of "
            f"shape {tuple(known.shape)}"
        )
    return -1.0 if metric.lower_better or getattr(metric, "train_loss", False) else 1.0


def _restored_bound(model: "MAP") -> int | None:
    """Put the user's bound on the iterations in place of an early stop that the last tuning found."""
    if "bound" in model.tuned and model.max_iter == model.tuned["iterations"]:
        model.max_iter = model.tuned["bound"]
    return model.max_iter


def _affordable(model: "MAP", y, physics, x: Tensor, weight: Tensor, clock: "_Clock") -> Prior:
    """
    What strengths are compared by: the prior, on every other patch where the time would not last for all of them.

    A search that is cut short ends at the best of two or three strengths that lie far apart, which costs more.
    """
    prior, seconds = model.prior, clock.left(SEARCH)
    whole = isinstance(prior, PatchNR) and (prior.stride, prior.n_patches) == (1, -1)
    if math.isinf(seconds) or not whole or prior.patch_size < 4:
        return prior
    objective = Objective(data_term(model.data_fidelity, y, physics), prior, weight, None, True)
    objective.value_and_grad(x)  # the first one takes longer
    began = time.monotonic()
    objective.value_and_grad(x.clone())
    if STRENGTHS * min(ITERATIONS, model.max_iter or ITERATIONS) * (time.monotonic() - began) <= seconds:
        return prior
    coarse = copy.copy(prior)
    coarse.stride = 2
    return coarse


class _Clock:
    """The time since it was made, and what is left of a bound."""

    def __init__(self, max_seconds: float | None):
        if max_seconds is not None:
            check_positive(max_seconds=max_seconds)
        self.began, self.bound = time.monotonic(), math.inf if max_seconds is None else max_seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def left(self, share: float = 1.0) -> float:
        return share * self.bound - self.seconds


def _said(tuned: dict, early: bool, late: bool) -> str:
    patches = " by every other patch, to save time," if "stride" in tuned else ""
    stop = ", where reconstructions will stop" if early else ""
    up = "; the time was up, and more max_seconds may find a better one" if late else ""
    return (
        f"lambda_reg {tuned['lambda_reg']:.4g} of {len(tuned['tried'])} tried{patches} on {tuned['images']} images, "
        f"{tuned['metric']} {tuned['score']:.4g} after {tuned['iterations']} iterations{stop}{up}"
    )


def _stop(histories: list[list[float]], sign: float, cut: bool = True) -> tuple[int, float]:
    """
    After how many iterations the mean metric is best, and its value there.

    That is the last, unless it is clearly worse for each of two images or more: what one image gains, the next may lose. So it
    is if steps follow from the number of iterations, which cannot be ``cut`` then.
    """
    means = [sum(values) / len(values) for values in zip(*histories)]
    last = len(means) - 1
    best = max(range(min(1, last), len(means)), key=lambda k: sign * means[k])
    worse = [sign * (values[best] - values[last]) > WORSE * abs(values[best]) for values in histories]
    if not cut or len(worse) < 2 or not all(worse):
        best = last
    return best, means[best]


def simulated(x: Tensor, physics, generator: torch.Generator | None):
    """Measurements of images; neither torch's random state nor that of the physics moves."""
    with kept(physics), randomness(torch.Generator() if generator is None else generator, x.device):
        return physics(x)


@contextlib.contextmanager
def kept(physics: nn.Module) -> Iterator[list[torch.Generator]]:
    """The random generators inside, which are as before at the end; deepinv's noise replaces its own when it is called."""
    held = [(vars(module), name, value) for module in physics.modules() for name, value in vars(module).items()]
    held = [(owner, name, value) for owner, name, value in held if isinstance(value, torch.Generator)]
    states = [value.get_state() for *_, value in held]
    try:
        yield [value for *_, value in held]
    finally:
        for (owner, name, value), state in zip(held, states):
            owner[name] = value
            value.set_state(state)


def _images(images: Tensor | Iterable[Tensor], n: int) -> Tensor:
    found = list(images)
    shapes = {tuple(getattr(image, "shape", ())) for image in found}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ValueError(
            f"expected clean images (B, C, H, W), or a list of (C, H, W) of one size; got {sorted(shapes)}"
        )
    x = torch.stack([found[k] for k in torch.linspace(0, len(found) - 1, min(n, len(found))).long().tolist()])
    if not (x.is_floating_point() or x.is_complex()) or not bool(torch.isfinite(x).all()):
        raise ValueError(f"expected finite floating-point images; got {x.dtype} of shape {tuple(x.shape)}")
    return x.detach()
