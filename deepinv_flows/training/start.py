"""What a training of a PatchNR begins from: the prior, the images, and a plan of sizes and steps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import positive_int
from ..flows import glow_flow
from ..patchnr import PatchNR
from .boundary import check_no_sizes
from .denoising import begin
from .effort import Plan, plan
from .samples import image_list


def start(
    images: Tensor | Iterable[Tensor],
    prior: PatchNR | None,
    patch_size: int | None,
    effort: str,
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
