"""Images in, trained flow out."""

import math
import warnings
from collections.abc import Iterable
from numbers import Real
from pathlib import Path

import torch
from deepinv.physics import Denoising, GaussianNoise
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from ..checks import check_input, positive_int
from ..flows import glow_flow, like_weights
from ..latent import FlowPrior
from ..patchnr import PatchNR
from ..reconstruction import FlowDenoiser
from .effort import carried_out, measured, plan, store
from .likelihood import FlowModel, FlowNLL
from .runs import fit
from .samples import ImageSamples, PatchSamples, image_list, noisy, same, spread, stacked
from .score_matching import ScoreMatching, ScoreModel


def fit_patchnr(
    images: Tensor | Iterable[Tensor],
    eval_images: Tensor | Iterable[Tensor] | None = None,
    *,
    effort: str = "standard",
    prior: PatchNR | None = None,
    patch_size: int = 6,
    num_layers: int | None = None,
    sub_net_size: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    batch_size: int | None = None,
    lr: float = 1e-3,
    dequantise: float = 1 / 255,
    augment: bool = True,
    early_stop: int | None = None,
    save_path: str | Path | None = None,
    resume: bool = False,
    mixed_precision: bool | str = False,
    compile: bool = False,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
    verbose: bool = True,
) -> PatchNR:
    r"""
    Train a :class:`PatchNR` on the patches of a few images, by :class:`deepinv.Trainer`.

    An epoch is ``steps_per_epoch`` batches of random patches, however many images there are. Adam, with a rate that
    rises over the first epochs and falls to zero along a cosine.

    :param torch.Tensor images: (B, C, H, W), or a list of (C, H, W) of different sizes, in the range the prior will
        see; 8-bit data in [0, 1] for the default ``dequantise``.
    :param torch.Tensor eval_images: images for the evaluation loss; the weights of its best epoch are returned. ``None``
        evaluates on patches of ``images`` and returns the last weights.
    :param str effort: ``"quick"``, ``"standard"`` or ``"thorough"``: about 2, 10 or 60 minutes. It chooses, where they are
        ``None``, ``num_layers``, ``sub_net_size`` and ``batch_size`` by the dimension of a patch, ``epochs``, and
        ``steps_per_epoch`` by timing a few steps, with the number of threads that turns out fastest. What was chosen is said
        first, and stored as ``prior.effort``.
    :param PatchNR prior: prior to train further, in place; ``None`` makes one with random permutations from
        ``patch_size``, ``num_layers`` and ``sub_net_size``.
    :param int patch_size: side of a patch, in pixels. In colour 4 (dimension 48) trains and reconstructs in two thirds of the
        time of 6 (dimension 108) and was as good.
    :param int num_layers: coupling blocks.
    :param int sub_net_size: width of their networks.
    :param int epochs: number of epochs.
    :param int steps_per_epoch: batches in an epoch.
    :param int batch_size: patches in a batch.
    :param float lr: largest learning rate.
    :param float dequantise: width of the uniform noise added to the patches, in colour to each channel.
    :param bool augment: also show the patches flipped and rotated.
    :param int early_stop: stop when the evaluation loss has not improved for this many epochs.
    :param str save_path: folder of this training, for the Trainer's checkpoints, one an epoch; ``None`` keeps none.
    :param bool resume: continue from the newest readable checkpoint under ``save_path``, if there is one; give the same
        ``eval_images``, as the best epoch of all runs there is returned. ``False`` starts a new run beside them.
    :param bool, str mixed_precision: as in :class:`deepinv.Trainer`.
    :param bool compile: compile the flow by :func:`torch.compile`, which needs a C++ compiler: half a minute once, then about a
        quarter more patches a second.
    :param str device: where to train.
    :param torch.Generator generator: source of initial weights, batches and noise; ``None`` is one with a fixed seed.
    :param bool verbose: say what is trained and how long it will take; progress bars and losses.
    :return: the trained prior.
    :raises ValueError: for images that are no finite floating-point tensors of a patch's size or more.

    >>> import torch
    >>> from deepinv_flows import fit_patchnr
    >>> images = torch.rand(2, 1, 32, 32)
    >>> prior = fit_patchnr(images, patch_size=3, sub_net_size=16, epochs=1, steps_per_epoch=5, verbose=False)
    >>> prior(images).shape
    torch.Size([2])
    """
    generator = torch.Generator() if generator is None else generator
    images = image_list(images, patch_size if prior is None else prior.patch_size)
    sizes = dict(num_layers=num_layers, sub_net_size=sub_net_size, batch_size=batch_size)
    sizes |= dict(epochs=epochs, steps_per_epoch=steps_per_epoch)
    channels = images[0].shape[0]
    dim = channels * patch_size**2 if prior is None else prior.dim
    planned = plan(effort, dim, save_path, resume, new=prior is None, **sizes)
    if prior is None:
        flow = glow_flow(dim, planned.num_layers, planned.sub_net_size, permute=True, generator=generator)
        prior = PatchNR(flow.to(images[0].dtype), patch_size=patch_size, channels=channels)
    held_out = images if eval_images is None else image_list(eval_images, prior.patch_size)
    _check_fit(prior, [*images, *held_out])
    _check_range(images, dequantise)
    model = FlowModel(prior.normalizing_flow.to(device), dequantise, generator, compile)
    samples, eval_samples = PatchSamples(images, prior.patch_size, augment), PatchSamples(held_out, prior.patch_size)
    planned = measured(planned, model.flow, samples, device)
    store(planned, save_path)
    batches = dict(batch_size=planned.batch_size, collate_fn=same, generator=generator)
    sampler = RandomSampler(samples, True, planned.steps_per_epoch * planned.batch_size, generator)
    loaders = {
        "train_dataloader": DataLoader(samples, sampler=sampler, **batches),
        "eval_dataloader": DataLoader(spread(eval_samples), **batches),
    }
    options = dict(
        epochs=planned.epochs,
        early_stop=early_stop,
        mixed_precision=mixed_precision,
        device=device,
        verbose=verbose,
        grad_clip=100.0,
    )
    with carried_out(planned, prior.dim, verbose):
        fit(
            model, _largest(images), FlowNLL(), lr, save_path, resume, keep_best=eval_images is not None,
            physics=Denoising(), **loaders, **options,
        )  # fmt: skip
    prior.effort = planned
    return prior.to(device)


