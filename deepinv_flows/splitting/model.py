"""The reconstructor inside an equivariant splitting loss, which splits and re-corrupts its input and remembers how."""

from dataclasses import dataclass

import torch
from deepinv.loss import SplittingLoss
from deepinv.models import EquivariantReconstructor
from deepinv.physics import Physics, StackedPhysics
from torch import Tensor, nn

from .joint import Alone, of_all
from .masks import sized
from .parts import check_mask, kept, observed_mask, rest, shares
from .pickling import Portable
from .recorruption import Recorruption

_REDRAWS = 8
_LEVELS = ("sigma2", "gain")


class RandomState:
    """The random states from which the forward pass of a module may draw, so that it can run again with the same draws."""

    @staticmethod
    def sources(module: nn.Module) -> list[torch.Generator]:
        """The generators that a module holds."""
        found = {id(v): v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Generator)}
        return list(found.values())

    def __init__(self, sources: list[torch.Generator], device: torch.device):
        self.own = [(generator, generator.get_state()) for generator in sources]
        self.cuda = [device] if device.type == "cuda" else []
        self.common = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.cuda]

    def run(self, function, *args):
        """``function(*args)`` with the draws of the remembered pass; the current random states are restored afterwards."""
        now = [(generator, generator.get_state()) for generator, _ in self.own]
        with torch.random.fork_rng(devices=self.cuda):
            torch.set_rng_state(self.common[0])
            for device, state in zip(self.cuda, self.common[1]):
                torch.cuda.set_rng_state(state, device)
            for generator, state in self.own:
                generator.set_state(state)
            try:
                return function(*args)
            finally:
                for generator, state in now:
                    generator.set_state(state)


@dataclass
class Split:
    """One splitting of a forward pass: its mask, the measurements it was applied to, A_1, and all that is needed to repeat it."""

    mask: Tensor
    y: Tensor
    physics: Physics
    x_net: Tensor | None
    random: RandomState
    autocast: bool


class SplitReconstructor(Portable, EquivariantReconstructor):
    """deepinv's Reynolds averaging, made picklable."""


