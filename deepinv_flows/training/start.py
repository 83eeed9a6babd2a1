"""What a training begins from: a prior, images, and a plan of sizes and steps; the first weights of a flow on images."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import positive_int
from ..flows import glow_flow
from ..patchnr import PatchNR
from .boundary import check_no_sizes
from .denoising import begin
from .effort import Plan, plan
from .samples import image_list, noisy


def start(
    images: Tensor | Iterable[Tensor],
    prior: PatchNR | None,
    patch_size: int | None,
    effort: str | None,
    generator: torch.Generator,
    sizes: dict[str, Any],
    steps: dict[str, int | None],
    resumed: dict[str, Any],
    levels: tuple[float, float] | None = None,
) -> tuple[PatchNR, list[Tensor], Plan]:
    """The prior to train, a new one unless it is given, the images as a list, and the plan of the training."""
    options: dict[str, Any] = {**resumed, **steps}
    if prior is not None:
        check_no_sizes(patch_size=patch_size, **sizes)
        planned = plan(effort, prior.dim, new=False, **options)
        return prior, image_list(images, prior.patch_size), planned
    side = positive_int(patch_size=(8 if levels else 6) if patch_size is None else patch_size)
    images = image_list(images, side)
    channels = images[0].shape[0]
    planned = plan(effort, channels * side**2, **sizes, **options)
    shape = planned.num_layers, planned.sub_net_size
    kind: dict[str, Any] = dict(activation="silu", whiten=True) if levels else {}
    flow = glow_flow(channels * side**2, *shape, permute=True, generator=generator, **kind)
    prior = PatchNR(flow.to(images[0].dtype), patch_size=side, channels=channels)
    if levels:
        prior.sigma_range = levels
        begin(prior, images, generator)
    return prior, images, planned


def initialised(
    flow: nn.Module,
    images: Tensor,
    dequantise: float = 1 / 255,
    generator: torch.Generator | None = None,
    sigma: float = 0.0,
    c: Sequence[Tensor] = (),
) -> nn.Module:
    """
    Initialise the affine maps of a new :func:`deepinv_flows.image_flow` from up to 256 of the images that it will be trained on.
    Other flows are returned as they are.

    :param torch.nn.Module flow: the flow.
    :param torch.Tensor images: images (B, C, H, W).
    :param float dequantise: width of the uniform noise added to the images.
    :param torch.Generator generator: source of the noise and of the choice of images; ``None`` is a generator with a fixed seed.
    :param float sigma: standard deviation of Gaussian noise that replaces the uniform noise; 0 for uniform noise.
    :param list c: conditions of the images, for a conditional flow.
    :return: ``flow``.

    >>> import torch
    >>> from deepinv_flows import image_flow
    >>> from deepinv_flows.training import initialised
    >>> flow = initialised(image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4), torch.rand(32, 1, 8, 8))
    """
    if not getattr(flow, "initialised", True):
        generator = torch.Generator() if generator is None else generator
        chosen = torch.randperm(len(images), generator=generator)[:256]
        first, device = images[chosen], next(flow.parameters()).device
        if sigma:
            first = noisy(first, sigma, generator)
        else:
            first = first + dequantise * (torch.rand(first.shape, generator=generator, dtype=first.dtype) - 0.5)
        conditions = [condition[chosen].to(device) for condition in c]
        flow.initialise(first.to(device), conditions)  # type: ignore[operator]
    return flow
