r"""
The patch potential as autograd functions, whose gradients the potential itself computes.

The value is recorded as the sum of two functions, one of the image and one (zero) of the weights, so that a backward pass
computes what it is asked for and nothing else. The forward pass computes the gradient in the image together with the value, if
the image asks for a gradient, and the gradients in the weights too, if the backward pass of the last call asked for them. The
latter hold if all images have the same factor in the loss, as in a sum or a mean. Otherwise the backward pass computes both
gradients together, and the next forward pass leaves them to it.

A backward pass with a graph records another function, the gradient. The backward pass of that is a Hessian-vector product, by
autograd on the flow's steps, with a graph for each chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import transformed
from ..solvers import per_sample
from . import plain
from .fused import recorded_nll

if TYPE_CHECKING:
    from .potential import PatchPotential

# the global scale of a GIN block does not have an effect
_UNUSED: Any = {"allow_unused": True, "materialize_grads": True}
KEPT = 2**14  # patches whose graph, of 0.2 MB each in the default flow, may be kept until the backward pass
_BATCHED = torch._C._dispatch_key_parse("Batched")


def value(potential: PatchPotential, x: Tensor, steps: list | None) -> Tensor:
    """The value (B,), differentiable in the image and, if the steps are known, in the weights that ask for a gradient."""
    trainable = [name for name, p in potential.params.items() if p.requires_grad]
    asked = potential.asked
    speculate, later = bool(trainable) and asked.weights, bool(trainable) and asked.unequal
    if trainable:  # an evaluation with frozen weights in between says nothing of the next training step
        asked.weights = asked.unequal = False
    grad: Tensor | None
    weight_grads, both = None, dict[str, Any]()
    random = plain.random_state(x) if steps is None else None
    if speculate:
        found, grad, weight_grads = potential.all_grads(x, trainable)
    else:
        found, grad = potential.constants(x, steps, image=x.requires_grad and not later)
    if x.requires_grad:
        found = _OfImage.apply(x, potential, found, grad, random, both)
    if trainable:  # made last, so that its backward pass is first
        found = found + _OfWeights.apply(potential, [x], weight_grads, trainable, both, *potential.params.values())
    return found


def gradients(potential: PatchPotential, x: Tensor, scale: Tensor, wanted: list[str] | tuple = (), handed=None):
    r"""
    Gradients of :math:`\sum_b s_b g(x_b)` in the image and in the ``wanted`` weights, differentiable in all of them.

    They are partial derivatives, also if x and the factors s (B,) depend on the weights. ``handed`` is the gradient in the image
    for s = 1, if it is known already.
    """
    expected = x.requires_grad or (potential.trainable and potential.asked.second)
    few = handed is None and expected and len(potential.index) <= min(potential.recorded_chunk(x), KEPT)
    if _batched(scale) or (few and torch.is_grad_enabled()):
        return _direct_gradients(potential, x, scale, wanted)
    return _Gradients.apply(x, scale, potential, tuple(wanted), handed, *potential.params.values())


class _OfImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, potential, value, grad, random, both):
        ctx.potential, ctx.random, ctx.both = potential, random, both
        # of one shape whether known or not, for torch's checkpoints, which compare what is saved each time
        grad = x.new_full((), torch.nan).expand_as(x) if grad is None else grad
        # autograd refuses a backward pass after these were changed in place
        ctx.save_for_backward(x, grad, *potential.params.values())
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        x, grad, *values = ctx.saved_tensors
        potential, grad = ctx.potential, None if bool(grad.flatten()[0].isnan()) else grad
        if not torch.is_grad_enabled():
            known, factors = (grad, None) if grad is not None else ctx.both.pop("grad", (None, None))
            if factors is not None and torch.equal(factors, scale):
                return known, None, None, None, None, None
            if known is None or factors is not None:
                known = potential.on(values).value_and_grad(x)[1]
            found = _scaled(known, scale)
        elif ctx.random is None:
            found = gradients(potential.on(values), x, scale, handed=grad)[0]
        else:
            with plain.replayed(x, ctx.random):
                found = plain.grad(potential.module(), x, potential.index, potential.recorded_chunk(x), scale)
        return found, None, None, None, None, None


class _OfWeights(torch.autograd.Function):
    """Zero, with gradients in the weights. The image comes in a list, so that autograd does not ask for its gradient here."""

    @staticmethod
    def forward(ctx, potential, hidden, grads, names, both, *values):
        ctx.potential, ctx.grads, ctx.names, ctx.both = potential, grads, names, both
        ctx.save_for_backward(hidden[0], *values)
        return values[0].new_zeros(potential.index.batch, dtype=hidden[0].dtype)

    @staticmethod
    def backward(ctx, scale):
        x, *values = ctx.saved_tensors
        potential, names, grads = ctx.potential.on(values), ctx.names, ctx.grads
        if torch.is_grad_enabled() or _batched(scale):
            found = gradients(potential, x, scale, names)[1:]
        else:
            alike = bool((scale == scale[0]).all())
            potential.asked.weights, potential.asked.unequal = alike, not alike
            if grads is None or not alike:
                _, image, grads = potential.all_grads(x, names, None if alike else scale)
                if x.requires_grad:  # whose backward pass is next
                    ctx.both["grad"] = image, None if alike else scale
            found = [g * scale[0] for g in grads] if alike else grads
        by_name = dict(zip(names, found))
        return None, None, None, None, None, *(by_name.get(name) for name in potential.params)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, potential, wanted, handed, *values):
        ctx.potential, ctx.wanted = potential, wanted
        ctx.save_for_backward(x, scale, *values)
        if wanted:
            _, grad, weight_grads = potential.on(values).all_grads(x, wanted, scale)
            return grad, *weight_grads
        return (_scaled(potential.on(values).value_and_grad(x)[1] if handed is None else handed, scale),)

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


def _batched(scale: Tensor) -> bool:
    """Whether several backward passes are one, as with ``is_grads_batched`` in :func:`torch.autograd.grad`."""
    return transformed(scale) or torch._C._dispatch_keys(scale).has(_BATCHED)


def _direct_gradients(potential: PatchPotential, x: Tensor, scale: Tensor, wanted: list[str] | tuple):
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


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    return grad * per_sample(scale, grad)