class EquivariantSplittingModel(Portable, SplittingLoss.SplittingModel):
    """
    deepinv's splitting model, which also re-corrupts its input, remembers its splits with their reconstructions, and can repeat
    them.

    :param torch.nn.Module model: reconstructor of split measurements.
    :param deepinv.physics.generator.PhysicsGenerator mask_generator: generator of the splitting masks.
    :param int eval_n_samples: number of splittings averaged in evaluation.
    :param Recorruption recorruption: noise added to the input before it is split, for R2R.
    """

    joint_draws = Alone()

    def __init__(self, model, mask_generator, eval_n_samples: int, recorruption: Recorruption | None = None):
        super().__init__(model, None, mask_generator, eval_n_samples, True, False, None)
        self.recorruption, self.checked = recorruption, False
        self.splits: list[Split] = []
        self.seen: tuple[Tensor, ...] = ()

    def forward(self, y: Tensor, physics: Physics, update_parameters: bool = False) -> Tensor:
        """
        Reconstruct from split measurements.

        :param torch.Tensor y: measurements (B, ...).
        :param deepinv.physics.Physics physics: physics of the measurements.
        :param bool update_parameters: whether to remember the splits, for the loss.
        :return: the reconstruction from one split in training, and the average over ``eval_n_samples`` splits in evaluation.
        :raises TypeError: for stacked measurements.
        :raises ValueError: for masks that do not fit the measurements, or that never split them.
        """
        if isinstance(physics, StackedPhysics) or not torch.is_tensor(y):
            raise TypeError(
                f"expected a tensor of measurements of one operator; got {type(y).__name__} of {type(physics).__name__}. "
                "A splitting mask applies to one tensor: write the stack as one operator with one tensor of measurements"
            )
        repeats = 1 if self.recorruption is None else self.recorruption.eval_n_samples
        n_samples = 1 if self.training else self.eval_n_samples * repeats
        sources = RandomState.sources(self.model) if update_parameters else []
        outputs, splits = [], []
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            for _ in range(n_samples):
                mask = self.draw(y, physics)
                y_in = y if self.recorruption is None else self.recorruption(y, physics, self.joint_draws)
                random = RandomState(sources, y.device) if update_parameters else None
                y1, physics1 = self.split(mask, y_in, physics)
                outputs.append(self.model(y1, physics1))
                if random is not None:
                    own = outputs[-1] if n_samples > 1 else None
                    splits.append(Split(mask, y_in, physics1, own, random, torch.is_autocast_enabled(y.device.type)))
        out = outputs[0] if n_samples == 1 else sum(outputs[1:], outputs[0]) / n_samples
        if update_parameters:
            self.splits, self.masks = splits, [split.mask for split in splits]
            self.seen = y, out.detach()
        return out

    def get_splits(self) -> list[Split]:
        """The splits of the last pass with ``update_parameters=True``."""
        self.get_masks()  # raises an error if there are none
        return self.splits

    def check_pass(self, y: Tensor, x_net: Tensor) -> None:
        """
        Refuse measurements or a reconstruction that are not those of the last pass with ``update_parameters=True``.

        :raises ValueError: when one of them differs, and before such a pass.
        """
        self.get_masks()
        for name, given, known in zip(("y", "x_net"), (y, x_net), self.seen):
            if not _equal(given.detach(), known):
                raise ValueError(
                    f"expected {name} to be that of the last pass with update_parameters=True, whose splits the loss uses; "
                    f"got another one, of shape {tuple(given.shape)}"
                )

    def draw(self, y: Tensor, physics) -> Tensor:
        """A checked splitting mask for these measurements, (B, ...), of zeros and ones; entries not observed are 0."""
        joint, seen = self.joint_draws, observed_mask(physics, y)
        observed, n_samples = None if seen is None else of_all(seen, y, joint), joint.size(len(y))

        def step() -> Tensor:
            with sized(self.mask_generator, observed):
                mask = self.mask_generator.step(n_samples, input_mask=observed)["mask"]
            return mask.expand(n_samples, *mask.shape[1:]) if len(mask) == 1 else mask  # one mask for all samples

        whole = step()
        mask = joint.share(whole)
        check_mask(mask, y, seen)
        if not self.checked:
            if not bool(((whole == 0) | (whole == 1)).all()):
                raise ValueError(
                    f"expected a splitting mask of zeros and ones; got values {whole.unique()[:5].tolist()}"
                )
            self._check_ratio(whole, observed, step)
            self.checked = True
        return kept(mask.to(y.real.dtype), seen)

    def _check_ratio(self, mask, observed, step) -> None:
        # a small mask may keep all or nothing by chance; it is a mistake only if this happens in every draw
        for _ in range(_REDRAWS):
            inside = kept(mask, observed)
            first, second = (bool((shares(part) > 0).any()) for part in (inside, rest(inside, observed)))
            if first and second:
                return
            mask = step()
        entries = mask.shape[1:].numel() if observed is None else int(observed.count_nonzero() / len(observed))
        what = "everything" if first else "nothing"
        raise ValueError(
            f"expected a mask_generator that splits the {entries} observed entries of a measurement in two; got masks that "
            f"always keep {what}: use a split_ratio between {1 / max(entries, 1):.2g} and {1 - 1 / max(entries, 1):.2g}, "
            "such as 0.9 (many entries) or 0.5 (few)"
        )

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"splits": [], "masks": None, "seen": ()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"splits": [], "seen": ()})  # 0.1.0 had other values there
        self._non_persistent_buffers_set |= self._buffers.keys() & set(_LEVELS)  # persistent in 0.1.0

    def hold_levels(self, levels: dict[str, Tensor]) -> None:
        """
        Hold the noise levels that UNSURE learns, as buffers.

        State dicts hold them as metadata, which ``torch.save`` keeps, so that a model adapted by deepinv's loss or without UNSURE
        can load the weights. Loading a state dict without noise levels keeps the present ones.
        """
        device = next((p.device for p in self.parameters()), None)
        for name, value in levels.items():
            if name not in self._buffers:
                self.register_buffer(name, value.to(device), persistent=False)

    def extra_repr(self) -> str:
        levels = [f"{name}={float(level):.4g}" for name, level in self._buffers.items() if level is not None]
        noise = [f"recorruption={self.recorruption}"] if self.recorruption else []
        return ", ".join([f"eval_n_samples={self.eval_n_samples}", *noise, *levels])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            levels = {name: float(level) for name, level in self._buffers.items() if level is not None}
            destination._metadata[prefix[:-1]]["noise_levels"] = levels

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        levels = local_metadata.get("noise_levels", {})
        for name in _LEVELS:
            level = state_dict.pop(prefix + name, levels.get(name))  # a key in checkpoints of 0.1.0
            if level is not None and name in self._buffers:
                self._buffers[name].fill_(float(level))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _equal(given: Tensor, known: Tensor) -> bool:
    """Whether two tensors hold the same values; autocast may have changed the type of one of them."""
    if given.shape != known.shape or given.device != known.device:
        return False
    if given.dtype == known.dtype and given.data_ptr() == known.data_ptr():
        return True
    return torch.allclose(given.to(known.dtype), known, rtol=0, atol=0, equal_nan=True)
