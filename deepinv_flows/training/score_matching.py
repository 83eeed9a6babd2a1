"""Denoising score matching, which trains a flow as a denoiser."""

from deepinv.loss import Loss
from deepinv.models import ArtifactRemoval
from deepinv.physics import Physics
from torch import Tensor

from ..flows import KnowsItsConfig
from ..reconstruction import FlowDenoiser
from .conditioning import conditions_of


class ScoreModel(KnowsItsConfig, ArtifactRemoval):
    """
    A denoiser as a model that :class:`deepinv.Trainer` trains at one noise level. Its checkpoints hold the level.

    :param FlowDenoiser denoiser: the denoiser.
    :param float sigma: the noise level.
    """

    def __init__(self, denoiser: FlowDenoiser, sigma: float):
        super().__init__(denoiser, mode="direct")
        self.config = {"sigma": sigma}

    def forward(self, y: Tensor, physics: Physics, **kwargs) -> Tensor:
        """The denoised images, given the conditions of the batch if it has any."""
        return super().forward(y, physics, c=conditions_of(physics), **kwargs)


class ScoreMatching(Loss):
    r"""
    Denoising score matching, :math:`\|D(y) - x\|^2 / (\sigma^2 n)` for images of n entries; it does not depend on their unit.

    :param float sigma: the noise level.

    Source: Vincent, "A connection between score matching and denoising autoencoders", Neural Computation 2011.
    """

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = sigma

    def forward(self, x_net: Tensor, x: Tensor, *args, **kwargs) -> Tensor:
        """
        The loss.

        :param torch.Tensor x_net: denoised images D(y), (B, C, H, W).
        :param torch.Tensor x: clean images, (B, C, H, W).
        :return: (B,)
        """
        return (((x_net - x) / self.sigma) ** 2).flatten(1).mean(1)
