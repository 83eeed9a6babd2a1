"""
The dialects of PatchNR weights, which are told apart by their keys and turned into weights of our flows.

=================  ===========================================  =========================================
dialect            keys                                         function
=================  ===========================================  =========================================
deepinv >= 0.4.1   ``blocks.K.subnet{1,2}...``                  clamp ``c*(2/pi)*atan(s/c)``
deepinv's Trainer  the same, under ``state_dict``               the same
deepinv <= 0.4.0   ``module_list.K.subnet{1,2}...``             FrEIA's clamp ``c*0.636*atan(s)``
PatchNR paper      the same, ``perm``, under                    FrEIA's clamp, permutations; the density is
                   ``net_state_dict``                           evaluated with ``rev=True``
ours               any; ``_metadata`` holds the config          what the config says
ours, of 0.1.0     any; ``..._extra_state`` holds the config    what the config says
=================  ===========================================  =========================================
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..flows import (
    CONFIG,
    DEEPINV_ORDER,
    EXTRA,
    FREIA_ORDER,
    NETWORKS,
    as_permutation,
    decode_config,
    deepinv_key,
    deepinv_state_dict,
    glow_config,
    is_rotation,
)

# the names by which modules hold a flow without changing its function
WRAPPERS = ("module", "_orig_mod", "flow", "normalizing_flow")


class CheckpointError(ValueError):
    """
    A file that cannot be read or written, or that does not hold the weights expected; nothing was loaded.

    >>> from deepinv_flows import CheckpointError, PatchNR
    >>> try:
    ...     PatchNR(pretrained="no_such_file.pt")
    ... except CheckpointError as error:
    ...     print(str(error)[:40])
    no_such_file.pt: no file or shipped weig
    """


@dataclass
class Weights:
    """A state dict of a flow, and what is known about it."""

    state: dict[str, Tensor]
    config: dict | None = None  # of the flow; None if it is not one of our builders'
    patch: dict = field(default_factory=dict)  # patch_size and channels, if the file says them
    dialect: bool = False  # whether another library wrote it, so that the user has to say the sizes
    spellings: list[dict[str, Tensor]] = field(
        default_factory=list
    )  # the state dict as found, with fewer and fewer prefixes
    known: dict[str, Any] = field(default_factory=dict)  # of KNOWN, what the file says

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a flow to load them into: that of the file, or torch's default if that is longer."""
        known = [
            v.dtype for k, v in self.state.items() if v.is_floating_point() and not k.endswith((".perm", "initialised"))
        ]
        return torch.get_default_dtype() if self.dialect else torch.promote_types(torch.get_default_dtype(), known[0])


def convert(raw: dict) -> Weights:
    """Weights for one of our flows from what ``torch.load`` returned, whatever its dialect."""
    for name in ("net_state_dict", "state_dict"):
        if isinstance(raw, dict) and isinstance(raw.get(name), dict):
            raw = raw[name]
    whole = modern(raw)
    if not whole or not all(torch.is_tensor(value) for value in whole.values()):
        raise CheckpointError("holds no state dict (a non-empty dict of tensors)")
    state = _of_the_flow(whole)
    if descriptions(state).get("") is not None:
        weights = Weights(state, descriptions(state)[""])
    elif any(key.startswith("blocks.") for key in state):
        weights = _convert_glow(_rename_deepinv(state), "deepinv")
    elif "module_list.0.subnet1.0.weight" in state:
        weights = _convert_glow(state, "ATAN")
    else:
        weights = Weights(state)
    first = next(iter(whole))
    starts = [first[: i + 1] for i, character in enumerate(first) if character == "."]
    shared = [start for start in starts if all(key.startswith(start) for key in whole)]
    weights.spellings = [whole, *(_below(whole, start) for start in shared)]
    return weights


def modern(raw: Mapping) -> dict:
    """A copy of a state dict in today's form; 0.1.0 may have written the argument."""
    if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
        raise CheckpointError("holds no state dict (a non-empty dict of tensors)")
    state = OrderedDict(raw)
    metadata = {key: dict(value) for key, value in getattr(raw, "_metadata", {}).items()}
    for key in [key for key in state if key.endswith(EXTRA)]:
        config = decode_config(state.pop(key))
        metadata.setdefault(key.removesuffix(EXTRA).removesuffix("."), {}).update(
            {CONFIG: config, NETWORKS: FREIA_ORDER}
        )
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def descriptions(state: dict) -> dict[str, dict]:
    """The config of each module that says one, by the module's name."""
    return {name: entry[CONFIG] for name, entry in getattr(state, "_metadata", {}).items() if CONFIG in entry}


