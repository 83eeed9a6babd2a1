"""The networks of a flow's couplings."""

import torch.nn.functional as F
from torch import Tensor

from .activations import Activation
from .columns import Columns
from .rows import Rows
from .workspace import Workspace


class Network:
    """
    A fully connected network.

    :param list packed: the matrix W (out, in) and the bias b (out,) of each layer, in turns.
    :param list activations: the activation after each layer but the last.
    """

    def __init__(self, packed: list[Tensor], activations: list[Activation]):
        self.packed, self.activations = packed, activations

    def recorded(self, x: Tensor) -> Tensor:
        """The outputs for the rows of x, with a graph."""
        *inner, last = zip(self.packed[::2], self.packed[1::2])
        for (w, b), act in zip(inner, self.activations):
            x = act.function(F.linear(x, w, b))
        return F.linear(x, *last)

    def prepare(self, space: Workspace) -> Columns | Rows:
        kind = Columns if space.dtype == space.state_dtype else Rows
        return kind([w.detach() for w in self.packed], self.activations, space)
