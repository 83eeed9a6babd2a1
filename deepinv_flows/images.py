"""Images to train and test on: those of a folder or of scikit-image, and random phantoms."""

import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checks import check_choice, positive_int

FILES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy")
EIGHT_BITS = ("1", "L", "LA", "P", "RGB", "RGBA")
EVERY = 5  # one in so many images, or rows of a single image, is held out


def load_images(
    data: str | os.PathLike | Sequence[str], channels: int = 1, part: str | None = None, min_size: int = 1
) -> list[Tensor]:
    """
    Images as tensors of torch's default dtype, in [0, 1].

    :param str data: a folder, which is searched with all folders below it; a file; the name of an image that comes with
        scikit-image (``"camera"``, ``"grass"``, ``"lfw_subset"``, ...); or a list of these. An ``.npy`` file holds (N, H, W) in
        [0, 1].
    :param int channels: 1 for grey images, 3 for colour images. A warning is given when colour images are read as grey.
    :param str part: ``"eval"`` for every fifth image (the last one of fewer than five, the lowest fifth of the rows of a single
        image); ``"train"`` for the rest; ``None`` for all.
    :param int min_size: least height and width of an image, in pixels.
    :return: list of images (C, H, W), sorted by the names of their files.
    :raises FileNotFoundError: when no images are found.
    :raises ValueError: for images that are too small or do not have 8 bits.

    >>> from deepinv_flows import load_images
    >>> [image.shape for image in load_images("coins")]
    [torch.Size([1, 303, 384])]
    """
    check_choice("part", part, (None, "train", "eval"))
    check_choice("channels", channels, (1, 3))
    names = [data] if isinstance(data, str | os.PathLike) else list(data or [])
    files = [path for name in names for path in _files(name)]
    images = [image for path in files for image in _read(path, channels)]
    if not images:
        raise FileNotFoundError(f"expected data to name images; got {data!r}")
    in_colour = sum(map(_in_colour, files)) if channels == 1 else 0
    if in_colour:
        warnings.warn(
            f"{in_colour} of {len(files)} files of {data!r} are in colour and are read as grey; channels=3 keeps the colours",
            stacklevel=2,
        )
    if part is not None and len(images) == 1:
        top = images[0].shape[1] - max(images[0].shape[1] // EVERY, min_size)
        images = [images[0][:, max(top, 0) :] if part == "eval" else images[0][:, : max(top, 0)]]
    elif part is not None:
        held_out = range(min(EVERY, len(images)) - 1, len(images), EVERY)
        images = [image for k, image in enumerate(images) if (k in held_out) == (part == "eval")]
    for image in images:
        if min(image.shape[1:]) < min_size:
            shape = tuple(image.shape)
            raise ValueError(
                f"expected images of at least {min_size} x {min_size} pixels; got {shape} in {data!r} {part or ''}"
            )
    return images


def crops(
    data: str | os.PathLike | Sequence[str],
    size: int,
    number: int | None,
    channels: int = 1,
    part: str | None = None,
    seed: int = 0,
) -> Tensor:
    """
    Square pieces of images, at random positions; no image is used again before all have been used.

    :param str data: as in :func:`deepinv_flows.load_images`; or ``"phantoms"``, for random phantoms.
    :param int size: height and width of a piece, in pixels.
    :param int number: number of pieces N; ``None`` takes one of each image.
    :param int channels: as in :func:`deepinv_flows.load_images`.
    :param str part: as in :func:`deepinv_flows.load_images`.
    :param int seed: seed of the positions, or of the phantoms.
    :return: tensor (N, C, size, size).

    >>> from deepinv_flows.images import crops
    >>> crops("grass", size=16, number=3).shape
    torch.Size([3, 1, 16, 16])
    """
    positive_int(size=size)
    if number is not None or data == "phantoms":
        positive_int(number=number)
    generator = torch.Generator().manual_seed(2 * seed + (part == "eval"))
    if data == "phantoms":
        return phantoms(number, size, generator=generator).repeat(1, channels, 1, 1)  # type: ignore[arg-type]
    images = load_images(data, channels, part, size)
    number = len(images) if number is None else number
    rounds = [torch.randperm(len(images), generator=generator) for _ in range(0, number, len(images))]
    pieces = []
    for k in torch.cat(rounds)[:number].tolist():
        top, left = (int(torch.randint(n - size + 1, (), generator=generator)) for n in images[k].shape[1:])
        pieces.append(images[k][:, top : top + size, left : left + size])
    return torch.stack(pieces)


def phantoms(number: int, size: int, ellipses: int = 6, generator: torch.Generator | None = None) -> Tensor:
    """
    Sums of random ellipses, in [0, 1].

    :param int number: number of phantoms N.
    :param int size: height and width of a phantom, in pixels.
    :param int ellipses: number of ellipses in a phantom.
    :param torch.Generator generator: source of the ellipses; ``None`` is a generator with a fixed seed.
    :return: tensor (N, 1, size, size).

    >>> from deepinv_flows.images import phantoms
    >>> phantoms(2, 32).shape
    torch.Size([2, 1, 32, 32])
    """
    generator = torch.Generator() if generator is None else generator
    draws = torch.rand(6, number, ellipses, 1, 1, generator=generator)
    (u0, v0), axes, angle, value = 1.1 * draws[:2] - 0.55, 0.1 + 0.35 * draws[2:4], torch.pi * draws[4], 0.5 * draws[5]
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    along = angle.cos() * (u - u0) + angle.sin() * (v - v0)
    across = angle.cos() * (v - v0) - angle.sin() * (u - u0)
    inside = (along / axes[0]) ** 2 + (across / axes[1]) ** 2 < 1
    return (value * inside).sum(1, keepdim=True).clamp(max=1)


def _files(name: str | os.PathLike) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix.lower() in FILES)
    if path.is_file():
        return [path]
    skimage = importlib.util.find_spec("skimage")
    bundled = Path(skimage.origin).parent / "data" if skimage and skimage.origin else None
    found = [bundled / f"{name}{suffix}" for suffix in FILES if bundled and (bundled / f"{name}{suffix}").is_file()]
    if not found or len(path.parts) != 1:
        raise FileNotFoundError(
            f"expected a folder of images, a file, or the name of an image of scikit-image; got {str(name)!r}"
        )
    return found


def _in_colour(path: Path) -> bool:
    from PIL import Image

    if path.suffix == ".npy":
        return False
    with Image.open(path) as image:
        red, *others = np.moveaxis(np.asarray(image.convert("RGB")), 2, 0)
    return any(not np.array_equal(red, other) for other in others)


def _read(path: Path, channels: int) -> list[Tensor]:
    from PIL import Image

    if path.suffix == ".npy":
        images = np.load(path, allow_pickle=False)
        if images.ndim != 3 or images.dtype.kind != "f" or not (images >= 0).all() or not (images <= 1).all():
            raise ValueError(f"expected (N, H, W) in [0, 1]; got {images.dtype} of shape {images.shape} in {path}")
        return list(torch.from_numpy(images).to(torch.get_default_dtype())[:, None].repeat(1, channels, 1, 1))
    with Image.open(path) as image:
        if image.mode not in EIGHT_BITS:
            raise ValueError(f"expected an image of 8 bits; got mode {image.mode} in {path}")
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB")) / 255
    tensor = torch.from_numpy(pixels).to(torch.get_default_dtype())
    return [tensor.view(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()]
