"""Images as training samples: their patches, or whole images."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset

from .streams import derived


class PatchSamples(Dataset):
    """
    All overlapping patches of some images as training samples, gathered from a copy of the images when they are asked for.

    :param Sequence[torch.Tensor] images: images (C, H, W), possibly of different sizes.
    :param int patch_size: side of a patch, in pixels.
    :param bool augment: flip and rotate the patches: each eighth of a batch by another of the eight symmetries of the square, and
        the patches of a batch of fewer than eight by symmetries drawn at random.
    :param torch.Generator generator: source of the random symmetries; ``None`` is a generator of its own, with a fixed seed.
    :param str device: where the copy is held, all of it, and patches are gathered.

    >>> import torch
    >>> from deepinv_flows.training import PatchSamples
    >>> samples = PatchSamples([torch.rand(1, 8, 8), torch.rand(1, 6, 9)], patch_size=6)
    >>> len(samples), samples[12]["x"].shape
    (13, torch.Size([36]))
    """

    def __init__(
        self,
        images: Sequence[Tensor],
        patch_size: int,
        augment: bool = False,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ):
        self.shape = (images[0].shape[0], patch_size, patch_size)
        self.augment = augment
        self.generator = torch.Generator() if generator is None else generator
        self.flat = torch.cat([image.reshape(-1) for image in images]).to(device)
        channels, rows, columns = (torch.arange(size, device=device) for size in self.shape)
        self.within = channels[:, None, None], rows[:, None], columns  # of each entry of a patch
        self.heights, self.widths = (torch.tensor([image.shape[k] for image in images], device=device) for k in (1, 2))
        self.first_pixels = torch.tensor([0, *(image.numel() for image in images[:-1])], device=device).cumsum(0)
        self.across = self.widths - patch_size + 1
        self.ends = ((self.heights - patch_size + 1) * self.across).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([i]).items()}

    def __getitems__(self, numbers: list[int] | Tensor) -> dict[str, Tensor]:
        patches = self.flat[self._pixels(torch.as_tensor(numbers, device=self.flat.device))].flatten(1)
        if self.augment:
            parts = patches.view(-1, *self.shape).tensor_split(min(8, len(patches)))
            symmetries = list(range(8))
            if len(parts) < 8:
                draws = torch.randint(8, (len(parts),), generator=self.generator, device=self.generator.device)
                symmetries = draws.tolist()
            patches = torch.cat([_symmetry(part, k) for k, part in zip(symmetries, parts)]).flatten(1)
        return {"x": patches, "y": patches}

    def _pixels(self, number: Tensor) -> Tensor:
        """The places (n, C, p, p) in ``flat`` of the entries of the patches with these numbers."""
        image = torch.bucketize(number, self.ends, right=True)
        position = number - self.ends[image] + (self.heights[image] - self.shape[1] + 1) * self.across[image]
        row, column = position // self.across[image], position % self.across[image]
        width, area = (part[image, None, None, None] for part in (self.widths, self.heights * self.widths))
        corner = self.first_pixels[image] + row * self.widths[image] + column
        channels, rows, columns = self.within
        return corner[:, None, None, None] + channels * area + rows * width + columns


def _symmetry(patches: Tensor, k: int) -> Tensor:
    turned = torch.rot90(patches, k % 4, (2, 3))
    return turned.flip(3) if k >= 4 else turned


class ImageSamples(Dataset):
    """
    Images of one size as training samples ``x``, and the same or noisy images as ``y``.

    :param torch.Tensor images: images (B, C, H, W).
    :param bool augment: whether to mirror half of the images, drawn at random, left to right.
    :param float sigma: standard deviation of the Gaussian noise in ``y``, which is drawn anew whenever a sample is asked for.
    :param torch.Generator generator: source of noise and augmentation; ``None`` is a generator of its own, with a fixed seed.
    :param torch.Tensor y: fixed images ``y``, (B, C, H, W), instead of noise and augmentation.
    :param list c: conditions of the images, each (B, C', H, W), which are mirrored with their images.
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

    def __getitem__(self, i: int) -> dict[str, Any]:
        batch = self.__getitems__([i])
        params = {key: value[0] for key, value in batch.pop("params", {}).items()}
        return {key: value[0] for key, value in batch.items()} | ({"params": params} if params else {})

    def __getitems__(self, numbers: list[int] | Tensor) -> dict[str, Any]:
        x, c = self.images[numbers], [condition[numbers] for condition in self.c]
        params: dict[str, Any] = {"params": {f"c{k}": condition for k, condition in enumerate(c)}} if c else {}
        if self.y is not None:
            return {"x": x, "y": self.y[numbers], **params}
        if self.augment:
            draws = torch.rand(len(x), generator=self.generator, device=self.generator.device)
            mirrored = draws.to(x.device) < 0.5
            for part in (x, *c):
                part[mirrored] = part[mirrored].flip(3)
        return {"x": x, "y": noisy(x, self.sigma, self.generator) if self.sigma else x, **params}


def noisy(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """``x`` plus Gaussian noise of standard deviation ``sigma``."""
    noise = torch.randn(x.shape, generator=derived(generator, x.device), device=x.device, dtype=x.dtype)
    return x + sigma * noise


class RandomBatches(Sampler):
    """
    Batches of numbers drawn with replacement.

    :param int total: number of samples.
    :param int size: numbers in a batch.
    :param int batches: batches in an epoch.
    :param torch.Generator generator: source of the numbers.
    """

    def __init__(self, total: int, size: int, batches: int, generator: torch.Generator):
        self.total, self.size, self.batches, self.generator = total, size, batches, generator

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.batches):
            yield torch.randint(self.total, (self.size,), generator=self.generator, device=self.generator.device)


def subset(samples: Dataset, size: int = 16384) -> Dataset:
    """
    At most ``size`` samples, evenly spaced among all of them.

    :param torch.utils.data.Dataset samples: all samples.
    :param int size: largest number of samples.
    :return: the samples chosen.
    """
    number = len(samples)  # type: ignore[arg-type]
    return Subset(samples, torch.linspace(0, number - 1, min(size, number)).long().tolist())


def same(batch: Any) -> Any:
    return batch


def image_list(images: Tensor | Iterable[Tensor], patch_size: int) -> list[Tensor]:
    """The images as a list of finite tensors (C, H, W) with the same number of channels; half precision becomes float32."""
    if isinstance(images, np.ndarray):
        raise TypeError(
            f"expected a tensor (B, C, H, W) or a list of tensors (C, H, W); got ndarray of shape {images.shape}"
            f"{_conversion(images, 'images')}"
        )
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
            shape = f" of shape {image.shape}" if isinstance(image, np.ndarray) else ""
            raise TypeError(
                f"expected images as tensors (C, H, W); got {type(image).__name__}{shape}{_conversion(image, 'image')}"
            )
        shape = tuple(image.shape)
        if not image.is_floating_point() or not bool(torch.isfinite(image).all()):
            hint = ": pass image.float() / 255" if image.dtype == torch.uint8 else ""
            raise ValueError(f"expected finite floating-point images; got {image.dtype} of shape {shape}{hint}")
        if len(shape) != 3 or shape[0] != images[0].shape[0] or min(shape[1:]) < patch_size:
            raise ValueError(
                f"expected images (C, H, W) of one number of channels and at least {patch_size} x {patch_size} pixels; "
                f"got shape {shape}"
            )
    half = (torch.float16, torch.bfloat16)
    return [(image.float() if image.dtype in half else image).detach().cpu() for image in images]


def _conversion(image, name: str) -> str:
    """Advice on how to convert an array, if its shape leaves no doubt."""
    axes = {2: "[None]", 3: ".permute(2, 0, 1)"}.get(getattr(image, "ndim", 0))
    if axes is None or not isinstance(image, np.ndarray) or (image.ndim == 3 and image.shape[2] != 3):
        return ""
    scaled = ".float() / 255" if image.dtype == np.uint8 else ".float()"
    tensor = f"torch.from_numpy({name}){axes}{scaled}"
    return f": pass {tensor}" if name == "image" else f": pass [{tensor}]"


def stacked(images: Tensor | Iterable[Tensor]) -> Tensor:
    images = image_list(images, 1)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"expected images of one size; got {sorted(shapes)}")
    return torch.stack(images)