def fit_flow(
    flow: nn.Module,
    images: Tensor | Iterable[Tensor],
    eval_images: Tensor | Iterable[Tensor] | None = None,
    *,
    epochs: int = 40,
    batch_size: int = 16,
    lr: float = 2e-3,
    dequantise: float = 1 / 255,
    sigma: float = 0.0,
    augment: bool = True,
    early_stop: int | None = None,
    save_path: str | Path | None = None,
    resume: bool = False,
    mixed_precision: bool | str = False,
    compile: bool = False,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
    verbose: bool = True,
) -> nn.Module:
    r"""
    Train a flow on whole images, in place, by :class:`deepinv.Trainer`.

    An epoch shows each image once. Adam, with a rate that rises over the first epochs and falls to zero along a cosine.
    A new :func:`deepinv_flows.image_flow` is first initialised from up to 256 of the images. By maximum likelihood, or with
    ``sigma`` by denoising score matching, the mean squared error of :class:`deepinv_flows.FlowDenoiser` at that noise level:
    smooth activations (``image_flow(..., activation="silu")``) and small batches suit it, and an epoch takes three times longer.

    :param torch.nn.Module flow: flow on images, to train from its present weights.
    :param torch.Tensor images: (B, C, H, W), in the range the prior will see; 8-bit data in [0, 1] for the default
        ``dequantise``.
    :param torch.Tensor eval_images: images for the evaluation loss; the weights of its best epoch are returned. ``None``
        evaluates on ``images`` and returns the last weights.
    :param int epochs: number of epochs.
    :param int batch_size: images in a batch.
    :param float lr: largest learning rate.
    :param float dequantise: width of the uniform noise added to the images, by maximum likelihood.
    :param float sigma: standard deviation of the Gaussian noise that the flow learns to remove; 0 for maximum likelihood.
    :param bool augment: mirror half of the images, left to right, at random.
    :param int early_stop: stop when the evaluation loss has not improved for this many epochs.
    :param str save_path: folder of this training, for the Trainer's checkpoints, one an epoch, of which the newest and about
        20 others stay; ``None`` keeps none.
    :param bool resume: continue from the newest readable checkpoint under ``save_path``, as :func:`fit_patchnr` does.
    :param bool, str mixed_precision: as in :class:`deepinv.Trainer`.
    :param bool compile: compile the flow by :func:`torch.compile`; not with ``sigma``.
    :param str device: where to train.
    :param torch.Generator generator: source of batches and noise; ``None`` is one with a fixed seed.
    :param bool verbose: progress bars and losses.
    :return: ``flow``, trained.
    :raises ValueError: for images that are not finite, floating-point and of one size, or not of the flow's; for a noise
        level that is negative or not finite; when the training diverges.
    :raises TypeError: for images of another dtype than the weights'.

    >>> import torch
    >>> from deepinv_flows import fit_flow, image_flow
    >>> flow = image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4)
    >>> flow = fit_flow(flow, torch.rand(32, 1, 8, 8), epochs=1, verbose=False)
    """
    positive_int(epochs=epochs, batch_size=batch_size)
    if not (isinstance(sigma, Real) and math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"expected a finite noise level sigma >= 0; got {sigma!r}")
    if sigma and compile:
        raise ValueError("expected compile=False with sigma: torch.compile has no second derivatives")
    generator = torch.Generator() if generator is None else generator
    images = stacked(images)
    held_out = images if eval_images is None else stacked(eval_images)
    if not any(p.requires_grad for p in flow.parameters()):
        raise ValueError("the weights of the flow are frozen; flow.requires_grad_(True) makes them trainable")
    prior = FlowPrior(getattr(flow, "normalizing_flow", flow))
    for batch in (images, held_out):
        prior.check(batch.to(like_weights(flow, batch).device))
    model = FlowModel(flow.to(device), dequantise, generator, compile)
    initialised(model.flow, images, dequantise, generator, sigma)
    if sigma:
        model = ScoreModel(FlowDenoiser(prior), float(sigma))
        objective = dict(losses=ScoreMatching(sigma), physics=Denoising(GaussianNoise(sigma)), grad_clip=1.0)
        eval_samples = ImageSamples(held_out, y=noisy(held_out, sigma, torch.Generator()))
    else:
        _check_range(images, dequantise)
        objective = dict(losses=FlowNLL(), physics=Denoising(), grad_clip=2.0 * images[0].numel())
        eval_samples = ImageSamples(held_out)
    batches = dict(batch_size=batch_size, collate_fn=same, generator=generator)
    samples = ImageSamples(images, augment, sigma, generator)
    loaders = {
        "train_dataloader": DataLoader(samples, sampler=RandomSampler(samples, generator=generator), **batches),
        "eval_dataloader": DataLoader(eval_samples, **batches),
    }
    options = dict(
        epochs=epochs, early_stop=early_stop, mixed_precision=mixed_precision, device=device, verbose=verbose,
        keep_interval=max(1, epochs // 20),
    )  # fmt: skip
    fit(
        model, _largest(images), lr=lr, save_path=save_path, resume=resume, keep_best=eval_images is not None,
        **objective, **loaders, **options,
    )  # fmt: skip
    return flow


def initialised(
    flow: nn.Module,
    images: Tensor,
    dequantise: float = 1 / 255,
    generator: torch.Generator | None = None,
    sigma: float = 0.0,
) -> nn.Module:
    """
    A new :func:`deepinv_flows.image_flow`, its affine maps set by up to 256 of the images it will learn; any other flow as it is.

    :param torch.nn.Module flow: the flow.
    :param torch.Tensor images: (B, C, H, W)
    :param float dequantise: width of the uniform noise added to the images.
    :param torch.Generator generator: source of noise and choice; ``None`` is one with a fixed seed.
    :param float sigma: standard deviation of Gaussian noise added instead.
    :return: ``flow``.

    >>> import torch
    >>> from deepinv_flows import image_flow
    >>> from deepinv_flows.training import initialised
    >>> flow = initialised(image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4), torch.rand(32, 1, 8, 8))
    """
    if not getattr(flow, "initialised", True):
        generator = torch.Generator() if generator is None else generator
        first = images[torch.randperm(len(images), generator=generator)[:256]]
        if sigma:
            first = noisy(first, sigma, generator)
        else:
            first = first + dequantise * (torch.rand(first.shape, generator=generator, dtype=first.dtype) - 0.5)
        flow.initialise(first.to(next(flow.parameters()).device))
    return flow


def _largest(images: Iterable[Tensor]) -> float:
    return max(float(image.abs().max()) for image in images)


def _check_range(images: Iterable[Tensor], dequantise: float) -> None:
    if 0 < dequantise < 1 and _largest(images) > 10:
        warnings.warn(
            f"dequantise={dequantise:.4g} is for images in [0, 1]; divide by their range, or pass their grey-level step",
            stacklevel=3,
        )


def _check_fit(prior: PatchNR, images: list[Tensor]) -> None:
    if not any(p.requires_grad for p in prior.parameters()):
        raise ValueError("the weights of the prior are frozen; prior.requires_grad_(True) makes them trainable")
    like = next(p for p in prior.parameters() if p.requires_grad).cpu()
    for image in images:
        check_input(image[None], like, prior.patch_size, prior.channels, images_only=True)
