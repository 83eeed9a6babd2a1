"""The checks of a training before it starts: errors and warnings."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from deepinv import Trainer
from torch import Tensor, nn

from ..checks import check_choice

# the options of deepinv's Trainer that a training sets itself
OWN = {"model", "physics", "optimizer", "scheduler", "losses", "train_dataloader", "eval_dataloader", "ckpt_pretrained"}


def check_options(options: dict[str, Any], own: set[str] | None = None) -> None:
    known = {field.name for field in fields(Trainer)} - OWN - (own or set())
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"expected options of deepinv.Trainer that this training does not set itself; got {unknown}")


def check_no_sizes(**sizes: int | None) -> None:
    given = {name: size for name, size in sizes.items() if size is not None}
    if given:
        raise ValueError(f"expected no sizes of a new prior beside prior, which has its own; got {given}")


def check_level(sigma: float, compile: bool) -> None:
    if not (isinstance(sigma, Real) and math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"expected a finite noise level sigma >= 0; got {sigma!r}")
    if sigma and compile:
        raise ValueError("expected compile=False with sigma: torch.compile does not support second derivatives")


def check_range(images: Iterable[Tensor], dequantise: float) -> None:
    if 0 < dequantise < 1 and max(float(image.abs().max()) for image in images) > 10:
        warnings.warn(
            f"dequantise={dequantise:.4g} is for images in [0, 1]; divide them by their range, or pass a width in their unit",
            stacklevel=3,
        )


def check_trainable(module: nn.Module, name: str) -> None:
    trainable = [p.dtype for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"the weights of the {name} are frozen; {name}.requires_grad_(True) makes them trainable")
    if trainable[0] in (torch.float16, torch.bfloat16):
        raise TypeError(f"expected weights of float32 or float64 to train; got {trainable[0]} ({name}.float())")


def check_objective(objective: str | None, levels: tuple[float, float] | None) -> None:
    check_choice("objective", objective, (None, "score", "likelihood"))
    if objective == "score" and levels is None:
        raise ValueError('expected sigma > 0 for objective="score", which learns to remove noise; got sigma = 0')


def autocast(mixed_precision: bool | str, device: str | torch.device) -> torch.autocast:
    """The context in which :class:`deepinv.Trainer` evaluates a model."""
    low = mixed_precision in ("bfloat16", "bf16", torch.bfloat16)
    dtype = torch.bfloat16 if low else torch.float16
    return torch.autocast(torch.device(device).type, dtype, enabled=bool(mixed_precision))
