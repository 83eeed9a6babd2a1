"""The flow on whole images, made of levels of FrEIA blocks."""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .state import KnowsItsConfig

LEAST_SPREAD = 1e-3  # of a direction, as a multiple of the standard deviation of the images


class Subnet(nn.Sequential):
    """The network of a coupling, whose result has the precision of x under autocast too, as log-determinants sum up many."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class ImageFlow(KnowsItsConfig, nn.Module):
    """
    A flow of levels of FrEIA blocks; after each level but the last, half of the channels become part of the latent.

    These channels are scaled and shifted by networks of the channels that go on, as in Glow's learned prior.

    :param torch.nn.ModuleList levels: a ``ModuleList`` of FrEIA blocks for each level.
    :param torch.nn.ModuleList splits: for each level but the last, the ``ConditionalAffineTransform`` of the channels that
        become part of the latent.
    :param dict config: the arguments of :func:`deepinv_flows.image_flow` for this flow.
    :param bool memory_efficient: as in :func:`deepinv_flows.image_flow`.
    """

    initialised: Tensor

    def __init__(self, levels: nn.ModuleList, splits: nn.ModuleList, config: dict, memory_efficient: bool = False):
        super().__init__()
        self.levels, self.splits, self.config = levels, splits, config
        self.img_size, self.dims_c = tuple(config["img_size"]), [tuple(dims) for dims in config["dims_c"]]
        self.register_buffer("initialised", torch.tensor(0.0))  # a number: state dicts are averaged
        self.memory_efficient = memory_efficient

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.config.items() if key != "builder")

    def forward(
        self, x: Tensor, c: Tensor | Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """
        Map images to latents, or back.

        :param torch.Tensor x: images, or latents if ``rev``, (N, C, H, W).
        :param torch.Tensor, list c: conditions, or the only one, each (N, C', H, W), for a flow built with ``dims_c``.
        :param bool rev: whether to map latents to images.
        :param bool jac: does not have an effect; the log-determinant is always computed.
        :return: latents or images (N, C, H, W), and log-determinants (N,).
        :raises ValueError: for another shape or number of conditions.
        """
        self._check(x, self.img_size)
        conditions = self._conditions(c, len(x))
        return self._decode(x, conditions) if rev else self._encode(x, conditions)

    @torch.no_grad()
    def initialise(self, x: Tensor, c: Tensor | Sequence[Tensor] | None = None) -> None:
        """
        Set the affine maps of new blocks so that every channel has mean 0 and variance 1 for these images, as in Glow.

        Call it once, before training, on a batch with its dequantisation noise; :func:`deepinv_flows.fit_flow` does so. If the
        images hold few samples for each channel of a level, the scales of this level are shrunk towards their mean, with a
        warning. Directions in which the images do not vary, such as the colours of grey ones, are taken to vary by a thousandth.

        :param torch.Tensor x: images (N, C, H, W), a few dozen or more.
        :param torch.Tensor, list c: conditions, as in the call.
        :raises ValueError: for another shape, an empty batch, and images that are not finite.
        """
        self._check(x, self.img_size)
        if len(x) == 0:
            raise ValueError("expected at least one image to initialise a flow with; got none")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("expected finite images to initialise a flow with; got NaN or infinite entries")
        self._warn_of_few(len(x))
        self._encode(_varied(x), self._conditions(c, len(x)), initialise=True)
        self.initialised.fill_(1)

    def _encode(self, x, conditions, initialise=False):
        x, latents, log_det = _channels_last(x), [], x.new_zeros(len(x))
        for level, c in enumerate(conditions):
            for block in self.levels[level]:
                if initialise and hasattr(block, "initialise"):
                    block.initialise(x, c)
                x, change = self._run(block, x, c, rev=False)
                log_det = log_det + change
            if level < len(self.splits):
                x, z = x.chunk(2, 1)
                z, change = self._run(self.splits[level], z, [x, *c], rev=False)
                log_det = log_det + change
                latents.append(z.flatten(1))
        return torch.cat([*latents, x.flatten(1)], 1).view(-1, *self.img_size), log_det

    def _decode(self, z, conditions):
        log_det = z.new_zeros(len(z))
        *latents, x = [_channels_last(part) for part in self.to_levels(z)]
        for level in reversed(range(len(self.levels))):
            c = conditions[level]
            if level < len(self.splits):
                part, change = self._run(self.splits[level], latents[level], [x, *c], rev=True)
                x, log_det = torch.cat([x, part], 1), log_det + change
            for block in reversed(self.levels[level]):
                x, change = self._run(block, x, c, rev=True)
                log_det = log_det + change
        return x.contiguous(), log_det

    def _run(self, block, x, c, rev):
        def call(x, *c):
            (out,), log_det = block((x,), c=list(c), rev=rev)
            return out, log_det

        if self.memory_efficient and torch.is_grad_enabled():
            return checkpoint(call, x, *c, use_reentrant=False, preserve_rng_state=False)
        return call(x, *c)

    def to_levels(self, z: Tensor) -> list[Tensor]:
        """
        The latents of each level, from the finest details to the coarsest structure, as views of z.

        :param torch.Tensor z: latents (N, C, H, W).
        :return: tensors (N, C_l, H_l, W_l). A flow of three levels on 3 x 64 x 64 images has levels of shapes (N, 6, 32, 32),
            (N, 12, 16, 16) and (N, 48, 8, 8).
        """
        self._check(z, self.img_size)
        shapes = self._level_shapes()
        parts = z.flatten(1).split([c * h * w for c, h, w in shapes], 1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes)]

    def from_levels(self, levels: Sequence[Tensor]) -> Tensor:
        """
        Join the latents of each level, as the inverse of ``to_levels``.

        :param list levels: tensors as ``to_levels`` returns them; they may come from several images.
        :return: latents (N, C, H, W).
        :raises ValueError: for another number of levels or another shape.
        """
        levels, shapes = list(levels), self._level_shapes()
        if [tuple(level.shape[1:]) for level in levels] != shapes:
            found = [tuple(level.shape) for level in levels]
            raise ValueError(f"expected latents of {len(shapes)} levels, N x {shapes}; got {found}")
        return torch.cat([level.flatten(1) for level in levels], 1).view(-1, *self.img_size)

    def _level_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the latents of each level, without the batch."""
        channels, height, width = self.img_size
        shapes = []
        for level in range(len(self.levels)):
            channels, height, width = 4 * channels, height // 2, width // 2
            if level < len(self.splits):
                channels //= 2
            shapes.append((channels, height, width))
        return shapes

    def _warn_of_few(self, images: int) -> None:
        """Warn if the images hold fewer than ten samples for each channel of a level."""
        from .freia import shrinkage

        for level, (channels, height, width) in enumerate(self._level_shapes(), 1):
            channels *= 2 if level <= len(self.splits) else 1
            if shrinkage(images * height * width, channels) > 0:
                warnings.warn(
                    f"level {level} has {channels} channels of {height} x {width} pixels, and {images} images are few to set its "
                    "scales by: they are shrunk towards their mean. Initialise with more images, or use fewer levels",
                    stacklevel=4,
                )
                return

    def _conditions(self, c: Tensor | Sequence[Tensor] | None, n: int) -> list[list[Tensor]]:
        """The conditions of each level, squeezed to its size."""
        c = [] if c is None else [c] if torch.is_tensor(c) else list(c)
        if len(c) != len(self.dims_c):
            raise ValueError(f"expected {len(self.dims_c)} conditions, of dims_c = {self.dims_c}; got {len(c)}")
        like = next(self.parameters())
        for condition, dims in zip(c, self.dims_c):
            self._check(condition, dims, n)
            if condition.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
                raise TypeError(f"expected a condition of {like.dtype}, as the flow's weights; got {condition.dtype}")
        return [[F.pixel_unshuffle(part, 2 ** (level + 1)) for part in c] for level in range(len(self.levels))]

    @staticmethod
    def _check(x: Tensor, size: tuple[int, int, int], n: int | str = "N") -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != size or n not in ("N", len(x)):
            raise ValueError(f"expected a tensor of shape {(n, *size)}; got {tuple(x.shape)}".replace("'", ""))


def _varied(x: Tensor) -> Tensor:
    """
    Images that vary a little in every direction.

    Blocks would stretch a direction without variance one after another, each by as much as it may, until couplings see numbers
    that no image of the training has.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    return x + LEAST_SPREAD * x.std(correction=0) * noise


def _channels_last(x: Tensor) -> Tensor:
    """The same tensor in the memory layout in which convolutions are fastest."""
    return x.contiguous(memory_format=torch.channels_last)
