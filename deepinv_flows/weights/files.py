"""
Weights in files: our safetensors files, and torch files of any dialect of :mod:`deepinv_flows.weights.dialects`.

Nothing but tensors is ever unpickled. Whatever is broken raises a :class:`deepinv_flows.CheckpointError` before anything is
loaded.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..flows import build_flow, same_function
from .dialects import CheckpointError, Weights, as_number, check_numbers, convert, descriptions, modern

METADATA_KEY = "deepinv_flows"


def _ends(pair: Sequence[float]) -> tuple[float, float]:
    low, high = pair
    return float(low), float(high)


# of the training of a prior: the values of the images, the levels of the noise in them, and the sizes and steps
KNOWN: dict[str, Callable[[Any], Any]] = {"image_range": _ends, "sigma_range": _ends, "effort": dict}
LODOPAB = "PatchNR_lodopab_small2"


def shipped() -> dict[str, Path]:
    """The path of each weights file that comes with the package, by name."""
    folder = Path(__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def located(path: str | os.PathLike) -> str | os.PathLike:
    """The path of shipped weights of this name, or the path itself."""
    return shipped().get(str(path), path)


def find(pretrained: str | os.PathLike | BinaryIO) -> Weights:
    """Weights from a path, an open file, the name of shipped weights, or deepinv's ``"PatchNR_lodopab_small2"``."""
    if hasattr(pretrained, "read"):
        return _read_bytes(pretrained.read())
    if pretrained == LODOPAB:
        return convert(_download_lodopab())
    pretrained = located(pretrained)
    if not Path(pretrained).is_file():
        names = ", ".join(map(repr, [*shipped(), LODOPAB]))
        raise CheckpointError(f"no file or shipped weights of this name; shipped: {names}")
    return read(pretrained)


def read(path: str | os.PathLike) -> Weights:
    """Weights in a file of any dialect; nothing but tensors is unpickled."""
    try:
        return _read_bytes(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})") from None


def _read_bytes(raw: bytes) -> Weights:
    # torch's files are zip archives, or pickles in its older format; safetensors begin with a length and a JSON header
    is_torch = raw[8:9] != b"{" and (raw[:2] == b"PK" or raw[:1] == b"\x80")
    return convert(read_torch(io.BytesIO(raw))) if is_torch else _read_safetensors(raw)


def write(path: str | os.PathLike, flow: nn.Module, known: dict[str, Any] | None = None, **patch: int) -> None:
    """Write weights and config of a builder's flow as safetensors; an interrupted write leaves ``path`` as it was."""
    from safetensors.torch import save

    config = getattr(flow, "config", None)
    if config is None:
        raise ValueError(f"only flows of deepinv_flows' builders know their architecture; got {type(flow).__name__}")
    state = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in flow.state_dict().items()}
    said = {"config": config, "patch": patch, **{name: value for name, value in (known or {}).items() if value}}
    place = Path(path).resolve()
    if place.is_dir():
        raise CheckpointError(f"{path}: cannot be written (it is a folder; name a file in it)")
    if not place.parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written (there is no folder {place.parent})")
    try:
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            (Path(folder) / "weights").write_bytes(save(state, {"format": "pt", METADATA_KEY: json.dumps(said)}))
            os.replace(Path(folder) / "weights", place)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None


def load_into(module: nn.Module, state: dict[str, Tensor], strict: bool = True, assign: bool = False):
    """Check every tensor, then load them all; on the first misfit raise an error that names it, and load none."""
    expected, state = module.state_dict(), modern(state)
    ours, theirs = descriptions(expected), descriptions(state)
    for name in ours.keys() & theirs.keys():
        if not same_function(ours[name], theirs[name]):
            raise CheckpointError(f"expected weights of a flow {ours[name]}; found weights of {theirs[name]}")
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    for key in sorted(expected.keys() & state.keys()):
        state[key] = as_number(key, expected[key], state[key])
        check_numbers(key, expected[key], state[key], bool(ours))
    if strict and (missing or extra):
        raise CheckpointError(f"missing tensors: {missing[:3] or 'none'}; unexpected tensors: {extra[:3] or 'none'}")
    return nn.Module.load_state_dict(module, state, strict=strict, assign=assign)


