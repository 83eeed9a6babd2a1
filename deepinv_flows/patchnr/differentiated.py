r"""
The gradient of the patch potential as autograd functions, whose derivatives are written out.

For :math:`G(x, \theta) = \sum_b s_b \nabla g(x_b)` and a direction v, a backward pass gives a Hessian-vector product,
:math:`\nabla_x \langle v, G \rangle`, and :math:`\nabla_\theta \langle v, G \rangle`. The gradient is recorded as the sum of a
function of the image and one (zero) of the weights, as the value is. What the forward pass computed is kept for backward passes
where that is not too much memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import by_autograd

if TYPE_CHECKING:
    from .fused import Second
    from .potential import PatchPotential


def gradient(potential: PatchPotential, x: Tensor, second: Second, handed: Tensor | None, expected: bool) -> Tensor:
    """
    The gradient in the image, differentiable in the image and in the weights that ask for a gradient.

    :param Second second: what computes derivatives, with the factors of the images.
    :param torch.Tensor handed: the gradient for images with the factor 1, if it is known already.
    :param bool expected: whether a backward pass is expected that needs more than what is handed.
    """
    found: Any
    kept, possible = None, expected and potential.single_chunk and second.fits()
    if possible and second.fits(beside=True):
        with torch.no_grad():
            found, kept = second.gradient()
        found = potential.as_image(found, x)
    else:
        found = potential.constants(x, second.steps)[1] if handed is None else handed
        found = by_autograd.scaled(found, second.scale)
    # of one shape whether kept or not, for torch's checkpoints, which compare what is saved each time
    if kept is None:
        kept = x.new_zeros(1, dtype=torch.uint8).expand(second.kept_shape if possible else (1, 1))
    trainable = [name for name, p in potential.params.items() if p.requires_grad]
    both = dict[str, Any]()
    if x.requires_grad:
        found = _OfImage.apply(x, second.scale, potential, found, kept, both)
    if trainable:  # made last, so that its backward pass is first
        known = [x, second.scale, kept]
        found = found + _OfWeights.apply(potential, known, trainable, both, *potential.params.values())
    return found


class _OfImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, potential, grad, kept, both):
        ctx.potential, ctx.both = potential, both
        # autograd refuses a backward pass after these were changed in place
        ctx.save_for_backward(x, scale, kept, *potential.params.values())
        return grad.clone()

    @staticmethod
    def backward(ctx, direction):
        x, scale, kept, *values = ctx.saved_tensors
        potential = ctx.potential.on(values)
        potential.asked.second = True
        if torch.is_grad_enabled() or by_autograd.batched(direction):
            (found,) = by_autograd.derivatives(potential, x, direction, scale, image=True)
        else:
            known, found = ctx.both.pop("image", (None, None))
            if known is None or not torch.equal(known, direction):
                found = potential.derivatives(x, direction, scale, [], _unless_dummy(kept))[0]
        return found, None, None, None, None, None


class _OfWeights(torch.autograd.Function):
    """Zero, with gradients in the weights. The image comes in a list, so that autograd does not ask for its gradient here."""

    @staticmethod
    def forward(ctx, potential, known, names, both, *values):
        ctx.potential, ctx.names, ctx.both = potential, names, both
        ctx.save_for_backward(*known, *values)
        return torch.zeros_like(known[0])

    @staticmethod
    def backward(ctx, direction):
        x, scale, kept, *values = ctx.saved_tensors
        potential, names = ctx.potential.on(values), ctx.names
        potential.asked.second = True
        if torch.is_grad_enabled() or by_autograd.batched(direction):
            found = by_autograd.derivatives(potential, x, direction, scale, names)
        else:
            image, found = potential.derivatives(x, direction, scale, names, _unless_dummy(kept))
            if x.requires_grad:  # whose backward pass is next; a copy, as the user may change the direction
                ctx.both["image"] = direction.detach().clone(), image
        by_name = dict(zip(names, found))
        return None, None, None, None, *(by_name.get(name) for name in potential.params)


def _unless_dummy(kept: Tensor) -> Tensor | None:
    """What was kept, if its last byte says that it was."""
    return kept if bool(kept[-1, -1] == 1) else None
