r"""
Second derivatives of the patch potential by autograd on the flow's steps, with a graph for each chunk.

For flows whose second derivatives are not written out, for derivatives in the factors of the images, and for all orders from the
third on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import transformed
from ..solvers import per_sample
from .fused import recorded_nll

if TYPE_CHECKING:
    from .potential import PatchPotential

# the global scale of a GIN block does not have an effect
_UNUSED: Any = {"allow_unused": True, "materialize_grads": True}
_BATCHED = torch._C._dispatch_key_parse("Batched")


def gradients(potential: PatchPotential, x: Tensor, scale: Tensor, wanted: list[str] | tuple = (), handed=None):
    """The gradients of ``recorded.gradients``, by a function whose backward pass holds the graph of one chunk at a time."""
    return _Gradients.apply(x, scale, potential, tuple(wanted), handed, *potential.params.values())


def derivatives(
    potential: PatchPotential,
    x: Tensor,
    direction: Tensor,
    scale: Tensor,
    names: list[str] | tuple = (),
    image: bool = False,
) -> tuple[Tensor, ...]:
    """Partial derivatives of :math:`\\langle v, \\nabla_x \\sum_b s_b g(x_b) \\rangle` in the image, if asked, and in weights."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        x, values = x.view_as(x), [p.view_as(p) for p in potential.params.values()]
        potential = potential.on(tuple(values))
        targets = [*([x] if image else []), *(potential.params[name] for name in names)]
        found = gradients(potential, x, scale)[0]
        return torch.autograd.grad(found, targets, direction, create_graph=recording, **_UNUSED)


def direct(potential: PatchPotential, x: Tensor, scale: Tensor, wanted: list[str] | tuple):
    """The gradients by autograd alone: for a single chunk, and for batched factors, whose values cannot be checked."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        known = recording and (x.requires_grad or potential.trainable)
        leaf = x.detach().requires_grad_()
        if known:
            potential.asked.second = False  # until a backward pass comes
            leaf = _Unmodified.apply(x, potential.asked, *potential.params.values())
        aliases = {name: p.view_as(p) if recording else p.detach() for name, p in potential.params.items()}
        for name in wanted:
            aliases[name].requires_grad_()
        image, pixels = potential.index(torch.arange(len(potential.index), device=x.device))
        values = recorded_nll(potential.known_steps(aliases), leaf.reshape(-1)[pixels]) * potential.index.weight
        values = values.new_zeros(potential.index.batch).index_add(0, image, values)
    targets = [leaf, *(aliases[name] for name in wanted)]
    return torch.autograd.grad(values, targets, scale, create_graph=recording, **_UNUSED)


class _Unmodified(torch.autograd.Function):
    """
    The image itself; its backward pass notes that second derivatives were asked for.

    Steps hold copies of the weights. The weights are saved here, so that autograd refuses a backward pass after they were changed
    in place.
    """

    @staticmethod
    def forward(ctx, x, asked, *values):
        ctx.asked = asked
        ctx.save_for_backward(*values)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.asked.second = True
        return grad, None, *(None for _ in ctx.saved_tensors)


def _chunk_grads(potential: PatchPotential, steps: list, wanted: list, x: Tensor, scale: Tensor, number: Tensor):
    """What the patches with these numbers add to the gradients, with a graph of any order."""
    image, pixels = potential.index(number)
    patches = x.reshape(-1)[pixels]
    if not patches.requires_grad:
        patches.requires_grad_()
    value = (recorded_nll(steps, patches) * scale[image]).sum() * potential.index.weight
    patch_grad, *rest = torch.autograd.grad(value, [patches, *wanted], create_graph=True, **_UNUSED)
    grad = x.new_zeros(x.numel()).index_add(0, pixels.reshape(-1), patch_grad.reshape(-1))
    return grad.view_as(x), *rest


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, potential, wanted, handed, *values):
        ctx.potential, ctx.wanted = potential, wanted
        ctx.save_for_backward(x, scale, *values)
        if wanted:
            _, grad, weight_grads = potential.on(values).all_grads(x, wanted, scale)
            return grad, *weight_grads
        return (scaled(potential.on(values).value_and_grad(x)[1] if handed is None else handed, scale),)

    @staticmethod
    def backward(ctx, *directions):
        potential, recording = ctx.potential, torch.is_grad_enabled()
        potential.asked.second = True
        x, scale, *values = (
            t.view_as(t) if recording and t.requires_grad else t.detach().requires_grad_(k < 2 or t.requires_grad)
            for k, t in enumerate(ctx.saved_tensors)
        )
        params = dict(zip(potential.params, values))
        trainable = [name for name, p in params.items() if p.requires_grad]
        targets = [x, scale, *(params[name] for name in trainable)]
        with torch.enable_grad():
            aliases = {name: p.view_as(p) for name, p in params.items()}
            steps = potential.known_steps(aliases)
            wanted = [aliases[name] for name in ctx.wanted]

        def chunk(number, *directions):
            grads = _chunk_grads(potential, steps, wanted, x, scale, number)
            # all chunks share the graph from the weights to the steps, which is therefore retained
            return torch.autograd.grad(grads, targets, directions, True, create_graph=recording, **_UNUSED)

        total = None
        with torch.enable_grad():
            for number in potential.index.chunks(potential.recorded_chunk(x)):
                if recording and not trainable:
                    parts = checkpoint(chunk, number, *directions, use_reentrant=False, preserve_rng_state=False)
                else:
                    parts = chunk(number, *directions)
                total = parts if total is None else [a + b for a, b in zip(total, parts)]
        weight_grads = dict(zip(trainable, total[2:]))
        return *total[:2], None, None, None, *(weight_grads.get(name) for name in params)


def batched(scale: Tensor) -> bool:
    """Whether several backward passes are one, as with ``is_grads_batched`` in :func:`torch.autograd.grad`."""
    return transformed(scale) or torch._C._dispatch_keys(scale).has(_BATCHED)


def scaled(grad: Tensor, scale: Tensor) -> Tensor:
    return grad * per_sample(scale, grad)
