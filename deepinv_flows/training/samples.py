"""Images as training samples: their patches, or whole."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..patchnr import PatchIndex


class PatchSamples(Dataset):
    """
    All overlapping patches of some images as training samples, gathered when asked for.

    :param Sequence[torch.Tensor] images: of shape (C, H, W), possibly of different sizes.
    :param int patch_size: side of a patch.
    :param bool augment: show each eighth of a batch under another symmetry of the square.

    >>> import torch
    >>> from deepinv_flows.training import PatchSamples
    >>> samples = PatchSamples([torch.rand(1, 8, 8), torch.rand(1, 6, 9)], patch_size=6)
    >>> len(samples), samples[12]["x"].shape
    (13, torch.Size([36]))
    """

    def __init__(self, images: Sequence[Tensor], patch_size: int, augment: bool = False):
        self.shape = (images[0].shape[0], patch_size, patch_size)
        self.augment = augment
        self.flat = [image.reshape(-1) for image in images]
        self.indices = [PatchIndex((1, *image.shape), patch_size) for image in images]
        self.ends = torch.tensor([len(index) for index in self.indices]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([i]).items()}

    def __getitems__(self, numbers: list[int]) -> dict[str, Tensor]:
        numbers = torch.as_tensor(numbers)
        image = torch.bucketize(numbers, self.ends, right=True)
        patches = self.flat[0].new_empty(len(numbers), math.prod(self.shape))
        for k in image.unique().tolist():
            own = image == k
            _, pixels = self.indices[k](numbers[own] - self.ends[k] + len(self.indices[k]))
            patches[own] = self.flat[k][pixels]
        if self.augment:
            parts = patches.view(-1, *self.shape).chunk(8)
            patches = torch.cat([_symmetry(part, k) for k, part in enumerate(parts)]).flatten(1)
        return {"x": patches, "y": patches}


def _symmetry(patches: Tensor, k: int) -> Tensor:
    turned = torch.rot90(patches, k % 4, (2, 3))
    return turned.flip(3) if k >= 4 else turned


class ImageSamples(Dataset):
    """
    Images of one size as training samples ``x``, and themselves or noisy images as ``y``.

    :param torch.Tensor images: (B, C, H, W).
    :param bool augment: whether to mirror half of them, at random.
    :param float sigma: standard deviation of Gaussian noise in ``y``, new at each look.
    :param torch.Generator generator: source of both; ``None`` is one of its own, with a fixed seed.
    :param torch.Tensor y: what is seen of the images, if that is fixed (B, C, H, W).
    :param list c: conditions of the images, each (B, C', H, W), which are mirrored with them.
    """

    def __init__(
        self,
        images: Tensor,
        augment: bool = False,
        sigma: float = 0.0,
        generator: torch.Generator | None = None,
        y: Tensor | None = None,
        c: Sequence[Tensor] = (),
    ):
        self.images, self.augment, self.sigma, self.y, self.c = images, augment, sigma, y, c
        self.generator = torch.Generator() if generator is None else generator

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        batch = self.__getitems__([i])
        params = {key: value[0] for key, value in batch.pop("params", {}).items()}
        return {key: value[0] for key, value in batch.items()} | ({"params": params} if params else {})

    def __getitems__(self, numbers: list[int]) -> dict[str, Tensor]:
        x, c = self.images[numbers], [condition[numbers] for condition in self.c]
        params = {"params": {f"c{k}": condition for k, condition in enumerate(c)}} if c else {}
        if self.y is not None:
            return {"x": x, "y": self.y[numbers], **params}
        if self.augment:
            source = {"generator": self.generator, "device": self.generator.device}
            mirrored = torch.rand(len(x), **source).to(x.device) < 0.5
            for part in (x, *c):
                part[mirrored] = part[mirrored].flip(3)
        return {"x": x, "y": noisy(x, self.sigma, self.generator) if self.sigma else x, **params}


def noisy(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """``x`` under Gaussian noise."""
    noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    return x + sigma * noise.to(x.device)


def spread(samples: PatchSamples, size: int = 16384) -> Dataset:
    """At most ``size`` samples, spread evenly."""
    numbers = torch.linspace(0, len(samples) - 1, min(size, len(samples))).long()
    return Subset(samples, numbers.tolist())


def same(batch: dict) -> dict:
    return batch


def image_list(images: Tensor | Iterable[Tensor], patch_size: int) -> list[Tensor]:
    if torch.is_tensor(images) and images.ndim != 4:
        raise ValueError(
            f"expected a tensor (B, C, H, W) or a list of (C, H, W); got a tensor of shape {tuple(images.shape)}. "
            "Grey images (B, H, W) are passed as images[:, None], one image (C, H, W) as images[None]"
        )
    images = list(images)
    if not images:
        raise ValueError("expected at least one image; got none")
    for image in images:
        if not torch.is_tensor(image):
            raise TypeError(f"expected images as tensors (C, H, W); got {type(image).__name__}")
        shape = tuple(getattr(image, "shape", ()))
        if len(shape) != 3 or shape[0] != images[0].shape[0] or min(shape[1:]) < patch_size:
            raise ValueError(
                f"expected images (C, H, W) of one number of channels and at least {patch_size} x {patch_size} pixels; "
                f"got shape {shape}"
            )
        if not image.is_floating_point() or not bool(torch.isfinite(image).all()):
            raise ValueError(f"expected finite floating-point images; got {image.dtype} of shape {shape}")
    return [image.detach().cpu() for image in images]


def stacked(images: Tensor | Iterable[Tensor]) -> Tensor:
    images = image_list(images, 1)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"expected images of one size; got {sorted(shapes)}")
    return torch.stack(images)
