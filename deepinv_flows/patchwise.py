r"""
Value and image gradient of a patch potential, chunk by chunk.

For an image :math:`x` with patches :math:`P_1 x, \dots, P_n x` the potential is the mean negative log-likelihood

.. math::

    g(x) = \frac{1}{n} \sum_{i=1}^n h(P_i x), \qquad h(p) = \tfrac12 \|z\|^2 - \log|\det J(p)|, \quad (z, \log|\det J|) = f(p)

of a flow :math:`f` (without the constant :math:`\tfrac D2 \log 2\pi`). Patches are taken in raster order, a chunk at a
time, so that memory does not grow with the image: without a graph only the gradient image is kept, with one each
chunk is recomputed in the backward pass.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .contract import evaluate


class PatchIndex:
    """
    The patches of an image batch, addressed by a running number: image by image, in raster order.

    :param tuple shape: (B, C, H, W).
    :param int patch_size: side p of a patch.
    :param int stride: step between patches; the last row and column are always included, so every pixel is covered.
    :param int n_patches: size of a random subset, the same for all images, drawn without replacement; -1 for all.
    :param torch.Generator generator: source of the subset.
    """

    def __init__(self, shape, patch_size, stride=1, n_patches=-1, generator=None, device="cpu"):
        self.batch, channels, height, width = shape
        self.numel = channels * height * width
        self.width, self.device = width, device
        self.rows, self.cols = (self._grid(side, patch_size, stride) for side in (height, width))
        c, i, j = (torch.arange(n, device=device) for n in (channels, patch_size, patch_size))
        self.offsets = (c[:, None, None] * height * width + i[:, None] * width + j).reshape(-1)
        total = len(self.rows) * len(self.cols)
        self.subset = None
        if 0 < n_patches < total:
            draw_on = generator.device if generator is not None else "cpu"
            self.subset = torch.randperm(total, generator=generator, device=draw_on)[:n_patches].to(device)
        self.per_image = total if self.subset is None else n_patches

    def _grid(self, side: int, patch_size: int, stride: int) -> Tensor:
        last = side - patch_size
        starts = torch.arange(0, last + 1, stride, device=self.device)
        return starts if last % stride == 0 else torch.cat([starts, starts.new_tensor([last])])

    def __len__(self) -> int:
        return self.batch * self.per_image

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The numbers of all patches, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            yield torch.arange(start, min(start + size, len(self)), device=self.device)

    def __call__(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Image number (k,) and flat pixel index (k, D) of the patches with these numbers (k,)."""
        image, position = number // self.per_image, number % self.per_image
        if self.subset is not None:
            position = self.subset[position]
        corner = self.rows[position // len(self.cols)] * self.width + self.cols[position % len(self.cols)]
        return image, (image * self.numel + corner)[:, None] + self.offsets


def patch_nll(flow: nn.Module, patches: Tensor) -> Tensor:
    """Negative log-likelihood (N,) of patches (N, D), in nats, without the constant D/2 log(2 pi)."""
    z, log_det = evaluate(flow, patches)
    return 0.5 * z.flatten(1).pow(2).sum(1) - log_det


def weights_need_grad(flow: nn.Module) -> bool:
    """Whether autograd is recording and any weight of the flow asks for a gradient."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in flow.parameters())


def image_nll(flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int) -> Tensor:
    """Mean negative log-likelihood (B,) over the patches of each image, differentiable in all that asks for it."""
    if weights_need_grad(flow):
        return _checkpointed_nll(flow, x, index, chunk_size)
    if x.requires_grad and torch.is_grad_enabled():
        return _FrozenNLL.apply(x, flow, index, chunk_size)
    with torch.no_grad():
        return _accumulate(index, chunk_size, x, lambda patches: patch_nll(flow, patches))


def value_and_grad(flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int) -> tuple[Tensor, Tensor]:
    """:func:`image_nll` and its gradient in the image, together and without a graph; the weights are constants."""
    grad = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)

    def chunk(patches, pixels):
        with torch.enable_grad():
            leaf = patches.detach().requires_grad_()
            nll = patch_nll(flow, leaf)
            (patch_grad,) = torch.autograd.grad(nll.sum(), leaf)
        grad.index_add_(0, pixels.reshape(-1), patch_grad.reshape(-1))
        return nll.detach()

    with torch.no_grad():
        value = _accumulate(index, chunk_size, x, chunk, with_pixels=True)
    return value, grad.view_as(x) / index.per_image


def differentiable_grad(flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int) -> Tensor:
    """Gradient of :func:`image_nll` in the image, itself differentiable in the image and in the weights."""

    def chunk(flat, number):
        _, pixels = index(number)
        patches = flat.index_select(0, pixels.reshape(-1)).view_as(pixels)
        if not patches.requires_grad:
            patches.requires_grad_()
        nll = patch_nll(flow, patches)
        (patch_grad,) = torch.autograd.grad(nll.sum(), patches, create_graph=True)
        return torch.zeros_like(flat).index_add(0, pixels.reshape(-1), patch_grad.reshape(-1))

    with torch.enable_grad():
        grad = _checkpointed_sum(chunk, x.reshape(-1), index, chunk_size)
    return grad.view_as(x) / index.per_image


def reference_nll(flow: nn.Module, x: Tensor, patch_size: int) -> Tensor:
    """:func:`image_nll` over all patches in a single batch of plain autograd: slow, large, and obviously right."""
    patches = nn.functional.unfold(x, patch_size).transpose(1, 2)
    return patch_nll(flow, patches.reshape(-1, patches.shape[-1])).view(patches.shape[:2]).mean(1)


class _FrozenNLL(torch.autograd.Function):
    """:func:`image_nll` for constant weights: the gradient is computed with the value, and recomputed with a graph
    only when the backward pass asks for one."""

    @staticmethod
    def forward(ctx, x, flow, index, chunk_size):
        value, grad = value_and_grad(flow, x, index, chunk_size)
        ctx.save_for_backward(x, grad)
        ctx.call = flow, index, chunk_size
        return value

    @staticmethod
    def backward(ctx, grad_value):
        x, grad = ctx.saved_tensors
        if torch.is_grad_enabled():
            flow, index, chunk_size = ctx.call
            grad = differentiable_grad(flow, x, index, chunk_size)
        return grad_value.view(-1, *[1] * (x.ndim - 1)) * grad, None, None, None


def _checkpointed_nll(flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int) -> Tensor:
    def chunk(flat, number):
        image, pixels = index(number)
        nll = patch_nll(flow, flat.index_select(0, pixels.reshape(-1)).view_as(pixels))
        return nll.new_zeros(index.batch).index_add(0, image, nll)

    return _checkpointed_sum(chunk, x.reshape(-1), index, chunk_size) / index.per_image


def _checkpointed_sum(chunk, flat: Tensor, index: PatchIndex, chunk_size: int) -> Tensor:
    """Sum of ``chunk(flat, number)``; what several chunks need for their backward pass is recomputed there."""
    if len(index) <= chunk_size:
        return sum(chunk(flat, number) for number in index.chunks(chunk_size))
    return sum(checkpoint(chunk, flat, number, use_reentrant=False) for number in index.chunks(chunk_size))


def _accumulate(index: PatchIndex, chunk_size: int, x: Tensor, evaluate_chunk, with_pixels: bool = False) -> Tensor:
    """Mean of ``evaluate_chunk(patches)`` over the patches of each image, added up in float64 where there is one."""
    dtype = torch.float64 if x.device.type != "mps" else x.dtype
    total = torch.zeros(index.batch, dtype=dtype, device=x.device)
    flat = x.reshape(-1)
    for number in index.chunks(chunk_size):
        image, pixels = index(number)
        patches = flat.index_select(0, pixels.reshape(-1)).view_as(pixels)
        nll = evaluate_chunk(patches, pixels) if with_pixels else evaluate_chunk(patches)
        total.index_add_(0, image, nll.to(dtype))
    return (total / index.per_image).to(x.dtype)
