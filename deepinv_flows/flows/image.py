"""Builder of multi-scale flows on whole images, from FrEIA's blocks."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..checks import check_choice, check_positive, positive_int, randomness
from .multiscale import ImageFlow, Subnet
from .vector import ACTIVATIONS

COUPLINGS = ("allinone", "glow")
SQUEEZES = ("haar", "checkerboard")


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
    Build a multi-scale flow on images, after Glow: each level squeezes 2x2 pixels into channels and transforms them in steps.

    A step rotates the channels, scales and shifts each channel, and couples the two halves of the channels by a network of
    convolutions (3x3, 1x1 and 3x3). The last layer of each network starts at zero, so that a new flow is linear. After each
    level but the last, half of the channels become part of the latent. Log-scales of couplings are bounded by
    ``affine_clamping`` in both directions. Latents have the shape of the images, and ``flow.to_levels(z)`` splits them by level.
    The flow takes images of one size only.

    :param tuple img_size: (C, H, W) with H and W divisible by ``2**num_levels``.
    :param int num_levels: number of levels.
    :param int num_steps: number of steps in each level.
    :param int hidden: number of channels of the two hidden layers of each network.
    :param str coupling: ``"allinone"``, FrEIA's ``AllInOneBlock``, which changes half of the channels in a step, or ``"glow"``,
        FrEIA's ``GLOWCouplingBlock``, which changes both halves and has twice the cost and number of weights.
    :param str squeeze: ``"haar"`` turns 2x2 pixels into Haar coefficients, ``"checkerboard"`` keeps the values of the pixels.
    :param float affine_clamping: bound on the log-scale of a coupling.
    :param str activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"leaky_relu"``.
    :param list dims_c: sizes (C', H, W) of the conditions that ``flow(x, c=[condition, ...])`` then takes, or
        ``flow(x, c=condition)`` if there is one. A condition may be a noise level or a class at each pixel, or a first
        reconstruction.
    :param bool memory_efficient: whether to keep only the input of each block for a gradient and to compute the rest again, which
        takes about a third more time. ``flow.memory_efficient`` can be set at any time.
    :param torch.Generator generator: source of weights and rotations; ``None`` takes torch's global one.
    :return: flow on tensors of shape (N, C, H, W). Before training, ``flow.initialise(x)`` fits its affine maps to data.
    :raises ValueError: for a height or width that ``2**num_levels`` does not divide, or an unknown choice.

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
    num_levels, num_steps, hidden = positive_int(num_levels=num_levels, num_steps=num_steps, hidden=hidden)
    check_positive(affine_clamping=affine_clamping)
    affine_clamping = float(affine_clamping)
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
            f"the nearest size that is divisible would be {nearest[0]} x {nearest[1]}"
        )
    dims_c = [[positive_int(dims_c=size) for size in dims] for dims in dims_c]
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
        block: Any = Fm.GLOWCouplingBlock([dims], conditions, subnet_constructor=_subnet(config), clamp=clamp)
        block.f_clamp = Clamp.named("TANH", clamp)
        blocks.append(block)
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
        for p in last.parameters():
            nn.init.zeros_(p)
        first = nn.Conv2d(channels_in, hidden, 3, padding=1)
        return Subnet(first, act(), nn.Conv2d(hidden, hidden, 1), act(), last)

    return subnet
