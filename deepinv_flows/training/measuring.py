"""Clean images as training samples with measurements that are simulated when they are asked for."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepinv.physics import Physics
from torch import Tensor
from torch.utils.data import Dataset

from ..reconstruction import kept
from .samples import ImageSamples, PatchSamples
from .streams import Stream

Draw = Callable[[list[int] | Tensor], Tensor]


class Measured(Dataset):
    """
    Clean images ``x`` with measurements ``y``.

    :param Callable draw: maps numbers to images (B, C, H, W).
    :param int length: how many numbers there are.
    :param deepinv.physics.Physics physics: what measures, with its noise.
    :param torch.device device: where images are measured.
    :param torch.Generator generator: source of the noise; ``None`` gives the same images the same noise.
    """

    def __init__(
        self,
        draw: Draw,
        length: int,
        physics: Physics,
        device: torch.device,
        generator: torch.Generator | None = None,
    ):
        self.draw, self.length, self.physics, self.device = draw, length, physics, device
        self.generator = generator

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        """A batch of one sample: measurements need not have a dimension for batches that can be taken off."""
        return self.__getitems__([i])

    @torch.no_grad()
    def __getitems__(self, numbers: list[int] | Tensor) -> dict[str, Any]:
        x, seed = self.draw(numbers).to(self.device), int(numbers[0])
        if self.generator is not None:
            seed = int(torch.randint(2**31, (), generator=self.generator, device=self.generator.device))
        with noise_of(self.physics, self.device, seed):
            return {"x": x, "y": self.physics(x)}


@contextlib.contextmanager
def noise_of(physics: Physics, device: torch.device, seed: int) -> Iterator[None]:
    """Noise that a seed determines; neither the global random states move nor the generators that the physics holds."""
    with kept(physics) as generators, Stream(device, seed):
        for k, generator in enumerate(generators):
            generator.manual_seed(seed + k)  # the operators of a stack have noise of their own each
        yield


def crops(images: Sequence[Tensor], side: int, augment: bool, generator: torch.Generator) -> tuple[Draw, int]:
    """Square pieces of images, as what :class:`Measured` draws, and how many there are."""
    samples = PatchSamples(images, side, augment, generator)
    return lambda numbers: samples.__getitems__(numbers)["x"].view(-1, *samples.shape), len(samples)


def mirrored(images: Tensor, augment: bool, generator: torch.Generator) -> tuple[Draw, int]:
    """Whole images, half of which may be mirrored, as what :class:`Measured` draws, and how many there are."""
    samples = ImageSamples(images, augment, generator=generator)
    return lambda numbers: samples.__getitems__(numbers)["x"], len(samples)


def whole(images: Sequence[Tensor]) -> tuple[Draw, int]:
    """Whole images as they are, one at a time if their sizes differ."""
    return lambda numbers: torch.stack([images[k] for k in numbers]), len(images)
