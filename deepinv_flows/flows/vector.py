"""Builders of flows on vectors, from FrEIA's blocks; they satisfy the contract of :mod:`deepinv_flows.flows.contract`."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_positive, positive_int, randomness
from . import state

COUPLINGS = {  # FrEIA's blocks
    "glow": "GLOWCouplingBlock",
    "realnvp": "RNVPCouplingBlock",
    "nice": "NICECouplingBlock",
    "gin": "GINCouplingBlock",
}
CLAMPS = ("deepinv", "ATAN", "TANH", "SIGMOID")
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU}


def glow_flow(
    dim: int,
    num_layers: int = 5,
    sub_net_size: int = 256,
    clamp: float = 1.6,
    permute: bool = False,
    *,
    coupling: str = "glow",
    clamp_activation: str = "deepinv",
    activation: str = "relu",
    split_len: int | None = None,
    whiten: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""
    Build a flow of two-sided coupling blocks on vectors; by default the flow of deepinv's ``PatchNR``.

    Each block splits its input into halves :math:`(x_1, x_2)` and computes

    .. math::

        y_2 = x_2 \odot e^{s_1(x_1)} + t_1(x_1), \qquad y_1 = x_1 \odot e^{s_2(y_2)} + t_2(y_2),

    with :math:`s = \tfrac{2c}{\pi} \arctan(a / c)` for a network's output :math:`a` and ``clamp`` :math:`c`. With
    equal weights the flow is the same function as :class:`deepinv.optim.prior.NormalizingFlow`. After the same
    :func:`torch.manual_seed` both have equal weights.

    :param int dim: number of entries D of a sample; at least 2. For an odd D the two halves differ by one entry.
    :param int num_layers: number of coupling blocks.
    :param int sub_net_size: width of the two hidden layers of each network.
    :param float clamp: bound c on the log-scale of a coupling.
    :param bool permute: whether a fixed random permutation follows each block, as in the PatchNR paper. Without permutations,
        the same entries are in the same half in all blocks. A flow with permutations fits better at equal cost.
    :param str coupling: ``"glow"`` (one network for s and t), ``"realnvp"`` (one for each), ``"nice"``
        (additive, s = 0) or ``"gin"`` (volume preserving, the entries of s sum to 0).
    :param str clamp_activation: ``"deepinv"`` as above, or FrEIA's ``"ATAN"`` (:math:`s = 0.636\,c\arctan a`),
        ``"TANH"``, ``"SIGMOID"``.
    :param str activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"leaky_relu"`` between the linear layers.
    :param int split_len: length of :math:`x_2`; ``None`` for D - D // 2, as deepinv splits.
    :param bool whiten: whether the blocks follow a fixed rotation and a learned scale and offset of each entry, which
        :func:`deepinv_flows.fit_patchnr` sets to the principal axes of noisy patches.
    :param torch.Generator generator: source of the weights and permutations; ``None`` takes torch's global
        one, as torch's own layers do.
    :return: flow on tensors of shape (N, D).
    :raises ValueError: for ``dim < 2``, a size that is not a whole number, or an unknown choice.

    Sources: Dinh et al. 2014 (arXiv 1410.8516), Dinh et al. 2017 (arXiv 1605.08803), Kingma & Dhariwal 2018
    (arXiv 1807.03039), Sorrenson et al. 2020 (arXiv 2001.04872), Altekrueger et al. 2023 (arXiv 2205.12021).

    >>> import torch
    >>> from deepinv_flows import glow_flow
    >>> flow = glow_flow(36, num_layers=2, sub_net_size=32)
    >>> x = torch.rand(10, 36)
    >>> z, log_det = flow(x)
    >>> z.shape, log_det.shape
    (torch.Size([10, 36]), torch.Size([10]))
    >>> torch.allclose(flow(z, rev=True)[0], x, atol=1e-5)
    True
    """
    dim = _dimension(dim)
    num_layers, sub_net_size = positive_int(num_layers=num_layers, sub_net_size=sub_net_size)
    check_positive(clamp=clamp)
    clamp, permute = float(clamp), bool(permute)
    check_choice("coupling", coupling, COUPLINGS)
    check_choice("clamp_activation", clamp_activation, CLAMPS)
    check_choice("activation", activation, ACTIVATIONS)
    small, large = _halves(dim, split_len)
    config = {
        "builder": "glow_flow",
        **dict(dim=dim, num_layers=num_layers, sub_net_size=sub_net_size, clamp=clamp, permute=permute),
        **dict(coupling=coupling, clamp_activation=clamp_activation, activation=activation, split_len=large),
        **({"whiten": True} if whiten else {}),
    }
    import FrEIA.modules as Fm

    from .freia import Clamp, Permutation, SequenceFlow
    from .whitening import Whitening

    block = getattr(Fm, COUPLINGS[coupling])
    options = {} if coupling == "nice" else {"clamp": clamp}
    flow = SequenceFlow(dim, config=config)
    with randomness(generator):
        if whiten:
            flow.append(Whitening)
        # FrEIA updates the first half first, and deepinv the second half: permutations at both ends swap the halves
        flow.append(Permutation, perm=torch.arange(dim).roll(-small))
        for _ in range(num_layers):
            subnets = _deepinv_order(coupling, small, large, sub_net_size, activation)
            flow.append(block, subnet_constructor=subnets, split_len=large, **options)
            flow[-1].f_clamp = Clamp.named(clamp_activation, clamp)
            if coupling == "glow":
                state.arrange(flow[-1], state.DEEPINV_ORDER)
            if permute:
                flow.append(Permutation, perm=torch.randperm(dim))
        flow.append(Permutation, perm=torch.arange(dim).roll(small))
    return flow


