"""The latents at which a search or a chain starts."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor

from ..checks import check_choice
from ..flows import Conditions, like_weights
from ..solvers import Objective, finite, per_sample
from .measurements import parts

if TYPE_CHECKING:
    from .map import LatentMAP

INITS = ("zero", "random", "pinv")


def known_init(init: str | Tensor | Callable) -> str | Tensor | Callable:
    """
    ``init`` itself, checked.

    :raises TypeError: for anything but a name, a tensor or a function.
    :raises ValueError: for an unknown name.
    """
    if torch.is_tensor(init) or callable(init):
        return init
    if not isinstance(init, str):
        raise TypeError(f"expected init to be a name, a tensor or a function; got {type(init).__name__}")
    check_choice("init", init, INITS)
    return init


def start(model: "LatentMAP", y: Tensor | TensorList, physics: Physics, init, c: Conditions) -> Tensor:
    """The latents (B, ...) at which the search for ``y`` starts."""
    batch, like = len(parts(y)[0]), like_weights(model.flow, parts(y)[0].real)
    if callable(init) or torch.is_tensor(init):
        z = init(y, physics) if callable(init) else init
        if not torch.is_tensor(z):
            raise TypeError(f"expected init to return a tensor of latents; got {type(z).__name__}")
        if len(z) not in (1, batch):
            raise ValueError(f"expected 1 or {batch} initial latents; got shape {tuple(z.shape)}")
        return z.detach().to(like).expand(batch, *z.shape[1:]).contiguous()
    if init == "pinv":
        if not model.images.invertible:
            raise ValueError(f'init="pinv" needs the inverse of G, which a {model.images.name} does not have')
        return model.images.encode(physics.A_dagger(y).real.to(like), c)
    shape = (batch, *_latent_shape(model, y, physics, like, c))
    if init == "zero":
        return like.new_zeros(shape)
    noise = torch.randn(shape, generator=model.generator, device=model.generator.device, dtype=like.dtype)
    return model.init_std * noise.to(like.device)


def _latent_shape(model, y, physics, like, c) -> Sequence[int]:
    known = model.images.latent_shape if model.latent_shape is None else model.latent_shape
    if known is not None:
        return known
    if not model.images.invertible:
        raise ValueError(f"expected latent_shape, as {model.images.name} is not a flow; got None")
    if not hasattr(physics, "A_adjoint"):
        raise ValueError(
            f"expected latent_shape, since {model.images.name} does not know the size of its images and "
            f"{type(physics).__name__} does not have an adjoint that would show it; got None"
        )
    x = physics.A_adjoint(y)
    return model.images.encode(torch.zeros_like(x.real).to(like), c).shape[1:]


def first_finite(value_and_grad: Objective, z: Tensor) -> Tensor:
    """
    z, with 0 in place of those samples where the objective is not finite; a warning names them.

    :raises ValueError: where the objective is not finite at 0 either.
    """
    good = finite(*value_and_grad(z))
    if good.all():
        return z
    z = torch.where(per_sample(good, z), z, torch.zeros_like(z))
    bad = (~finite(*value_and_grad(z))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the objective of images {bad} of the batch is finite neither where the search starts nor at z = 0"
        )
    moved = (~good).nonzero().flatten().tolist()
    warnings.warn(
        f"the objective of images {moved} of the batch is not finite at their start: they start at z = 0", stacklevel=5
    )
    return z
