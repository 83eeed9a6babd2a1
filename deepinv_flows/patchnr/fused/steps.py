r"""
The steps of a patch flow with their derivatives written out, without a graph, in buffers that are reused for each chunk.

A chunk of N patches is held as the columns of a (D, N) matrix, so that halves and single entries are contiguous rows.

Each step has the dimension ``dim`` of a patch; ``packed`` weights, which are functions of the flow's parameters (autograd maps
their gradients back); and

- ``forward(do, x, log_det, tape)``: gives the new state, adds to ``log_det`` (N,), and keeps what ``backward`` needs in ``tape``;
- ``backward(do, g, weight, tape, grads)``: gives the gradient of :math:`L = \sum_i w_i (\tfrac12 \|z_i\|^2 - \log|\det J|_i)` in
  the old state from the gradient g in the new state, and adds the gradients in ``packed`` to ``grads`` unless it is ``None``;
- ``inverse()``: gives the inverse step;
- ``recorded(x)``: gives the new state and log-determinants of the rows of x (n, D), with a graph in x and in ``packed``.

The first two are called once, with x, g and the rest as buffers. By ``do(operation, ...)`` they note the operations that are then
run for each chunk. An operation writes to a buffer, never to a new tensor, and takes one call from the Python interpreter, which
runs one thread at a time.
"""

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from .networks import Network
from .workspace import Workspace


class Affine:
    r"""
    :math:`x \mapsto W x + b`.

    :param list packed: [W (D, D), b (D, 1), :math:`\log|\det W|` ()].
    :param callable inverse_packed: returns the same three tensors for the inverse.
    """

    def __init__(self, packed: list[Tensor], inverse_packed: Callable[[], list[Tensor]]):
        self.packed, self.inverse_packed = packed, inverse_packed

    @property
    def dim(self) -> int:
        return len(self.packed[0])

    def inverse(self) -> "Affine":
        return Affine(self.inverse_packed(), lambda: self.packed)

    def recorded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        matrix, offset, log_det = self.packed
        return x @ matrix.t() + offset.t(), log_det

    def prepare(self, space: Workspace) -> SimpleNamespace:
        dim = len(self.packed[0])
        weights = [w.detach() for w in self.packed]
        return SimpleNamespace(
            weights=weights,
            out=space.new(dim),
            grad=space.new(dim),
            input=None,
            sums=[torch.empty_like(w) for w in weights[1:]],
        )

    def forward(self, do: Callable, x: Tensor, log_det: Tensor, tape: SimpleNamespace) -> Tensor:
        matrix, offset, constant = tape.weights
        do(log_det.add_, constant)
        tape.input = x
        do(torch.mm, matrix, x, out=tape.out)
        do(tape.out.add_, offset)
        return tape.out

    def backward(self, do: Callable, g: Tensor, weight: Tensor, tape: SimpleNamespace, grads: list | None) -> Tensor:
        if grads is not None:
            do(grads[0].addmm_, g, tape.input.t())
            do(torch.sum, g, 1, keepdim=True, out=tape.sums[0])
            do(grads[1].add_, tape.sums[0])
            do(torch.sum, weight, 0, out=tape.sums[1])
            do(grads[2].sub_, tape.sums[1])
        do(torch.mm, tape.weights[0].t(), g, out=tape.grad)
        return tape.grad


class Permutation(Affine):
    """
    :math:`x \\mapsto (x_{r_1}, \\dots, x_{r_D})`.

    :param torch.Tensor rows: the numbers r.
    :param torch.Tensor like: a weight, for its dtype.
    """

    def __init__(self, rows: Tensor, like: Tensor):
        self.rows, self.like = rows, like
        zero = like.new_zeros(len(rows), 1)
        super().__init__([torch.eye(len(rows), out=like.new_empty(0))[rows], zero, like.new_zeros(())], list)

    def inverse(self) -> "Permutation":
        return Permutation(self.rows.argsort(), self.like)


