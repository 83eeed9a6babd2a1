"""
The layers of a coupling's networks, differentiated along a direction.

``push`` and ``pull`` are as in ``tangents``; those of a network write its outputs, and add to the gradient in its inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .activations import Activation
from .networks import Network
from .workspace import Workspace


class NetworkTangent:
    """
    The layers of a network: :math:`dh_{k+1} = f'(a_k)\\, W_k\\,dh_k`, and back :math:`f'(a_k)\\,dg_k + f''(a_k)\\, g_k\\,da_k`.
    """

    def __init__(self, network: Network, kept: Workspace, space: Workspace):
        self.packed = network.packed
        weights = [w.detach() for w in network.packed]
        self.weights, self.biases = weights[::2], [b[:, None] for b in weights[1::2]]
        sizes = [w.shape[1] for w in self.weights]
        self.first, hidden = kept.new(sizes[0]), sizes[1:]
        self.a, self.g = [kept.new(n) for n in hidden], [kept.new(n) for n in hidden]
        self.layers = [
            (_Kinked if act.in_place else _Smooth)(act, a, g, kept, space)
            for act, a, g in zip(network.activations, self.a, self.g)
        ]
        self.dfirst, self.dg = space.new(sizes[0]), [space.shared(f"dg {k % 2}", n) for k, n in enumerate(hidden)]
        self.ones = space.shared("ones", 1)[0]

    def forward(self, do: Callable, x: Tensor, out: Tensor) -> None:
        do(self.first.copy_, x)
        h = self.first
        for k, layer in enumerate(self.layers):
            do(torch.addmm, self.biases[k], self.weights[k], h, out=self.a[k])
            h = layer.forward(do)
        do(torch.addmm, self.biases[-1], self.weights[-1], h, out=out)

    def backward(self, do: Callable, g: Tensor, into: Tensor) -> None:
        self.last = g
        for k in range(len(self.layers) - 1, -1, -1):
            do(torch.mm, self.weights[k + 1].t(), g, out=self.g[k])
            g = self.layers[k].backward(do)
        do(into.addmm_, self.weights[0].t(), g)

    def push(self, do: Callable, dx: Tensor, dout: Tensor) -> None:
        do(self.dfirst.copy_, dx)
        dh = self.dfirst
        for k, layer in enumerate(self.layers):
            do(torch.mm, self.weights[k], dh, out=layer.da)
            dh = layer.push(do)
        do(torch.mm, self.weights[-1], dh, out=dout)

    def pull(self, do: Callable, dg: Tensor, grads: list | None, into: Tensor) -> None:
        do(self.ones.fill_, 1)
        for k in range(len(self.layers), -1, -1):
            if grads is not None:
                h, dh = (self.layers[k - 1].h, self.layers[k - 1].dh) if k else (self.first, self.dfirst)
                g = self.layers[k].slope_times_g(do) if k < len(self.layers) else self.last
                do(grads[2 * k].addmm_, dg, h.t())
                do(grads[2 * k].addmm_, g, dh.t())
                do(grads[2 * k + 1].addmv_, dg, self.ones)
            if k:
                do(torch.mm, self.weights[k].t(), dg, out=self.dg[k - 1])
                dg = self.layers[k - 1].pull(do, self.dg[k - 1])
        do(into.addmm_, self.weights[0].t(), dg)


class _Kinked:
    """A piecewise linear activation, which works in place: a holds h, and g the gradient before it."""

    def __init__(self, act: Activation, a: Tensor, g: Tensor, kept: Workspace, space: Workspace):
        self.h, self.g, self.da = a, g, space.new(len(a))
        self.dh, self.act = self.da, act

    def forward(self, do: Callable) -> Tensor:
        self.act.apply(do, self.h, self.h)
        return self.h

    def backward(self, do: Callable) -> Tensor:
        self.act.backward(do, self.g, self.h)
        return self.g

    def push(self, do: Callable) -> Tensor:
        self.act.backward(do, self.da, self.h)
        return self.dh

    def pull(self, do: Callable, dg: Tensor) -> Tensor:
        self.act.backward(do, dg, self.h)
        return dg

    def slope_times_g(self, do: Callable) -> Tensor:
        return self.g


class _Smooth:
    """An activation with a second derivative; g is the gradient after it."""

    def __init__(self, act: Activation, a: Tensor, g: Tensor, kept: Workspace, space: Workspace):
        self.act, self.a, self.g, n = act, a, g, len(a)
        self.before, self.after = (kept.shared(name, n) for name in ("before", "after"))
        self.h, self.slope, self.da, self.dh = (space.new(n) for _ in range(4))
        self.bend, self.ga = space.shared("bend", n), space.shared("ga", n)

    def forward(self, do: Callable) -> Tensor:
        self.act.apply(do, self.a, self.after)
        return self.after

    def backward(self, do: Callable) -> Tensor:
        do(self.before.copy_, self.g)
        self.act.backward(do, self.before, self.a)
        return self.before

    def push(self, do: Callable) -> Tensor:
        assert self.act.derivatives is not None
        self.act.derivatives(do, self.a, self.h, self.slope, self.bend)
        do(torch.mul, self.slope, self.da, out=self.dh)
        do(self.da.mul_, self.bend)
        do(self.da.mul_, self.g)
        return self.dh

    def pull(self, do: Callable, dg: Tensor) -> Tensor:
        do(torch.addcmul, self.da, dg, self.slope, out=dg)
        return dg

    def slope_times_g(self, do: Callable) -> Tensor:
        do(torch.mul, self.slope, self.g, out=self.ga)
        return self.ga
