"""
The steps (:mod:`deepinv_flows.patchnr.fused.steps`) of a flow, if all its modules are known.

The following are known: chains, by FrEIA's ``SequenceINN`` and ``GraphINN``, of GLOW, RealNVP, NICE and GIN couplings,
``AllInOneBlock`` and fixed permutations, and deepinv's ``NormalizingFlow``. Their networks are linear layers with ReLU,
LeakyReLU, SiLU or GELU between them. Classes have to match by their exact names, since a subclass may compute something else.
Everything is read anew at each call, so that changed weights never give a stale result. Nothing is ever written to the modules.
"""

import math

import torch
from torch import Tensor, nn

from .activations import Activation, gelu, leaky_relu, relu, silu
from .networks import Network
from .originals import unchanged
from .steps import Affine, Coupling, Permutation


class _Unknown(Exception):
    pass


class _Reading:
    """
    Reads the tensors of a flow: a parameter, or the tensor that takes its place.

    :param torch.Tensor like: a weight, for its dtype and device.
    :param dict weights: maps the ``id`` of a parameter to the tensor to read in its place.
    """

    def __init__(self, like: Tensor, weights: dict[int, Tensor]):
        self.like, self.weights = like, weights

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.weights.get(id(tensor), tensor)

    def zeros(self, *shape: int) -> Tensor:
        return self.like.new_zeros(shape)


def steps_of(flow: nn.Module, weights: dict[str, Tensor] | None = None) -> list | None:
    """
    The steps of a flow in float32 or float64; ``None`` if a part of it is not known.

    :param torch.nn.Module flow: flow on (N, D).
    :param dict weights: tensors to read in place of the parameters of these names; ``None`` reads the parameters.
    """
    own = dict(flow.named_parameters())
    floating = [p for p in own.values() if p.is_floating_point()]
    if len({(p.dtype, p.device) for p in floating}) != 1 or floating[0].dtype not in (torch.float32, torch.float64):
        return None
    if not unchanged(flow):
        return None
    try:
        return _steps(flow, _Reading(floating[0], {id(own[name]): t for name, t in (weights or {}).items()}))
    except _Unknown:
        return None


def _steps(module: nn.Module, read: _Reading) -> list:
    package, name = type(module).__module__.split(".")[0], type(module).__name__
    try:
        reader = _READERS[package][name]
    except KeyError:
        raise _Unknown from None
    return reader(module, read)


def _require(condition: bool) -> None:
    if not condition:
        raise _Unknown


def _chain(modules, read: _Reading) -> list:
    return [step for module in modules for step in _steps(module, read)]


def _sequence(module, read: _Reading) -> list:
    _require(all(condition is None for condition in module.conditions) and not module.force_tuple_output)
    return _chain(module.module_list, read)


def _graph(module, read: _Reading) -> list:
    _require(len(module.in_nodes) == len(module.out_nodes) == 1)
    _require(not module.condition_nodes and not module.force_tuple_output)
    for before, node in zip(module.node_list, module.node_list[1:]):
        _require(node.inputs == [(before, 0)])
    return _chain([node.module for node in module.node_list if node.module is not None], read)


def _wrapped(module, read: _Reading) -> list:
    return _steps(module.module, read)


def _reversed(module, read: _Reading) -> list:
    return [step.inverse() for step in reversed(_steps(module.flow, read))]


def _permutation(module, read: _Reading) -> list:
    return [Permutation(module.perm.long(), read.like)]


def _whitening(module, read: _Reading) -> list:
    rotation, log_scale, offset = (
        read(module.rotation),
        read(module.log_scale).flatten(),
        read(module.offset).reshape(-1, 1),
    )
    scale, log_det = log_scale.exp()[:, None], log_scale.sum()
    back = (rotation / scale).t()
    return [Affine([scale * rotation, offset, log_det], lambda: [back, -back @ offset, -log_det])]


def _two_sided(moves_first: tuple, moves_second: tuple, **options) -> list:
    """The two couplings of a block, each given by (networks, rows that move, rows that stay)."""
    return [Coupling(kept, moved, networks, **options) for networks, moved, kept in (moves_first, moves_second)]


def _halves(module) -> tuple[slice, slice]:
    _require(not module.conditional and module.ndims == 1 and min(module.split_len1, module.split_len2) > 0)
    return slice(0, module.split_len1), slice(module.split_len1, module.channels)


def _joint(subnet: nn.Module, moved: slice, inner: float, read: _Reading) -> list[Network]:
    d = moved.stop - moved.start
    return [_network(subnet, read, 2 * d, inner, d)]


def _glow(module, read: _Reading, centred: bool = False) -> list:
    first, second = _halves(module)
    function, outer, inner = _clamp(module)
    return _two_sided(
        (_joint(module.subnet2, first, inner, read), first, second),
        (_joint(module.subnet1, second, inner, read), second, first),
        function=function,
        alpha=outer * module.clamp,
        centred=centred,
    )


def _gin(module, read: _Reading) -> list:
    return _glow(module, read, centred=True)


def _realnvp(module, read: _Reading) -> list:
    first, second = _halves(module)
    function, outer, inner = _clamp(module)

    def networks(scale, shift, moved):
        d = moved.stop - moved.start
        return [_network(scale, read, d, inner, d), _network(shift, read, d)]

    return _two_sided(
        (networks(module.subnet_s2, module.subnet_t2, first), first, second),
        (networks(module.subnet_s1, module.subnet_t1, second), second, first),
        function=function,
        alpha=outer * module.clamp,
    )


