r"""
The steps of a flow differentiated once more, along a direction: products with Hessians, and their gradients in the weights.

For the negative log-likelihood h of a patch x and a direction v,

.. math::

    \frac{d}{d\epsilon}\Big|_0 \nabla_x h(x + \epsilon v) = \nabla^2 h(x)\, v, \qquad
    \frac{d}{d\epsilon}\Big|_0 \nabla_\theta h(x + \epsilon v) = \nabla_\theta\, \langle v, \nabla_x h(x) \rangle

A step goes forward and backward as in :mod:`deepinv_flows.patchnr.fused.steps`, and keeps in ``kept`` buffers what tangents need.
Then ``push(do, dx)`` gives the tangent of the new state from that of the old one, and ``pull(do, dg, grads)`` that of the
gradient in the old state from that in the new one; it adds the tangents of gradients in ``packed`` to ``grads`` unless it is
``None``. Names that begin with d are tangents. What is kept serves many directions: their buffers are those of another ``space``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .layers import NetworkTangent
from .steps import Affine, Coupling, centre
from .workspace import Workspace


class AffineTangent:
    """:math:`dx \\mapsto W\\,dx`."""

    def __init__(self, step: Affine, kept: Workspace, space: Workspace):
        self.matrix, self.offset = (w.detach() for w in step.packed[:2])
        self.out, self.grad = kept.new(step.dim), kept.new(step.dim)
        self.dout, self.dgrad = space.new(step.dim), space.new(step.dim)
        self.sum = torch.empty_like(self.offset)

    def forward(self, do: Callable, x: Tensor) -> Tensor:
        self.x = x
        do(torch.addmm, self.offset, self.matrix, x, out=self.out)
        return self.out

    def backward(self, do: Callable, g: Tensor, weight: Tensor) -> Tensor:
        self.g = g
        do(torch.mm, self.matrix.t(), g, out=self.grad)
        return self.grad

    def push(self, do: Callable, dx: Tensor) -> Tensor:
        self.dx = dx
        do(torch.mm, self.matrix, dx, out=self.dout)
        return self.dout

    def pull(self, do: Callable, dg: Tensor, grads: list | None) -> Tensor:
        if grads is not None:
            do(grads[0].addmm_, dg, self.x.t())
            do(grads[0].addmm_, self.g, self.dx.t())
            do(torch.sum, dg, 1, keepdim=True, out=self.sum)
            do(grads[1].add_, self.sum)
        do(torch.mm, self.matrix.t(), dg, out=self.dgrad)
        return self.dgrad


class CouplingTangent:
    r"""
    With the new half :math:`m' = p + t`, :math:`p = m e^s` (or, back, :math:`m' = p = (m - t) e^s`), its gradient
    :math:`g'` and the gradients :math:`g_s = g' p - w`, :math:`g_a = g_s s'(a)`:

    .. math::

        ds = s'(a)\,da, \quad dp = e^s dm + p\,ds, \quad dg_s = dg'\,p + g'\,dp, \quad
        dg_a = s'(a)\,dg_s + g_a \frac{s''(a)}{s'(a)}\,da, \quad dg_m = e^s (dg' + g'\,ds)
    """

    def __init__(self, step: Coupling, kept: Workspace, space: Workspace):
        self.step, d = step, step.moved.stop - step.moved.start
        rows = d if step.function is None else 2 * d
        self.networks = [NetworkTangent(network, kept, space) for network in step.networks]
        out, dout, self.grad, self.dgrad = kept.new(rows), space.new(rows), kept.new(rows), space.shared("dgrad", rows)
        parts = [whole.chunk(len(self.networks)) for whole in (out, dout, self.grad, self.dgrad)]
        self.outs, self.douts, self.grads, self.dgrads = parts
        self.a, self.t, self.da, self.dt = out[:-d], out[-d:], dout[:-d], dout[-d:]
        self.grad_a, self.grad_t, self.dgrad_a, self.dgrad_t = (
            self.grad[:-d],
            self.grad[-d:],
            self.dgrad[:-d],
            self.dgrad[-d:],
        )
        if step.function is not None:
            self.factor, self.product, self.slope, self.bend, self.g = (kept.new(d) for _ in range(5))
            self.ds, self.dproduct, self.bent = (space.new(d) for _ in range(3))
            self.sum, self.dsum = (buffers.shared("sum", 1)[0] for buffers in (kept, space))

    def forward(self, do: Callable, x: Tensor) -> Tensor:
        step, m = self.step, x[self.step.moved]
        for network, out in zip(self.networks, self.outs):
            network.forward(do, x[step.kept], out)
        if step.function is None:
            do(m.add_, self.t, alpha=step.sign)
            return x
        self._scale(do)
        s = self.factor
        if step.centred:
            centre(do, s, self.sum)
        do(s.exp_)
        if step.sign < 0:
            do(m.sub_, self.t)
        do(torch.mul, m, s, out=self.product)
        if step.sign > 0:
            do(torch.add, self.product, self.t, out=m)
        else:
            do(m.copy_, self.product)
        return x

    def _scale(self, do: Callable) -> None:
        """Write s, its slope s' and s'' / s' in a."""
        alpha, a, s, slope, bend = self.step.sign * self.step.alpha, self.a, self.factor, self.slope, self.bend
        if self.step.function == "tanh":
            do(torch.tanh, a, out=s)
            do(torch.mul, s, s, out=slope)
            do(slope.sub_, 1)
            do(slope.mul_, -alpha)
            do(torch.mul, s, -2.0, out=bend)
        else:
            do(torch.atan, a, out=s)
            do(torch.mul, a, a, out=slope)
            do(slope.add_, 1)
            do(slope.reciprocal_)
            do(torch.mul, a, slope, out=bend)
            do(bend.mul_, -2.0)
            do(slope.mul_, alpha)
        do(s.mul_, alpha)

    def backward(self, do: Callable, g: Tensor, weight: Tensor) -> Tensor:
        gm = g[self.step.moved]
        if self.step.function is None:
            do(torch.mul, gm, self.step.sign, out=self.grad)
        else:
            do(self.g.copy_, gm)
            do(torch.mul, gm, self.product, out=self.grad_a)
            do(self.grad_a.sub_, weight)  # the log-determinant's part
            if self.step.centred:
                centre(do, self.grad_a, self.sum)
            do(self.grad_a.mul_, self.slope)
            do(gm.mul_, self.factor)
            if self.step.sign > 0:
                do(self.grad_t.copy_, self.g)
            else:
                do(torch.neg, gm, out=self.grad_t)
        for network, part in zip(self.networks, self.grads):
            network.backward(do, part, g[self.step.kept])
        return g

    def push(self, do: Callable, dx: Tensor) -> Tensor:
        step, dm = self.step, dx[self.step.moved]
        for network, dout in zip(self.networks, self.douts):
            network.push(do, dx[step.kept], dout)
        if step.function is None:
            do(dm.add_, self.dt, alpha=step.sign)
            return dx
        do(torch.mul, self.slope, self.da, out=self.ds)
        do(torch.mul, self.bend, self.grad_a, out=self.bent)
        do(self.bent.mul_, self.da)
        if step.centred:
            centre(do, self.ds, self.dsum)
        if step.sign < 0:
            do(dm.sub_, self.dt)
        do(torch.mul, self.product, self.ds, out=self.dproduct)
        do(self.dproduct.addcmul_, self.factor, dm)
        if step.sign > 0:
            do(torch.add, self.dproduct, self.dt, out=dm)
        else:
            do(dm.copy_, self.dproduct)
        return dx

    def pull(self, do: Callable, dg: Tensor, grads: list | None) -> Tensor:
        step, dgm = self.step, dg[self.step.moved]
        if step.function is None:
            do(torch.mul, dgm, step.sign, out=self.dgrad)
        else:
            self._pull_affine(do, dgm)
        start = 0
        for network, part in zip(self.networks, self.dgrads):
            own = None if grads is None else grads[start : start + len(network.packed)]
            network.pull(do, part, own, dg[step.kept])
            start += len(network.packed)
        return dg

    def _pull_affine(self, do: Callable, dgm: Tensor) -> None:
        ds = self.dgrad_a
        do(torch.mul, dgm, self.product, out=ds)
        do(ds.addcmul_, self.g, self.dproduct)
        if self.step.centred:
            centre(do, ds, self.dsum)
        do(torch.addcmul, self.bent, ds, self.slope, out=ds)
        if self.step.sign > 0:
            do(self.dgrad_t.copy_, dgm)
        do(dgm.addcmul_, self.g, self.ds)
        do(dgm.mul_, self.factor)
        if self.step.sign < 0:
            do(torch.neg, dgm, out=self.dgrad_t)