class Coupling:
    r"""
    Moves one half of the entries by networks of the other half: :math:`x_m \mapsto x_m e^{s} + t`, or back by
    :math:`x_m \mapsto (x_m - t) e^{-s}`, with :math:`(a, t)` from the networks and :math:`s = \alpha f(a)`.

    :param slice kept: rows that are the input of the networks.
    :param slice moved: rows that move.
    :param list networks: one network for a and t, or one for each of them; one for t alone if ``function`` is ``None``.
    :param str function: f, ``"atan"`` or ``"tanh"``; ``None`` for s = 0.
    :param float alpha: :math:`\alpha`.
    :param bool centred: whether to subtract from s its mean, so that the volume is preserved.
    """

    def __init__(self, kept: slice, moved: slice, networks: list[Network], function=None, alpha=1.0, centred=False):
        self.kept, self.moved, self.networks = kept, moved, networks
        self.function, self.alpha, self.centred = function, float(alpha), centred
        self.sign = 1

    @property
    def dim(self) -> int:
        return max(self.kept.stop, self.moved.stop)

    @property
    def packed(self) -> list[Tensor]:
        return [w for network in self.networks for w in network.packed]

    def inverse(self) -> "Coupling":
        step = copy.copy(self)
        step.sign = -self.sign
        return step

    def recorded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = x[:, self.moved]
        out = torch.cat([network.recorded(x[:, self.kept]) for network in self.networks], 1)
        a, t = out[:, : -m.shape[1]], out[:, -m.shape[1] :]
        if self.function is None:
            m, log_det = m + self.sign * t, x.new_zeros(())
        else:
            s = self.sign * self.alpha * getattr(torch, self.function)(a)
            s = s - s.mean(1, keepdim=True) if self.centred else s
            m = m * s.exp() + t if self.sign > 0 else (m - t) * s.exp()
            log_det = x.new_zeros(()) if self.centred else s.sum(1)
        halves = (m, x[:, self.kept]) if self.moved.start == 0 else (x[:, self.kept], m)
        return torch.cat(halves, 1), log_det

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
            sum=space.shared("sum", 1)[0],
            grad=grad,
            grad_a=grad[:-d],
            grad_t=grad[-d:],
            # (1 + a^2) / alpha, or alpha (1 - a^2), up to the sign of s
            slope=torch.tensor(self._slope(), dtype=space.state_dtype, device=space.device),
        )

    def _slope(self) -> float:
        return self.sign * (self.alpha if self.function == "tanh" else 1 / self.alpha)

    def forward(self, do: Callable, x: Tensor, log_det: Tensor, tape: SimpleNamespace) -> Tensor:
        for network_tape, out in zip(tape.networks, tape.outs):
            network_tape.forward(do, x[self.kept], out)
        if tape.state is not tape.out:
            do(tape.state.copy_, tape.out)
        m, s = x[self.moved], tape.factor
        if self.function is None:
            do(m.add_, tape.t, alpha=self.sign)
            return x
        do(torch.tanh if self.function == "tanh" else torch.atan, tape.a, out=s)
        do(s.mul_, self.sign * self.alpha)
        if self.centred:
            centre(do, s, tape.sum)
        else:
            do(torch.sum, s, 0, out=tape.sum)
            do(log_det.add_, tape.sum)
        do(s.exp_)
        if self.sign > 0:
            do(torch.mul, m, s, out=tape.product)
            do(torch.add, tape.product, tape.t, out=m)
        else:
            do(m.sub_, tape.t)
            do(torch.mul, m, s, out=tape.product)
            do(m.copy_, tape.product)
        return x

    def backward(self, do: Callable, g: Tensor, weight: Tensor, tape: SimpleNamespace, grads: list | None) -> Tensor:
        gm, grad = g[self.moved], tape.grad
        if self.function is None:
            do(torch.mul, gm, self.sign, out=grad)
        else:
            self._backward_affine(do, gm, weight, tape)
        start = 0
        for network, network_tape, part in zip(self.networks, tape.networks, grad.chunk(len(self.networks))):
            own = None if grads is None else grads[start : start + len(network.packed)]
            network_tape.backward(do, part, own, g[self.kept])
            start += len(network.packed)
        return g

    def _backward_affine(self, do: Callable, gm: Tensor, weight: Tensor, tape: SimpleNamespace) -> None:
        """Turn the gradient in the moved half into the one before the step; write those in a and t to ``tape.grad``."""
        if self.sign > 0:
            do(tape.grad_t.copy_, gm)
        a, ds = tape.a, tape.grad_a
        do(torch.mul, gm, tape.product, out=ds)
        do(ds.sub_, weight)  # the log-determinant's part
        if self.centred:
            centre(do, ds, tape.sum)
        do(gm.mul_, tape.factor)
        if self.sign < 0:
            do(torch.neg, gm, out=tape.grad_t)
        if self.function == "tanh":
            do(a.tanh_)
            do(torch.addcmul, tape.slope, a, a, value=-self._slope(), out=a)
            do(ds.mul_, a)
        else:
            do(torch.addcmul, tape.slope, a, a, value=self._slope(), out=a)
            do(ds.div_, a)


