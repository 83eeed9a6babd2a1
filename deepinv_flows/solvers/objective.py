"""Objectives of a batch of samples, which map z (B, ...) to values (B,) and gradients (B, ...)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import iteration
from .batch import finite, per_sample

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


def in_unit(value_and_grad: Objective, size: Tensor) -> tuple[Objective, Tensor]:
    """
    Divide the objective of each sample by a power of two near ``size``, which does not change any rounding.

    An objective whose ``size`` is zero stays as it is.

    :return: the scaled objective, and the powers (B,).
    """
    unit = torch.where(size > 0, torch.exp2(torch.log2(size).round()), torch.ones_like(size))

    def scaled(z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = value_and_grad(z)
        return value / unit, grad / per_sample(unit, grad)

    return scaled, unit


def check_still_finite(value_and_grad: Objective, z: Tensor, which: Tensor) -> None:
    """
    Check that the objective is still finite at z, an iterate accepted earlier, for samples whose last steps were all refused.

    :raises ValueError: when it is not; the message names the samples and the iteration.
    """
    if which.any() and (bad := which & ~finite(*value_and_grad(z))).any():
        raise ValueError(
            f"the objective of images {bad.nonzero().flatten().tolist()} of the batch is not finite any more{iteration()}"
        )
