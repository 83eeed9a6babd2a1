"""
State dicts of flows, which hold floating-point numbers alone.

They can be averaged, rounded to half precision or sent through numpy. Which function the numbers belong to is written in their
``_metadata``, which torch keeps beside the tensors. State dicts with the names of deepinv's ``NormalizingFlow``, and those of
0.1.0 (with the description as a tensor of bytes, and permutations of integers), are read as well.
"""

import copy
import json
import re

import torch
from torch import Tensor, nn

SIZES = ("dim", "num_layers", "sub_net_size", "split_len")
CONFIG, NETWORKS = "deepinv_flows", "networks"  # keys of a module's entry in the metadata
EXTRA = "_extra_state"  # where 0.1.0 kept the description
# An optimizer's state goes by the order of the parameters, and deepinv's blocks hold first what FrEIA calls subnet2
DEEPINV_ORDER, FREIA_ORDER = ("subnet2", "subnet1"), ("subnet1", "subnet2")


def decode_config(code: Tensor) -> dict:
    """A builder's ``config`` from the tensor that a state dict of 0.1.0 holds."""
    return json.loads(bytes(code.tolist()))


def same_function(a: dict, b: dict) -> bool:
    """Whether flows of these configs compute the same function when sizes and weights are equal."""
    a, b = ({"reversed": False, "whiten": False, **{key: c[key] for key in c if key not in SIZES}} for c in (a, b))
    return a == b


class KnowsItsConfig:
    """Mixin: the state dict says which function its weights belong to, and weights of another function are refused."""

    config: dict

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        config, metadata = getattr(self, "config", None), getattr(destination, "_metadata", {})
        if config is not None and prefix[:-1] in metadata:
            metadata[prefix[:-1]][CONFIG] = copy.deepcopy(config)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        code = state_dict.pop(prefix + EXTRA, None)
        found = local_metadata.get(CONFIG) if code is None else decode_config(code)
        if found is not None and not same_function(found, self.config):
            raise ValueError(f"expected weights of a flow {self.config}; found weights of {found}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[misc]


def as_permutation(found: Tensor) -> Tensor:
    """
    The indices of a permutation from the numbers that a state dict holds.

    :param torch.Tensor found: (D,) numbers, whole up to the rounding of averages and of half precision.
    :return: (D,) indices, of dtype int64.
    :raises ValueError: for numbers that are not whole, or not a permutation.
    """
    if found.is_complex() or found.layout != torch.strided:
        raise ValueError(f"expected a dense tensor of indices; found {found.layout}, {found.dtype}")
    rounding = 2 * len(found) * torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    found = found.detach().double()
    if bool(((found - found.round()).abs() > min(0.49, max(1e-3, rounding))).any()):
        raise ValueError("is not a permutation: its numbers are not whole (an average of different permutations?)")
    perm = found.round().long()
    if not torch.equal(perm.sort().values, torch.arange(len(perm), device=perm.device)):
        raise ValueError("is not a permutation: an index is missing")
    return perm


def is_rotation(matrix: Tensor) -> bool:
    """Whether a matrix is orthogonal up to the rounding of half precision."""
    matrix = matrix.detach().flatten(1).float()
    return bool((matrix.T @ matrix - torch.eye(matrix.shape[1], device=matrix.device)).abs().max() < 0.02)


def glow_config(**differ) -> dict:
    """The part of a config that says the function of deepinv's flow, with sizes and differences as given."""
    function = dict(clamp=1.6, coupling="glow", clamp_activation="deepinv", activation="relu", permute=False)
    return {"builder": "glow_flow", **function, **differ}


def deepinv_key(key: str) -> str:
    """Our name of deepinv's tensor ``blocks.K.subnet{1,2}...``; FrEIA numbers the two networks the other way round."""
    match = re.fullmatch(r"blocks\.(\d+)\.subnet([12])\.(.+)", key)
    if match is None:
        raise ValueError(f"unexpected tensor {key}")
    block, subnet, rest = match.groups()
    return f"module_list.{int(block) + 1}.subnet{3 - int(subnet)}.{rest}"


def rename_deepinv(state: dict[str, Tensor], prefix: str, flow: nn.Module) -> bool:
    """Rename deepinv's tensors below ``prefix`` in place to what they are called in ``flow``, if that is the same function."""
    theirs = [key for key in state if key.startswith(prefix + "blocks.")]
    if not theirs or not same_function(getattr(flow, "config", {}), glow_config()):
        return False
    for key in theirs:
        state[prefix + deepinv_key(key.removeprefix(prefix))] = state.pop(key)
    for key, value in flow.state_dict().items():
        if key.endswith(".perm"):
            state.setdefault(prefix + key, value)
    return True


def deepinv_state_dict(flow: nn.Module) -> dict[str, Tensor]:
    """
    State dict for deepinv's ``NormalizingFlow`` of the same function.

    :param torch.nn.Module flow: a flow of :func:`deepinv_flows.glow_flow`.
    :return: tensors by deepinv's names, ``blocks.K.subnet{1,2}...``, in deepinv's order.
    :raises ValueError: when deepinv does not have a flow of this function, as with permutations.
    """
    config = getattr(flow, "config", {})
    dim = config.get("dim", 2)
    theirs = glow_config(dim=dim, num_layers=None, sub_net_size=None, split_len=dim - dim // 2)
    differ = {key: value for key, value in config.items() if theirs.get(key, False) not in (None, value)}
    if differ or not config:
        raise ValueError(
            f"expected a flow that deepinv's PatchNR has too; got {type(flow).__name__} with {differ or 'its own architecture'}"
        )
    state = flow.state_dict()
    blocks = [f"module_list.{k + 1}.subnet" for k in range(config["num_layers"])]
    return {
        f"blocks.{k}.subnet{subnet}.{key.split('.', 3)[3]}": value.clone()
        for k, name in enumerate(blocks)
        for subnet in (1, 2)
        for key, value in state.items()
        if key.startswith(f"{name}{3 - subnet}.")
    }


def arrange(block: nn.Module, names: tuple[str, ...]) -> None:
    """Register the networks of a new block in this order."""
    for name in names:
        block._modules[name] = block._modules.pop(name)


def order(block: nn.Module) -> tuple[str, ...]:
    """The names of a block's two networks in the order in which they are registered."""
    return tuple(name for name in block._modules if name in DEEPINV_ORDER)


def exchange(block: nn.Module) -> None:
    """
    Register the two networks of a block the other way round.

    An optimizer that was made before knows the parameters by their place. Each parameter therefore keeps its place among those
    of the flow, and takes the name, the values and the shape that belong to this place in the other order.
    """
    first, second = (block.get_submodule(name) for name in order(block))
    pairs = list(zip(first.modules(), second.modules()))
    if any(a._parameters.keys() != b._parameters.keys() for a, b in pairs):
        return  # networks that a user put in, which need not be alike
    for a, b in pairs:
        a._parameters, b._parameters = b._parameters, a._parameters
        for p, q in zip(a.parameters(recurse=False), b.parameters(recurse=False)):
            p.grad, q.grad = None, None  # they belong to the former weights
            p.data, q.data = q.data, p.data
            p.requires_grad, q.requires_grad = q.requires_grad, p.requires_grad
    arrange(block, order(block)[::-1])
