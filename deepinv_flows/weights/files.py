"""
Weights on disk: our safetensors files, and torch files of any dialect of :mod:`deepinv_flows.weights.dialects`.

Nothing but tensors is ever unpickled, and whatever is broken raises :class:`CheckpointError` before anything is loaded.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..flows import build_flow, decode_config, same_function
from .dialects import EXTRA, CheckpointError, Weights, convert

METADATA_KEY = "deepinv_flows"
LODOPAB = "PatchNR_lodopab_small2"


def shipped() -> dict[str, Path]:
    """Path of each weights file that comes with the package, by name."""
    folder = Path(__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find(pretrained: str | os.PathLike) -> Weights:
    """Weights from a path, one of our shipped names, or deepinv's ``"PatchNR_lodopab_small2"``."""
    if pretrained in shipped():
        return read(shipped()[pretrained])
    if pretrained == LODOPAB:
        return convert(_download_lodopab())
    if not Path(pretrained).is_file():
        names = ", ".join(map(repr, [*shipped(), LODOPAB]))
        raise CheckpointError(f"no file or shipped weights of this name; shipped: {names}")
    return read(pretrained)


def read(path: str | os.PathLike) -> Weights:
    """Weights in a file of any dialect; nothing but tensors is unpickled."""
    try:
        with open(path, "rb") as file:
            is_torch = file.read(2) in (b"PK", b"\x80\x02")
        return convert(read_torch(path)) if is_torch else _read_safetensors(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})") from None


def write(path: str | os.PathLike, flow: nn.Module, **patch: int) -> None:
    """Write weights and architecture of a builder's flow as safetensors; an interrupted write leaves ``path`` as it was."""
    from safetensors.torch import save

    config = getattr(flow, "config", None)
    if config is None:
        raise ValueError(f"only flows of deepinv_flows' builders know their architecture; got {type(flow).__name__}")
    state = {k: v.detach().cpu().contiguous() for k, v in flow.state_dict().items() if not k.endswith(EXTRA)}
    metadata = {"format": "pt", METADATA_KEY: json.dumps({"config": config, "patch": patch})}
    with tempfile.TemporaryDirectory(dir=Path(path).resolve().parent) as folder:
        (Path(folder) / "weights").write_bytes(save(state, metadata))
        os.replace(Path(folder) / "weights", path)


def load_into(module: nn.Module, state: dict[str, Tensor], strict: bool = True, assign: bool = False):
    """Check every tensor, then load them all; or raise naming the first misfit and load none."""
    expected = module.state_dict()
    # weights of other origin do not say their function: the caller has chosen the module by it
    state = {**{key: value for key, value in expected.items() if key.endswith(EXTRA)}, **state}
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    for key in sorted(expected.keys() & state.keys()):
        _check_tensor(key, expected[key], state[key])
    if strict and (missing or extra):
        raise CheckpointError(f"missing tensors: {missing[:3] or 'none'}; unexpected tensors: {extra[:3] or 'none'}")
    return nn.Module.load_state_dict(module, state, strict=strict, assign=assign)


def _check_tensor(key: str, expected: Tensor, found: Tensor) -> None:
    if key.endswith(EXTRA):
        configs = decode_config(expected), decode_config(found)
        if not same_function(*configs):
            raise CheckpointError("expected weights of a flow {}; found weights of {}".format(*configs))
        return
    if expected.shape != found.shape:
        raise CheckpointError(f"{key}: expected shape {tuple(expected.shape)}; found {tuple(found.shape)}")
    if found.is_floating_point() != expected.is_floating_point() or found.is_complex() or found.layout != torch.strided:
        raise CheckpointError(f"{key}: expected a dense {expected.dtype} tensor; found {found.layout}, {found.dtype}")
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{key}: holds NaN or infinite values")
    if key.endswith(".perm") and not torch.equal(found.sort().values, torch.arange(len(found), device=found.device)):
        raise CheckpointError(f"{key}: is no permutation")


def patch_config(weights: Weights) -> dict:
    """Architecture of a flow on patches."""
    if weights.config is None:
        raise CheckpointError(f"not the weights of a PatchNR: tensors named {sorted(weights.state)[:3]}")
    if "dim" not in weights.config:
        raise CheckpointError("expected weights of a flow on patches; found those of a flow on images, for FlowPrior")
    return weights.config


def build(weights: Weights, patch: dict[str, int], num_layers: int, sub_net_size: int) -> nn.Module:
    """A new flow of the function that the weights are for, with the weights loaded.

    Our files say their architecture; a file of another dialect has to be of the given sizes.
    """
    config = patch_config(weights)
    dim = patch["channels"] * patch["patch_size"] ** 2
    if config["dim"] != dim or weights.patch not in ({}, patch):
        raise CheckpointError(
            f"expected weights for {patch} (patch dimension {dim}); found weights for patch dimension {config['dim']}"
            f"{', ' + str(weights.patch) if weights.patch else ''}"
        )
    if weights.dialect:
        config = {**config, "num_layers": num_layers, "sub_net_size": sub_net_size}
    flow = build_flow(config, torch.Generator())  # every weight is loaded: the user's random stream stands still
    try:
        load_into(flow, weights.state)
    except CheckpointError as error:
        sizes = {key: weights.config[key] for key in ("num_layers", "sub_net_size")}
        asked = {"num_layers": num_layers, "sub_net_size": sub_net_size}
        hint = f" (the file has {sizes}, asked for was {asked}; PatchNR.from_checkpoint takes the file's)"
        raise CheckpointError(f"{error}{hint if weights.dialect and sizes != asked else ''}") from None
    return flow


@contextlib.contextmanager
def guarded(name: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong with the weights called ``name`` ends in one :class:`CheckpointError` that says so."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: broken weights ({type(error).__name__}: {error})") from None


def read_torch(path) -> dict:
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
    return Weights(state, metadata["config"], metadata["patch"], spellings=[state])


def _download_lodopab() -> dict:
    from deepinv.models.utils import get_weights_url, load_state_dict_from_url

    file_name = f"{LODOPAB}.pt"
    url = get_weights_url(model_name="demo", file_name=file_name)
    try:
        return load_state_dict_from_url(url, map_location="cpu", file_name=file_name, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{LODOPAB} is downloaded by deepinv and needs internet access: {error}") from None
