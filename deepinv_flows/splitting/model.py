"""The reconstructor inside an equivariant splitting loss: splits (and re-corrupts) its input, and remembers how."""

from dataclasses import dataclass

import torch
from deepinv.loss import SplittingLoss
from deepinv.loss.r2r import set_beta_corruptor, set_binomial_corruptor, set_gaussian_corruptor
from deepinv.models import EquivariantReconstructor
from deepinv.physics import ComposedPhysics, GammaNoise, GaussianNoise, PoissonNoise, StackedPhysics
from torch import Tensor, nn

from .joint import Alone
from .masks import sized
from .pickling import Portable, recipe

_CORRUPTORS = {
    GaussianNoise: (set_gaussian_corruptor, "sigma"),
    PoissonNoise: (set_binomial_corruptor, "gain"),
    GammaNoise: (set_beta_corruptor, "l"),
}
_REDRAWS = 8
_LEVELS = ("sigma2", "gain")


def observed_mask(physics, y: Tensor) -> Tensor | None:
    """The operator's own mask of measurements, (B or 1, ...); ``None`` where it observes every entry of y."""
    if isinstance(physics, ComposedPhysics):
        physics = physics[-1]
    mask = getattr(physics, "mask", None)
    # compressed sensing has a mask too, but of the image
    fits = torch.is_tensor(mask) and 2 <= mask.ndim <= y.ndim and _fits(mask, y)
    return mask.to(y.real.dtype) if fits else None


def parts(mask: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The masks of A_1 and of A_2, which add up to the observed entries."""
    if observed is None:
        return mask, 1 - mask
    if mask.ndim < observed.ndim:
        mask = aligned(mask, observed)
    observed = aligned(observed, mask)
    return mask * observed, observed - mask * observed


def shares(part: Tensor) -> Tensor:
    """(B,) fraction of entries that a mask keeps, sample by sample."""
    return part.flatten(1).mean(1)


def aligned(mask: Tensor, y: Tensor) -> Tensor:
    """The mask (B, C, H, W), as a view that broadcasts with measurements (B, C, ..., H, W)."""
    return mask.view(*mask.shape[:2], *[1] * (y.ndim - mask.ndim), *mask.shape[2:])


def _fits(mask: Tensor, y: Tensor) -> bool:
    same = mask.shape[-2:] == y.shape[-2:]
    if y.ndim == 2:  # vectors (B, m)
        same = mask.ndim == 2 and mask.shape[1] == y.shape[1]
    return same and all(m in (1, n) for m, n in zip(aligned(mask, y).shape, y.shape))


def _of_all(values: Tensor, y: Tensor, joint) -> Tensor:
    """Values of each sample in y as those of the whole batch; a value of all samples as it is."""
    return joint.whole(values) if len(values) == len(y) else values


def _check_mask(mask: Tensor, y: Tensor, observed: Tensor | None) -> None:
    if mask.device != y.device:
        raise ValueError(
            f"expected a splitting mask on {y.device}, as the measurements; got one on {mask.device}: "
            f"make the mask_generator with device={str(y.device)!r}"
        )
    if not 2 <= mask.ndim <= y.ndim or len(mask) != len(y) or not _fits(mask, y):
        size = tuple((y if observed is None else observed).shape[1:])
        raise ValueError(
            f"expected a splitting mask that fits measurements of shape {tuple(y.shape)}; got one of shape {tuple(mask.shape)}: "
            f"make the mask_generator with img_size={size}"
        )


@dataclass
class Recorruption:
    """The noise that :class:`deepinv.loss.R2RLoss` adds to its input."""

    alpha: float
    noise_model: nn.Module | None
    eval_n_samples: int

    def __call__(self, y: Tensor, physics, joint=None) -> Tensor:
        joint = joint or Alone()
        noise = physics.noise_model if self.noise_model is None else self.noise_model
        for kind, (corruptor, name) in _CORRUPTORS.items():
            if isinstance(noise, kind):
                if not getattr(noise, "normalize", True):
                    raise ValueError("expected PoissonNoise(normalize=True) for R2RLoss; got normalize=False")
                level = torch.as_tensor(getattr(noise, name)).to(y.real).reshape(-1, *[1] * (y.ndim - 1))
                return joint.share(corruptor(joint.whole(y), self.alpha, _of_all(level, y, joint))())
        expected = ", ".join(kind.__name__ for kind in _CORRUPTORS)
        raise ValueError(f"expected one of {expected} as noise model for R2RLoss; got {type(noise).__name__}")

    @property
    def recipe(self):
        return self.alpha, self.eval_n_samples, recipe(self.noise_model)


class RandomState:
    """Every random state that a module's forward pass may draw from, to run it again with the same draws."""

    def __init__(self, module: nn.Module, device: torch.device):
        found = {id(v): v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Generator)}
        self.own = [(generator, generator.get_state()) for generator in found.values()]
        self.cuda = [device] if device.type == "cuda" else []
        self.common = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.cuda]

    def run(self, function, *args):
        """``function(*args)`` with the draws of then; the random states of now are kept."""
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
    """One splitting of one forward pass: its mask, the measurement it was applied to, and what else repeats it."""

    mask: Tensor
    y: Tensor
    x_net: Tensor | None
    random: RandomState
    autocast: bool


class SplitReconstructor(Portable, EquivariantReconstructor):
    """deepinv's Reynolds averaging, which pickles."""