def centre(do: Callable, s: Tensor, mean: Tensor) -> None:
    """Subtract from the columns of s their means, which are written to ``mean``."""
    do(torch.mean, s, 0, out=mean)
    do(s.sub_, mean)


def recorded_nll(steps: list, x: Tensor) -> Tensor:
    """Negative log-likelihoods (n,) of the rows of x (n, D), without the constant, with a graph."""
    total = x.new_zeros(len(x))
    for step in steps:
        x, log_det = step.recorded(x)
        total = total + log_det
    return 0.5 * x.square().sum(1) - total


class Program:
    """
    The operations of a flow's steps for a chunk of patches; each thread has a program of its own.

    :param list steps: as :func:`deepinv_flows.patchnr.fused.steps_of` gives them.
    :param int dim: number of entries of a patch.
    :param Workspace space: source of buffers.
    :param bool backward: whether to compute gradients.
    :param list grads: where to add the gradients in the packed weights of each step; ``None`` if they are not wanted.

    The patches are written to ``x`` (D, n) and their factors in gradients to ``weight`` (n,). After ``run``, ``value`` (n,) holds
    their negative log-likelihoods, and ``grad`` (D, n) the gradient in x of the weighted sum; ``x`` is overwritten.
    """

    def __init__(self, steps: list, dim: int, space: Workspace, backward: bool = True, grads: list | None = None):
        self.operations: list[Callable] = []
        self.x, self.weight, self.value, log_det = space.new(dim), *(space.new(1)[0] for _ in range(3))
        tapes, do = [step.prepare(space) for step in steps], functools.partial(note, self.operations)
        z = self.x
        do(log_det.zero_)
        for step, tape in zip(steps, tapes):
            z = step.forward(do, z, log_det, tape)
        g = space.shared("gradient", dim)
        do(torch.mul, z, z, out=g)
        do(torch.sum, g, 0, out=self.value)
        do(self.value.mul_, 0.5)
        do(self.value.sub_, log_det)
        if backward:
            do(torch.mul, z, self.weight, out=g)
            for step, tape, own in zip(steps[::-1], tapes[::-1], (grads or [None] * len(steps))[::-1]):
                g = step.backward(do, g, self.weight, tape, own)
        self.grad = g

    def run(self) -> None:
        run(self.operations)


def note(operations: list[Callable], operation: Callable, *args, **kwargs) -> None:
    """Note an operation, to run it for each chunk."""
    operations.append(functools.partial(operation, *args, **kwargs))


def run(operations: list[Callable]) -> None:
    """Run what was noted."""
    for operation in operations:
        operation()
