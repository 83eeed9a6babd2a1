"""Checks of what callers pass, with both sides in each message, and draws from the generator that a caller gives."""

import contextlib
import operator
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_counting: ContextVar[int | None] = ContextVar("iteration", default=None)
# deepinv's loops count iterations in `it`, and do not tell a prior the number
_DEEPINV_LOOPS = ("deepinv.optim.fixed_point", "deepinv.sampling.sampling")


@contextlib.contextmanager
def at_iteration(it: int) -> Iterator[None]:
    """Let the messages of errors that are raised inside name this iteration."""
    token = _counting.set(it)
    try:
        yield
    finally:
        _counting.reset(token)


def iteration() -> str:
    """The end of a message that is raised while an optimizer runs: the number of the iteration."""
    it = _counting.get()
    frame = sys._getframe(1) if it is None else None
    while frame is not None:
        if frame.f_globals.get("__name__") in _DEEPINV_LOOPS and "it" in frame.f_locals:
            it = frame.f_locals["it"]
            break
        frame = frame.f_back
    return "" if it is None else f" at iteration {it}"


@contextlib.contextmanager
def randomness(generator: torch.Generator | None, device: torch.device | None = None) -> Iterator[None]:
    """
    Let what draws from torch's global generator draw from ``generator``, unless it is ``None``.

    :param torch.device device: also replace the draws of the global generator of this device, if it is a CUDA device.
    """
    if generator is None:
        yield
        return
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        torch.random.default_generator.manual_seed(seed)
        for one in cuda:
            torch.cuda.set_rng_state(torch.Generator(one).manual_seed(seed).get_state(), one)
        yield


def transformed(*tensors: Tensor) -> bool:
    """Whether tensors belong to forward-mode differentiation or to a transform of ``torch.func``, where checks of values fail."""
    if forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None:
        return False  # neither is going on
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(wrapped(t) or forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """Leave autocast, if it is on."""
    known = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext()


def check_finite(what: str, *tensors: Tensor) -> None:
    """Refuse NaN and infinite entries, naming the iteration."""
    if not all(bool(torch.isfinite(t.detach()).all()) for t in tensors):
        raise ValueError(f"{what} holds NaN or infinite entries{iteration()}")


def check_input(x: Tensor, like: Tensor, patch_size: int, channels: int, images_only: bool) -> None:
    """Refuse all but finite batches of images (and of patches, unless ``images_only``) of the dtype and device of ``like``."""
    if not torch.is_tensor(x):
        raise TypeError(f"expected a tensor; got {type(x).__name__}")
    _check_shape(x, patch_size, channels, images_only)
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"expected dtype {like.dtype}, as the flow's weights; got {x.dtype} (x.float(), or prior.double())"
        )
    if x.device != like.device:
        raise ValueError(f"expected a tensor on {like.device}, as the flow's weights; got one on {x.device}")
    if not transformed(x) and not bool(torch.isfinite(x.detach()).all()):
        raise ValueError(
            f"the input of shape {tuple(x.shape)} holds NaN or infinite entries{iteration()}; "
            "if an optimizer passed it, its step size may be too large"
        )


def warn_outside(x: Tensor, image_range: tuple[float, float]) -> bool:
    """Warn of images that are further outside the range of the training images than this range is long; return if they are."""
    low, high = image_range
    least, most = (float(end) for end in x.detach().aminmax())
    outside = least < 2 * low - high or most > 2 * high - low
    if outside:
        warnings.warn(
            f"expected images in about [{low:.3g}, {high:.3g}], the range of the images that this prior was trained on; got "
            f"values in [{least:.3g}, {most:.3g}]: rescale the images, or train a prior in their unit",
            stacklevel=4,
        )
    return outside


def check_autograd(who: str) -> None:
    """Refuse to compute a gradient in inference mode."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"the gradient of {who} needs autograd, which torch.inference_mode rules out: use torch.no_grad"
        )


def positive_int(**named: Any) -> Any:
    """The argument as an ``int``, or a tuple of several arguments in their order; refused unless whole and at least 1."""
    for name, value in named.items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"expected {name} to be an integer >= 1; got {value!r}")
    values = tuple(operator.index(value) for value in named.values())
    return values if len(values) > 1 else values[0]


def check_positive(**values: float) -> None:
    """Refuse numbers that are not greater than 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not value > 0:
            raise ValueError(f"expected {name} > 0; got {value}")


def check_choice(name: str, value: Any, choices: Iterable) -> None:
    """Refuse a value that is not among the choices."""
    choices = list(choices)
    # 0 and 1 are equal to bools, and mean neither
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
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
        patches = "" if images_only else f". Patches are passed as (B, n, {channels}, {p}, {p})"
        of_patches = f" (patch dimension {dim})" if p > 1 else ""
        raise ValueError(f"expected {channels} channels{of_patches}; got image of shape {shape}{patches}")
    if x.ndim == 4 and min(shape[2:]) < p:
        raise ValueError(f"expected an image of at least {p} x {p} pixels, the size of a patch; got shape {shape}")
    if x.ndim == 3 and shape[2] != dim:
        raise ValueError(
            f"expected patches (B, n, {dim}) of dimension {channels} * {p}^2; got shape {shape}. "
            "One image (C, H, W) is passed as x[None]"
        )
    if x.ndim == 5 and shape[2:] != (channels, p, p):
        raise ValueError(f"expected patches (B, n, {channels}, {p}, {p}); got shape {shape}")
