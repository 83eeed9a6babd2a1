"""
The dialects of PatchNR weights, told apart by their keys, and turned into weights of :func:`deepinv_flows.glow_flow`.

========================  =============================================  =====================================
dialect                   keys                                           function
========================  =============================================  =====================================
deepinv >= 0.4.1          ``blocks.K.subnet{1,2}...``                    clamp c*(2/pi)*atan(s/c)
deepinv's Trainer         the same under ``state_dict``                  the same
deepinv <= 0.4.0          ``module_list.K.subnet{1,2}...``               FrEIA's clamp c*0.636*atan(s)
PatchNR paper             ``module_list.K...perm`` in ``net_state_dict`` the same, permutations, run in reverse
ours                      ``..._extra_state`` holds the config           what the config says
========================  =============================================  =====================================
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..flows import decode_config, same_function

EXTRA = "_extra_state"


class CheckpointError(ValueError):
    """
    A file that cannot be read, or does not hold the weights it should; nothing was loaded.

    >>> from deepinv_flows import CheckpointError, PatchNR
    >>> try:
    ...     PatchNR(pretrained="no_such_file.pt")
    ... except CheckpointError as error:
    ...     print(str(error)[:40])
    no_such_file.pt: no file or shipped weig
    """


@dataclass
class Weights:
    """A state dict of one of our flows, and what is known of it."""

    state: dict[str, Tensor]
    config: dict | None = None  # of the flow; None for weights of no flow we know
    patch: dict = field(default_factory=dict)  # patch_size and channels, where the file says them
    dialect: bool = False  # another library's: its sizes are for the user to say
    spellings: list[dict[str, Tensor]] = field(default_factory=list)  # as found, with fewer and fewer prefixes


def convert(raw: dict) -> Weights:
    """Weights for one of our flows from what ``torch.load`` returned, whatever its dialect."""
    spellings = _spellings(raw)
    state = spellings[-1]
    if EXTRA in state:
        weights = Weights(state, decode_config(state[EXTRA]))
    elif any(key.startswith("blocks.") for key in state):
        weights = _convert_glow(_rename_deepinv(state), "deepinv")
    elif "module_list.0.subnet1.0.weight" in state:
        weights = _convert_glow(state, "ATAN")
    else:
        weights = Weights(state)
    weights.spellings = spellings
    return weights


def deepinv_key(key: str) -> str:
    """Our name of deepinv's tensor ``blocks.K.subnet{1,2}...``: FrEIA numbers the two networks the other way round."""
    match = re.fullmatch(r"blocks\.(\d+)\.subnet([12])\.(.+)", key)
    if match is None:
        raise CheckpointError(f"unexpected tensor {key}")
    block, subnet, rest = match.groups()
    return f"module_list.{int(block) + 1}.subnet{3 - int(subnet)}.{rest}"


