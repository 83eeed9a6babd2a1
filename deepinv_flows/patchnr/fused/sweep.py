"""Values and gradients by a flow's steps, summed over the patches of a batch of images, chunk by chunk, in several threads."""

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..patches import PatchIndex
from .onchip import on_chip
from .steps import Program
from .workspace import workspace

LEAST_SHARE = 256  # with fewer patches a thread is not worth its start
ALIGNED = 64  # bytes of a cache line; matrix products of a chunk size that it does not divide take a sixth longer


@dataclass
class Sums:
    """
    Sums over patches.

    :param torch.Tensor grad: gradient in the image, flat; ``None`` if not wanted.
    :param list grads: gradients in the packed weights of each step; ``None`` if not wanted.

    ``value`` (B,) are the negative log-likelihoods of each image, when all its patches are evaluated.
    """

    grad: Tensor | None
    grads: list[list[Tensor]] | None
    value: Tensor = field(init=False)

    def add_(self, other: "Sums") -> "Sums":
        if self.grad is not None and other.grad is not None:
            self.grad += other.grad
        for mine, its in zip(self.grads or [], other.grads or []):
            for a, b in zip(mine, its):
                a += b
        return self


def patch_sums(
    steps: list,
    x: Tensor,
    index: PatchIndex,
    chunk_size: int,
    dtype=None,
    image: bool = True,
    weights: bool = False,
    scale: Tensor | None = None,
) -> Sums:
    """
    The sums over all patches of an index.

    :param list steps: as :func:`deepinv_flows.patchnr.fused.steps_of` gives them.
    :param torch.Tensor x: images (B, C, H, W).
    :param int chunk_size: number of patches at a time, in each thread; rounded up to whole cache lines.
    :param torch.dtype dtype: of matrix products; ``None`` for the dtype of x.
    :param bool image: whether to compute the gradient in the image.
    :param bool weights: whether to compute the gradients in the packed weights.
    :param torch.Tensor scale: factors of the images in the gradients (B,); ``None`` for 1.
    :return: sums; equal at each call with the same number of threads, as shares and the order of additions are fixed.
    """
    flat = x.detach().reshape(-1).to(steps[0].packed[0].dtype)  # under autocast x may have another dtype
    sweep = _Sweep(steps, flat, index, chunk_size, dtype or flat.dtype, image, weights, scale)
    found = in_threads(sweep.share, split(len(index), thread_count(flat, len(index))), sweep.stopped)
    total = functools.reduce(Sums.add_, found)
    double = torch.float64 if flat.device.type != "mps" else flat.dtype
    total.value = sweep.values.view(index.batch, index.per_image).sum(1, dtype=double)
    return total


@dataclass
class _Sweep:
    """What the threads of one call of ``patch_sums`` have in common."""

    steps: list
    flat: Tensor
    index: PatchIndex
    chunk_size: int
    dtype: torch.dtype
    image: bool
    weights: bool
    scale: Tensor | None
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.values = self.flat.new_empty(len(self.index))  # of all patches; each thread writes those of its own

    def share(self, start: int, stop: int) -> Sums:
        """The sums over the patches with these numbers."""
        flat, dim = self.flat, len(self.index.offsets)
        sums = zeros(self.steps, flat, self.image, self.weights)
        size = patches_of_chunk(stop - start, self.chunk_size, self.dtype)
        with workspace(size, flat.dtype, flat.device, self.dtype) as space:
            steps = self.steps if self.weights else on_chip(self.steps, space, self.image)
            program = Program(steps, dim, space, self.image or self.weights, sums.grads)
            pixels = space.new(dim, torch.int64)
            for first in range(start, stop, size):
                if self.stopped.is_set():
                    break
                self._chunk(program, pixels, first, stop, sums)
        return sums

    def _chunk(self, program: Program, pixels: Tensor, first: int, stop: int, sums: Sums) -> None:
        counts, number = locate(self.index, first, stop, pixels)
        flat_pixels = pixels.view(-1)
        torch.index_select(self.flat, 0, flat_pixels, out=program.x.view(-1))
        program.weight.copy_(counts if self.scale is None else counts * self.scale[number])
        program.run()
        last = min(first + pixels.shape[1], stop)
        self.values[first:last] = program.value[: last - first]
        if sums.grad is not None:
            sums.grad.index_add_(0, flat_pixels, program.grad.view(-1))


def patches_of_chunk(total: int, chunk_size: int, dtype: torch.dtype) -> int:
    """The size of the smallest number of equal chunks, in whole cache lines."""
    size, entries = math.ceil(total / math.ceil(total / chunk_size)), ALIGNED // dtype.itemsize
    return math.ceil(size / entries) * entries


def locate(index: PatchIndex, first: int, stop: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """
    Write the pixels of as many patches from the first one on as ``pixels`` (D, n) has columns.

    :return: whether each patch counts, and the numbers of the images (n,); the last chunk is filled up with patches that do not.
    """
    numbers = torch.arange(first, first + pixels.shape[1], device=pixels.device)
    counts = numbers < stop
    return counts, index.columns(numbers.clamp_(max=stop - 1), pixels)[0]


def zeros(steps: list, flat: Tensor, image: bool, weights: bool) -> Sums:
    grads = [[flat.new_zeros(w.shape) for w in step.packed] for step in steps] if weights else None
    return Sums(torch.zeros_like(flat) if image else None, grads)


def thread_count(flat: Tensor, patches: int) -> int:
    """How many threads are worth their start."""
    return min(_alone.threads(), max(patches // LEAST_SHARE, 1)) if flat.device.type == "cpu" else 1


class _Alone:
    """A context in which torch uses one thread for each operation; its number of threads, global to all callers, is restored."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, 1

    def threads(self) -> int:
        with self.lock:
            return self.before if self.inside else torch.get_num_threads()

    def __enter__(self) -> None:
        with self.lock:
            self.before = self.before if self.inside else torch.get_num_threads()
            self.inside += 1
        torch.set_num_threads(1)  # MKL has one such number for all threads

    def __exit__(self, *error) -> None:
        with self.lock:
            self.inside -= 1
            torch.set_num_threads(self.before)


_alone = _Alone()


def split(total: int, parts: int) -> list[tuple[int, int]]:
    """The bounds of at most so many parts, none of them empty."""
    parts = min(parts, total)
    return list(itertools.pairwise(total * k // parts for k in range(parts + 1)))


def in_threads(work: Callable, shares: list[tuple], stopped: threading.Event) -> list:
    """
    The results of ``work(*share)`` for each share, each in a thread of its own.

    Two cores that work on chunks of their own, each in its own cache, are faster than two that divide each operation on a larger
    chunk.
    """

    def run(share):
        with torch.no_grad():
            return work(*share)

    if len(shares) == 1:
        return [run(shares[0])]
    try:
        with _alone:
            return list(_pool(len(shares), os.getpid()).map(run, shares))
    except BaseException:  # also for an interrupt: threads that went on would delay the next call
        stopped.set()
        raise


@functools.lru_cache(maxsize=2)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """The pool, which is kept, as the first products of a new thread take milliseconds; a forked process gets its own."""
    return ThreadPoolExecutor(threads, "deepinv_flows", torch.set_num_threads, (1,))
