r"""
The patch potential as autograd functions, whose gradients the potential itself computes.

The value is recorded as the sum of two functions, one of the image and one (zero) of the weights, so that a backward pass
computes what it is asked for and nothing else. The forward pass computes the gradient in the image together with the value, if
the image asks for a gradient, and the gradients in the weights too, if the backward pass of the last call asked for them. The
latter hold if all images have the same factor in the loss, as in a sum or a mean. Otherwise the backward pass computes both
gradients together, and the next forward pass leaves them to it.

A backward pass with a graph records another function, the gradient, of :mod:`~deepinv_flows.patchnr.differentiated` or, where
second derivatives are not written out, :mod:`~deepinv_flows.patchnr.by_autograd`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import by_autograd, differentiated, plain
from .fused import twice_differentiable

if TYPE_CHECKING:
    from .potential import PatchPotential

KEPT = 2**14  # patches whose graph, of 0.2 MB each in the default flow, may be kept until the backward pass


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


def gradients(
    potential: PatchPotential,
    x: Tensor,
    scale: Tensor,
    wanted: list[str] | tuple = (),
    handed: Tensor | None = None,
    steps: list | None = None,
):
    r"""
    Gradients of :math:`\sum_b s_b g(x_b)` in the image and in the ``wanted`` weights, differentiable in all of them.

    They are partial derivatives, also if x and the factors s (B,) depend on the weights. ``handed`` is the gradient in the image
    for s = 1, and ``steps`` are those of the flow, if they are known already.
    """
    if by_autograd.batched(scale):
        return by_autograd.direct(potential, x, scale, wanted)
    expected = handed is None and (x.requires_grad or (potential.trainable and potential.asked.second))
    if not wanted and not scale.requires_grad:
        steps = potential.steps(x) if steps is None else steps
        if steps is not None and twice_differentiable(steps):
            second = potential.second(steps, x, scale.detach())
            return (differentiated.gradient(potential, x, second, handed, expected),)
    few = expected and len(potential.index) <= min(potential.recorded_chunk(x), KEPT)
    if few and torch.is_grad_enabled():
        return by_autograd.direct(potential, x, scale, wanted)
    return by_autograd.gradients(potential, x, scale, wanted, handed)


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
            found = by_autograd.scaled(known, scale)
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
        if torch.is_grad_enabled() or by_autograd.batched(scale):
            found = gradients(potential, x, scale, names)[1:]
        else:
            alike = bool((scale == scale[0]).all())
            potential.asked.weights, potential.asked.unequal = alike, not alike
            if grads is None or not alike:
                _, image, grads = potential.all_grads(x, names, None if alike else scale)
                if x.requires_grad:  # whose backward pass is next
                    ctx.both["grad"] = image, None if alike else scale.detach().clone()
            found = [g * scale[0] for g in grads] if alike else grads
        by_name = dict(zip(names, found))
        return None, None, None, None, None, *(by_name.get(name) for name in potential.params)