class EquivariantSplittingModel(Portable, SplittingLoss.SplittingModel):
    """
    deepinv's splitting model, which also re-corrupts, remembers each evaluation split's own reconstruction, and can repeat it.

    :param torch.nn.Module model: reconstructor of split measurements.
    :param deepinv.physics.generator.PhysicsGenerator mask_generator: distribution of the splittings.
    :param int eval_n_samples: splittings averaged in evaluation.
    :param Recorruption recorruption: noise added to the input before it is split, for R2R.
    """

    joint = Alone()

    def __init__(self, model, mask_generator, eval_n_samples: int, recorruption: Recorruption | None = None):
        super().__init__(model, None, mask_generator, eval_n_samples, True, False, None)
        self.recorruption, self.splits, self.seen, self.checked = recorruption, None, None, False

    def forward(self, y: Tensor, physics, update_parameters: bool = False) -> Tensor:
        """
        :param torch.Tensor y: measurements (B, ...).
        :param deepinv.physics.Physics physics: their operator.
        :param bool update_parameters: whether to remember the splits, for the loss.
        :return: the reconstruction from one split in training, the average over ``eval_n_samples`` in evaluation.
        :raises TypeError: for stacked measurements.
        :raises ValueError: for masks that do not fit the measurements, or never split them.
        """
        if isinstance(physics, StackedPhysics) or not torch.is_tensor(y):
            raise TypeError(
                f"expected a tensor of measurements of one operator; got {type(y).__name__} of {type(physics).__name__}. "
                "Stacked measurements have no splitting mask: write the stack as one operator with one tensor"
            )
        repeats = 1 if self.recorruption is None else self.recorruption.eval_n_samples
        n_samples = 1 if self.training else self.eval_n_samples * repeats
        out, splits = 0.0, []
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            for _ in range(n_samples):
                mask = self.draw(y, physics)
                y_in = y if self.recorruption is None else self.recorruption(y, physics, self.joint)
                random = RandomState(self.model, y.device) if update_parameters else None
                x_net = self.model(*self.split(mask, y_in, physics))
                out = out + x_net / n_samples
                if update_parameters:
                    own = x_net if n_samples > 1 else None
                    splits.append(Split(mask, y_in, own, random, torch.is_autocast_enabled(y.device.type)))
        if update_parameters:
            self.splits, self.masks = splits, [split.mask for split in splits]
            self.seen = y, out.detach()
        return out

    def get_splits(self) -> list[Split]:
        """The splits of the last pass with ``update_parameters=True``."""
        self.get_masks()  # raises where there are none
        return self.splits

    def check_pass(self, y: Tensor, x_net: Tensor) -> None:
        """
        Refuse measurements or a reconstruction that are not those of the last pass with ``update_parameters=True``.

        :raises ValueError: for such ones, or before such a pass.
        """
        self.get_masks()
        for name, given, known in zip(("y", "x_net"), (y, x_net), self.seen):
            if not _equal(given.detach(), known):
                raise ValueError(
                    f"expected {name} to be that of the last pass with update_parameters=True, whose splits the loss uses; "
                    f"got another one, of shape {tuple(given.shape)}"
                )

    def draw(self, y: Tensor, physics) -> Tensor:
        """A checked splitting mask for these measurements, (B, ...) of zeros and ones, of observed entries alone."""
        joint, seen = self.joint, observed_mask(physics, y)
        observed, n_samples = None if seen is None else _of_all(seen, y, joint), joint.size(len(y))

        def step() -> Tensor:
            with sized(self.mask_generator, observed):
                mask = self.mask_generator.step(n_samples, input_mask=observed)["mask"]
            return mask.expand(n_samples, *mask.shape[1:]) if len(mask) == 1 else mask  # one mask for all samples

        whole = step()
        mask = joint.share(whole)
        _check_mask(mask, y, seen)
        if not self.checked:
            if not bool(((whole == 0) | (whole == 1)).all()):
                raise ValueError(
                    f"expected a splitting mask of zeros and ones; got values {whole.unique()[:5].tolist()}"
                )
            self._check_ratio(whole, observed, step)
            self.checked = True
        return parts(mask.to(y.real.dtype), seen)[0]

    def _check_ratio(self, mask, observed, step) -> None:
        # a small mask may keep all or nothing by chance: only what does so again and again is a mistake
        for _ in range(_REDRAWS):
            kept, left = (shares(part) > 0 for part in parts(mask, observed))
            if bool(kept.any()) and bool(left.any()):
                return
            mask = step()
        entries = mask.shape[1:].numel() if observed is None else int(observed.count_nonzero() / len(observed))
        what = "nothing" if not bool(kept.any()) else "everything"
        raise ValueError(
            f"expected a mask_generator that splits the {entries} observed entries of a measurement in two; got masks that "
            f"always keep {what}: use a split_ratio between {1 / max(entries, 1):.2g} and {1 - 1 / max(entries, 1):.2g}, "
            "such as 0.9 (many entries) or 0.5 (few)"
        )

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"splits": None, "masks": None, "seen": None}

    def hold_levels(self, levels: dict[str, Tensor]) -> None:
        """
        Hold the noise levels that UNSURE learns, as buffers.

        State dicts have them in their metadata, where they survive ``torch.save``, so that a model adapted by deepinv's loss, or
        without UNSURE, loads the weights. A state dict without them leaves those that are here.
        """
        device = next((p.device for p in self.parameters()), None)
        for name, value in levels.items():
            if name not in self._buffers:
                self.register_buffer(name, value.to(device), persistent=False)

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
    """Whether two tensors are alike but for their type of number, which autocast may have changed."""
    if given.shape != known.shape or given.device != known.device:
        return False
    if given.dtype == known.dtype and given.data_ptr() == known.data_ptr():
        return True
    return torch.allclose(given.to(known.dtype), known, rtol=0, atol=0, equal_nan=True)