def allinone_flow(
    dim: int,
    num_layers: int = 8,
    sub_net_size: int = 256,
    *,
    dims_c: Sequence[int] | int = (),
    affine_clamping: float = 2.0,
    gin_block: bool = False,
    global_affine_init: float = 1.0,
    global_affine_type: str = "SOFTPLUS",
    permute_soft: bool = False,
    learned_householder_permutation: int = 0,
    reverse_permutation: bool = False,
    activation: str = "relu",
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""
    Build a flow of FrEIA's ``AllInOneBlock`` on vectors: each block is a one-sided coupling, an affine map and a rotation.

    .. math::

        y = V R \big(\Psi(s_g) \odot [\,x_1,\; x_2 \odot e^{\alpha \tanh(0.1 s(x_1))} + 0.1\,t(x_1)] + t_g\big)

    :param int dim: number of entries D of a sample; at least 2.
    :param int num_layers: number of blocks. A block changes one half only, so a flow needs about twice as many blocks as one of
        :func:`deepinv_flows.glow_flow`.
    :param int sub_net_size: width of the two hidden layers of each network.
    :param int | tuple dims_c: number of entries of the condition that ``flow(x, c=[condition])`` then takes.
    :param float affine_clamping: bound :math:`\alpha` on the log-scale of a coupling.
    :param bool gin_block: whether couplings preserve volume and there is no global scale.
    :param float global_affine_init: initial global scale.
    :param str global_affine_type: :math:`\Psi`, one of ``"SIGMOID"``, ``"SOFTPLUS"``, ``"EXP"``.
    :param bool permute_soft: whether R is a random rotation; it is a random permutation otherwise.
    :param int learned_householder_permutation: number of learned reflections whose product is V; 0 for none.
    :param bool reverse_permutation: whether :math:`(VR)^{-1}` is applied before the coupling as well.
    :param str activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"leaky_relu"``.
    :param torch.Generator generator: source of weights and rotations; ``None`` takes torch's global one.
    :return: flow on tensors of shape (N, D).
    :raises ValueError: for ``dim < 2``, a size that is not a whole number, or an unknown choice.

    Source: FrEIA (Ardizzone et al. 2018-2022), https://github.com/vislearn/FrEIA.

    >>> import torch
    >>> from deepinv_flows import allinone_flow
    >>> flow = allinone_flow(8, num_layers=3, sub_net_size=16, permute_soft=True, dims_c=2)
    >>> x, condition = torch.rand(5, 8), torch.rand(5, 2)
    >>> z, log_det = flow(x, c=[condition])
    >>> torch.allclose(flow(z, c=[condition], rev=True)[0], x, atol=1e-5)
    True
    """
    dim = _dimension(dim)
    num_layers, sub_net_size = positive_int(num_layers=num_layers, sub_net_size=sub_net_size)
    check_positive(affine_clamping=affine_clamping, global_affine_init=global_affine_init)
    check_choice("global_affine_type", global_affine_type, ("SIGMOID", "SOFTPLUS", "EXP"))
    check_choice("activation", activation, ACTIVATIONS)
    if global_affine_type == "SIGMOID" and global_affine_init >= 10:
        raise ValueError(f"a SIGMOID scale stays below 10; got global_affine_init={global_affine_init}")
    if learned_householder_permutation != 0:
        positive_int(learned_householder_permutation=learned_householder_permutation)
    dims_c = [positive_int(dims_c=size) for size in (dims_c if isinstance(dims_c, Iterable) else [dims_c])]
    block = dict(
        affine_clamping=float(affine_clamping),
        gin_block=bool(gin_block),
        global_affine_init=float(global_affine_init),
        global_affine_type=global_affine_type,
        permute_soft=bool(permute_soft),
        learned_householder_permutation=int(learned_householder_permutation),
        reverse_permutation=bool(reverse_permutation),
    )
    config = {
        "builder": "allinone_flow",
        **dict(dim=dim, num_layers=num_layers, sub_net_size=sub_net_size, dims_c=dims_c, activation=activation),
        **block,
    }
    from .freia import AllInOneBlock, SequenceFlow

    flow = SequenceFlow(dim, config=config)
    condition = {"cond": 0, "cond_shape": tuple(dims_c)} if dims_c else {}
    with randomness(generator):
        for _ in range(num_layers):
            flow.append(
                AllInOneBlock,
                subnet_constructor=lambda i, o: _mlp(i, o, sub_net_size, activation),
                **condition,
                **block,
            )
    return flow


@torch.no_grad()
def gaussianise(flow: nn.Module, x: Tensor) -> None:
    """
    Make a flow that was built with ``whiten=True`` the Gaussian density of samples: couplings become the identity.

    :param torch.nn.Module flow: the flow.
    :param torch.Tensor x: samples (N, D).
    """
    flow.module_list[0].initialise(x)  # type: ignore[union-attr, operator, index]
    for module in flow.modules():
        if isinstance(module, nn.Sequential):
            for p in module[-1].parameters():
                p.zero_()


def _mlp(dim_in: int, dim_out: int, width: int, activation: str) -> nn.Sequential:
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Linear(dim_in, width), act(), nn.Linear(width, width), act(), nn.Linear(width, dim_out)
    )  # fmt: skip


def _deepinv_order(coupling: str, small: int, large: int, width: int, activation: str):
    """Subnet constructor that draws the two GLOW networks in deepinv's order, so that equal seeds give equal weights."""
    if coupling != "glow":
        return lambda i, o: _mlp(i, o, width, activation)
    first = _mlp(small, 2 * large, width, activation)
    ready = iter([_mlp(large, 2 * small, width, activation), first])
    return lambda i, o: next(ready)


def _halves(dim: int, split_len: int | None) -> tuple[int, int]:
    large = dim - dim // 2 if split_len is None else split_len
    if not 0 < large < dim:
        raise ValueError(f"expected 0 < split_len < dim = {dim}; got {split_len}")
    large = positive_int(split_len=large)
    return dim - large, large


def _dimension(dim: int) -> int:
    if dim < 2:
        raise ValueError(f"a coupling splits its input into two non-empty parts: expected dim >= 2; got {dim}")
    return positive_int(dim=dim)
