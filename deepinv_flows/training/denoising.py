r"""
Training a PatchNR as a denoiser, by denoising score matching on pieces of images.

.. math::

    \min_\theta \; \mathbb E \Big[ \frac1{\sigma^2} \| D_\theta(x + \sigma n) - x \|^2 \Big]

over the pixels at least p - 1 away from the borders of a piece, with :math:`D_\theta` of :class:`deepinv_flows.FlowDenoiser`. The
error of the average over patches becomes small, not only that of each patch.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from deepinv.loss import Loss
from deepinv.models.base import Reconstructor
from deepinv.physics import Denoising
from torch import Tensor
from torch.utils.data import Dataset

from ..flows import KnowsItsConfig, gaussianise
from ..patchnr import PatchNR
from ..reconstruction import of_patches, scaled
from .likelihood import FlowModel
from .samples import PatchSamples
from .streams import derived

TAIL = 4.0  # standard deviations of noise that few pixels exceed
FIRST = 16384  # patches from which a new flow starts


class Levelled(Denoising):
    """Denoising that knows the noise level of each image of a batch."""

    sigma: Tensor | float = 0.0

    def update(self, **params) -> None:
        self.sigma = params["sigma"]


class PatchScoreModel(KnowsItsConfig, Reconstructor):
    """
    A PatchNR as a denoiser that :class:`deepinv.Trainer` trains. Its checkpoints hold the levels.

    :param PatchNR prior: the prior, whose ``sigma_range`` is set.
    """

    def __init__(self, prior: PatchNR):
        super().__init__()
        self.prior = prior
        prior._asked.second = True  # from the first step on, so that a training that is resumed takes the same road
        self.config = {"sigma_range": prior.sigma_range}

    def forward(self, y: Tensor, physics: Any, **kwargs) -> Tensor:
        """The denoised pixels at least p - 1 away from the borders."""
        return of_patches(self.prior, y, physics.sigma, borders=False)


class NoisyFlowModel(KnowsItsConfig, FlowModel):
    """
    The flow of noisy patches as a model that :class:`deepinv.Trainer` trains. Its checkpoints hold the levels.

    :param PatchNR prior: the prior, whose ``sigma_range`` is set.
    """

    def __init__(self, prior: PatchNR):
        super().__init__(prior.normalizing_flow, dequantise=0)
        self.config = {"sigma_range": prior.sigma_range}


class RelativeError(Loss):
    """Denoising score matching, with the levels that a :class:`Levelled` physics knows."""

    def forward(self, x_net: Tensor, x: Tensor, physics: Any, *args, **kwargs) -> Tensor:
        """The loss of each piece, (B,), from the middles of the denoised pieces, and the clean pieces."""
        return relative_error(x_net, x, physics.sigma)


def relative_error(x_net: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The squared error of each image over its variance of noise, (B,), where ``x_net`` is the middle of an estimate of ``x``."""
    margin = (x.shape[2] - x_net.shape[2]) // 2
    middle = x[:, :, margin : x.shape[2] - margin, margin : x.shape[3] - margin]
    return (((x_net - middle) / sigma) ** 2).flatten(1).mean(1)


class NoisyPieces(Dataset):
    """
    Square pieces of images as samples ``x``, with noise as ``y``.

    :param list images: images (C, H, W).
    :param int side: side of a piece, in pixels.
    :param tuple sigma_range: least and largest noise level; a piece's is drawn evenly in its logarithm.
    :param torch.Generator generator: source of noise, levels and symmetries; ``None`` gives the same batch of numbers the same
        noise, and does not flip or rotate.
    :param bool augment: flip and rotate the pieces.
    :param str device: where the images are held and the noise is drawn.
    """

    def __init__(
        self,
        images: Sequence[Tensor],
        side: int,
        sigma_range: tuple[float, float],
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: str | torch.device = "cpu",
    ):
        self.pieces = PatchSamples(images, side, augment and generator is not None, generator, device)
        self.sigma_range, self.generator = sigma_range, generator

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, Any]:
        batch = self.__getitems__([i])
        return {"x": batch["x"][0], "y": batch["y"][0], "params": {"sigma": batch["params"]["sigma"][0]}}

    def __getitems__(self, numbers: list[int] | Tensor) -> dict[str, Any]:
        x = self.pieces.__getitems__(numbers)["x"].view(-1, *self.pieces.shape)
        generator = torch.Generator().manual_seed(int(numbers[0])) if self.generator is None else self.generator
        y, sigma = with_noise(x, self.sigma_range, generator)
        return {"x": x, "y": y, "params": {"sigma": sigma}}


