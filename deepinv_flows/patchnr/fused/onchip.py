"""
Couplings on Hopper GPUs (H100, H200) with products in 16 bits, by one kernel forward and one backward, if Triton is installed.

Hidden layers never leave the chip, so that the tensor cores and not memory set the pace. The weights have to be frozen, and to
fit into the shared memory of a multiprocessor together with a tile of patches. Kernels are compared with the plain path before
their first use (:mod:`deepinv_flows.patchnr.fused.trial`).

They are experimental, and used only where the environment variable ``DEEPINV_FLOWS_KERNELS`` is 1: Triton's interpreter and its
compiler for these GPUs have seen them, a GPU has not.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from .activations import relu
from .steps import Coupling, Permutation
from .trial import GROUP, passed
from .workspace import Workspace

PATCHES = 128  # of a tile
WARPS, STAGES = 8, 1  # loads ahead would need shared memory that the weights fill
MEMORY = 2**30  # bytes, about, that the steps keep of a chunk
ALIGNED = 16  # bytes, for which Triton compiles kernels of their own


class OnChip:
    """
    A coupling whose weights ask for no gradient, as a step of its own.

    :param Coupling coupling: one that is ``usable``.
    :param torch.Tensor rows: where the rows of the state are, which permutations before have not moved.
    :param bool backward: whether to keep what gradients need.
    """

    def __init__(self, coupling: Coupling, rows: Tensor, backward: bool):
        self.halves = rows[coupling.kept], rows[coupling.moved]
        self.coupling, self.keep, self.options = coupling, backward, _options(coupling)
        self.sign, self.alpha = coupling.sign, coupling.alpha

    def prepare(self, space: Workspace) -> SimpleNamespace:
        weights = [_aligned(w.detach()) for w in self.coupling.packed]
        weights[2] = weights[2].to(space.dtype)  # the others are converted as they are read
        rows = [self.options["E"]] * 2 if self.keep else [1, 1]
        words = -(-self.options["H"] // 128) * 4 if self.keep else 1
        return SimpleNamespace(
            kept=[space.new(size) for size in rows] + [space.new(words, torch.int32) for _ in range(2)],
            weights=weights,
            n=space.n,
        )

    def forward(self, do: Callable, x: Tensor, log_det: Tensor, tape: SimpleNamespace) -> Tensor:
        arguments = x, *self.halves, log_det, *tape.kept, *tape.weights, tape.n, self.sign * self.alpha
        do(_launch, "forward_kernel", *arguments, KEEP=self.keep, **self.options)
        return x

    def backward(self, do: Callable, g: Tensor, weight: Tensor, tape: SimpleNamespace, grads: None) -> Tensor:
        arguments = g, *self.halves, weight, *tape.kept, *tape.weights[::2], tape.n, self.sign * self.alpha
        do(_launch, "backward_kernel", *arguments, **self.options)
        return g


def on_chip(steps: list, space: Workspace, backward: bool) -> list:
    """
    The steps, with couplings by kernels where these can be used.

    Permutations are left out if nothing but kernels follows: the norm of the last state does not depend on the order of its rows.
    """
    can = [usable(step, space.dtype, space.device, backward) for step in steps]
    # numbers of entries, of a state or of words with 32 bits of a hidden layer, have to fit into 32 bits themselves
    if not any(can) or space.n * max(steps[0].dim, 8) >= 2**31:
        return steps
    others = [k for k, step in enumerate(steps) if not (can[k] or isinstance(step, Permutation))]
    rows = torch.arange(steps[0].dim, dtype=torch.int32, device=space.device)
    found = []
    for k, step in enumerate(steps):
        if can[k]:
            found.append(OnChip(step, rows, backward))
        elif isinstance(step, Permutation) and k > max(others, default=-1):
            rows = rows[step.rows]
        else:
            found.append(step)
    return found


def chunk_size(steps: list, dtype: torch.dtype, device: torch.device, backward: bool) -> int | None:
    """The number of patches at a time for steps whose couplings are all by kernels; ``None`` for others."""
    couplings = [step for step in steps if isinstance(step, Coupling)]
    if not couplings or not all(usable(step, dtype, device, backward) for step in couplings):
        return None
    # of a coupling two numbers for each entry of a half are kept, and a bit of each hidden unit
    return MEMORY // sum(4 * step.dim + len(step.packed[0]) // 4 for step in steps)


def usable(step, dtype: torch.dtype, device: torch.device, backward: bool) -> bool:
    """Whether there are kernels for this step, which have passed their trial."""
    if not fits(step, dtype, device):
        return False

    def kernels(coupling: Coupling) -> OnChip:
        return OnChip(coupling, torch.arange(step.dim, dtype=torch.int32, device=device), backward)

    n = 2 * PATCHES * _programs(device) + GROUP  # each program takes several tiles, and one a part of a tile
    key = *_options(step).items(), dtype, device, backward
    return passed(key, step, kernels, n, dtype, backward)


def fits(step, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for this step, for products in this dtype."""
    if dtype not in (torch.bfloat16, torch.float16) or not available(device):
        return False
    if not isinstance(step, Coupling) or step.function is None or step.centred or len(step.networks) != 1:
        return False
    packed, activations = step.packed, step.networks[0].activations
    rectified = len(packed) == 6 and all(act is relu() for act in activations)
    if not rectified or packed[0].dtype != torch.float32 or packed[2].shape[0] != packed[2].shape[1]:
        return False
    return _shared_memory(**_options(step)) <= _capacity(device)


def available(device: torch.device) -> bool:
    """Whether the user wants kernels, this is a Hopper GPU, as on others registers would not suffice, and Triton is installed."""
    if os.environ.get("DEEPINV_FLOWS_KERNELS") != "1":
        return False
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def _aligned(w: Tensor) -> Tensor:
    return w.clone(memory_format=torch.contiguous_format) if w.data_ptr() % ALIGNED else w.contiguous()


def _capacity(device: torch.device) -> int:
    """Bytes of shared memory that one block can take."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 49152)


def _options(step: Coupling) -> dict:
    """The constants of the kernels; sizes of products are powers of 2."""
    width, d = step.packed[0].shape
    e = step.moved.stop - step.moved.start
    padded = {name: max(1 << (size - 1).bit_length(), 16) for name, size in zip(("K", "H", "OUT"), (d, width, e))}
    return dict(D=d, E=e, WIDTH=width, M=PATCHES, BACK=step.sign < 0, TANH=step.function == "tanh", **padded)


def _shared_memory(K: int, H: int, OUT: int, M: int, **_) -> int:
    weights, biases = H * (H + K + 2 * OUT), 32 * (H + OUT)
    return 2 * (weights + biases) + 4 * M * max(K, OUT)


def _launch(name: str, x: Tensor, *arguments, M: int, **constants) -> None:
    n = arguments[-2]
    with torch.cuda.device_of(x):
        _kernel(name)[(min(-(-n // M), _programs(x.device)),)](
            x, *arguments, M=M, num_warps=WARPS, num_stages=STAGES, **constants
        )


@functools.cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _kernel(name: str):
    from . import kernels

    return getattr(kernels, name)
