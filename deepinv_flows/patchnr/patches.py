"""Which patches of a batch of images are evaluated, and where their pixels lie."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

SUBSETS = ("uniform", "grid")


class PatchIndex:
    r"""
    The patches of a batch of images, numbered image by image, in raster order.

    A random subset has the same positions in all images. Every position is equally likely to be in it, also at the borders.
    ``weight``, the factor of each patch in the mean over an image, makes this mean an unbiased estimate of that over all patches.

    :param tuple shape: shape (B, C, H, W) of the images.
    :param int patch_size: side p of a patch.
    :param int stride: step between patches; the last row and column are always included, so that every pixel is in a patch.
    :param int n_patches: size of a random subset; -1 for all.
    :param str subset: ``"uniform"``, which draws without replacement, or ``"grid"``: every s-th row and r-th column from a random
        offset, with whole numbers s and r for which about ``n_patches`` are left.
    :param torch.Generator generator: source of the subset.
    """

    def __init__(self, shape, patch_size, stride=1, n_patches=-1, generator=None, device="cpu", subset="uniform"):
        self.batch, self.channels, height, self.width = shape
        self.patch_size, self.device = patch_size, device
        self.rows, self.cols = (self._starts(side, patch_size, stride) for side in (height, self.width))
        self._lay_out(height)
        self.positions = None
        self.weight = 1 / (len(self.rows) * len(self.cols))
        if 0 < n_patches < len(self.rows) * len(self.cols):
            (self._draw_grid if subset == "grid" else self._draw_uniform)(n_patches, generator)

    @property
    def per_image(self) -> int:
        """Number of patches of each image."""
        return len(self.rows) * len(self.cols) if self.positions is None else len(self.positions)

    def _lay_out(self, height: int) -> None:
        self.numel = self.channels * height * self.width
        c, i, j = (torch.arange(n, device=self.device) for n in (self.channels, self.patch_size, self.patch_size))
        self.offsets = (c[:, None, None] * height * self.width + i[:, None] * self.width + j).reshape(-1)

    def _starts(self, side: int, patch_size: int, stride: int) -> Tensor:
        last = side - patch_size
        starts = torch.arange(0, last + 1, stride, device=self.device)
        return starts if last % stride == 0 else torch.cat([starts, starts.new_tensor([last])])

    def _draw_uniform(self, n_patches: int, generator: torch.Generator | None) -> None:
        draw_on = generator.device if generator is not None else "cpu"
        total = len(self.rows) * len(self.cols)
        self.positions = torch.randperm(total, generator=generator, device=draw_on)[:n_patches].to(self.device)
        self.weight = 1 / n_patches

    def _draw_grid(self, n_patches: int, generator: torch.Generator | None) -> None:
        ratio = len(self.rows) * len(self.cols) / n_patches
        down = min(max(round(ratio**0.5), 1), len(self.rows))
        across = min(max(round(ratio / down), 1), len(self.cols))
        draw_on = generator.device if generator is not None else "cpu"
        i, j = (int(torch.randint(step, (), generator=generator, device=draw_on)) for step in (down, across))
        self.weight *= (
            down * across
        )  # offsets have different numbers of patches: dividing by that number would be biased
        self.rows, self.cols = self.rows[i::down], self.cols[j::across]

    def __len__(self) -> int:
        return self.batch * self.per_image

    def single(self) -> "PatchIndex":
        """The same patches of a batch of one image."""
        index = copy.copy(self)
        index.batch = 1
        return index

    def share(self, k: int, n: int) -> tuple["PatchIndex", slice]:
        """
        The k-th of n shares of the rows of patches.

        A share without patches of its own gets a row of patches of another share, with weight zero.

        :return: the index of these patches in the images cut to some pixel rows, and the slice of these rows.
        """
        first, last = (len(self.rows) * end // n for end in (k, k + 1))
        part = self._between(first, last)
        if len(part) == 0:
            first = 0 if self.positions is None else int(self.positions[0]) // len(self.cols)
            last = first + 1
            part = self._between(first, last)
            part.weight = 0.0
        top, bottom = int(self.rows[first]), int(self.rows[last - 1]) + self.patch_size
        part.rows = part.rows - top
        part._lay_out(bottom - top)
        return part, slice(top, bottom)

    def _between(self, first: int, last: int) -> "PatchIndex":
        part = copy.copy(self)
        part.rows = self.rows[first:last]
        if self.positions is not None:
            start, stop = first * len(self.cols), last * len(self.cols)
            part.positions = self.positions[(self.positions >= start) & (self.positions < stop)] - start
        return part

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The numbers of all patches, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            yield torch.arange(start, min(start + size, len(self)), device=self.device)

    def locate(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """The number of the image and the flat index of the first pixel, both (k,), of the patches with these numbers (k,)."""
        image, position = number // self.per_image, number % self.per_image
        if self.positions is not None:
            position = self.positions[position]
        corner = self.rows[position // len(self.cols)] * self.width + self.cols[position % len(self.cols)]
        return image, image * self.numel + corner

    def __call__(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """The number of the image (k,) and the flat indices of the pixels (k, D) of the patches with these numbers (k,)."""
        image, corner = self.locate(number)
        return image, corner[:, None] + self.offsets

    def columns(self, number: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a call, with the indices of the pixels as columns (D, k), which are written to ``out``."""
        image, corner = self.locate(number)
        return image, torch.add(self.offsets[:, None], corner, out=out)
