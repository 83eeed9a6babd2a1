"""Objectives of a batch of samples: values (B,) and gradients (B, ...) at z, (B, ...)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import iteration
from .batch import finite, per_sample

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


def in_unit(value_and_grad: Objective, size: Tensor) -> tuple[Objective, Tensor]:
    """
    The objective divided, for each sample, by a power of two near ``size``, so that no rounding changes; and these powers.

    Where ``size`` is zero the objective stays as it is.
    """
    unit = torch.where(size > 0, torch.exp2(torch.log2(size).round()), torch.ones_like(size))

    def scaled(z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = value_and_grad(z)
        return value / unit, grad / per_sample(unit, grad)

    return scaled, unit


def check_still_finite(value_and_grad: Objective, z: Tensor, which: Tensor) -> None:
    """
    Where every step was refused, ask whether the objective is still finite at z, which was accepted once.

    :raises ValueError: naming the samples where it is not, and the iteration.
    """
    if which.any() and (bad := which & ~finite(*value_and_grad(z))).any():
        raise ValueError(
            f"the objective of images {bad.nonzero().flatten().tolist()} of the batch is not finite any more{iteration()}"
        )
