"""Arithmetic of batches in which each sample is a problem of its own: one number for each sample, of shape (B,)."""

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (B,) of tensors (B, ...); of complex tensors the real parts."""
    product = (a.conj() * b).real if a.is_complex() else a * b
    return product.flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Euclidean norms (B,) of tensors (B, ...), also of entries whose squares would underflow."""
    largest = a.flatten(1).abs().amax(1)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    return unit * torch.linalg.vector_norm(a.flatten(1) / unit[:, None], dim=1)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Numbers (B,), reshaped so that they multiply the samples of ``like``, (B, ...)."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def finite(value: Tensor, grad: Tensor) -> Tensor:
    """For which samples (B,) the value (B,) and the gradient (B, ...) are finite."""
    return torch.isfinite(value) & torch.isfinite(grad.flatten(1)).all(1)


def rounding(value: Tensor) -> Tensor:
    """By how much a value (B,) may differ, by rounding, from one that it equals in exact arithmetic."""
    return 10 * torch.finfo(value.dtype).eps * value.abs()
