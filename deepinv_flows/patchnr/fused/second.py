"""Hessian-vector products by a flow's steps, and their gradients in the weights, over the patches of a batch of images."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..patches import PatchIndex
from .steps import Coupling, note, run
from .sweep import Sums, in_threads, locate, patches_of_chunk, shares, zeros
from .tangents import AffineTangent, CouplingTangent
from .workspace import Workspace, workspace


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

    :param list steps: as :func:`deepinv_flows.patchnr.fused.steps_of` gives them, that are ``twice_differentiable``.
    :param torch.Tensor x: images (B, C, H, W).
    :param int chunk_size: number of patches at a time, in each thread; rounded up to whole cache lines.
    :param torch.Tensor scale: factors s (B,).
    """

    steps: list
    x: Tensor
    index: PatchIndex
    chunk_size: int
    scale: Tensor
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.flat = self._flat(self.x)

    def gradient(self) -> tuple[Tensor, list]:
        """The gradient in the images, flat, and what ``along`` needs of it: of each thread and chunk, some memory."""
        found = in_threads(self._gradient, shares(self.flat, self.index), self.stopped)
        return sum(grad for grad, _ in found), [memory for _, memory in found]

    def along(self, direction: Tensor, weights: bool, memory: list | None = None) -> Sums:
        """
        The derivatives of the gradients in the images and, if wanted, in the packed weights.

        :param torch.Tensor direction: like x.
        :param list memory: of ``gradient``; it is computed anew if it is ``None``.
        """
        work = functools.partial(self._along, self._flat(direction), weights)
        # threads may have become more or fewer since memory was kept
        parts = [(*share, None) for share in shares(self.flat, self.index)] if memory is None else memory
        found = in_threads(work, parts, self.stopped)
        total = found[0]
        for other in found[1:]:
            total.add_(other)
        return total

    def _gradient(self, start: int, stop: int) -> tuple[Tensor, tuple[int, int, list]]:
        """The gradient of the patches with these numbers, and what is kept of each chunk of them."""
        size, grad, memory = self._size(start, stop), torch.zeros_like(self.flat), list[list[Tensor]]()
        for first in range(start, stop, size):
            if self.stopped.is_set():
                break
            with self._workspace(size) as space:
                kept = Workspace(size, space.state_dtype, space.device, space.dtype)
                program, pixels = self._prepared(kept, space, directed=False)
                self._first(program, pixels, first, stop)
                grad.index_add_(0, pixels.view(-1), program.grad.view(-1))
                memory.append(kept.slabs)
        return grad, (start, stop, memory)

    def _along(self, direction: Tensor, weights: bool, start: int, stop: int, memory: list | None) -> Sums:
        size, sums = self._size(start, stop), zeros(self.steps, self.flat, True, weights)
        with self._workspace(size) as space:
            if memory is None:
                program, pixels = self._prepared(space, space, grads=sums.grads)
            for k, first in enumerate(range(start, stop, size)):
                if self.stopped.is_set():
                    break
                if memory is None:
                    self._first(program, pixels, first, stop)
                else:
                    space.start(size, space.state_dtype, space.dtype)
                    kept = Workspace(size, space.state_dtype, space.device, space.dtype, memory[k])
                    program, pixels = self._prepared(kept, space, anew=False, grads=sums.grads)
                    locate(self.index, first, stop, pixels)
                torch.index_select(direction, 0, pixels.view(-1), out=program.dx.view(-1))
                run(program.then)
                sums.grad.index_add_(0, pixels.view(-1), program.dgrad.view(-1))  # type: ignore[union-attr]
        return sums

    def _first(self, program: SecondProgram, pixels: Tensor, first: int, stop: int) -> None:
        counts, number = locate(self.index, first, stop, pixels)
        torch.index_select(self.flat, 0, pixels.view(-1), out=program.x.view(-1))
        torch.mul(self.scale[number], counts, out=program.weight)
        run(program.first)

    def _prepared(self, kept: Workspace, space: Workspace, **options) -> tuple[SecondProgram, Tensor]:
        dim = len(self.index.offsets)
        return SecondProgram(self.steps, dim, kept, space, **options), space.new(dim, torch.int64)

    def _size(self, start: int, stop: int) -> int:
        return patches_of_chunk(stop - start, self.chunk_size, self.flat.dtype)

    def _workspace(self, size: int):
        return workspace(size, self.flat.dtype, self.flat.device, self.flat.dtype)

    def _flat(self, x: Tensor) -> Tensor:
        return x.detach().reshape(-1).to(self.steps[0].packed[0].dtype)
