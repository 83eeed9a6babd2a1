"""Where a reconstruction starts: of a few images, the one of least objective."""

from collections.abc import Callable

import torch
from deepinv.physics import DecomposablePhysics, LinearPhysics
from deepinv.physics.functional import conv2d, gaussian_blur
from torch import Tensor

from ..checks import randomness
from ..solvers import dot, per_sample
from .objective import Objective, parts

WIDTHS = 0.75, 1.5, 3.0  # in pixels, of the smoothing of a start


def candidates(y, physics, init: Tensor | None = None) -> dict[str, Tensor]:
    """
    Images to start from, by name; those that this physics does not have are left out.

    :param y: measurements.
    :param deepinv.physics.Physics physics: of the measurements.
    :param torch.Tensor init: the user's (B, C, H, W), or (1, C, H, W).
    :return: images (B, C, H, W).
    :raises ValueError: where the physics has none, and the user gave none.
    """
    found: dict[str, Tensor] = {}
    reasons = []
    if isinstance(physics, LinearPhysics):
        found["A^T y"] = _scaled(physics.A_adjoint(y).detach(), y, physics)
        try:
            found["regularised A_dagger(y)"] = _in_units(y, lambda y: _near_a_constant(y, physics))
        except Exception as error:  # a guess that any physics may fail to give
            reasons.append(f"prox_l2: {error}")
    # by conjugate gradients it takes as long as some iterations, and the image near a constant is as good a start
    if "regularised A_dagger(y)" not in found or isinstance(physics, DecomposablePhysics):
        try:
            found["A_dagger(y)"] = _pseudoinverse(y, physics)
        except Exception as error:  # a guess that any physics may fail to give
            reasons.append(f"A_dagger: {error}")
    batch = len(parts(y)[0])
    shape = next((tuple(x.shape) for x in found.values()), None if init is None else (batch, *init.shape[1:]))
    if shape is None and torch.is_tensor(y) and _is_an_image(y, physics):
        shape = tuple(y.shape)
    if torch.is_tensor(y) and y.is_floating_point() and y.ndim == 4 and shape == tuple(y.shape):
        found["y"] = y.detach()
    if init is not None:
        if init.shape[0] not in (1, batch) or (shape is not None and tuple(init.shape[1:]) != shape[1:]):
            raise ValueError(f"expected an initial image of shape {shape}; got {tuple(init.shape)}")
        found["init"] = init.detach().expand(batch, *init.shape[1:])
    if sharp := next((name for name in ("regularised A_dagger(y)", "A_dagger(y)", "y") if name in found), None):
        found |= _smoothed(sharp, found[sharp])
    if not found:
        raise ValueError(f"this physics has neither A_adjoint nor A_dagger ({'; '.join(reasons)}): pass init=...")
    return found


def _is_an_image(y: Tensor, physics) -> bool:
    try:
        return physics.A(y.detach()).shape == y.shape
    except Exception:  # the physics does not measure images of this shape
        return False


def _smoothed(name: str, x: Tensor) -> dict[str, Tensor]:
    """
    An image at coarser scales, from which a search comes to a lower minimum sooner.

    Far from the images that it has learned, such as at noise, a prior pulls in many directions; smooth images are nearer.
    """
    if x.ndim != 4 or not x.is_floating_point():
        return {}
    kernels = {width: gaussian_blur(sigma=(width, width), device=x.device).to(x.dtype) for width in WIDTHS}
    return {f"{name} smoothed by {w:g}": conv2d(x, kernel, padding="replicate") for w, kernel in kernels.items()}


def _pseudoinverse(y, physics) -> Tensor:
    """
    ``A_dagger(y)``; of measurements of size 1 where that is the same, and otherwise of one sample after another.

    Some of deepinv's begin at random, or scale a batch as a whole.
    """
    if isinstance(physics, LinearPhysics) or not torch.is_tensor(y):
        return _in_units(y, physics.A_dagger)
    found = []
    for one in y.split(1):
        with randomness(torch.Generator(), y.device):
            found.append(physics.A_dagger(one).detach())
        if len(found[-1]) != 1:  # the physics has parameters for each sample
            return physics.A_dagger(y).detach()
    return torch.cat(found)


def _in_units(y, solve: Callable) -> Tensor:
    """``solve(y)`` of measurements of size 1, as deepinv's solvers have absolute tolerances; a stack stays as it is."""
    if not torch.is_tensor(y):
        return solve(y).detach()
    scale = y.abs().flatten(1).amax(1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x = solve(y / per_sample(scale, y)).detach()
    return per_sample(scale, x) * x


def _scaled(x: Tensor, y, physics: LinearPhysics) -> Tensor:
    """The multiple of x whose measurements are nearest to y."""
    Ax = physics.A(x)
    inner, square = _inner(Ax, y), _inner(Ax, Ax)
    return per_sample(torch.where(square > 0, inner / square, torch.zeros_like(square)), x) * x


def _near_a_constant(y, physics: LinearPhysics) -> Tensor:
    """
    The image nearest to a constant that fits the measurements, up to a hundredth of the curvature of the data fidelity.

    Where nothing was measured, the constant that fits best is more plausible than 0.
    """
    back = physics.A_adjoint(y)
    flat, Ax = _scaled(torch.ones_like(back), y, physics), physics.A(back)
    curvature = _inner(Ax, Ax) / _inner(back, back)
    # nothing was measured of a blank image
    gamma = 100 / torch.where(curvature > 0, curvature, torch.ones_like(curvature))
    return physics.prox_l2(flat, y, gamma=per_sample(gamma, back))


def _inner(a, b) -> Tensor:
    """Inner products (B,) of images or measurements, stacked ones among them."""
    return torch.stack([dot(p, q) for p, q in zip(parts(a), parts(b))]).sum(0)


@torch.no_grad()
def least(objective: Objective, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[str]]:
    """
    For each sample the candidate of least objective.

    :return: images, their objectives (B,), and which candidate each sample took.
    :raises ValueError: naming the samples for which the objective, or its gradient, is finite at no candidate.
    """
    names, constraint = list(found), objective.constraint
    images = torch.stack([x if constraint is None else constraint.feasible(x) for x in found.values()])
    found_values: list[Tensor] = []
    for k, x in enumerate(images):  # of some physics several are the same
        same = next((j for j in range(k) if torch.equal(images[j], x)), None)
        found_values.append(_value(objective, x) if same is None else found_values[same])
    values = torch.stack(found_values)
    rows = torch.arange(images.shape[1], device=images.device)
    while True:
        lowest, which = values.min(0)
        if torch.isinf(lowest).any():
            raise ValueError(
                f"the objective of images {torch.isinf(lowest).nonzero().flatten().tolist()} of the batch, or its gradient, "
                f"is not finite at any start ({', '.join(names)})"
            )
        x = images[which, rows]
        good = objective.finite(x)
        if good.all():
            return x, lowest, [names[k] for k in which.tolist()]
        values[which[~good], rows[~good]] = torch.inf


def _value(objective: Objective, x: Tensor) -> Tensor:
    """The objective of each sample, infinite where that or the image is not finite."""
    good = torch.isfinite(x).flatten(1).all(1)
    value = objective.value(torch.where(per_sample(good, x), x, torch.zeros_like(x)))
    return value.nan_to_num(torch.inf, torch.inf, torch.inf).masked_fill(~good, torch.inf)
