"""The methods of PatchNR that write weights, load them in any dialect, and make a prior of a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from .. import weights as checkpoints
from ..flows import like_weights, rename_deepinv, same_function
from ..weights import KNOWN

if TYPE_CHECKING:
    from .prior import PatchNR

Source = str | os.PathLike | BinaryIO


def save(self: PatchNR, path: str | os.PathLike) -> None:
    """
    Write weights, config, patch shape, and what is known of the training, for ``from_checkpoint``.

    :param str path: file to write, in a folder that exists. An interrupted write leaves the file as it was.
    :raises ValueError: when the flow is not made by one of our builders, or the file cannot be written.
    """
    known = {name: getattr(self, name, None) for name in KNOWN}
    checkpoints.write(path, self.normalizing_flow, known, patch_size=self.patch_size, channels=self.channels)


def from_checkpoint(cls: type[PatchNR], path: Source, **kwargs: Any) -> PatchNR:
    """
    Make a PatchNR with the flow of a checkpoint of any dialect.

    :param str path: file, open binary file, or name of shipped weights.
    :param kwargs: further arguments of :class:`deepinv_flows.PatchNR`. Only our own files hold ``patch_size`` and ``channels``.
        For other files, and unless they are given, the number of channels is the smallest for which a square patch has as many
        entries as the flow.
    :return: the prior, of the file's dtype if that is longer than torch's default.
    :raises CheckpointError: when the file cannot be read or used.

    >>> import tempfile, torch
    >>> from deepinv_flows import PatchNR
    >>> prior = PatchNR(patch_size=3, channels=2, num_layers=1, sub_net_size=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prior.save(f"{folder}/weights.safetensors")
    ...     again = PatchNR.from_checkpoint(f"{folder}/weights.safetensors")
    >>> x = torch.rand(1, 2, 8, 8)
    >>> torch.equal(again(x), prior(x))
    True
    """
    with checkpoints.guarded(path):
        weights = checkpoints.find(path)
        config = checkpoints.patch_config(weights)
        patch = _patch_shape(config["dim"], {**weights.patch, **_given(kwargs, "patch_size", "channels")})
        sizes = {key: config[key] for key in ("num_layers", "sub_net_size")}
        sizes.update({key: kwargs.pop(key) for key in _given(kwargs, *sizes)})
        flow = checkpoints.build(weights, patch, **sizes).to(kwargs.get("device", "cpu"))
    prior = cls(flow, **{**kwargs, **patch})
    _remember(prior, weights)
    return prior


def to_deepinv_state_dict(self: PatchNR) -> dict[str, Tensor]:
    """
    State dict that ``deepinv.optim.PatchNR(...).load_state_dict`` takes.

    :raises ValueError: when deepinv does not have a flow of this function, as with permutations.
    """
    return checkpoints.to_deepinv(self.normalizing_flow)


def load_state_dict(self: PatchNR, state_dict: dict, strict: bool = True, assign: bool = False):
    """
    Load weights of any dialect; on a misfit nothing is loaded.

    The weights of the two dialects written with FrEIA have the same shapes, but belong to other functions (clamp, order,
    permutations). For these ``normalizing_flow`` becomes a new module, so make optimizers after loading.

    :param dict state_dict: state dict of this class, of deepinv's PatchNR of any version, or of the PatchNR paper.
    :param bool strict: whether all tensors must be there. If not, the names must be those of this class or of deepinv >= 0.4.1.
    :param bool assign: as in :meth:`torch.nn.Module.load_state_dict`.
    :raises CheckpointError: when a tensor does not fit; the message names it, the shape expected and the shape found.
    """
    with checkpoints.guarded("state dict"):
        if strict:
            return _load(self, checkpoints.convert(state_dict), assign)
        state = checkpoints.modern(state_dict)
        rename_deepinv(state, "normalizing_flow.", self.normalizing_flow)
        return checkpoints.load_into(self, state, False, assign)


def load_pretrained(prior: PatchNR, pretrained: Source, sizes: tuple[int, int] | None, device) -> None:
    """Load into the prior's flow, or, given ``sizes`` (layers, width), into a new one of the file's config if it has one."""
    with checkpoints.guarded(pretrained):
        weights = checkpoints.find(pretrained)
        if sizes is None:
            _load(prior, weights)
        else:
            prior.normalizing_flow = checkpoints.build(weights, _patch_of(prior), *sizes).to(device)
    _remember(prior, weights)


def _load(prior: PatchNR, weights: checkpoints.Weights, assign: bool = False):
    flow = prior.normalizing_flow
    ours: dict | None = getattr(flow, "config", None)
    theirs = weights.config
    if ours is not None and theirs is not None and not same_function(ours, theirs):
        new = checkpoints.build(weights, _patch_of(prior), ours["num_layers"], ours["sub_net_size"])
        new = new.to(like_weights(flow)).train(flow.training)
        if not any(p.requires_grad for p in flow.parameters()):
            new.requires_grad_(False)
        prior.normalizing_flow = new
        return checkpoints.load_into(new, new.state_dict())
    state, expected = weights.state, flow.state_dict().keys()
    for spelling in weights.spellings if ours is None else []:
        if spelling.keys() == expected:
            state = spelling
    return checkpoints.load_into(flow, state, assign=assign)


def _patch_of(prior: PatchNR) -> dict[str, int]:
    return {"patch_size": prior.patch_size, "channels": prior.channels}


def _patch_shape(dim: int, known: dict[str, int]) -> dict[str, int]:
    """Side and channels of patches of ``dim`` entries; one of the two, both or none may be known."""
    if "patch_size" in known:
        channels = [known.get("channels", max(1, dim // known["patch_size"] ** 2))]
    else:
        channels = [known["channels"]] if "channels" in known else list(range(1, dim // 4 + 1))
    for number in channels:
        side = known.get("patch_size", round((dim / number) ** 0.5))
        if number * side**2 == dim:
            return {"patch_size": side, "channels": number}
    given = ", ".join(f"{key}={value}" for key, value in known.items()) or "square patches of 2 x 2 pixels or more"
    raise checkpoints.CheckpointError(
        f"expected weights for {given}; found weights for patch dimension {dim}: "
        f"pass channels= and patch_size= with channels * patch_size**2 = {dim}"
    )


def _given(kwargs: dict, *names: str) -> dict:
    return {name: kwargs[name] for name in names if name in kwargs}


def _remember(prior: PatchNR, weights: checkpoints.Weights) -> None:
    for name, value in weights.known.items():
        setattr(prior, name, value)
