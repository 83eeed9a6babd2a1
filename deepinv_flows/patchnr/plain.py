"""
The patch potential of any flow, by autograd in the flow's own parameters, chunk by chunk.

Arguments are those of ``PatchPotential`` in :mod:`deepinv_flows.patchnr.potential`, and ``size``, the number of patches in a
chunk.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from ..flows import evaluate, like_weights, nll
from .patches import PatchIndex


def value(flow: nn.Module, x: Tensor, index: PatchIndex, size: int) -> Tensor:
    """Value (B,) with a graph; if there are several chunks, each is computed again in the backward pass."""
    check_independent(flow)

    def chunk(flat, number):
        image, pixels = index(number)
        values = nll(flow, flat.index_select(0, pixels.reshape(-1)).view_as(pixels), constant=False)
        return values if index.per_image == 1 else values.new_zeros(index.batch).index_add(0, image, values)

    flat = x.reshape(-1)
    if len(index) <= size:
        total = chunk(flat, next(index.chunks(size)))
    else:
        parts = [checkpoint(chunk, flat, number, use_reentrant=False) for number in index.chunks(size)]
        total = torch.cat(parts) if index.per_image == 1 else sum(parts)
    return (total * index.weight).to(x.dtype)  # under autocast a flow may return another dtype


def grad(flow: nn.Module, x: Tensor, index: PatchIndex, size: int, scale: Tensor | None = None) -> Tensor:
    """Gradient in the image of the sum of the values, or of their sum with the weights ``scale`` (B,), with a graph."""
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        values = value(flow, leaf, index, size)
        return torch.autograd.grad(
            values, leaf, torch.ones_like(values) if scale is None else scale, create_graph=True
        )[0]


def value_and_grad(flow: nn.Module, x: Tensor, index: PatchIndex, size: int, image: bool = True):
    """Value (B,) and, if ``image``, the gradient in the image, without a graph."""
    check_independent(flow)
    flat = x.detach().reshape(-1)
    total = torch.zeros(index.batch, dtype=torch.float64 if x.device.type != "mps" else x.dtype, device=x.device)
    grad = torch.zeros_like(flat) if image else None
    for numbers in index.chunks(size):
        number, pixels = index(numbers)
        with torch.set_grad_enabled(image), own_graph():
            patches = flat[pixels].requires_grad_(image)
            values = nll(flow, patches, constant=False)
            if grad is not None:
                (patch_grad,) = torch.autograd.grad(values.sum(), patches)
                grad.index_add_(0, pixels.reshape(-1), patch_grad.reshape(-1))
        total.index_add_(0, number, values.detach().to(total.dtype))
    return (total * index.weight).to(x.dtype), None if grad is None else grad.mul_(index.weight).view_as(x)


def own_graph() -> contextlib.AbstractContextManager:
    """Let graphs that are built and used inside keep their tensors, also if a checkpoint around them would drop these."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def check_independent(flow: nn.Module) -> None:
    """Refuse a flow in which the value of a patch depends on the other patches of its chunk."""
    for name, module in flow.named_modules():
        batch_norm = _is_batch_norm(type(module))  # type: ignore[arg-type]
        if batch_norm and (module.training or getattr(module, "running_mean", True) is None):
            raise ValueError(
                f"expected a flow that evaluates each patch on its own; {type(module).__name__} ({name!r}) in training mode "
                "uses statistics of all patches that are evaluated together: call .eval() on the prior"
                if module.training
                else f"expected a flow that evaluates each patch on its own; {type(module).__name__} ({name!r}) does "
                "not keep running statistics: make it with track_running_stats=True"
            )


@functools.lru_cache(maxsize=256)
def _is_batch_norm(kind) -> bool:
    return any("BatchNorm" in ancestor.__name__ for ancestor in kind.__mro__)


def random_state(x: Tensor) -> tuple:
    """The states of torch's global generators, including those of the device of x."""
    return torch.get_rng_state(), *get_device_states(x)


@contextlib.contextmanager
def replayed(x: Tensor, state: tuple) -> Iterator[None]:
    """Draw what is random in a flow, such as dropout, from torch's generators in these states."""
    cpu, devices, states = state
    with torch.random.fork_rng(devices, device_type=x.device.type if devices else "cuda"):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def check_dimension(flow: nn.Module, dim: int, because: str) -> None:
    """Refuse a flow that fails on vectors of this dimension."""
    try:
        # a copy, as some flows initialise themselves on their first batch
        flow = copy.deepcopy(flow).eval()
    except Exception:  # not every module can be copied
        return
    like = like_weights(flow)
    x = torch.linspace(0, 1, 4 * dim, dtype=like.dtype, device=like.device).view(4, dim)
    with torch.no_grad():
        try:
            evaluate(flow, x)
        except Exception as error:
            raise ValueError(
                f"expected a flow on patches of dimension {dim} ({because}); the one given fails on a tensor of shape "
                f"(4, {dim}): {error}"
            ) from error