def to_deepinv(flow: nn.Module) -> dict[str, Tensor]:
    """State dict for a ``deepinv.optim.PatchNR`` of the same function; refused if deepinv does not have such a flow."""
    return {f"normalizing_flow.{key}": value for key, value in deepinv_state_dict(flow).items()}


def _of_the_flow(state: dict) -> dict:
    """The state dict without the names of the modules around the flow."""
    said = [name and f"{name}." for name in descriptions(state)]
    if said:  # the flow begins at the outermost module that has a config
        prefix = min(said, key=len)
        inside = all(key.startswith(prefix) for key in state) and prefix.split(".")[-2:][0] in ("", *WRAPPERS)
        return _below(state, prefix) if inside else state
    for wrapper in WRAPPERS:
        if all(key.startswith(f"{wrapper}.") for key in state):
            state = _below(state, f"{wrapper}.")
    return state


def _below(state: dict, prefix: str) -> dict:
    """The tensors whose names start with ``prefix``, and their metadata, by their names without it."""
    below: OrderedDict = OrderedDict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    metadata = getattr(state, "_metadata", {})
    below._metadata = {  # type: ignore[attr-defined]
        f"{k}.".removeprefix(prefix).removesuffix("."): v for k, v in metadata.items() if f"{k}.".startswith(prefix)
    }
    return below


def _rename_deepinv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """deepinv's blocks by our names, between the two permutations that swap the halves."""
    renamed = {deepinv_key(key): value for key, value in state.items()}
    small = _width(renamed, "module_list.1.subnet2.0.weight", 1)
    dim = small + _width(renamed, "module_list.1.subnet1.0.weight", 1)
    last = 1 + _last_index(renamed)
    renamed["module_list.0.perm"] = torch.arange(dim).roll(-small).float()
    renamed[f"module_list.{last}.perm"] = torch.arange(dim).roll(small).float()
    return renamed


def _convert_glow(state: dict[str, Tensor], clamp_activation: str) -> Weights:
    """Add what a dialect does not hold: the config, and identities in place of our first and last permutation."""
    permute = any(key.endswith(".perm_inv") for key in state)
    if clamp_activation == "ATAN":
        state = {f"module_list.{int(k.split('.')[1]) + 1}.{k.split('.', 2)[2]}": v for k, v in state.items()}
        state = {key: value for key, value in state.items() if not key.endswith(".perm_inv")}
    split_len = _width(state, "module_list.1.subnet1.0.weight", 1)
    dim = split_len + _width(state, "module_list.1.subnet2.0.weight", 1)
    if clamp_activation == "ATAN":
        state["module_list.0.perm"] = torch.arange(dim).float()
        state[f"module_list.{1 + _last_index(state)}.perm"] = torch.arange(dim).float()
    config = glow_config(
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
    state = OrderedDict(state)
    state._metadata = {"": {NETWORKS: DEEPINV_ORDER}}  # type: ignore[attr-defined]
    return Weights(state, config, dialect=True)


def _width(state: dict[str, Tensor], key: str, axis: int) -> int:
    if key not in state or state[key].ndim != 2:
        raise CheckpointError(f"missing tensors: {key} (a matrix)")
    return state[key].shape[axis]


def _last_index(state: dict[str, Tensor]) -> int:
    return max(int(key.split(".")[1]) for key in state)


def as_number(key: str, expected: Tensor, found: Tensor) -> Tensor:
    """A floating-point tensor from the integers or truth values that 0.1.0 wrote in its place."""
    former = key.endswith((".perm", "initialised")) and expected.is_floating_point() and not found.is_complex()
    return found.float() if former and not found.is_floating_point() else found


def check_numbers(key: str, expected: Tensor, found: Tensor, ours: bool) -> None:
    """Refuse a tensor that cannot take the place of this parameter or buffer of a flow (of ``ours``, or of a user's)."""
    if expected.shape != found.shape:
        raise CheckpointError(f"{key}: expected shape {tuple(expected.shape)}; found {tuple(found.shape)}")
    if found.is_floating_point() != expected.is_floating_point() or found.is_complex() or found.layout != torch.strided:
        raise CheckpointError(f"{key}: expected a dense {expected.dtype} tensor; found {found.layout}, {found.dtype}")
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{key}: holds NaN or infinite values")
    if key.endswith(".perm"):
        try:
            as_permutation(found)
        except ValueError as error:
            raise CheckpointError(f"{key}: {error}") from None
    if key.endswith((".w_perm", ".w_0", ".rotation")) and ours and not is_rotation(found):
        raise CheckpointError(f"{key}: is not a rotation (an average of different rotations?)")
