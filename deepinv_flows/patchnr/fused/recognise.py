"""
From a flow's modules to :mod:`deepinv_flows.patchnr.fused.steps`, where every one of them is known.

Known are FrEIA's ``SequenceINN`` and ``GraphINN`` chains of GLOW, RealNVP, NICE and GIN couplings, ``AllInOneBlock`` and fixed
permutations, and deepinv's ``NormalizingFlow``, all over networks of linear layers with ReLU, LeakyReLU, SiLU or GELU between
them. Classes are told by name, exactly: a subclass may compute something else. Everything is read anew at each call, so
weights changed in any way never give a stale result.
"""

import math

import torch
from torch import Tensor, nn

from .networks import Activation, Network, gelu, leaky_relu, relu, silu
from .steps import Affine, Coupling


class _Unknown(Exception):
    pass


def steps_of(flow: nn.Module) -> list | None:
    """The steps of a flow in float32 or float64, or ``None`` if any part of it is not known."""
    if not all(_plain(module) for module in flow.modules()):
        return None
    weights = [p for p in flow.parameters() if p.is_floating_point()]
    if len({(p.dtype, p.device) for p in weights}) != 1 or weights[0].dtype not in (torch.float32, torch.float64):
        return None
    try:
        return _steps(flow, weights[0])
    except _Unknown:
        return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}", {}) for name in _HOOKS]


def _plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's ``forward`` and nothing else."""
    return (
        "forward" not in vars(module) and not any(vars(module).get(name) for name in _HOOKS) and not any(_GLOBAL_HOOKS)
    )


def _steps(module: nn.Module, like: Tensor) -> list:
    package, name = type(module).__module__.split(".")[0], type(module).__name__
    try:
        reader = _READERS[package][name]
    except KeyError:
        raise _Unknown from None
    return reader(module, like)


def _require(condition: bool) -> None:
    if not condition:
        raise _Unknown


def _chain(modules, like: Tensor) -> list:
    return [step for module in modules for step in _steps(module, like)]


def _sequence(module, like: Tensor) -> list:
    _require(all(condition is None for condition in module.conditions) and not module.force_tuple_output)
    return _chain(module.module_list, like)


def _graph(module, like: Tensor) -> list:
    _require(len(module.in_nodes) == len(module.out_nodes) == 1)
    _require(not module.condition_nodes and not module.force_tuple_output)
    for before, node in zip(module.node_list, module.node_list[1:]):
        _require(node.inputs == [(before, 0)])
    return _chain([node.module for node in module.node_list if node.module is not None], like)


def _wrapped(module, like: Tensor) -> list:
    return _steps(module.module, like)


def _reversed(module, like: Tensor) -> list:
    return [step.inverse() for step in reversed(_steps(module.flow, like))]


def _permutation(module, like: Tensor) -> list:
    matrix = torch.eye(len(module.perm), dtype=like.dtype, device=like.device)[module.perm]
    zero = like.new_zeros(len(matrix), 1)
    return [Affine([matrix, zero, like.new_zeros(())], lambda: [matrix.t(), zero, like.new_zeros(())])]


def _two_sided(moves_first: tuple, moves_second: tuple, **options) -> list:
    """Two half-steps, each given by (networks, rows that move, rows that stay)."""
    return [Coupling(kept, moved, networks, **options) for networks, moved, kept in (moves_first, moves_second)]


def _halves(module) -> tuple[slice, slice]:
    _require(not module.conditional and module.ndims == 1 and min(module.split_len1, module.split_len2) > 0)
    return slice(0, module.split_len1), slice(module.split_len1, module.channels)


def _joint(subnet: nn.Module, moved: slice, inner: float) -> list[Network]:
    d = moved.stop - moved.start
    return [_network(subnet, 2 * d, [inner] * d + [1.0] * d)]


def _glow(module, like: Tensor, centred: bool = False) -> list:
    first, second = _halves(module)
    function, outer, inner = _clamp(module)
    return _two_sided(
        (_joint(module.subnet2, first, inner), first, second),
        (_joint(module.subnet1, second, inner), second, first),
        function=function,
        alpha=outer * module.clamp,
        centred=centred,
    )


def _gin(module, like: Tensor) -> list:
    return _glow(module, like, centred=True)


