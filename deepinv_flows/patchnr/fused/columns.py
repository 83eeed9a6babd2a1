"""
A network on chunks of patches held as columns, where each layer is one product into a buffer; ``do`` is explained in ``steps``.

Sizes of products are those of the layers: with the bias as a column of the weights, one more than a multiple of 16, they take a
tenth longer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .activations import Activation
from .workspace import Workspace


class Columns:
    """
    The operations of a network, in the precision of the patches.

    :param list packed: the matrix W (out, in) and the bias b (out,) of each layer, in turns.
    :param list activations: the activation after each layer but the last.
    :param Workspace space: source of buffers.
    """

    def __init__(self, packed: list[Tensor], activations: list[Activation], space: Workspace):
        self.weights, self.biases, self.activations = packed[::2], [b[:, None] for b in packed[1::2]], activations
        self.hidden = [space.new(w.shape[1]) for w in self.weights]
        self.kept = [h if act.in_place else space.new(len(h)) for h, act in zip(self.hidden[1:], activations)]
        self.grads = [space.shared(f"hidden {k % 2}", len(h)) for k, h in enumerate(self.hidden)]
        self.ones = space.shared("ones", 1)[0].fill_(1)

    def forward(self, do: Callable, x: Tensor, out: Tensor) -> None:
        """Write the outputs for the columns of x to ``out``."""
        do(self.hidden[0].copy_, x)
        for k, act in enumerate(self.activations):
            do(torch.addmm, self.biases[k], self.weights[k], self.hidden[k], out=self.kept[k])
            act.apply(do, self.kept[k], self.hidden[k + 1])
        do(torch.addmm, self.biases[-1], self.weights[-1], self.hidden[-1], out=out)

    def backward(self, do: Callable, g: Tensor, grads: list[Tensor] | None, into: Tensor) -> None:
        """Add the gradient in the input to ``into``, and the gradients in ``packed`` to ``grads``."""
        for k in range(len(self.weights) - 1, -1, -1):
            if grads is not None:
                do(grads[2 * k].addmm_, g, self.hidden[k].t())
                do(grads[2 * k + 1].addmv_, g, self.ones)
            if k == 0:
                break
            do(torch.mm, self.weights[k].t(), g, out=self.grads[k])
            g = self.grads[k]
            self.activations[k - 1].backward(do, g, self.kept[k - 1])
        do(into.addmm_, self.weights[0].t(), g)
