"""
Weights on disk: our safetensors files, and the four dialects of PatchNR checkpoints, told apart by their keys.

========================  =============================================  =====================================
dialect                   keys                                           function
========================  =============================================  =====================================
deepinv >= 0.4.1          ``blocks.K.subnet{1,2}...``                    clamp c*(2/pi)*atan(s/c)
deepinv's Trainer         the same under ``state_dict``                  the same
deepinv <= 0.4.0          ``module_list.K.subnet{1,2}...``               FrEIA's clamp c*0.636*atan(s)
PatchNR paper             ``module_list.K...perm`` in ``net_state_dict`` the same, permutations, run in reverse
========================  =============================================  =====================================

All are turned into weights of :func:`deepinv_flows.glow_flow`. Nothing but tensors is ever unpickled.
"""

import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .flows import build_flow, glow_flow

METADATA_KEY = "deepinv_flows"
LODOPAB = "PatchNR_lodopab_small2"


class CheckpointError(ValueError):
    """
    A file that cannot be read, or does not hold the weights it should; nothing was loaded.

    >>> from deepinv_flows import CheckpointError, PatchNR
    >>> try:
    ...     PatchNR(pretrained="no_such_file.pt")
    ... except CheckpointError as error:
    ...     print(str(error)[:40])
    no file or shipped weights named 'no_suc
    """


@dataclass
class Weights:
    """A state dict of one of our flows, with the architecture (``None``: not known) and the patches it is for."""

    state: dict[str, Tensor]
    config: dict | None = None
    patch: dict = field(default_factory=dict)


def shipped() -> dict[str, Path]:
    """Path of each weights file that comes with the package, by name."""
    folder = Path(__file__).parent / "weights"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find(pretrained: str | os.PathLike) -> Weights:
    """Weights from a path, one of our shipped names, or deepinv's ``"PatchNR_lodopab_small2"``."""
    if pretrained in shipped():
        return read(shipped()[pretrained])
    if pretrained == LODOPAB:
        return convert(_download_lodopab())
    if not Path(pretrained).is_file():
        names = ", ".join(map(repr, [*shipped(), LODOPAB]))
        raise CheckpointError(f"no file or shipped weights named {str(pretrained)!r}; shipped: {names}")
    return read(pretrained)


def read(path: str | os.PathLike) -> Weights:
    """Weights in a file of any dialect; nothing but tensors is unpickled."""
    try:
        with open(path, "rb") as file:
            is_torch = file.read(2) in (b"PK", b"\x80\x02")
        return convert(read_torch(path)) if is_torch else _read_safetensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def write(path: str | os.PathLike, flow: nn.Module, **patch: int) -> None:
    """Write weights and architecture of a builder's flow as safetensors; an interrupted write leaves ``path`` as it was."""
    from safetensors.torch import save_file

    config = getattr(flow, "config", None)
    if config is None:
        raise ValueError(f"only flows of deepinv_flows' builders know their architecture; got {type(flow).__name__}")
    state = {key: value.detach().cpu().contiguous() for key, value in flow.state_dict().items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps({"config": config, "patch": patch})}
    with tempfile.TemporaryDirectory(dir=Path(path).resolve().parent) as folder:
        save_file(state, Path(folder) / "weights", metadata)
        os.replace(Path(folder) / "weights", path)


def same_function(a: dict, b: dict) -> bool:
    """Whether flows of these architectures compute the same function when sizes and weights are equal."""
    sizes = ("dim", "num_layers", "sub_net_size", "split_len")
    a, b = ({"reversed": False, **{key: c[key] for key in c if key not in sizes}} for c in (a, b))
    return a == b


def load_into(module: nn.Module, state: dict[str, Tensor], strict: bool = True):
    """Check every tensor, then load them all; or raise naming the first misfit and load none."""
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    for key in sorted(expected.keys() & state.keys()):
        if expected[key].shape != state[key].shape:
            raise CheckpointError(
                f"{key}: expected shape {tuple(expected[key].shape)}; found {tuple(state[key].shape)}"
            )
    if strict and (missing or extra):
        raise CheckpointError(f"missing tensors: {missing[:3] or 'none'}; unexpected tensors: {extra[:3] or 'none'}")
    check_values(state)
    return nn.Module.load_state_dict(module, state, strict=strict)


def build(weights: Weights, patch: dict[str, int], num_layers: int, sub_net_size: int) -> nn.Module:
    """A new flow of the function that the weights are for, with the weights loaded.

    Our files say their architecture; a file of another dialect has to be of the given sizes.
    """
    dim = patch["channels"] * patch["patch_size"] ** 2
    config = weights.config
    if config is None:
        config = glow_flow(dim, num_layers, sub_net_size).config
    elif not weights.patch:
        split_len = config["split_len"] if config["dim"] == dim else None
        config = {**config, "dim": dim, "num_layers": num_layers, "sub_net_size": sub_net_size, "split_len": split_len}
    elif weights.patch != patch:
        raise CheckpointError(f"expected weights for {patch}; found {weights.patch}")
    flow = build_flow(config)
    load_into(flow, weights.state)
    return flow


