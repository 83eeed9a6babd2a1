"""Denoising score matching, by which a flow learns to be a denoiser."""

from deepinv.loss import Loss
from deepinv.models import ArtifactRemoval
from deepinv.physics import Physics
from torch import Tensor

from ..flows import KnowsItsConfig
from ..reconstruction import FlowDenoiser
from .conditioning import conditions_of


class ScoreModel(KnowsItsConfig, ArtifactRemoval):
    """
    A denoiser as the model that :class:`deepinv.Trainer` trains at one noise level, which its checkpoints remember.

    :param FlowDenoiser denoiser: the denoiser.
    :param float sigma: the noise level.
    """

    def __init__(self, denoiser: FlowDenoiser, sigma: float):
        super().__init__(denoiser, mode="direct")
        self.config = {"sigma": sigma}

    def forward(self, y: Tensor, physics: Physics, **kwargs) -> Tensor:
        """The images that the denoiser finds in ``y``, given the conditions of the batch, if it has any."""
        return super().forward(y, physics, c=conditions_of(physics), **kwargs)


class ScoreMatching(Loss):
    r"""
    Denoising score matching: :math:`\|D(y) - x\|^2 / (\sigma^2 n)` for images of n entries, whatever their unit.

    :param float sigma: the noise level.

    Source: Vincent, "A connection between score matching and denoising autoencoders", Neural Computation 2011.
    """

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = sigma

    def forward(self, x_net: Tensor, x: Tensor, *args, **kwargs) -> Tensor:
        """
        :param torch.Tensor x_net: denoised images (B, C, H, W).
        :param torch.Tensor x: the images.
        :return: (B,)
        """
        return (((x_net - x) / self.sigma) ** 2).flatten(1).mean(1)