def to_deepinv(flow: nn.Module) -> dict[str, Tensor]:
    """State dict of ``deepinv.optim.PatchNR`` with the same function; refused where deepinv has no such flow."""
    config = getattr(flow, "config", {})
    dim = config.get("dim", 2)
    theirs = _glow_config(dim=dim, num_layers=None, sub_net_size=None, split_len=dim - dim // 2)
    differ = {key: value for key, value in config.items() if theirs.get(key, False) not in (None, value)}
    if differ or not config:
        raise ValueError(
            f"deepinv's PatchNR has no flow like {type(flow).__name__} with {differ or 'its own architecture'}"
        )
    state = {}
    for key, value in flow.state_dict().items():
        if not key.endswith((".perm", EXTRA)):
            _, block, subnet, rest = key.split(".", 3)
            state[f"normalizing_flow.blocks.{int(block) - 1}.subnet{3 - int(subnet[-1])}.{rest}"] = value.clone()
    return state


def _spellings(raw: dict) -> list[dict[str, Tensor]]:
    """The state dict inside a checkpoint, as it is and then without each wrapper's prefix."""
    for name in ("net_state_dict", "state_dict"):
        if isinstance(raw, dict) and isinstance(raw.get(name), dict):
            raw = raw[name]
    if not isinstance(raw, dict) or not raw or not all(torch.is_tensor(value) for value in raw.values()):
        raise CheckpointError("holds no state dict (a non-empty dict of tensors)")
    spellings = [dict(raw)]
    said = [key.removesuffix(EXTRA) for key in raw if key.endswith(EXTRA)]
    # the outermost of our flows says where the flow begins; elsewhere only known wrappers are taken off
    for prefix in [min(said, key=len)] if said else ["module.", "flow.", "normalizing_flow."]:
        last = spellings[-1]
        if prefix and all(key.startswith(prefix) for key in last):
            spellings.append({key.removeprefix(prefix): value for key, value in last.items()})
    return spellings


def _rename_deepinv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """deepinv's blocks under our names, between the two permutations that swap the halves."""
    renamed = {deepinv_key(key): value for key, value in state.items()}
    small = _width(renamed, "module_list.1.subnet2.0.weight", 1)
    dim = small + _width(renamed, "module_list.1.subnet1.0.weight", 1)
    last = 1 + _last_index(renamed)
    renamed["module_list.0.perm"] = torch.arange(dim).roll(-small)
    renamed[f"module_list.{last}.perm"] = torch.arange(dim).roll(small)
    return renamed


def _convert_glow(state: dict[str, Tensor], clamp_activation: str) -> Weights:
    """Add what the blocks of a dialect leave unsaid: architecture, and identities where we have permutations."""
    permute = any(key.endswith(".perm_inv") for key in state)
    if clamp_activation == "ATAN":
        state = {f"module_list.{int(k.split('.')[1]) + 1}.{k.split('.', 2)[2]}": v for k, v in state.items()}
        state = {key: value for key, value in state.items() if not key.endswith(".perm_inv")}
    split_len = _width(state, "module_list.1.subnet1.0.weight", 1)
    dim = split_len + _width(state, "module_list.1.subnet2.0.weight", 1)
    if clamp_activation == "ATAN":
        state["module_list.0.perm"] = torch.arange(dim)
        state[f"module_list.{1 + _last_index(state)}.perm"] = torch.arange(dim)
    config = _glow_config(
        dim=dim,
        num_layers=sum(key.endswith("subnet1.0.weight") for key in state),
        sub_net_size=_width(state, "module_list.1.subnet1.0.weight", 0),
        split_len=split_len,
        clamp_activation=clamp_activation,
        permute=permute,
    )
    if permute:  # the paper evaluates the density with rev=True
        state = {f"flow.{key}": value for key, value in state.items()}
        return Weights(state, {**config, "reversed": True}, dialect=True)
    return Weights(state, config, dialect=True)


def _glow_config(**differ) -> dict:
    """The config of deepinv's flow (its function if no more is given) or of another dialect's."""
    function = dict(clamp=1.6, coupling="glow", clamp_activation="deepinv", activation="relu", permute=False)
    return {"builder": "glow_flow", **function, **differ}


def _width(state: dict[str, Tensor], key: str, axis: int) -> int:
    if key not in state or state[key].ndim != 2:
        raise CheckpointError(f"missing tensors: {key} (a matrix)")
    return state[key].shape[axis]


def _last_index(state: dict[str, Tensor]) -> int:
    return max(int(key.split(".")[1]) for key in state)


def rename_in_place(state: dict[str, Tensor], prefix: str, flow: nn.Module) -> None:
    """Give deepinv's tensors below ``prefix`` the names that they have in ``flow``, if it is of the same function."""
    theirs = [key for key in state if key.startswith(prefix + "blocks.")]
    if theirs and same_function(getattr(flow, "config", {}), _glow_config()):
        for key in theirs:
            state[prefix + deepinv_key(key.removeprefix(prefix))] = state.pop(key)
        for key, value in flow.state_dict().items():
            if key.endswith((".perm", EXTRA)):
                state.setdefault(prefix + key, value)
