r"""
The steps of a patch flow with their derivatives written out: no graph, buffers reused from chunk to chunk.

A chunk of N patches is held as the columns of a (D, N) matrix, so that halves and single entries are contiguous rows and
each layer is one matrix product into a buffer. A row of ones below the activations makes the bias a column of the
weights, :math:`W h + b = [W\;b]\,[h;1]`, and its gradient a column of theirs.

Each step has ``packed`` weights, which are functions of the flow's parameters (autograd maps their gradients back), and

- ``forward(x, log_det, tape)``: the new state; ``log_det`` (N,) is added to, ``tape`` keeps what ``backward`` needs;
- ``backward(g, weight, tape, grads)``: from :math:`g = \partial L/\partial` (new state) the one of the old state, for
  :math:`L = \sum_i w_i (\tfrac12 \|z_i\|^2 - \log|\det J|_i)`, adding to ``grads`` (as ``packed``) unless it is ``None``;
- ``inverse()``: the step that undoes it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from .workspace import Workspace

aten = torch.ops.aten


@dataclass
class Activation:
    """``apply(a, h)`` writes h = f(a); ``backward(g, kept)`` multiplies g by f'(a) in place, ``kept`` (lost) being h if f works
    in place and a if not."""

    in_place: bool
    apply: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def relu() -> Activation:
    return Activation(
        True,
        lambda a, h: a.relu_(),
        lambda g, h: aten.threshold_backward.grad_input(g, h, 0, grad_input=g),
    )


def leaky_relu(slope: float) -> Activation:
    return Activation(
        True,
        lambda a, h: aten.leaky_relu_(a, slope),
        lambda g, h: aten.leaky_relu_backward.grad_input(g, h, slope, True, grad_input=g),
    )


def silu() -> Activation:
    return Activation(
        False,
        lambda a, h: aten.silu.out(a, out=h),
        lambda g, a: aten.silu_backward.grad_input(g, a, grad_input=g),
    )


def gelu(approximate: str) -> Activation:
    return Activation(
        False,
        lambda a, h: aten.gelu.out(a, approximate=approximate, out=h),
        lambda g, a: aten.gelu_backward.grad_input(g, a, approximate=approximate, grad_input=g),
    )


class Network:
    """
    A fully connected network.

    :param list packed: [W b] of each layer, (out, in + 1).
    :param list activations: one after each layer but the last.
    """

    def __init__(self, packed: list[Tensor], activations: list[Activation]):
        self.packed, self.activations = packed, activations

    def prepare(self, space: Workspace) -> SimpleNamespace:
        weights = [w.detach().to(space.dtype) for w in self.packed]
        inputs = [space.new(w.shape[1], space.dtype) for w in weights]
        for h in inputs:
            h[-1].fill_(1)
        kept = [
            h[:-1] if act.in_place else space.new(len(h) - 1, space.dtype)
            for h, act in zip(inputs[1:], self.activations)
        ]
        return SimpleNamespace(
            weights=weights,
            transposed=[w[:, :-1].t() for w in weights],
            inputs=inputs,
            hidden=[h[:-1] for h in inputs],
            kept=kept,
            grads=[space.shared(f"hidden {k % 2}", len(h) - 1, space.dtype) for k, h in enumerate(inputs)],
        )

    def forward(self, x: Tensor, tape: SimpleNamespace, out: Tensor) -> None:
        tape.hidden[0].copy_(x)
        for k, act in enumerate(self.activations):
            torch.mm(tape.weights[k], tape.inputs[k], out=tape.kept[k])
            act.apply(tape.kept[k], tape.hidden[k + 1])
        torch.mm(tape.weights[-1], tape.inputs[-1], out=out)

    def backward(self, g: Tensor, tape: SimpleNamespace, grads: list[Tensor] | None, into: Tensor) -> None:
        """Add to ``into`` the gradient in the input."""
        for k in range(len(tape.weights) - 1, -1, -1):
            if grads is not None:
                grads[k].addmm_(g, tape.inputs[k].t())
            if k == 0:
                break
            torch.mm(tape.transposed[k], g, out=tape.grads[k])
            g = tape.grads[k]
            self.activations[k - 1].backward(g, tape.kept[k - 1])
        if into.dtype == g.dtype:
            into.addmm_(tape.transposed[0], g)
        else:
            into.add_(torch.mm(tape.transposed[0], g))


class Affine:
    r"""
    :math:`x \mapsto W x + b`.

    :param list packed: [W (D, D), b (D, 1), :math:`\log|\det W|` ()].
    :param callable inverse_packed: gives the same three of the inverse.
    """

    def __init__(self, packed: list[Tensor], inverse_packed: Callable[[], list[Tensor]]):
        self.packed, self.inverse_packed = packed, inverse_packed

    def inverse(self) -> "Affine":
        return Affine(self.inverse_packed(), lambda: self.packed)

    def prepare(self, space: Workspace) -> SimpleNamespace:
        dim = len(self.packed[0])
        # in turns, as the output of one is the input of the next
        return SimpleNamespace(
            weights=[w.detach() for w in self.packed], out=space.new(dim), grad=space.new(dim), input=None
        )

    def forward(self, x: Tensor, log_det: Tensor, tape: SimpleNamespace) -> Tensor:
        matrix, offset, constant = tape.weights
        log_det.add_(constant)
        tape.input = x
        return torch.mm(matrix, x, out=tape.out).add_(offset)

    def backward(self, g: Tensor, weight: Tensor, tape: SimpleNamespace, grads: list[Tensor] | None) -> Tensor:
        if grads is not None:
            grads[0].addmm_(g, tape.input.t())
            grads[1].add_(g.sum(1, keepdim=True))
            grads[2].sub_(weight.sum())
        return torch.mm(tape.weights[0].t(), g, out=tape.grad)


class Coupling:
    r"""
    One half moves by what networks say of the other: :math:`x_m \mapsto x_m e^{s} + t`, or back by
    :math:`x_m \mapsto (x_m - t) e^{-s}`, with :math:`(a, t)` from the networks and :math:`s = \alpha f(a)`.

    :param slice kept: rows that the networks see.
    :param slice moved: rows that move.
    :param list networks: one that gives a and t, or one for each; only t if ``function`` is ``None``.
    :param str function: f, ``"atan"`` or ``"tanh"``; ``None`` for s = 0.
    :param float alpha: bound of s.
    :param bool centred: subtract from s its mean, which preserves volume.
    """

    def __init__(self, kept: slice, moved: slice, networks: list[Network], function=None, alpha=1.0, centred=False):
        self.kept, self.moved, self.networks = kept, moved, networks
        self.function, self.alpha, self.centred = function, float(alpha), centred
        self.sign = 1

    @property
    def packed(self) -> list[Tensor]:
        return [w for network in self.networks for w in network.packed]

    def inverse(self) -> "Coupling":
        step = copy.copy(self)
        step.sign = -self.sign
        return step

    def prepare(self, space: Workspace) -> SimpleNamespace:
        d = self.moved.stop - self.moved.start
        rows = d if self.function is None else 2 * d
        out = space.new(rows, space.dtype)
        state = out if space.dtype == space.state_dtype else space.new(rows)
        grad = space.shared("coupling", rows)
        return SimpleNamespace(
            networks=[network.prepare(space) for network in self.networks],
            outs=out.chunk(len(self.networks)),
            out=out,
            state=state,
            a=state[:-d],
            t=state[-d:],
            factor=space.new(d),
            product=space.new(d),
            grad=grad,
            grad_a=grad[:-d],
            grad_t=grad[-d:],
            # (1 + a^2) / alpha, or alpha (1 - a^2), up to the sign of s
            slope=torch.tensor(self._slope(), dtype=space.state_dtype, device=space.device),
        )

    def _slope(self) -> float:
        return self.sign * (self.alpha if self.function == "tanh" else 1 / self.alpha)

    def forward(self, x: Tensor, log_det: Tensor, tape: SimpleNamespace) -> Tensor:
        for network, network_tape, out in zip(self.networks, tape.networks, tape.outs):
            network.forward(x[self.kept], network_tape, out)
        if tape.state is not tape.out:
            tape.state.copy_(tape.out)
        m = x[self.moved]
        if self.function is None:
            m.add_(tape.t, alpha=self.sign)
            return x
        s = tape.factor
        (torch.tanh if self.function == "tanh" else torch.atan)(tape.a, out=s).mul_(self.sign * self.alpha)
        if self.centred:
            s.sub_(s.mean(0))
        else:
            log_det.add_(s.sum(0))
        s.exp_()
        if self.sign > 0:
            torch.mul(m, s, out=tape.product)
            torch.add(tape.product, tape.t, out=m)
        else:
            torch.mul(m.sub_(tape.t), s, out=tape.product)
            m.copy_(tape.product)
        return x

    def backward(self, g: Tensor, weight: Tensor, tape: SimpleNamespace, grads: list[Tensor] | None) -> Tensor:
        gm = g[self.moved]
        if self.function is None:
            torch.mul(gm, self.sign, out=tape.grad)
        else:
            self._backward_affine(gm, weight, tape)
        grad = tape.grad.to(tape.out.dtype)
        start = 0
        for network, network_tape, part in zip(self.networks, tape.networks, grad.chunk(len(self.networks))):
            own = None if grads is None else grads[start : start + len(network.packed)]
            network.backward(part, network_tape, own, g[self.kept])
            start += len(network.packed)
        return g

    def _backward_affine(self, gm: Tensor, weight: Tensor, tape: SimpleNamespace) -> None:
        """From the gradient in the moved half those in a and t (in ``tape.grad``) and, in place, in its old value."""
        if self.sign > 0:
            tape.grad_t.copy_(gm)
        ds = torch.mul(gm, tape.product, out=tape.grad_a).sub_(weight)  # the log-determinant's part
        if self.centred:
            ds.sub_(ds.mean(0))
        gm.mul_(tape.factor)
        if self.sign < 0:
            torch.neg(gm, out=tape.grad_t)
        a = tape.a
        if self.function == "tanh":
            a.tanh_()
            ds.mul_(torch.addcmul(tape.slope, a, a, value=-self._slope(), out=a))
        else:
            ds.div_(torch.addcmul(tape.slope, a, a, value=self._slope(), out=a))


class Program:
    """
    A flow's steps, run on chunks of columns; one for each thread.

    :param list steps: as :func:`deepinv_flows.recognise.steps_of` gives them.
    :param Workspace space: buffers.
    :param list grads: where to add the gradients in the packed weights of each step; ``None`` for nowhere.
    """

    def __init__(self, steps: list, space: Workspace, grads: list[list[Tensor]] | None = None):
        self.steps, self.space = steps, space
        self.tapes = [step.prepare(space) for step in steps]
        self.log_det = space.new(1)[0]
        self.grads = [None] * len(steps) if grads is None else grads

    def nll(self, x: Tensor) -> Tensor:
        """Negative log-likelihood (n,) of the columns of x (D, n), which is overwritten."""
        log_det = self.log_det.zero_()
        for step, tape in zip(self.steps, self.tapes):
            x = step.forward(x, log_det, tape)
        self.z = x
        square = torch.mul(x, x, out=self.space.shared("gradient", len(x)))
        return square.sum(0).mul_(0.5).sub_(log_det)

    def grad(self, weight: Tensor) -> Tensor:
        """Gradient (D, n) of the sum of the last call's values times ``weight`` (n,)."""
        g = torch.mul(self.z, weight, out=self.space.shared("gradient", len(self.z)))
        for step, tape, grads in zip(self.steps[::-1], self.tapes[::-1], self.grads[::-1]):
            g = step.backward(g, weight, tape, grads)
        return g
