"""The networks of a flow's couplings, for chunks of patches held as columns; ``do`` is explained in ``steps``."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from .workspace import Workspace

aten = torch.ops.aten


@dataclass
class Activation:
    """
    A function f of each entry.

    ``function(a)`` returns f(a) with a graph. ``apply(do, a, h)`` writes f(a) to h. ``backward(do, g, kept)`` multiplies g by
    f'(a) in place; ``kept`` is h if f works in place, and a otherwise.
    """

    function: Callable[[Tensor], Tensor]
    in_place: bool
    apply: Callable[[Callable, Tensor, Tensor], None]
    backward: Callable[[Callable, Tensor, Tensor], None]


@functools.cache
def relu() -> Activation:
    return Activation(
        torch.relu,
        True,
        lambda do, a, h: do(a.relu_),
        lambda do, g, h: do(aten.threshold_backward.grad_input, g, h, 0, grad_input=g),
    )


@functools.cache
def leaky_relu(slope: float) -> Activation:
    return Activation(
        functools.partial(F.leaky_relu, negative_slope=slope),
        True,
        lambda do, a, h: do(aten.leaky_relu_, a, slope),
        lambda do, g, h: do(aten.leaky_relu_backward.grad_input, g, h, slope, True, grad_input=g),
    )


@functools.cache
def silu() -> Activation:
    return Activation(
        F.silu,
        False,
        lambda do, a, h: do(aten.silu.out, a, out=h),
        lambda do, g, a: do(aten.silu_backward.grad_input, g, a, grad_input=g),
    )


@functools.cache
def gelu(approximate: str) -> Activation:
    return Activation(
        functools.partial(F.gelu, approximate=approximate),
        False,
        lambda do, a, h: do(aten.gelu.out, a, approximate=approximate, out=h),
        lambda do, g, a: do(aten.gelu_backward.grad_input, g, a, approximate=approximate, grad_input=g),
    )


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

    def prepare(self, space: Workspace) -> SimpleNamespace:
        weights, biases = ([w.detach().to(space.dtype) for w in self.packed[k::2]] for k in (0, 1))
        hidden = [space.new(w.shape[1], space.dtype) for w in weights]
        kept = [h if act.in_place else space.new(len(h), space.dtype) for h, act in zip(hidden[1:], self.activations)]
        return SimpleNamespace(
            weights=weights,
            transposed=[w.t() for w in weights],
            biases=[b[:, None] for b in biases],
            hidden=hidden,
            kept=kept,
            grads=[space.shared(f"hidden {k % 2}", len(h), space.dtype) for k, h in enumerate(hidden)],
            product=space.shared("input", len(hidden[0]), space.dtype) if space.dtype != space.state_dtype else None,
            ones=space.ones(),
        )

    def forward(self, do: Callable, x: Tensor, tape: SimpleNamespace, out: Tensor) -> None:
        do(tape.hidden[0].copy_, x)
        for k, act in enumerate(self.activations):
            do(torch.addmm, tape.biases[k], tape.weights[k], tape.hidden[k], out=tape.kept[k])
            act.apply(do, tape.kept[k], tape.hidden[k + 1])
        do(torch.addmm, tape.biases[-1], tape.weights[-1], tape.hidden[-1], out=out)

    def backward(
        self, do: Callable, g: Tensor, tape: SimpleNamespace, grads: list[Tensor] | None, into: Tensor
    ) -> None:
        """Add the gradient in the input to ``into``, and the gradients in ``packed`` to ``grads``."""
        for k in range(len(tape.weights) - 1, -1, -1):
            if grads is not None:
                do(grads[2 * k].addmm_, g, tape.hidden[k].t())
                do(grads[2 * k + 1].addmv_, g, tape.ones)
            if k == 0:
                break
            do(torch.mm, tape.transposed[k], g, out=tape.grads[k])
            g = tape.grads[k]
            self.activations[k - 1].backward(do, g, tape.kept[k - 1])
        if tape.product is None:
            do(into.addmm_, tape.transposed[0], g)
        else:
            do(torch.mm, tape.transposed[0], g, out=tape.product)
            do(into.add_, tape.product)
