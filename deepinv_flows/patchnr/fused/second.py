"""Hessian-vector products by a flow's steps, and their gradients in the weights, over the patches of a batch of images."""

import functools
import math
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..patches import PatchIndex
from .steps import Coupling, note, run
from .sweep import ALIGNED, Sums, in_threads, locate, patches_of_chunk, split, thread_count, zeros
from .tangents import AffineTangent, CouplingTangent
from .workspace import Workspace, memory, workspace

LEAST = 512  # patches of a chunk; fewer are not worth its program
SHARED = 8  # chunks into which few patches are divided, for as many threads
MEMORY = 2**29  # bytes that may be kept until backward passes, by all calls together


def twice_differentiable(steps: list) -> bool:
    """Whether second derivatives of these steps are written out."""
    couplings = [step for step in steps if isinstance(step, Coupling)]
    return all(
        act.twice_differentiable for step in couplings for network in step.networks for act in network.activations
    )


class SecondProgram:
    """
    The operations for a chunk of patches, in two lists: ``first`` for gradients, and ``then`` for a direction.

    :param list steps: as :func:`deepinv_flows.patchnr.fused.steps_of` gives them.
    :param int dim: number of entries of a patch.
    :param Workspace kept: source of buffers for what ``then`` needs of ``first``.
    :param Workspace space: source of buffers for ``then``; the same one if there is a single direction.
    :param bool anew: whether to note ``first``; otherwise ``kept`` has what it left there.
    :param bool directed: whether to note ``then``.
    :param list grads: where ``then`` adds tangents of the gradients in the packed weights; ``None`` if they are not wanted.

    The patches are written to ``x`` (D, n), which is overwritten, and their factors in gradients to ``weight`` (n,), from which
    ``first`` makes ``grad`` (D, n). From directions in ``dx`` (D, n), overwritten too, ``then`` makes ``dgrad`` (D, n).
    """

    def __init__(
        self,
        steps: list,
        dim: int,
        kept: Workspace,
        space: Workspace,
        anew: bool = True,
        directed: bool = True,
        grads: list | None = None,
    ):
        self.first: list[Callable] = []
        self.then: list[Callable] = []
        self.x, self.weight, g = kept.new(dim), kept.new(1)[0], kept.new(dim)
        self.dx, dg = space.new(dim), space.new(dim)
        kinds = [CouplingTangent if isinstance(step, Coupling) else AffineTangent for step in steps]
        tangents = [kind(step, kept, space) for kind, step in zip(kinds, steps)]
        self.grad = self._at(functools.partial(note, self.first) if anew else _nothing, tangents, g)
        if directed:
            self.dgrad = self._along(functools.partial(note, self.then), tangents, dg, grads)

    def _at(self, do: Callable, tangents: list, g: Tensor) -> Tensor:
        z = self.x
        for step in tangents:
            z = step.forward(do, z)
        do(torch.mul, z, self.weight, out=g)
        for step in tangents[::-1]:
            g = step.backward(do, g, self.weight)
        return g

    def _along(self, do: Callable, tangents: list, dg: Tensor, grads: list | None) -> Tensor:
        dz = self.dx
        for step in tangents:
            dz = step.push(do, dz)
        do(torch.mul, dz, self.weight, out=dg)
        for step, own in zip(tangents[::-1], (grads or [None] * len(tangents))[::-1]):
            dg = step.pull(do, dg, own)
        return dg


def _nothing(operation: Callable, *args, **kwargs) -> None:
    pass


