"""Buffers for chunks of patches, which are kept from call to call."""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

SLAB = 2**23  # bytes
KEPT = 2**27  # bytes; a larger workspace is not kept after a call


class Workspace:
    """
    Buffers for chunks of n patches.

    :param int n: number of patches.
    :param torch.dtype state_dtype: dtype of everything but matrix products.
    :param torch.dtype dtype: dtype of matrix products.
    :param torch.Tensor slab: memory to begin with; a workspace of this size on the same memory has the same buffers.
    """

    def __init__(
        self,
        n: int,
        state_dtype: torch.dtype,
        device: torch.device,
        dtype: torch.dtype,
        slab: Tensor | None = None,
    ):
        self.slabs = [] if slab is None else [slab]
        self.typed: dict = {}  # the slabs, viewed as each dtype
        self.device = device
        self.start(n, state_dtype, dtype)

    def start(self, n: int, state_dtype: torch.dtype, dtype: torch.dtype) -> "Workspace":
        """Take all buffers back, to hand them out for chunks of another size."""
        self.n, self.state_dtype, self.dtype = n, state_dtype, dtype
        self.slab, self.taken = 0, 0
        self.by_name: dict[tuple, Tensor] = {}
        return self

    def new(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer (rows, n), not initialised."""
        dtype = dtype or self.state_dtype
        size = rows * self.n * dtype.itemsize
        while self.slab < len(self.slabs) and self.taken + size > len(self.slabs[self.slab]):
            self.slab, self.taken = self.slab + 1, 0
        if self.slab == len(self.slabs):
            self.slabs.append(memory(max(-(-size // 64) * 64, SLAB), self.device))
        start, self.taken = self.taken // dtype.itemsize, self.taken + -(-size // 64) * 64
        if (self.slab, dtype) not in self.typed:
            self.typed[self.slab, dtype] = self.slabs[self.slab].view(dtype)
        slab = self.typed[self.slab, dtype]
        return slab.as_strided((rows, self.n), (self.n, 1), slab.storage_offset() + start)

    @property
    def nbytes(self) -> int:
        return sum(len(slab) for slab in self.slabs)

    def shared(self, name: str, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer (rows, n) that all steps share, so that it stays in cache; its content is used before the next step."""
        key = name, rows, dtype
        if key not in self.by_name:
            self.by_name[key] = self.new(rows, dtype)
        return self.by_name[key]


_kept = threading.local()


@contextlib.contextmanager
def workspace(n: int, state_dtype: torch.dtype, device: torch.device, dtype: torch.dtype) -> Iterator[Workspace]:
    """A workspace; on a CPU that of this thread, which is kept if it is small, as the first write to new memory is slow."""
    if device.type != "cpu":
        yield Workspace(n, state_dtype, device, dtype)
        return
    if n > getattr(_kept, "capacity", 0):  # slabs of the former workspace would be too small, and stay unused
        _kept.capacity, _kept.space = n, Workspace(n, state_dtype, device, dtype)
    try:
        yield _kept.space.start(n, state_dtype, dtype)
    finally:
        if _kept.space.nbytes > KEPT:
            del _kept.capacity, _kept.space


def memory(size: int, device: torch.device) -> Tensor:
    """So many bytes, not initialised."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    # numpy asks for huge pages: the first write to small pages takes longer than the work on a small image
    return torch.from_numpy(np.empty(size, dtype=np.uint8))
