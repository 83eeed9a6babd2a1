"""
A network with products in 16 bits, on chunks of patches whose hidden layers are held as rows; ``do`` is explained in ``steps``.

Processors with matrix units in bfloat16 (AMX) multiply rows faster than columns. Inner sizes are multiples of 32, without which
oneDNN is slow, and has been seen to spread NaN between rows. The first of the columns that are added are ones, which meet the
biases. (Sharing the hidden layers of all networks, and computing them again in the backward pass, was slower.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation
from .workspace import Workspace

BLOCK = 32
LARGEST = 1e30  # weight


class Rows:
    """
    The operations of a network in the dtype of ``space``; inputs, outputs and gradients are columns in that of the patches.

    :param list packed: the matrix W (out, in) and the bias b (out,) of each layer, in turns.
    :param list activations: the activation after each layer but the last.
    :param Workspace space: source of buffers.
    """

    def __init__(self, packed: list[Tensor], activations: list[Activation], space: Workspace):
        self.activations, self.sizes = activations, [w.shape[1] for w in packed[::2]]
        self.weights = [_with_bias(w, b, space.dtype) for w, b in zip(packed[::2], packed[1::2])]
        if not all(bool((w.abs() < LARGEST).all()) for w in self.weights):
            self.weights[-1].fill_(torch.nan)  # rectified as an integer, the NaN of an overflow may become zero
        first, *others = [space.new(_padded(size + 1), space.dtype) for size in self.sizes]
        self.inputs = [first.t(), *(_rows(h) for h in others)]
        for h, size in zip(self.inputs, self.sizes):
            h[:, size:] = 0
            h[:, size] = 1
        self.hidden = [h[:, :size] for h, size in zip(self.inputs, self.sizes)]
        pairs = zip(self.hidden[1:], activations)
        self.kept = [h if act.in_place else _rows(space.new(h.shape[1], space.dtype)) for h, act in pairs]
        self.grads = [_rows(space.shared(f"rows {k % 2}", size, space.dtype)) for k, size in enumerate(self.sizes)]
        out = len(packed[-1])
        # padded: the inner size of the product with the last layer's matrix
        self.outer = space.shared(f"outer {out}", _padded(out), space.dtype)
        self.outer[out:] = 0
        self.last = F.pad(self.weights[-1], (0, 0, 0, _padded(out) - out))
        self.product = space.shared("input", self.sizes[0], space.dtype)
        self.weight_grads = [torch.empty_like(w) for w in self.weights]

    def forward(self, do: Callable, x: Tensor, out: Tensor) -> None:
        """Write the outputs for the columns of x to the columns ``out``."""
        do(self.hidden[0].copy_, x.t())
        for k, act in enumerate(self.activations):
            do(torch.mm, self.inputs[k], self.weights[k].t(), out=self.kept[k])
            act.apply(do, self.kept[k], self.hidden[k + 1])
        do(torch.mm, self.weights[-1], self.inputs[-1].t(), out=out)

    def backward(self, do: Callable, g: Tensor, grads: list[Tensor] | None, into: Tensor) -> None:
        """Add the gradient in the input to ``into``, and the gradients in ``packed`` to ``grads``."""
        do(self.outer[: len(g)].copy_, g)
        g, matrix = self.outer[: len(g)].t(), None
        for k in range(len(self.weights) - 1, -1, -1):
            if grads is not None:
                self._add(do, g, k, grads[2 * k : 2 * k + 2])
            if k == 0:
                break
            g, matrix = (self.outer.t(), self.last) if matrix is None else (g, self.weights[k])
            do(torch.mm, g, matrix[:, : self.sizes[k]], out=self.grads[k])
            g = self.grads[k]
            self.activations[k - 1].backward(do, g, self.kept[k - 1])
        do(torch.mm, self.weights[0][:, : self.sizes[0]].t(), g.t(), out=self.product)
        do(into.add_, self.product)

    def _add(self, do: Callable, g: Tensor, k: int, grads: list[Tensor]) -> None:
        """Add the gradients in the matrix and the bias of layer k, which are one product."""
        found, size = self.weight_grads[k], self.sizes[k]
        do(torch.mm, g.t(), self.inputs[k], out=found)
        do(grads[0].add_, found[:, :size])
        do(grads[1].add_, found[:, size])


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _rows(buffer: Tensor) -> Tensor:
    """A buffer (size, n) as (n, size)."""
    return buffer.view(buffer.shape[1], -1)


def _with_bias(w: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return F.pad(torch.cat([w, b[:, None]], 1), (0, _padded(w.shape[1] + 1) - w.shape[1] - 1)).to(dtype)