def patch_config(weights: Weights) -> dict:
    """The config of a flow on patches; refused for other weights."""
    if weights.config is None:
        named = f"not the weights of a PatchNR: tensors named {sorted(weights.state)[:3]}"
        lost = ", whose config was lost on the way: make the flow, and load them by its load_state_dict"
        raise CheckpointError(f"{named}{lost if _ours(weights.state) else ''}")
    if "sigma_range" in weights.config:
        raise CheckpointError(
            "expected weights of a flow on patches; found the training of a denoiser: fit_patchnr(resume=True) ends it, and "
            "prior.save keeps the weights with their noise levels"
        )
    if "dim" not in weights.config:
        raise CheckpointError("expected weights of a flow on patches; found those of a flow on images, for FlowPrior")
    return weights.config


def _ours(state: dict[str, Tensor]) -> bool:
    return any(key.endswith(("module_list.0.perm", "module_list.1.perm")) for key in state)


def new_flow(weights: Weights, **differ) -> nn.Module:
    """A new flow of the function that the weights are for, in their dtype; no random numbers of the user's are drawn."""
    return build_flow({**(weights.config or {}), **differ}, torch.Generator()).to(weights.dtype)


def build(weights: Weights, patch: dict[str, int], num_layers: int, sub_net_size: int) -> nn.Module:
    """
    A new flow of the function that the weights are for, with the weights loaded.

    Our files say the sizes of the flow; weights of another dialect have to be of the sizes given.
    """
    config = patch_config(weights)
    dim = patch["channels"] * patch["patch_size"] ** 2
    if config["dim"] != dim or weights.patch not in ({}, patch):
        raise CheckpointError(
            f"expected weights for {patch} (patch dimension {dim}); found weights for patch dimension {config['dim']}"
            f"{', ' + str(weights.patch) if weights.patch else ''}"
        )
    asked = {"num_layers": num_layers, "sub_net_size": sub_net_size}
    flow = new_flow(weights, **(asked if weights.dialect else {}))
    try:
        load_into(flow, weights.state)
    except CheckpointError as error:
        sizes = {key: config[key] for key in ("num_layers", "sub_net_size")}
        hint = f" (expected {asked}; the file has {sizes}, which PatchNR.from_checkpoint takes from it)"
        raise CheckpointError(f"{error}{hint if weights.dialect and sizes != asked else ''}") from None
    return flow


@contextlib.contextmanager
def guarded(name: str | os.PathLike | BinaryIO) -> Iterator[None]:
    """Turn any error about the weights called ``name`` into a :class:`deepinv_flows.CheckpointError` that names them."""
    name = getattr(name, "name", type(name).__name__) if hasattr(name, "read") else name
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: broken weights ({type(error).__name__}: {error})") from None


def read_torch(path) -> dict:
    """What ``torch.save`` wrote to a path or an open file; nothing but tensors and numbers is unpickled."""
    import numpy as np

    # deepinv's Trainer writes its loss history as numpy scalars
    core = getattr(np, "_core", None) or np.core
    scalars = [core.multiarray.scalar, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]
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


def _read_safetensors(raw: bytes) -> Weights:
    import safetensors.torch

    try:
        state = safetensors.torch.load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        said = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"neither a torch nor a safetensors file ({error})") from None
    if not said:
        return convert(state)
    state = modern(state)
    known = {name: read_as(said[name]) for name, read_as in KNOWN.items() if name in said}
    return Weights(state, said["config"], said["patch"], spellings=[state], known=known)


def _download_lodopab() -> dict:
    from deepinv.models.utils import get_weights_url, load_state_dict_from_url

    file_name = f"{LODOPAB}.pt"
    url = get_weights_url(model_name="demo", file_name=file_name)
    try:
        return load_state_dict_from_url(url, map_location="cpu", file_name=file_name, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{LODOPAB} is downloaded by deepinv and needs internet access: {error}") from None
