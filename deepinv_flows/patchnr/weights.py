"""What PatchNR does with weights: write them, load them in any dialect, be built from a file."""

import os

from torch import Tensor, nn

from .. import weights as checkpoints
from ..flows import same_function


class PatchWeights:
    """Methods of a patch prior with ``normalizing_flow``, ``patch_size`` and ``channels``, for its weights."""

    def save(self, path: str | os.PathLike) -> None:
        """
        Write weights, architecture and patch shape as safetensors, for :meth:`from_checkpoint`.

        :param str path: file to write; left as it was if writing is interrupted.
        :raises ValueError: when the flow is not one of our builders'.
        """
        checkpoints.write(path, self.normalizing_flow, patch_size=self.patch_size, channels=self.channels)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, **kwargs) -> "PatchWeights":
        """
        PatchNR with the architecture and weights of a checkpoint of any dialect.

        :param str path: file, or name of shipped weights.
        :param kwargs: further arguments of :class:`PatchNR`. Only our own files know ``patch_size`` and ``channels``: for the
            others ``channels`` is 1 unless given, and ``patch_size`` follows.
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
            channels = kwargs.setdefault("channels", weights.patch.get("channels", 1))
            side = round((config["dim"] / channels) ** 0.5)
            kwargs.setdefault("patch_size", weights.patch.get("patch_size", side))
            sizes = {key: config[key] for key in ("num_layers", "sub_net_size")}
        return cls(pretrained=path, **{**sizes, **kwargs})

    def to_deepinv_state_dict(self) -> dict[str, Tensor]:
        """
        State dict that ``deepinv.optim.PatchNR(...).load_state_dict`` takes.

        :raises ValueError: when deepinv has no flow of this function, as with permutations.
        """
        return checkpoints.to_deepinv(self.normalizing_flow)

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """
        Load weights of any dialect; on a misfit nothing is loaded.

        The two dialects written with FrEIA are other functions of equal shapes (clamp, order, permutations): for these
        ``normalizing_flow`` becomes a new module, so make optimizers afterwards.

        :param dict state_dict: of this class, of deepinv's PatchNR of any version, or of the paper's.
        :param bool strict: whether all tensors must be there; if not, only names of this class and deepinv >= 0.4.1.
        :param bool assign: as in :meth:`torch.nn.Module.load_state_dict`.
        :raises CheckpointError: naming the tensor, the shape expected and the shape found.
        """
        with checkpoints.guarded("state dict"):
            if strict:
                return self._load(checkpoints.convert(state_dict), assign)
            state = dict(state_dict)
            checkpoints.rename_in_place(state, "normalizing_flow.", self.normalizing_flow)
            return checkpoints.load_into(self, state, False, assign)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # deepinv's names, also when the prior is part of a larger module
        checkpoints.rename_in_place(state_dict, prefix + "normalizing_flow.", self.normalizing_flow)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _load_pretrained(self, pretrained: str | os.PathLike, sizes: dict[str, int] | None, device) -> None:
        """Load into the flow that is there, or make one: of ``sizes``, unless the file knows its own."""
        with checkpoints.guarded(pretrained):
            weights = checkpoints.find(pretrained)
            if sizes is None:
                self._load(weights)
            else:
                self.normalizing_flow = self._flow_for(weights, **sizes).to(device)

    def _load(self, weights: checkpoints.Weights, assign: bool = False):
        flow = self.normalizing_flow
        ours, theirs = getattr(flow, "config", None), weights.config
        if ours is not None and theirs is not None and not same_function(ours, theirs):
            new = (
                self._flow_for(weights, ours["num_layers"], ours["sub_net_size"]).to(self._like()).train(flow.training)
            )
            if not any(p.requires_grad for p in flow.parameters()):
                new.requires_grad_(False)
            self.normalizing_flow = new
            return checkpoints.load_into(new, new.state_dict())
        state = weights.state
        for spelling in weights.spellings if ours is None else []:
            if spelling.keys() == flow.state_dict().keys():
                state = spelling
        return checkpoints.load_into(flow, state, assign=assign)

    def _flow_for(self, weights: checkpoints.Weights, num_layers: int, sub_net_size: int) -> nn.Module:
        patch = {"patch_size": self.patch_size, "channels": self.channels}
        return checkpoints.build(weights, patch, num_layers, sub_net_size)
