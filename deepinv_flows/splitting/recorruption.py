"""The noise that R2R adds to the measurements before they are split."""

from dataclasses import dataclass

import torch
from deepinv.loss.r2r import set_beta_corruptor, set_binomial_corruptor, set_gaussian_corruptor
from deepinv.physics import GammaNoise, GaussianNoise, PoissonNoise
from torch import Tensor, nn

from .joint import Alone, of_all
from .pickling import pack, recipe, unpack

_CORRUPTORS = {
    GaussianNoise: (set_gaussian_corruptor, "sigma"),
    PoissonNoise: (set_binomial_corruptor, "gain"),
    GammaNoise: (set_beta_corruptor, "l"),
}


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
                return joint.share(corruptor(joint.whole(y), self.alpha, of_all(level, y, joint))())
        expected = ", ".join(kind.__name__ for kind in _CORRUPTORS)
        raise ValueError(f"expected one of {expected} as noise model for R2RLoss; got {type(noise).__name__}")

    def __getstate__(self) -> dict:
        return vars(self) | {"noise_model": pack(self.noise_model)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state | {"noise_model": unpack(state["noise_model"])})

    @property
    def recipe(self):
        return self.alpha, self.eval_n_samples, recipe(self.noise_model)
