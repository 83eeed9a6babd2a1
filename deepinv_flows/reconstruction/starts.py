"""Where a reconstruction starts: of a few images, the one of least objective."""

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ..solvers import per_sample
from .objective import Constraint, Objective, parts


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
        found["A^T y"] = _scaled_adjoint(y, physics)
    try:
        found["A_dagger(y)"] = _pseudoinverse(y, physics)
    except Exception as error:  # a guess that any physics may fail to give
        reasons.append(f"A_dagger: {error}")
    batch = len(parts(y)[0])
    shape = next((tuple(x.shape) for x in found.values()), None if init is None else (batch, *init.shape[1:]))
    if torch.is_tensor(y) and y.is_floating_point() and shape in (None, tuple(y.shape)) and y.ndim == 4:
        found["y"] = y.detach()
    if init is not None:
        if init.shape[0] not in (1, batch) or (shape is not None and tuple(init.shape[1:]) != shape[1:]):
            raise ValueError(f"expected an initial image of shape {shape}; got {tuple(init.shape)}")
        found["init"] = init.detach().expand(batch, *init.shape[1:])
    if not found:
        raise ValueError(f"this physics has neither A_adjoint nor A_dagger ({'; '.join(reasons)}): pass init=...")
    return found


def _pseudoinverse(y, physics) -> Tensor:
    """``A_dagger(y)``; of measurements of size 1 where that is the same, as deepinv's solvers have absolute tolerances."""
    if not isinstance(physics, LinearPhysics) or not torch.is_tensor(y):
        return physics.A_dagger(y).detach()
    scale = y.abs().flatten(1).amax(1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x = physics.A_dagger(y / per_sample(scale, y)).detach()
    return per_sample(scale, x) * x


def _scaled_adjoint(y, physics) -> Tensor:
    """The multiple of A^T y whose measurements are nearest to y."""
    x = physics.A_adjoint(y).detach()
    Ax = physics.A(x)
    pairs = list(zip(parts(Ax), parts(y)))
    inner = torch.stack([(a.conj() * b).real.flatten(1).sum(1) for a, b in pairs]).sum(0)
    square = torch.stack([(a.conj() * a).real.flatten(1).sum(1) for a, _ in pairs]).sum(0)
    factor = torch.where(square > 0, inner / square, torch.zeros_like(square))
    return per_sample(factor, x) * x


@torch.no_grad()
def least(objective: Objective, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[str]]:
    """
    For each sample the candidate of least objective.

    :return: images, their objectives (B,), and which candidate each sample took.
    :raises ValueError: naming the samples for which the objective, or its gradient, is finite at no candidate.
    """
    names = list(found)
    constraint = objective.constraint
    images = [x if constraint is None else _feasible(constraint, x) for x in found.values()]
    values = torch.stack([_value(objective, x) for x in images])
    lowest, which = values.min(0)
    bad = torch.isinf(lowest)
    if bad.any():
        raise ValueError(
            f"the objective of images {bad.nonzero().flatten().tolist()} of the batch, or its gradient, is not finite "
            f"at any start ({', '.join(names)})"
        )
    x = images[0]
    for k, image in enumerate(images[1:], 1):
        x = torch.where(per_sample(which == k, x), image, x)
    return x.contiguous(), lowest, [names[k] for k in which.tolist()]


def _feasible(constraint: Constraint, x: Tensor) -> Tensor:
    outside = torch.isinf(constraint.value(x))
    return torch.where(per_sample(outside, x), constraint.prox(x, x.new_ones(())), x)


def _value(objective: Objective, x: Tensor) -> Tensor:
    """The objective, infinite where it or its gradient is not finite."""
    if not bool(torch.isfinite(x).all()):
        return torch.full_like(x.flatten(1)[:, 0], torch.inf)
    value = objective.value(x)
    return torch.where(objective.finite(x), value, torch.full_like(value, torch.inf))
