"""Multi-scale flows on whole images, on FrEIA."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import check_choice, check_positive, positive_int, randomness
from .contract import KnowsItsConfig
from .vector import ACTIVATIONS

COUPLINGS = ("allinone", "glow")
SQUEEZES = ("haar", "checkerboard")


class ImageFlow(KnowsItsConfig, nn.Module):
    """
    Levels of FrEIA blocks; after each level but the last, half of the channels leave for the latent.

    What leaves is scaled and shifted by networks of what stays, as Glow's learned prior does.

    :param torch.nn.ModuleList levels: a ``ModuleList`` of FrEIA blocks for each level.
    :param torch.nn.ModuleList splits: for each level but the last the ``ConditionalAffineTransform`` of what leaves.
    :param dict config: the call of :func:`image_flow` that this is.
    :param bool memory_efficient: as there.
    """

    def __init__(self, levels: nn.ModuleList, splits: nn.ModuleList, config: dict, memory_efficient: bool = False):
        super().__init__()
        self.levels, self.splits, self.config = levels, splits, config
        self.img_size, self.dims_c = tuple(config["img_size"]), [tuple(dims) for dims in config["dims_c"]]
        self.register_buffer("initialised", torch.tensor(0.0))  # a number: state dicts are averaged
        self.memory_efficient = memory_efficient

    def forward(
        self, x: Tensor, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """
        :param torch.Tensor x: images, or latents if ``rev``, (N, C, H, W).
        :param list c: conditions, each (N, C', H, W), for a flow built with ``dims_c``.
        :param bool rev: whether to map latents to images.
        :param bool jac: has no effect: the log-determinant comes for free.
        :return: latents or images (N, C, H, W), and log-determinants (N,).
        :raises ValueError: for another shape.
        """
        self._check(x, self.img_size)
        conditions = self._conditions(c, len(x))
        return self._decode(x, conditions) if rev else self._encode(x, conditions)

    @torch.no_grad()
    def initialise(self, x: Tensor, c: Sequence[Tensor] | None = None) -> None:
        """
        Set the affine maps of new blocks so that every channel has mean 0 and variance 1 for these images, as in Glow.

        Call it once, before training (:func:`deepinv_flows.fit_flow` does), on a batch with its dequantisation noise.

        :param torch.Tensor x: images (N, C, H, W), a few dozen or more.
        :param list c: conditions, as in the call.
        """
        self._check(x, self.img_size)
        self._encode(x, self._conditions(c, len(x)), initialise=True)
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
        *latents, x = self._parts(z)
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

    def _parts(self, z: Tensor) -> list[Tensor]:
        """What left after each level, and what stayed to the end."""
        channels, height, width = self.img_size
        shapes = []
        for level in range(len(self.levels)):
            channels, height, width = 4 * channels, height // 2, width // 2
            if level < len(self.splits):
                channels //= 2
            shapes.append((channels, height, width))
        parts = z.flatten(1).split([c * h * w for c, h, w in shapes], 1)
        return [_channels_last(part.reshape(-1, *shape)) for part, shape in zip(parts, shapes)]

    def _conditions(self, c: Sequence[Tensor] | None, n: int) -> list[list[Tensor]]:
        c = list(c or [])
        if len(c) != len(self.dims_c):
            raise ValueError(f"expected {len(self.dims_c)} conditions, of dims_c = {self.dims_c}; got {len(c)}")
        for condition, dims in zip(c, self.dims_c):
            self._check(condition, dims, n)
        return [[F.pixel_unshuffle(part, 2 ** (level + 1)) for part in c] for level in range(len(self.levels))]

    @staticmethod
    def _check(x: Tensor, size: tuple[int, int, int], n: int | str = "N") -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != size or n not in ("N", len(x)):
            raise ValueError(f"expected a tensor of shape {(n, *size)}; got {tuple(x.shape)}".replace("'", ""))


def image_flow(
    img_size: Sequence[int],
    num_levels: int = 3,
    num_steps: int = 8,
    hidden: int = 64,
    coupling: str = "allinone",
    *,
    squeeze: str = "haar",
    affine_clamping: float = 2.0,
    activation: str = "relu",
    dims_c: Iterable[Sequence[int]] = (),
    memory_efficient: bool = False,
    generator: torch.Generator | None = None,
) -> ImageFlow:
    r"""
    Multi-scale flow on images, after Glow: each level squeezes 2x2 pixels into channels, does some steps, and lets half go.

    A step rotates the channels, scales and shifts each, and couples the halves by a network of convolutions 3x3, 1x1 and 3x3
    whose last layer starts at zero, so that a new flow is linear. Log-scales of couplings are bounded by
    ``affine_clamping``, in both directions. Latents have the shape of the images; the flow is made for one size.

    :param tuple img_size: (C, H, W) with H and W divisible by ``2**num_levels``.
    :param int num_levels: number of levels.
    :param int num_steps: steps in each level.
    :param int hidden: channels of the two hidden layers of each network.
    :param str coupling: ``"allinone"``, FrEIA's ``AllInOneBlock``, which moves half of the channels in a step, or ``"glow"``, its
        ``GLOWCouplingBlock``, which moves both and has twice the cost and weights.
    :param str squeeze: ``"haar"`` squeezes to Haar coefficients, ``"checkerboard"`` leaves the pixels as they are.
    :param float affine_clamping: bound on the log-scale of a coupling.
    :param str activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"leaky_relu"``.
    :param list dims_c: sizes (C', H, W) of conditions, which ``flow(x, c=[condition, ...])`` then takes.
    :param bool memory_efficient: keep only the input of each block for a gradient and compute the rest again, for about a
        third more time; ``flow.memory_efficient`` can be set at any time.
    :param torch.Generator generator: source of weights and rotations; ``None`` takes torch's global one.
    :return: flow on tensors of shape (N, C, H, W). ``flow.initialise(x)`` before training fits its affine maps to data.
    :raises ValueError: for sizes that do not divide, or an unknown choice.

    Sources: Dinh et al. 2017 (arXiv 1605.08803), Kingma & Dhariwal 2018 (arXiv 1807.03039), FrEIA.

    >>> import torch
    >>> from deepinv_flows import image_flow
    >>> flow = image_flow((3, 16, 16), num_levels=2, num_steps=2, hidden=8)
    >>> x = torch.rand(2, 3, 16, 16)
    >>> flow.initialise(x)
    >>> z, log_det = flow(x)
    >>> z.shape, log_det.shape
    (torch.Size([2, 3, 16, 16]), torch.Size([2]))
    >>> torch.allclose(flow(z, rev=True)[0], x, atol=1e-5)
    True
    """
    positive_int(num_levels=num_levels, num_steps=num_steps, hidden=hidden)
    check_positive(affine_clamping=affine_clamping)
    check_choice("coupling", coupling, COUPLINGS)
    check_choice("squeeze", squeeze, SQUEEZES)
    check_choice("activation", activation, ACTIVATIONS)
    img_size, dims_c = _sizes(img_size, dims_c, num_levels)
    config = {
        "builder": "image_flow",
        **dict(img_size=img_size, num_levels=num_levels, num_steps=num_steps, hidden=hidden, coupling=coupling),
        **dict(squeeze=squeeze, affine_clamping=affine_clamping, activation=activation, dims_c=dims_c),
    }
    levels, splits, dims = nn.ModuleList(), nn.ModuleList(), tuple(img_size)
    with randomness(generator):
        for level in range(1, num_levels + 1):
            conditions = [(4**level * c, h // 2**level, w // 2**level) for c, h, w in dims_c]
            blocks, dims = _level(dims, conditions, config)
            levels.append(blocks)
            if level < num_levels:
                dims = (dims[0] // 2, *dims[1:])
                splits.append(_split(dims, conditions, config))
    return ImageFlow(levels, splits, config, memory_efficient)


def _sizes(img_size, dims_c, num_levels: int) -> tuple[list[int], list[list[int]]]:
    img_size = [positive_int(img_size=size) for size in img_size]
    if len(img_size) != 3:
        raise ValueError(f"expected img_size (C, H, W); got {tuple(img_size)}")
    unit = 2**num_levels
    nearest = [max(unit, (side + unit // 2) // unit * unit) for side in img_size[1:]]
    if nearest != img_size[1:]:
        raise ValueError(
            f"expected height and width divisible by 2**num_levels = {unit}; got {img_size[1]} x {img_size[2]}, "
            f"of which the nearest that is would be {nearest[0]} x {nearest[1]}"
        )
    dims_c = [list(dims) for dims in dims_c]
    for dims in dims_c:
        if len(dims) != 3 or dims[1:] != img_size[1:]:
            raise ValueError(f"expected conditions of sizes (C', {img_size[1]}, {img_size[2]}); got {tuple(dims)}")
    return img_size, dims_c


def _level(dims, conditions, config) -> tuple[nn.ModuleList, tuple[int, int, int]]:
    import FrEIA.modules as Fm

    from .freia import AllInOneBlock, ChannelAffine, Clamp, Squeeze

    squeeze = Squeeze([dims], kind=config["squeeze"])
    (dims,) = squeeze.output_dims([dims])
    blocks, clamp = nn.ModuleList([squeeze, ChannelAffine([dims])]), config["affine_clamping"]

    for step in range(config["num_steps"]):
        if config["coupling"] == "allinone":
            options = dict(affine_clamping=clamp, global_affine_type="EXP", permute_soft=True)
            blocks.append(AllInOneBlock([dims], conditions, subnet_constructor=_subnet(config), **options))
            continue
        if step > 0:
            blocks.append(ChannelAffine([dims]))
        blocks.append(Fm.GLOWCouplingBlock([dims], conditions, subnet_constructor=_subnet(config), clamp=clamp))
        blocks[-1].f_clamp = Clamp.named("TANH", clamp)
    return blocks, dims


def _split(dims, conditions, config) -> nn.Module:
    import FrEIA.modules as Fm

    from .freia import Clamp

    clamp = config["affine_clamping"]
    block = Fm.ConditionalAffineTransform([dims], [dims, *conditions], subnet_constructor=_subnet(config), clamp=clamp)
    block.f_clamp = Clamp.named("TANH", clamp)
    return block


def _subnet(config):
    hidden, act = config["hidden"], ACTIVATIONS[config["activation"]]

    def subnet(channels_in: int, channels_out: int) -> nn.Sequential:
        last = nn.Conv2d(hidden, channels_out, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Conv2d(channels_in, hidden, 3, padding=1)
        return nn.Sequential(first, act(), nn.Conv2d(hidden, hidden, 1), act(), last)

    return subnet


def _channels_last(x: Tensor) -> Tensor:
    """In the layout in which convolutions are fastest."""
    return x.contiguous(memory_format=torch.channels_last)
