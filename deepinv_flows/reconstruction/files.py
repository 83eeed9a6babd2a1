"""A MAP model in one file: the weights of its prior, and its choices in the metadata beside them."""

import json
import os
import tempfile
from pathlib import Path

import torch
from deepinv.optim.data_fidelity import L2

from .. import weights as checkpoints
from ..latent import FlowPrior
from ..patchnr import PatchNR
from .objective import Box

KEY = "deepinv_flows_map"
PRIOR_OPTIONS: dict[type, tuple[str, ...]] = {
    PatchNR: ("pad", "stride", "n_patches", "subset", "precision"),
    FlowPrior: ("per_dim",),
}
OPTIONS = ("lambda_reg", "solver", "max_iter", "tol", "max_seconds", "verbose")


def save(model, path: str | os.PathLike) -> None:
    from safetensors import safe_open
    from safetensors.torch import save as to_bytes

    kind = next((kind for kind in PRIOR_OPTIONS if isinstance(model.prior, kind)), None)
    if kind is None:
        raise ValueError(f"only a MAP with a PatchNR or FlowPrior is saved; got {type(model.prior).__name__}")
    options = {name: getattr(model, name) for name in OPTIONS}
    if hasattr(options["lambda_reg"], "tolist"):
        options["lambda_reg"] = options["lambda_reg"].tolist()
    box = type(model.constraint) is Box
    choices = {
        "options": options,
        "prior": kind.__name__,
        "prior_options": {name: getattr(model.prior, name) for name in PRIOR_OPTIONS[kind]},
        "L2": float(model.data_fidelity.norm) if type(model.data_fidelity) is L2 else None,
        "data_fidelity": type(model.data_fidelity).__name__,
        "constraint": [model.constraint.low, model.constraint.high] if box else type(model.constraint).__name__,
        "tuned": model.tuned,
    }
    with tempfile.TemporaryDirectory(dir=Path(path).resolve().parent) as folder:
        part = Path(folder) / "weights"
        model.prior.save(part)
        with safe_open(part, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = {**file.metadata(), KEY: json.dumps(choices)}
        part.write_bytes(to_bytes(state, metadata))
        os.replace(part, path)


def load(path: str | os.PathLike, given: dict) -> tuple[dict, dict]:
    """Arguments of a MAP, those ``given`` in place of the saved ones, and what was tuned."""
    saved = {"data_fidelity": None, "constraint": "saved"}
    given = {name: value for name, value in given.items() if name not in saved or value != saved[name]}
    path = checkpoints.located(path)
    with checkpoints.guarded(path):
        choices = _choices(path)
        arguments = dict(choices["options"])
        if isinstance(arguments["lambda_reg"], list):
            arguments["lambda_reg"] = torch.tensor(arguments["lambda_reg"])
        if choices["L2"] is not None:
            arguments["data_fidelity"] = L2(sigma=choices["L2"] ** -0.5)
        elif "data_fidelity" not in given:
            raise checkpoints.CheckpointError(f"saved with a {choices['data_fidelity']}: pass data_fidelity=...")
        if isinstance(choices["constraint"], list):
            arguments["constraint"] = tuple(choices["constraint"])
        elif choices["constraint"] != "NoneType" and "constraint" not in given:
            raise checkpoints.CheckpointError(
                f"saved with a {choices['constraint']} as constraint: pass constraint=..."
            )
        options = choices["prior_options"]
        make = {"PatchNR": PatchNR.from_checkpoint, "FlowPrior": lambda path, **o: FlowPrior(pretrained=path, **o)}
        prior = given.pop("prior") if "prior" in given else make[choices["prior"]](path, **options)
    if "lambda_reg" in given:
        choices["tuned"] = {}
    return {**arguments, **given, "prior": prior}, choices["tuned"]


def _choices(path: str | os.PathLike) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError) as error:
        raise checkpoints.CheckpointError(f"cannot be read ({error})") from None
    if found is None:
        raise checkpoints.CheckpointError(
            "no choices of a MAP in this file; MAP(PatchNR.from_checkpoint(path)) makes one"
        )
    return json.loads(found)