class NoisyPatches(NoisyPieces):
    """Patches (D,) with noise as samples, in the unit in which the prior sees them; the arguments are those of the base class."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([i]).items()}

    def __getitems__(self, numbers: list[int] | Tensor) -> dict[str, Tensor]:
        batch = super().__getitems__(numbers)
        y = batch["y"] / batch["params"]["sigma"] if scaled(self.sigma_range) else batch["y"]
        return {"x": y.flatten(1), "y": y.flatten(1)}


def mean_error(prior: Any, batch: dict[str, Any], device) -> Tensor:
    """The loss of a batch, for timing."""
    x, y, sigma = batch["x"].to(device), batch["y"].to(device), batch["params"]["sigma"].to(device)
    return relative_error(of_patches(prior, y, sigma, borders=False), x, sigma).mean()


def with_noise(x: Tensor, sigma_range: tuple[float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (or patches as images) with noise, and its levels (B, 1, 1, 1)."""
    low, high = (math.log(end) for end in sigma_range)
    generator = derived(generator, x.device)
    draws = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device, dtype=x.dtype)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    sigma = (low + (high - low) * draws).exp()
    return x + sigma * noise, sigma


def level_range(sigma: float | tuple[float, float]) -> tuple[float, float] | None:
    """The least and largest of one level or two; ``None`` for the level 0, without noise."""
    ends = (sigma, sigma) if isinstance(sigma, Real) else sigma
    if not isinstance(ends, tuple | list) or len(ends) != 2 or not all(isinstance(end, Real) for end in ends):
        raise TypeError(f"expected sigma to be a number, or two as (low, high); got {sigma!r}")
    low, high = (float(end) for end in ends)
    if not (math.isfinite(high) and 0 <= low <= high and (low > 0 or high == 0)):
        raise ValueError(
            f"expected a finite noise level sigma >= 0, or (low, high) with 0 < low <= high; got {sigma!r}"
        )
    return (low, high) if high else None


def begin(prior: PatchNR, images: Sequence[Tensor], generator: torch.Generator) -> None:
    """Make the flow of a new prior the Gaussian density of noisy patches."""
    samples = PatchSamples(images, prior.patch_size)
    numbers = torch.randint(len(samples), (FIRST,), generator=generator, device=generator.device).tolist()
    x = samples.__getitems__(numbers)["x"][:, :, None, None]
    assert prior.sigma_range is not None
    y, sigma = with_noise(x, prior.sigma_range, generator)
    gaussianise(prior.normalizing_flow, (y / sigma if scaled(prior.sigma_range) else y)[:, :, 0, 0])


def noisy_range(levels: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    """The range of noisy images, in the unit in which the prior sees them, from that of the images."""
    units = levels if scaled(levels) else (1.0,)
    ends = [end / unit for end in (low, high) for unit in units]
    noise = TAIL * (1.0 if scaled(levels) else levels[1])
    return min(ends) - noise, max(ends) + noise


def piece_side(prior: PatchNR, images: Sequence[Tensor]) -> int:
    """The side of a piece: four patches, or that of the smallest image."""
    least = 2 * prior.patch_size - 1
    side = min(4 * prior.patch_size, *(min(image.shape[1:]) for image in images))
    if side < least:
        raise ValueError(
            f"expected images of at least {least} pixels a side, for patches of {prior.patch_size}; got {side}"
        )
    return side