def _nice(module, read: _Reading) -> list:
    first, second = _halves(module)
    return _two_sided(
        ([_network(module.F, read, module.split_len1)], first, second),
        ([_network(module.G, read, module.split_len2)], second, first),
    )


def _deepinv_block(module, read: _Reading) -> list:
    first, second = slice(0, module.split1), slice(module.split1, module.split1 + module.split2)
    inner, outer = 1 / module.clamp, 2 / math.pi
    return _two_sided(
        (_joint(module.subnet1, second, inner, read), second, first),
        (_joint(module.subnet2, first, inner, read), first, second),
        function="atan",
        alpha=outer * module.clamp,
    )


def _all_in_one(module, read: _Reading) -> list:
    _require(not module.conditional and module.input_rank == 0 and min(module.splits) > 0)
    rotation, back = _rotation(module, read)
    raw = read(module.global_scale)
    scale = torch.ones_like(raw) if module.GIN else module.global_scale_activation(raw)
    offset, zero = read(module.global_offset).t(), read.zeros(module.in_channels, 1)
    log_scale = scale.log().sum()
    after = Affine(
        [rotation * scale, rotation @ offset, log_scale],
        lambda: [back / scale.t(), -offset / scale.t(), -log_scale],
    )
    kept, d = module.splits
    moved = slice(kept, kept + d)
    coupling = Coupling(
        slice(0, kept),
        moved,
        [_network(module.subnet, read, 2 * d, 0.1, 2 * d)],
        function="tanh",
        alpha=module.clamp,
        centred=bool(module.GIN),
    )
    if not module.reverse_pre_permute:
        return [coupling, after]
    none = read.zeros()
    return [Affine([back, zero, none], lambda: [rotation, zero, none]), coupling, after]


def _rotation(module, read: _Reading) -> tuple[Tensor, Tensor]:
    """The rotation of an ``AllInOneBlock`` and its inverse."""
    if not module.householder:
        return read(module.w_perm).to(read.like.dtype), read(module.w_perm_inv)
    rotation = read(module.w_0).to(read.like.dtype)
    for v in read(module.vk_householder):
        rotation = rotation @ (torch.eye(len(v), dtype=v.dtype, device=v.device) - 2 * torch.outer(v, v) / (v @ v))
    return rotation, rotation.t()


def _clamp(module) -> tuple[str, float, float]:
    """The f, outer and inner of a block's soft clamp u -> outer * f(inner * u), which FrEIA keeps as a function."""
    _require(not torch.is_tensor(module.clamp) and module.clamp != 0 and not isinstance(module.f_clamp, nn.Module))
    if (
        type(module.f_clamp).__module__ == "deepinv_flows.flows.freia"
    ):  # a clamp of our builders has these as attributes
        return module.f_clamp.function, module.f_clamp.outer, module.f_clamp.inner
    known = [
        ("atan", 0.636, 1.0),  # FrEIA's "ATAN"
        ("tanh", 1.0, 1.0),
        ("tanh", 1.0, 0.5),  # "SIGMOID"
        ("atan", 2 / math.pi, 1 / module.clamp),  # deepinv's
    ]
    u = torch.cat([scale * torch.linspace(-9, 11, 41, dtype=torch.float64) for scale in (1, 1e3, 1e6)])
    try:
        value = module.f_clamp(u.clone())
    except Exception:  # a function of the user's may raise anything
        raise _Unknown from None
    for function, outer, inner in known:
        expected = outer * getattr(torch, function)(inner * u)
        if torch.is_tensor(value) and value.dtype == u.dtype and torch.allclose(value, expected, rtol=1e-12, atol=0):
            return function, outer, inner
    raise _Unknown


def _network(module: nn.Module, read: _Reading, dim_out: int, scale: float = 1.0, first: int = 0) -> Network:
    """Linear layers with activations between them; ``scale`` multiplies the ``first`` entries of the output."""
    if type(module) is not nn.Sequential or len(module) % 2 == 0:
        raise _Unknown
    layers = [layer for layer in list(module)[::2] if type(layer) is nn.Linear]
    activations, packed = list(module)[1::2], []
    _require(len(layers) == len(activations) + 1 and layers[-1].out_features == dim_out)
    for layer in layers:
        packed += [read(layer.weight), read.zeros(layer.out_features) if layer.bias is None else read(layer.bias)]
    if scale != 1.0:
        packed[-2:] = (torch.cat([scale * last[:first], last[first:]]) for last in packed[-2:])
    return Network(packed, [_activation(module) for module in activations])


def _activation(module: nn.Module) -> Activation:
    if type(module) is nn.ReLU:
        return relu()
    if type(module) is nn.LeakyReLU and module.negative_slope > 0:
        return leaky_relu(module.negative_slope)
    if type(module) is nn.SiLU:
        return silu()
    if type(module) is nn.GELU:
        return gelu(module.approximate)
    raise _Unknown


_READERS = {
    "FrEIA": {
        "SequenceINN": _sequence,
        "GraphINN": _graph,
        "GLOWCouplingBlock": _glow,
        "GINCouplingBlock": _gin,
        "RNVPCouplingBlock": _realnvp,
        "NICECouplingBlock": _nice,
        "AllInOneBlock": _all_in_one,
        "PermuteRandom": _permutation,
    },
    "deepinv": {
        "NormalizingFlow": lambda module, read: _chain(module.blocks, read),
        "GLOWCouplingBlock": _deepinv_block,
    },
    "deepinv_flows": {
        "SequenceFlow": _sequence,
        "AllInOneBlock": _all_in_one,
        "Permutation": _permutation,
        "Whitening": _whitening,
        "Reversed": _reversed,
        "_TupleFlow": _wrapped,
    },
}