@dataclass
class Second:
    r"""
    The gradient of :math:`\sum_b s_b g(x_b)`, up to the weight of a patch, and its derivatives along directions.

    Chunks do not depend on how many threads there are, so that what one number of threads kept serves another.

    :param list steps: as :func:`deepinv_flows.patchnr.fused.steps_of` gives them, that are ``twice_differentiable``.
    :param torch.Tensor x: images (B, C, H, W).
    :param int chunk_size: most patches at a time, in each thread, up to whole cache lines.
    :param torch.Tensor scale: factors s (B,).
    """

    steps: list
    x: Tensor
    index: PatchIndex
    chunk_size: int
    scale: Tensor
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.flat, total = self._flat(self.x), len(self.index)
        several = min(os.cpu_count() or 1, SHARED, total // LEAST) if self.flat.device.type == "cpu" else 1
        parts = max(math.ceil(total / self.chunk_size), several)
        self.size = patches_of_chunk(total, math.ceil(total / parts), self.flat.dtype)
        self.firsts = range(0, total, self.size)

    @functools.cached_property
    def kept_shape(self) -> tuple[int, int]:
        """The number of chunks, and the bytes that are kept of each; the last one is 1."""
        nowhere = torch.device("meta")
        kept = Workspace(
            self.size, self.flat.dtype, nowhere, self.flat.dtype, torch.empty(2**50, dtype=torch.uint8, device=nowhere)
        )
        space = Workspace(self.size, self.flat.dtype, nowhere, self.flat.dtype)
        SecondProgram(self.steps, len(self.index.offsets), kept, space, anew=False, directed=False)
        return len(self.firsts), kept.taken + ALIGNED

    def fits(self, beside: bool = False) -> bool:
        """Whether what ``along`` needs fits into memory, alone or ``beside`` what is kept already."""
        return math.prod(self.kept_shape) <= MEMORY - (_alive.bytes if beside else 0)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The gradient in the images, flat, and what ``along`` needs of it, of the shape ``kept_shape``."""
        kept = memory(math.prod(self.kept_shape), self.flat.device).view(self.kept_shape)
        kept[-1, -1] = 1
        _alive.watch(kept)
        return sum(self._by_threads(functools.partial(self._gradient, kept))), kept

    def along(self, direction: Tensor, weights: bool, kept: Tensor | None = None) -> Sums:
        """
        The derivatives of the gradients in the images and, if wanted, in the packed weights.

        :param torch.Tensor direction: like x.
        :param torch.Tensor kept: of ``gradient``; what is needed is computed anew if it is ``None``.
        """
        work = functools.partial(self._along, self._flat(direction), weights, kept)
        return functools.reduce(Sums.add_, self._by_threads(work))

    def _by_threads(self, work: Callable) -> list:
        return in_threads(work, split(len(self.firsts), thread_count(self.flat, len(self.index))), self.stopped)

    def _gradient(self, kept: Tensor, start: int, stop: int) -> Tensor:
        """The gradient of the patches of these chunks."""
        grad = torch.zeros_like(self.flat)
        for k in range(start, stop):
            if self.stopped.is_set():
                break
            with self._workspace() as space:
                program, pixels = self._prepared(self._of_chunk(kept, k), space, directed=False)
                self._first(program, pixels, k)
                grad.index_add_(0, pixels.view(-1), program.grad.view(-1))
        return grad

    def _along(self, direction: Tensor, weights: bool, kept: Tensor | None, start: int, stop: int) -> Sums:
        sums = zeros(self.steps, self.flat, True, weights)
        with self._workspace() as space:
            if kept is None:
                program, pixels = self._prepared(space, space, grads=sums.grads)
            for k in range(start, stop):
                if self.stopped.is_set():
                    break
                if kept is None:
                    self._first(program, pixels, k)
                else:
                    space.start(self.size, space.state_dtype, space.dtype)
                    program, pixels = self._prepared(self._of_chunk(kept, k), space, anew=False, grads=sums.grads)
                    locate(self.index, self.firsts[k], len(self.index), pixels)
                torch.index_select(direction, 0, pixels.view(-1), out=program.dx.view(-1))
                run(program.then)
                sums.grad.index_add_(0, pixels.view(-1), program.dgrad.view(-1))  # type: ignore[union-attr]
        return sums

    def _first(self, program: SecondProgram, pixels: Tensor, k: int) -> None:
        counts, number = locate(self.index, self.firsts[k], len(self.index), pixels)
        torch.index_select(self.flat, 0, pixels.view(-1), out=program.x.view(-1))
        torch.mul(self.scale[number], counts, out=program.weight)
        run(program.first)

    def _prepared(self, kept: Workspace, space: Workspace, **options) -> tuple[SecondProgram, Tensor]:
        dim = len(self.index.offsets)
        return SecondProgram(self.steps, dim, kept, space, **options), space.new(dim, torch.int64)

    def _of_chunk(self, kept: Tensor, k: int) -> Workspace:
        return Workspace(self.size, self.flat.dtype, self.flat.device, self.flat.dtype, kept[k])

    def _workspace(self):
        return workspace(self.size, self.flat.dtype, self.flat.device, self.flat.dtype)

    def _flat(self, x: Tensor) -> Tensor:
        return x.detach().reshape(-1).to(self.steps[0].packed[0].dtype)


class _Alive:
    """The bytes that are kept at the moment, by all calls together."""

    def __init__(self) -> None:
        self.lock, self.bytes = threading.Lock(), 0

    def watch(self, kept: Tensor) -> None:
        self._add(kept.numel())
        weakref.finalize(kept, self._add, -kept.numel())

    def _add(self, number: int) -> None:
        with self.lock:
            self.bytes += number


_alive = _Alive()
