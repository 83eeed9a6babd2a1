"""What a training of a PatchNR descends on, and on which samples: the likelihood, or denoising score matching."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepinv.loss import Loss
from deepinv.physics import Denoising, Physics
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..patchnr import PatchNR
from .denoising import (
    Levelled,
    NoisyFlowModel,
    NoisyPatches,
    NoisyPieces,
    PatchScoreModel,
    RelativeError,
    mean_error,
    piece_side,
)
from .effort import Step, mean_nll
from .likelihood import FlowModel, FlowNLL
from .samples import PatchSamples, subset

PIECES = 64  # to evaluate on


@dataclass
class Task:
    """
    A task for :func:`deepinv_flows.training.runs.fit`.

    :param torch.nn.Module timed: the module whose steps, of the loss ``step``, are timed beforehand.
    :param int size: patches in a sample.
    """

    model: nn.Module
    loss: Loss
    physics: Physics
    samples: PatchSamples | NoisyPieces
    eval_samples: Dataset
    grad_clip: float
    timed: nn.Module
    step: Step
    size: int = 1


def likelihood(
    prior: PatchNR,
    images: list[Tensor],
    held_out: list[Tensor],
    dequantise: float,
    augment: bool,
    generator: torch.Generator,
    device: str | torch.device,
    compile: bool,
) -> Task:
    """Maximum likelihood of single patches."""
    model = FlowModel(prior.normalizing_flow, dequantise, generator, compile)
    samples = PatchSamples(images, prior.patch_size, augment, generator, device)
    eval_samples = subset(PatchSamples(held_out, prior.patch_size, device=device))
    return Task(model, FlowNLL(), Denoising(), samples, eval_samples, 100.0, prior.normalizing_flow, mean_nll)


def noisy_likelihood(
    prior: PatchNR,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor],
    augment: bool,
    generator: torch.Generator,
    device: str | torch.device,
) -> Task:
    """Maximum likelihood of single patches with noise, at the levels of ``prior.sigma_range``."""
    assert prior.sigma_range is not None
    model = NoisyFlowModel(prior)
    samples, eval_samples = (
        NoisyPatches(part, prior.patch_size, prior.sigma_range, source, augment, device)
        for part, source in ((images, generator), (held_out, None))
    )
    chosen = subset(eval_samples)
    return Task(model, FlowNLL(), Denoising(), samples, chosen, 100.0, prior.normalizing_flow, mean_nll)


def score_matching(
    prior: PatchNR,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor],
    augment: bool,
    generator: torch.Generator,
    device: str | torch.device,
) -> Task:
    """Denoising score matching on pieces of images, at the levels of ``prior.sigma_range``."""
    assert prior.sigma_range is not None
    side = piece_side(prior, [*images, *held_out])
    samples = NoisyPieces(images, side, prior.sigma_range, generator, augment, device)
    eval_samples = subset(NoisyPieces(held_out, side, prior.sigma_range, device=device), PIECES)
    size = (side - prior.patch_size + 1) ** 2
    model = PatchScoreModel(prior)
    return Task(model, RelativeError(), Levelled(), samples, eval_samples, 1.0, prior, mean_error, size)
