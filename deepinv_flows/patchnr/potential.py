r"""
The potential of the patches of an image under a flow: its value and gradient in the image, without or with a graph.

For an image :math:`x` with patches :math:`P_1 x, \dots, P_n x` the potential is the mean negative log-likelihood

.. math::

    g(x) = \frac{1}{n} \sum_{i=1}^n h(P_i x), \qquad h(p) = \tfrac12 \|z\|^2 - \log|\det J(p)|, \quad (z, \log|\det J|) = f(p)

of a flow :math:`f` (without the constant :math:`\tfrac D2 \log 2\pi`). Patches are taken in raster order, a chunk at a
time, so that memory does not grow with the image. If every part of the flow is known, derivatives are written out in
:mod:`deepinv_flows.patchnr.fused`, and :mod:`deepinv_flows.patchnr.recorded` makes autograd use them. Other flows, and few
patches of any flow, are evaluated by autograd inside each chunk (:mod:`deepinv_flows.patchnr.plain`).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import full_precision, transformed
from ..flows import like_weights, nll
from . import plain, recorded
from .fused import Second, chunk_size, patch_sums, steps_of
from .fused.sweep import Sums
from .patches import PatchIndex

UNKNOWN = object()
MANY = 1024  # patches of a step of training, from which on written-out derivatives save time
FEW = 256  # fewer patches are evaluated by autograd in less time than it takes to read a flow's steps


@dataclass
class Asked:
    """
    What the last backward pass asked for, which the next forward pass computes in advance, or leaves to the backward pass.

    :param bool weights: gradients in the weights, of images with one factor in the loss.
    :param bool unequal: the same, of images with different factors.
    :param bool second: derivatives of the gradient, for which the next gradients keep what they have computed.
    """

    weights: bool = False
    unequal: bool = False
    second: bool = False


class PatchPotential:
    """
    The potential of the patches of an image batch.

    A call never changes the flow, not even for a moment. If other tensors take the place of its parameters, its steps are
    evaluated on them, or, if these are not known, a copy of the flow.

    :param torch.nn.Module flow: flow on (N, D).
    :param PatchIndex index: the patches to take.
    :param int chunk_size: number of patches at a time; ``None`` chooses it.
    :param str precision: ``"bfloat16"`` for matrix products in this dtype, if the hardware has them, save for second derivatives;
        autocast does the same. ``None`` is the dtype of the weights.
    :param Asked asked: what the backward pass of the last call asked for; the backward pass of this call updates it.
    :param dict weights: tensors (by name) in place of the flow's parameters; ``None`` for the parameters.
    """

    def __init__(
        self,
        flow: nn.Module,
        index: PatchIndex,
        chunk_size: int | None = None,
        precision: str | None = None,
        asked: Asked | None = None,
        weights: dict[str, Tensor] | None = None,
    ):
        self.flow, self.index, self.chunk_size, self.precision = flow, index, chunk_size, precision
        self.asked = Asked() if asked is None else asked
        self.params = dict(flow.named_parameters()) | (weights or {})
        self.replaced = bool(weights)
        self.dtype: Any = UNKNOWN  # of matrix products, as it was in the forward pass

    @property
    def trainable(self) -> bool:
        """Whether autograd is recording and any weight of the flow asks for a gradient."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.params.values())

    def value(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood (B,) of the patches of images x (B, C, H, W), differentiable in x and the weights."""
        if transformed(x, *self.params.values()):
            return plain.value(self.module(), x, self.index, len(self.index))
        return self.by_steps(x, self.steps(x))

    def by_steps(self, x: Tensor, steps: list | None) -> Tensor:
        """The value by these steps; by autograd in the flow if they are ``None``."""
        trainable, self.dtype = self.trainable, _product_dtype(x, self.precision)
        if not trainable and not (x.requires_grad and torch.is_grad_enabled()):
            return self.constants(x, steps, image=False)[0]
        chunk = self.recorded_chunk(x)
        # on other devices losses may be scaled against underflow; on a CPU autograd is faster for a single chunk
        low = torch.is_autocast_enabled(x.device.type) and (x.device.type != "cpu" or len(self.index) <= chunk)
        if (trainable and low) or (steps is None and (trainable or len(self.index) <= chunk)):
            return plain.value(self.module(trainable and len(self.index) > chunk), x, self.index, chunk)
        return recorded.value(self, x, steps)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value (B,) and its gradient in the image, without a graph; the weights are constants."""
        return self.constants(x, self.steps(x))  # type: ignore[return-value]

    def constants(self, x: Tensor, steps: list | None, image: bool = True) -> tuple[Tensor, Tensor | None]:
        """The value (B,) by these steps and, if ``image``, its gradient in the image, without a graph."""
        if self.dtype is UNKNOWN:
            self.dtype = _product_dtype(x, self.precision)
        with torch.no_grad():
            if steps is None:
                return plain.value_and_grad(self.module(), x, self.index, self.recorded_chunk(x), image)
            return self._means(self._sums(steps, x, image), x)

    def grad(self, x: Tensor) -> Tensor:
        """The gradient of the value in the image; differentiable in the image and the weights that ask for a gradient."""
        if transformed(x, *self.params.values()):
            return torch.func.grad(lambda u: self.value(u).sum())(x)
        if not self.trainable and not (x.requires_grad and torch.is_grad_enabled()):
            return self.value_and_grad(x)[1]
        if (steps := self.steps(x)) is None:
            size = self.recorded_chunk(x)
            return plain.grad(self.module(len(self.index) > size), x, self.index, size)
        return recorded.gradients(self, x, x.new_ones(self.index.batch), steps=steps)[0]

    def all_grads(
        self, x: Tensor, wanted: list[str], scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """
        Value (B,) and gradients of :math:`\\sum_b s_b g(x_b)` in the image and in the ``wanted`` weights, without a graph.

        :param torch.Tensor scale: the factors s (B,); ``None`` for 1.
        """
        sums, weight_grads = self._with_grads(wanted, lambda steps: self._sums(steps, x, weights=True, scale=scale))
        return *self._means(sums, x), weight_grads

    def second(self, steps: list, x: Tensor, scale: Tensor) -> Second:
        """What computes derivatives of the gradient of :math:`\\sum_b s_b g(x_b)`."""
        size = self.chunk_size or _fused_chunk(x, steps, x.dtype, True, True)
        return Second(steps, x, self.index, size, scale)

    def derivatives(
        self, x: Tensor, direction: Tensor, scale: Tensor, wanted: list[str], kept: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Gradients of :math:`\\langle v, \\nabla_x \\sum_b s_b g(x_b) \\rangle` in the image and in the ``wanted`` weights.

        :param torch.Tensor direction: v, like x.
        :param torch.Tensor kept: of :meth:`Second.gradient`.
        """
        sums, weight_grads = self._with_grads(
            wanted, lambda steps: self.second(steps, x, scale).along(direction, bool(wanted), kept)
        )
        assert sums.grad is not None
        return self.as_image(sums.grad, x), weight_grads

    @property
    def single_chunk(self) -> bool:
        """Whether the user lets all patches be held at a time."""
        return self.chunk_size is None or len(self.index) <= self.chunk_size

    def on(self, values: tuple[Tensor, ...]) -> "PatchPotential":
        """The potential with these tensors in place of the weights."""
        weights = dict(zip(self.params, values))
        potential = PatchPotential(self.flow, self.index, self.chunk_size, self.precision, self.asked, weights)
        potential.dtype = self.dtype
        return potential

    @torch.no_grad()
    def steps(self, x: Tensor) -> list | None:
        """The steps of the flow, as constants; ``None`` if they are not known, or if the patches are too few for them."""
        if len(self.index) < FEW and not self.replaced and not torch.is_autocast_enabled(x.device.type):
            return None
        with full_precision(x.device.type):
            return steps_of(self.flow, self.params if self.replaced else None)

    def known_steps(self, weights: dict[str, Tensor]) -> list:
        """The steps, on these weights, of a flow whose steps were known in the forward pass."""
        with full_precision(next(iter(weights.values())).device.type):
            steps = steps_of(self.flow, weights)
        if steps is None:
            raise RuntimeError("expected the same flow as in the forward pass; it has got hooks or other methods since")
        return steps

    def module(self, later: bool = False) -> nn.Module:
        """
        The flow, or, if other tensors take the place of its parameters, a copy of the flow that holds these.

        :param bool later: whether it will be called later too, when ``torch.func.functional_call`` may have ended.
        """
        if not self.replaced and not later:
            return self.flow
        memo = {id(p): self.params[name] for name, p in self.flow.named_parameters()}
        return copy.deepcopy(self.flow, memo | {id(b): b for b in self.flow.buffers()})

    def recorded_chunk(self, x: Tensor) -> int:
        """The number of patches whose graph is held at a time."""
        return self.chunk_size or (2048 if x.device.type == "cpu" else 65536)

    def _with_grads(self, wanted: list[str], sums_of: Callable[[list], Sums]) -> tuple[Sums, list[Tensor]]:
        """Sums over patches by the steps of the flow, and their gradients in the ``wanted`` weights."""
        # gradients stop at these aliases, so that hooks of the parameters run only once, on the result
        aliases = {name: p.detach().requires_grad_(name in wanted) for name, p in self.params.items()}
        device = next(iter(aliases.values())).device.type
        with torch.enable_grad(), plain.own_graph():
            steps = self.known_steps(aliases)
            with torch.no_grad():
                sums = sums_of(steps)
            with full_precision(device):
                grads = _in_parameters(steps, sums.grads, [aliases[name] for name in wanted])
        return sums, [g * self.index.weight for g in grads]

    def _sums(self, steps: list, x: Tensor, image: bool = True, weights: bool = False, scale=None) -> Sums:
        size = self.chunk_size or _fused_chunk(x, steps, self.dtype or x.dtype, image, weights)
        return patch_sums(steps, x, self.index, size, self.dtype, image, weights, scale)

    def as_image(self, flat: Tensor, x: Tensor) -> Tensor:
        """A sum over patches as a mean like x."""
        return flat.mul_(self.index.weight).view_as(x).to(x.dtype)

    def _means(self, sums: Sums, x: Tensor) -> tuple[Tensor, Tensor | None]:
        value = (sums.value * self.index.weight).to(x.dtype)
        return value, None if sums.grad is None else self.as_image(sums.grad, x)


def patch_nll(flow: nn.Module, patches: Tensor, asked: Asked) -> Tensor:
    """
    Negative log-likelihoods (N,) of patches (N, D), with the constant, differentiable in the weights that ask for a gradient.

    Derivatives are written out if every part of the flow is known, for many patches in full precision. Autograd is faster for
    fewer, and under autocast, as the weights need not be read and converted anew.

    :param Asked asked: as in :class:`PatchPotential`.
    """
    full = patches.dtype == like_weights(flow, patches).dtype and not torch.is_autocast_enabled(patches.device.type)
    if len(patches) < MANY or not full:
        return nll(flow, patches)
    columns = patches[:, :, None, None]
    potential = PatchPotential(flow, PatchIndex(columns.shape, 1, device=patches.device), asked=asked)
    steps = None if transformed(patches, *potential.params.values()) else potential.steps(columns)
    if steps is None or steps[0].dim != patches.shape[1]:
        return nll(flow, patches)
    return potential.by_steps(columns, steps) + 0.5 * patches.shape[1] * math.log(2 * math.pi)


def _in_parameters(steps: list, grads: list[list[Tensor]] | None, weights) -> tuple[Tensor, ...]:
    """The gradients in the flow's parameters from the gradients in the packed weights of its steps."""
    pairs = [(w, g) for step, own in zip(steps, grads or []) for w, g in zip(step.packed, own) if w.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(w) for w in weights)
    packed, packed_grads = zip(*pairs)
    # unused: the global scale of a GIN block does not have an effect
    return torch.autograd.grad(packed, weights, packed_grads, True, allow_unused=True, materialize_grads=True)


def _product_dtype(x: Tensor, precision: str | None) -> torch.dtype | None:
    """The dtype of matrix products that autocast or the user allow; ``None`` if it is not fast on this hardware."""
    device, wanted = x.device.type, None if precision is None else getattr(torch, precision)
    if torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
    if device == "cpu":
        has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = wanted == torch.bfloat16 and (has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))
        return wanted if fast and x.dtype != torch.float64 else None
    return wanted if x.dtype != torch.float64 else None


def _fused_chunk(x: Tensor, steps: list, dtype: torch.dtype, image: bool, weights: bool) -> int:
    if x.device.type != "cpu":
        return (None if weights else chunk_size(steps, dtype, x.device, image)) or 32768
    width = max((len(w) for step in steps for w in step.packed if w.ndim == 2), default=1)
    # hidden layers have to fit into a core's cache, and products to take longer than the calls to them
    return min(max(2**20 // (dtype.itemsize * width), 1024), 4096)
