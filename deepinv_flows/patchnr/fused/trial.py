"""
The trial of kernels: before the first use of those of a shape, they are compared with the plain path, on this very device.

Kernels that do not compile, do not run or give other numbers are not used in this process.
"""

import copy
import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .networks import Network
from .steps import Coupling, Program
from .workspace import Workspace

# of a relative norm; rounding to bfloat16 makes half a percent, and up to two for patches of two pixels
TOLERANCE = 0.05
GROUP = 32  # patches that have a norm of their own, as a wrong part of a tile would be lost among many right ones

_verdicts: dict[Hashable, bool] = {}


def passed(key: Hashable, step: Coupling, kernels: Callable, n: int, dtype: torch.dtype, backward: bool) -> bool:
    """
    Whether kernels agree with the plain path; a warning tells, once, if they do not.

    :param Hashable key: what distinguishes these kernels from others.
    :param Coupling step: a coupling of the shape that they are for.
    :param callable kernels: gives the step by kernels from a coupling.
    :param int n: number of patches to try, a multiple of GROUP.
    :param torch.dtype dtype: of their matrix products.
    :param bool backward: whether to try gradients too.
    """
    if key not in _verdicts:
        width, d = step.packed[0].shape
        if step.packed[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # for now: a graph that is captured cannot wait for a result
        try:
            difference = _difference(step, kernels, n, dtype, backward)
            problem = f"disagree with the plain path by {difference:.1%} (expected at most {TOLERANCE:.0%})"
        except Exception as error:  # of the compiler or the driver
            difference, problem = torch.nan, f"do not run ({type(error).__name__}: {error})"
        _verdicts[key] = difference <= TOLERANCE  # NaN does not pass
        if not _verdicts[key]:
            what = f"the fused kernels for {d} entries and layers of {width}"
            warnings.warn(f"{what} {problem}; the plain path is used", UserWarning, stacklevel=2)
    return _verdicts[key]


def _difference(step: Coupling, kernels: Callable, n: int, dtype: torch.dtype, backward: bool) -> float:
    """The largest relative norm, of values and gradients of a group of patches, between kernels and float32."""
    own, device = step.packed[0].dtype, step.packed[0].device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=own)

    like = copy.copy(step)
    # weights of the flow, which may be almost zero before training, would hide what is wrong; hidden layers of whole numbers and
    # a half are exact, and none is rectified on one side alone, which would be an error of some percent in the gradient
    width, d = step.packed[0].shape
    *hidden, last, bias = (normal(*w.shape) for w in step.packed)
    packed = [w.round() + 0.5 * (w.ndim == 1) for w in hidden] + [last * 2 / (width * d**0.5), bias]
    like.networks, like.alpha = [Network(packed, step.networks[0].activations)], 0.8
    x, weight = normal(step.dim, n).round(), normal(n)
    results = []
    for one, products in ((kernels(like), dtype), (like, own)):
        # twice, as kernels add to what the step before left
        program = Program([one, one], step.dim, Workspace(n, own, device, products), backward)
        program.x.copy_(x)
        program.weight.copy_(weight)
        program.run()
        results.append([program.value[None], program.grad] if backward else [program.value[None]])
    largest = [_relative(*pair).max() for pair in zip(*results)]
    return float(torch.stack(largest).max())  # NaN if any is; waits for the kernels, whose errors come late


def _relative(actual: Tensor, expected: Tensor) -> Tensor:
    error, size = (t.unflatten(1, (-1, GROUP)).square().sum((0, 2)) for t in (actual - expected, expected))
    return (error / size).sqrt()