def _realnvp(module, like: Tensor) -> list:
    first, second = _halves(module)
    function, outer, inner = _clamp(module)

    def networks(scale, shift, moved):
        d = moved.stop - moved.start
        return [_network(scale, d, [inner] * d), _network(shift, d, [1.0] * d)]

    return _two_sided(
        (networks(module.subnet_s2, module.subnet_t2, first), first, second),
        (networks(module.subnet_s1, module.subnet_t1, second), second, first),
        function=function,
        alpha=outer * module.clamp,
    )


def _nice(module, like: Tensor) -> list:
    first, second = _halves(module)
    return _two_sided(
        ([_network(module.F, module.split_len1)], first, second),
        ([_network(module.G, module.split_len2)], second, first),
    )


def _deepinv_block(module, like: Tensor) -> list:
    first, second = slice(0, module.split1), slice(module.split1, module.split1 + module.split2)
    inner, outer = 1 / module.clamp, 2 / math.pi
    return _two_sided(
        (_joint(module.subnet1, second, inner), second, first),
        (_joint(module.subnet2, first, inner), first, second),
        function="atan",
        alpha=outer * module.clamp,
    )


def _all_in_one(module, like: Tensor) -> list:
    _require(not module.conditional and module.input_rank == 0 and min(module.splits) > 0)
    rotation = (module._construct_householder_permutation() if module.householder else module.w_perm).to(like.dtype)
    back = rotation.t() if module.householder else module.w_perm_inv
    raw = module.global_scale
    scale = torch.ones_like(raw) if module.GIN else module.global_scale_activation(raw)
    offset, zero = module.global_offset.t(), like.new_zeros(module.in_channels, 1)
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
        [_network(module.subnet, 2 * d, [0.1] * (2 * d))],
        function="tanh",
        alpha=module.clamp,
        centred=bool(module.GIN),
    )
    if not module.reverse_pre_permute:
        return [coupling, after]
    none = like.new_zeros(())
    return [Affine([back, zero, none], lambda: [rotation, zero, none]), coupling, after]


def _clamp(module) -> tuple[str, float, float]:
    """f, outer and inner of a block's soft clamp u -> outer * f(inner * u), which FrEIA keeps as a bare function."""
    _require(not torch.is_tensor(module.clamp) and module.clamp != 0 and not isinstance(module.f_clamp, nn.Module))
    known = [
        ("atan", 0.636, 1.0),  # FrEIA's "ATAN"
        ("tanh", 1.0, 1.0),
        ("tanh", 1.0, 0.5),  # "SIGMOID"
        ("atan", 2 / math.pi, 1 / module.clamp),  # deepinv's
    ]
    u = torch.cat([scale * torch.linspace(-9, 11, 41, dtype=torch.float64) for scale in (1, 1e3, 1e6)])
    try:
        value = module.f_clamp(u.clone())
    except Exception:  # a user's function, of whatever kind
        raise _Unknown from None
    for function, outer, inner in known:
        expected = outer * getattr(torch, function)(inner * u)
        if torch.is_tensor(value) and value.dtype == u.dtype and torch.allclose(value, expected, rtol=1e-12, atol=0):
            return function, outer, inner
    raise _Unknown


def _network(module: nn.Module, dim_out: int, scale: list[float] | None = None) -> Network:
    """Linear layers with activations between them; ``scale`` multiplies the entries of the output."""
    _require(type(module) is nn.Sequential and len(module) % 2 == 1)
    layers, activations = list(module)[::2], list(module)[1::2]
    _require(all(type(layer) is nn.Linear for layer in layers) and layers[-1].out_features == dim_out)
    packed = []
    for layer in layers:
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        packed.append(torch.cat([layer.weight, bias[:, None]], 1))
    if scale is not None:
        packed[-1] = packed[-1] * packed[-1].new_tensor(scale)[:, None]
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
        "NormalizingFlow": lambda module, like: _chain(module.blocks, like),
        "GLOWCouplingBlock": _deepinv_block,
    },
    "deepinv_flows": {
        "SequenceFlow": _sequence,
        "AllInOneBlock": _all_in_one,
        "Permutation": _permutation,
        "Reversed": _reversed,
        "_TupleFlow": _wrapped,
    },
}
