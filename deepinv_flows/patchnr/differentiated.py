r"""
The gradient of the patch potential as autograd functions, whose derivatives are written out.

For :math:`G(x, \theta) = \sum_b s_b \nabla g(x_b)` and a direction v, a backward pass gives a Hessian-vector product,
:math:`\nabla_x \langle v, G \rangle`, and :math:`\nabla_\theta \langle v, G \rangle`. The gradient is recorded as the sum of a
function of the image and one (zero) of the weights, as the value is. What the forward pass computed is kept for backward passes
where that is not too much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..solvers import per_sample
from . import by_autograd

if TYPE_CHECKING:
    from .potential import PatchPotential


def differentiable(
    potential: PatchPotential, x: Tensor, scale: Tensor, handed: Tensor | None, steps: list | None
) -> Tensor:
    """
    The gradient in the image, differentiable in the image and in the weights that ask for a gradient.

    :param torch.Tensor scale: the factors s (B,), constants.
    :param torch.Tensor handed: the gradient for s = 1, if it is known already.
    :param list steps: of the flow, to keep what a backward pass needs; ``None`` keeps nothing.
    """
    found, memory = handed, list[Any]()
    if found is None and steps is not None:
        potential.asked.second = False  # until a backward pass comes
        found, memory = potential.prepared_grad(x, scale, steps)
    else:
        found = potential.value_and_grad(x)[1] if found is None else found
        found = found * per_sample(scale, found)
    trainable = [name for name, p in potential.params.items() if p.requires_grad]
    kept, both = _Kept(memory), dict[str, Any]()
    if x.requires_grad:
        found = _OfImage.apply(x, scale, potential, found, kept, both)
    if trainable:  # made last, so that its backward pass is first
        found = found + _OfWeights.apply(potential, [x, scale], kept, trainable, both, *potential.params.values())
    kept.tensors.clear()  # autograd alone holds them, and frees them
    return found


class _Kept:
    """The tensors of what was kept, and their structure."""

    def __init__(self, memory: list):
        self.counts = [(start, stop, [len(slabs) for slabs in chunks]) for start, stop, chunks in memory]
        self.tensors = [slab for _, _, chunks in memory for slabs in chunks for slab in slabs]

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list | None]:
        """The weights, and what was kept as it was, from the tensors of both that autograd held."""
        total = sum(sum(counts) for _, _, counts in self.counts)
        rest = iter(tensors[len(tensors) - total :])
        memory = [
            (start, stop, [[next(rest) for _ in range(n)] for n in counts]) for start, stop, counts in self.counts
        ]
        return list(tensors[: len(tensors) - total]), memory or None


class _OfImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, potential, grad, kept, both):
        ctx.potential, ctx.kept, ctx.both = potential, kept, both
        # autograd refuses a backward pass after these were changed in place
        ctx.save_for_backward(x, scale, *potential.params.values(), *kept.tensors)
        return grad.clone()

    @staticmethod
    def backward(ctx, direction):
        x, scale, *rest = ctx.saved_tensors
        values, memory = ctx.kept.split(rest)
        potential = ctx.potential.on(values)
        potential.asked.second = True
        if torch.is_grad_enabled() or by_autograd.batched(direction):
            (found,) = by_autograd.along(potential, x, direction, scale, image=True)
        else:
            known, found = ctx.both.pop("image", (None, None))
            if known is None or not torch.equal(known, direction):
                found = potential.along(x, direction, scale, [], memory)[0]
        return found, None, None, None, None, None


class _OfWeights(torch.autograd.Function):
    """Zero, with gradients in the weights. The image comes in a list, so that autograd does not ask for its gradient here."""

    @staticmethod
    def forward(ctx, potential, hidden, kept, names, both, *values):
        ctx.potential, ctx.kept, ctx.names, ctx.both = potential, kept, names, both
        ctx.save_for_backward(*hidden, *values, *kept.tensors)
        return torch.zeros_like(hidden[0])

    @staticmethod
    def backward(ctx, direction):
        x, scale, *rest = ctx.saved_tensors
        values, memory = ctx.kept.split(rest)
        potential, names = ctx.potential.on(values), ctx.names
        potential.asked.second = True
        if torch.is_grad_enabled() or by_autograd.batched(direction):
            found = by_autograd.along(potential, x, direction, scale, names)
        else:
            image, found = potential.along(x, direction, scale, names, memory)
            if x.requires_grad:  # whose backward pass is next
                ctx.both["image"] = direction, image
        by_name = dict(zip(names, found))
        return None, None, None, None, None, *(by_name.get(name) for name in potential.params)
