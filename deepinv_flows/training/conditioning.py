"""The conditions of a batch reach the model that deepinv's Trainer trains as parameters of its physics."""

from collections.abc import Sequence

import torch
from deepinv.physics import Denoising, Physics
from torch import Tensor


class Conditioned(Denoising):
    """Denoising with parameters ``c0``, ``c1``, ..., the conditions of the batch, which do not change the measurements."""

    c: list[Tensor] | None = None

    def update(self, **params) -> None:
        self.c = [params[f"c{k}"] for k in range(len(params))] or None


def conditions_of(physics: Physics | None) -> list[Tensor] | None:
    """The conditions that the physics of a batch holds, if it holds any."""
    return physics.c if isinstance(physics, Conditioned) else None


def condition_list(c: Tensor | Sequence[Tensor] | None, number: int) -> list[Tensor]:
    """
    The conditions of ``number`` images, as a list of tensors.

    :raises TypeError: for anything but tensors.
    :raises ValueError: for a condition of another number of images.
    """
    conditions = [] if c is None else [c] if torch.is_tensor(c) else list(c)
    for condition in conditions:
        if not torch.is_tensor(condition):
            raise TypeError(f"expected conditions as tensors; got {type(condition).__name__}")
        if len(condition) != number:
            raise ValueError(f"expected a condition for each of {number} images; got shape {tuple(condition.shape)}")
    return conditions