def rename_in_place(state: dict[str, Tensor], prefix: str, flow: nn.Module) -> None:
    """Give deepinv's tensors below ``prefix`` the names that they have in ``flow``, if it is a :func:`glow_flow`."""
    theirs = [key for key in state if key.startswith(prefix + "blocks.")]
    if theirs and getattr(flow, "config", {}).get("builder") == "glow_flow":
        for key in theirs:
            state[prefix + deepinv_key(key.removeprefix(prefix))] = state.pop(key)
        for key, value in flow.state_dict().items():
            if key.endswith(".perm"):
                state.setdefault(prefix + key, value)


def check_values(state: dict[str, Tensor]) -> None:
    """Every floating-point tensor is finite and every permutation is one."""
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{key}: holds NaN or infinite values")
        if key.endswith(".perm") and not torch.equal(
            value.sort().values, torch.arange(len(value), device=value.device)
        ):
            raise CheckpointError(f"{key}: is no permutation")


def convert(raw: dict) -> Weights:
    """Weights for one of our flows from what ``torch.load`` returned, whatever its dialect."""
    state = _tensors(raw)
    if any(key.startswith("blocks.") for key in state):
        return _convert_glow(_rename_deepinv(state), "deepinv")
    if "module_list.0.perm" in state:
        return Weights(state)
    if "module_list.0.subnet1.0.weight" in state:
        return _convert_glow(state, "ATAN")
    raise CheckpointError(f"not the weights of a PatchNR: tensors named {sorted(state)[:3]}")


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
    theirs = glow_flow(config.get("dim", 2), 1, 1).config | {"num_layers": None, "sub_net_size": None}
    differ = {key: value for key, value in config.items() if theirs.get(key, False) not in (None, value)}
    if differ or not config:
        raise ValueError(
            f"deepinv's PatchNR has no flow like {type(flow).__name__} with {differ or 'its own architecture'}"
        )
    state = {}
    for key, value in flow.state_dict().items():
        if not key.endswith(".perm"):
            _, block, subnet, rest = key.split(".", 3)
            state[f"normalizing_flow.blocks.{int(block) - 1}.subnet{3 - int(subnet[-1])}.{rest}"] = value.clone()
    return state


def _tensors(raw: dict) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without wrappers' prefixes."""
    for name in ("net_state_dict", "state_dict"):
        if isinstance(raw, dict) and isinstance(raw.get(name), dict):
            raw = raw[name]
    if not isinstance(raw, dict) or not raw or not all(torch.is_tensor(value) for value in raw.values()):
        raise CheckpointError("holds no state dict (a non-empty dict of tensors)")
    for prefix in ("module.", "flow.", "normalizing_flow."):
        if all(key.startswith(prefix) for key in raw):
            raw = {key.removeprefix(prefix): value for key, value in raw.items()}
    return dict(raw)


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
    config = {
        "builder": "glow_flow",
        "dim": dim,
        "num_layers": sum(key.endswith("subnet1.0.weight") for key in state),
        "sub_net_size": _width(state, "module_list.1.subnet1.0.weight", 0),
        **dict(clamp=1.6, coupling="glow", clamp_activation=clamp_activation, activation="relu", permute=permute),
        "split_len": split_len,
    }
    if permute:  # the paper evaluates the density with rev=True
        return Weights({f"flow.{key}": value for key, value in state.items()}, {**config, "reversed": True})
    return Weights(state, config)


def _width(state: dict[str, Tensor], key: str, axis: int) -> int:
    if key not in state or state[key].ndim != 2:
        raise CheckpointError(f"missing tensors: {key} (a matrix)")
    return state[key].shape[axis]


def _last_index(state: dict[str, Tensor]) -> int:
    return max(int(key.split(".")[1]) for key in state)


def read_torch(path) -> dict:
    import numpy as np

    # deepinv's Trainer writes its loss history as numpy scalars
    scalars = [np._core.multiarray.scalar, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(scalars):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises anything from KeyError to UnpicklingError on a broken file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if "Weights only load failed" in reason:
            reason = "it holds more than tensors, and code in a checkpoint is never run"
        raise CheckpointError(f"not a readable torch checkpoint: {reason}") from None


def _read_safetensors(path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"neither a torch nor a safetensors file ({error})") from None
    if not metadata:
        return convert(state)
    return Weights(state, metadata["config"], metadata["patch"])


def _download_lodopab() -> dict:
    from deepinv.models.utils import get_weights_url, load_state_dict_from_url

    file_name = f"{LODOPAB}.pt"
    url = get_weights_url(model_name="demo", file_name=file_name)
    try:
        return load_state_dict_from_url(url, map_location="cpu", file_name=file_name, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{LODOPAB} is downloaded by deepinv and needs internet access: {error}") from None
