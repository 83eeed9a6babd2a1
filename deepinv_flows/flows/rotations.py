"""Rotations of the entries of patches and of the channels of images, as matrices."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import full_precision
from . import state

_ROTATION_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


def _not_orthogonal(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) - matrix.T @ matrix


def orthogonal(matrix: Tensor) -> Tensor:
    """Make a rotation that a shorter dtype has rounded orthogonal again, to the precision of its dtype (Newton-Schulz steps)."""
    tolerance = _ROTATION_ROUNDING.get(matrix.dtype, 1.0)
    for _ in range(0 if matrix.is_meta else 3):
        error = _not_orthogonal(matrix)
        if not tolerance < float(error.abs().max()) < 0.02:
            break
        matrix = matrix + 0.5 * matrix @ error
    return matrix


def check_rotation(name: str, matrix: Tensor, errors: list[str]) -> None:
    if not matrix.is_meta and not state.is_rotation(matrix):
        errors.append(f"{name}: is not a rotation (an average of different rotations?)")


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """Rotate the channels, under autocast too in the precision of the matrix, as x holds the finest details of the image."""
    context = full_precision(x.device.type)
    with context:
        return F.conv2d(x if isinstance(context, contextlib.nullcontext) else x.to(matrix.dtype), matrix)
