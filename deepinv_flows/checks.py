"""Checks at the boundary, with both sides in the message."""

import operator
import sys

import torch
from torch import Tensor

# modules whose loops count in `it`
_LOOPS = (
    "deepinv.optim.fixed_point",
    "deepinv.sampling.sampling",
    "deepinv_flows.iterators.nmapg",
    "deepinv_flows.solvers.lbfgs",
)


def iteration() -> str:
    """What ends a message while an optimizer runs: which iteration it is, as deepinv does not tell a prior."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in _LOOPS and "it" in frame.f_locals:
            return f" at iteration {frame.f_locals['it']}"
        frame = frame.f_back
    return ""


def check_finite(what: str, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(t.detach()).all()) for t in tensors):
        raise ValueError(f"{what} holds NaN or infinite entries{iteration()}")


def check_input(x: Tensor, like: Tensor, patch_size: int, channels: int, images_only: bool) -> None:
    """Refuse what is no finite image batch (or, unless ``images_only``, patches) of the dtype and device of ``like``."""
    if not torch.is_tensor(x):
        raise TypeError(f"expected a tensor; got {type(x).__name__}")
    _check_shape(x, patch_size, channels, images_only)
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"expected dtype {like.dtype}, as the flow's weights; got {x.dtype} (x.float(), or prior.double())"
        )
    if x.device != like.device:
        raise ValueError(f"expected a tensor on {like.device}, as the flow's weights; got one on {x.device}")
    if not bool(torch.isfinite(x.detach()).all()):
        raise ValueError(
            f"the input of shape {tuple(x.shape)} holds NaN or infinite entries{iteration()}; "
            "if an optimizer passed it, its step size may be too large"
        )


def check_autograd(who: str) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"the gradient of {who} needs autograd, which torch.inference_mode rules out: use torch.no_grad"
        )


def positive_int(**named: int) -> int:
    ((name, value),) = named.items()
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"expected {name} to be an integer >= 1; got {value!r}")
    return operator.index(value)


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"expected {name} > 0; got {value}")


def check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, choices))}; got {value!r}")


def _check_shape(x: Tensor, patch_size: int, channels: int, images_only: bool) -> None:
    shape, p = tuple(x.shape), patch_size
    dim = channels * p**2
    if not x.is_floating_point():
        raise TypeError(f"expected a real floating-point tensor; got {x.dtype} of shape {shape}")
    if x.ndim not in ((4,) if images_only else (3, 4, 5)):
        patches = "" if images_only else f", or patches (B, n, {dim}) or (B, n, {channels}, {p}, {p})"
        raise ValueError(f"expected images (B, {channels}, H, W){patches}; got shape {shape}")
    if x.numel() == 0:
        raise ValueError(f"expected a non-empty batch; got shape {shape}")
    if x.ndim == 4 and shape[1] != channels:
        raise ValueError(
            f"expected {channels} channels (patch dimension {dim}); got image of shape {shape}. "
            f"Patches are passed as (B, n, {channels}, {p}, {p})"
        )
    if x.ndim == 4 and min(shape[2:]) < p:
        raise ValueError(f"expected an image of at least {p} x {p} pixels, the size of a patch; got shape {shape}")
    if x.ndim == 3 and shape[2] != dim:
        raise ValueError(
            f"expected patches (B, n, {dim}) of dimension {channels} * {p}^2; got shape {shape}. "
            "One image (C, H, W) is passed as x[None]"
        )
    if x.ndim == 5 and shape[2:] != (channels, p, p):
        raise ValueError(f"expected patches (B, n, {channels}, {p}, {p}); got shape {shape}")
