"""Functions that take images and return a trained flow."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from deepinv.physics import GaussianNoise
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ..checks import check_input, positive_int
from ..flows import like_weights, unwrapped
from ..latent import FlowPrior
from ..patchnr import PatchNR
from ..reconstruction import FlowDenoiser
from .boundary import autocast, check_level, check_objective, check_options, check_range, check_trainable
from .conditioning import Conditioned, condition_lists
from .denoising import level_range, noisy_range
from .effort import carried_out, measured, store
from .likelihood import FlowModel, FlowNLL
from .runs import fit
from .samples import ImageSamples, RandomBatches, image_list, noisy, same, stacked
from .score_matching import ScoreMatching, ScoreModel
from .start import initialised, start
from .streams import source, unchanged
from .tasks import likelihood, noisy_likelihood, score_matching


def fit_patchnr(
    images: Tensor | Iterable[Tensor],
    eval_images: Tensor | Iterable[Tensor] | None = None,
    *,
    effort: str | None = None,
    prior: PatchNR | None = None,
    patch_size: int | None = None,
    num_layers: int | None = None,
    sub_net_size: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    batch_size: int | None = None,
    lr: float = 1e-3,
    dequantise: float = 8 / 255,
    sigma: float | tuple[float, float] = 0.0,
    objective: str | None = None,
    augment: bool = True,
    early_stop: int | None = None,
    save_path: str | Path | None = None,
    resume: bool = False,
    mixed_precision: bool | str = False,
    compile: bool = False,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
    verbose: bool = True,
    **trainer_options: Any,
) -> PatchNR:
    r"""
    Train a :class:`deepinv_flows.PatchNR` on the patches of a few images, by :class:`deepinv.Trainer`.

    The objective is the likelihood of the patches or, with ``sigma``, denoising score matching: the mean squared error of
    :class:`deepinv_flows.FlowDenoiser` at that noise level, on pieces of four patches a side; or, to begin with, the likelihood
    of noisy patches, by which several times as many patches are seen in a second. An epoch is ``steps_per_epoch``
    batches of random patches, however many images there are. The optimizer is Adam, whose learning rate rises over the first
    epochs and then falls to zero along a cosine.

    :param torch.Tensor images: (B, C, H, W), or a list of (C, H, W) of different sizes, in the range the prior will
        see; 8-bit data in [0, 1] for the default ``dequantise``. :func:`deepinv_flows.load_images` reads them from files. Half
        precision is converted to float32. Their least and largest values are kept as ``prior.image_range``.
    :param torch.Tensor eval_images: images for the evaluation loss; the weights of its best epoch are returned. ``None``
        evaluates on patches of ``images`` and returns the last weights.
    :param str effort: ``"quick"``, ``"standard"`` or ``"thorough"``: about 2, 10 or 60 minutes; ``None`` is ``"standard"``, or
        that of the training that is resumed. It chooses, where they are ``None``, ``num_layers``, ``sub_net_size`` and
        ``batch_size`` by the dimension of a patch, ``epochs``, and ``steps_per_epoch`` by timing a few steps. The number of
        threads is the one that turns out fastest, unless the training is short. What was chosen is said first, and kept as
        ``prior.effort``, which is saved with the weights.
    :param PatchNR prior: prior to train further, in place; ``None`` makes one with random permutations.
    :param int patch_size: side of a patch of a new prior, in pixels; if ``None`` 6, or 8 for a denoiser. In colour 4 (dimension
        48) trains and reconstructs in two thirds of the time of 6 (dimension 108) and was as good.
    :param int num_layers: coupling blocks of a new prior.
    :param int sub_net_size: width of the networks of a new prior.
    :param int epochs: number of epochs.
    :param int steps_per_epoch: batches in an epoch.
    :param int batch_size: patches in a batch; a denoiser has at least one piece in a batch.
    :param float lr: largest learning rate.
    :param float dequantise: width of the uniform noise added to the patches, in colour to each channel, for the likelihood alone;
        wider than a grey level, since the density of flat patches is as peaked as this noise is narrow, and minimisation then
        ends far from the minimum.
    :param float, tuple sigma: standard deviation of the Gaussian noise that the prior learns to remove, kept as
        ``prior.sigma_range``; ``(low, high)`` for all levels between the two, by a flow of images divided by their level; 0 for
        the likelihood of clean patches.
    :param str objective: of a denoiser: ``"score"``, denoising score matching, or ``"likelihood"``, that of noisy patches, from
        whose prior score matching may go on; ``None`` is ``"score"``.
    :param bool augment: also train on flipped and rotated patches.
    :param int early_stop: stop when the evaluation loss has not improved for this many epochs.
    :param str save_path: folder of this training, for the Trainer's checkpoints, one an epoch; ``None`` keeps none.
    :param bool resume: continue the newest run under ``save_path`` with a readable checkpoint, if there is one, as if it had not
        been interrupted. More ``epochs`` or another ``lr`` apply from there on. Pass the same ``eval_images``, since the best
        epoch before and after is returned. ``False`` starts a new run in this folder, another training.
    :param bool, str mixed_precision: as in :class:`deepinv.Trainer`; ``"bfloat16"`` trains the likelihood faster on processors
        that have such products (AMX). Weights and log-determinants stay in full precision.
    :param bool compile: compile the flow by :func:`torch.compile`, in place of derivatives that are written out. It needs a C++
        compiler and half a minute.
    :param str device: device of the training.
    :param torch.Generator generator: source of initial weights, batches and noise; ``None`` is a generator with a fixed seed.
    :param bool verbose: print what is trained and how long it will take; show one progress bar in a terminal, elsewhere a line an
        epoch, with the loss and, if there are ``eval_images``, the best evaluation loss; and print a line at the end. Short
        trainings say nothing.
    :param trainer_options: further options of :class:`deepinv.Trainer`, such as ``wandb_vis`` or ``metrics``.
    :return: the trained prior.
    :raises ValueError: for images that are not finite floating-point tensors or are smaller than a patch, for sizes of a new
        prior besides ``prior``, and when the training diverges or its checkpoints cannot be written.
    :raises TypeError: for arrays instead of tensors, for images of another dtype than the weights, and for unknown options.

    >>> import torch
    >>> from deepinv_flows import fit_patchnr
    >>> images = torch.rand(2, 1, 32, 32)
    >>> prior = fit_patchnr(images, patch_size=3, sub_net_size=16, epochs=1, steps_per_epoch=5, verbose=False)
    >>> prior(images).shape
    torch.Size([2])
    """
    check_options(trainer_options)
    levels = level_range(sigma)
    check_level(float(levels is not None), compile)
    check_objective(objective, levels)
    generator = source(generator)
    sizes = dict(num_layers=num_layers, sub_net_size=sub_net_size)
    steps = dict(epochs=epochs, steps_per_epoch=steps_per_epoch, batch_size=batch_size)
    resumed = dict(save_path=save_path, resume=resume)
    prior, images, planned = start(images, prior, patch_size, effort, generator, sizes, steps, resumed, levels)
    held_out = images if eval_images is None else image_list(eval_images, prior.patch_size)
    check_trainable(prior, "prior")
    for image in [*images, *held_out]:
        check_input(image[None], like_weights(prior).cpu(), prior.patch_size, prior.channels, images_only=True)
    prior.sigma_range = levels
    if levels and objective == "likelihood":
        task = noisy_likelihood(prior, images, held_out, augment, generator, device)
    elif levels:
        task = score_matching(prior, images, held_out, augment, generator, device)
    else:
        check_range(images, dequantise)
        task = likelihood(prior, images, held_out, dequantise, augment, generator, device, compile)
    with autocast(mixed_precision, device), unchanged(generator):
        planned = measured(planned, task.timed, task.samples, device, task.step, task.size)
    store(planned, save_path)
    batch = max(1, planned.batch_size // task.size)
    draws = RandomBatches(len(task.samples), batch, planned.steps_per_epoch, generator)
    with carried_out(planned, prior.dim, verbose and trainer_options.get("show_progress_bar", True)):
        fit(
            task.model.to(device), task.loss, lr, save_path, resume, keep_best=eval_images is not None,
            train_dataloader=DataLoader(task.samples, batch_sampler=draws, collate_fn=same, generator=generator),
            eval_dataloader=_batches(task.eval_samples, batch, generator),
            physics=task.physics, generator=generator, epochs=planned.epochs, early_stop=early_stop,
            mixed_precision=mixed_precision, device=device, verbose=verbose,
            **{"grad_clip": task.grad_clip, **trainer_options},
        )  # fmt: skip
    prior.effort = planned.chosen
    _widen_range(prior, images)
    return prior.to(device)


def fit_flow(
    flow: nn.Module,
    images: Tensor | Iterable[Tensor],
    eval_images: Tensor | Iterable[Tensor] | None = None,
    *,
    c: Tensor | Sequence[Tensor] | None = None,
    eval_c: Tensor | Sequence[Tensor] | None = None,
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
    **trainer_options: Any,
) -> nn.Module:
    r"""
    Train a flow on whole images, in place, by :class:`deepinv.Trainer`.

    Each image is used once in an epoch. The optimizer is Adam, whose learning rate rises over the first epochs and then falls to
    zero along a cosine. A new :func:`deepinv_flows.image_flow` is first initialised from up to 256 of the images. The objective
    is the likelihood or, with ``sigma``, denoising score matching: the mean squared error of :class:`deepinv_flows.FlowDenoiser`
    at that noise level. Score matching works best with smooth activations (``image_flow(..., activation="silu")``) and small
    batches, and an epoch takes three times longer.

    :param torch.nn.Module flow: flow on images, to train from its present weights.
    :param torch.Tensor images: (B, C, H, W), in the range the prior will see; 8-bit data in [0, 1] for the default
        ``dequantise``. Half precision is converted to float32.
    :param torch.Tensor eval_images: images for the evaluation loss; the weights of its best epoch are returned. ``None``
        evaluates on ``images`` and returns the last weights.
    :param torch.Tensor, list c: conditions of the images for a conditional flow, a list or a single one, each (B, C', H, W);
        ``augment`` mirrors them with their images.
    :param torch.Tensor, list eval_c: conditions of ``eval_images``, as many as ``c`` has.
    :param int epochs: number of epochs.
    :param int batch_size: images in a batch.
    :param float lr: largest learning rate.
    :param float dequantise: width of the uniform noise added to the images, for maximum likelihood alone.
    :param float sigma: standard deviation of the Gaussian noise that the flow learns to remove, kept as ``flow.sigma_range``; 0
        for maximum likelihood.
    :param bool augment: mirror half of the images, left to right, at random.
    :param int early_stop: stop when the evaluation loss has not improved for this many epochs.
    :param str save_path: folder of this training, for the Trainer's checkpoints, one an epoch, of which the newest and about
        20 others stay; ``None`` keeps none.
    :param bool resume: continue from the newest readable checkpoint under ``save_path``, as in :func:`deepinv_flows.fit_patchnr`.
    :param bool, str mixed_precision: as in :class:`deepinv.Trainer`.
    :param bool compile: compile the flow by :func:`torch.compile`, which is not possible with ``sigma``.
    :param str device: device of the training.
    :param torch.Generator generator: source of batches and noise; ``None`` is a generator with a fixed seed.
    :param bool verbose: show one progress bar in a terminal, elsewhere a line an epoch, with the loss and, if there are
        ``eval_images``, the best evaluation loss; and print a line at the end. Short trainings say nothing.
    :param trainer_options: further options of :class:`deepinv.Trainer`, such as ``wandb_vis``.
    :return: ``flow``, trained.
    :raises ValueError: for images that are not finite, floating-point and of one size, or not of the size of the flow; for a
        noise level that is negative or not finite; for conditions that do not fit the images; and when the training diverges.
    :raises TypeError: for images of another dtype than the weights, for arrays instead of tensors, and for unknown options.

    >>> import torch
    >>> from deepinv_flows import fit_flow, image_flow
    >>> flow = image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4)
    >>> flow = fit_flow(flow, torch.rand(32, 1, 8, 8), epochs=1, verbose=False)
    """
    positive_int(epochs=epochs, batch_size=batch_size)
    check_options(trainer_options)
    check_level(sigma, compile)
    generator = source(generator)
    images = stacked(images)
    held_out = images if eval_images is None else stacked(eval_images)
    eval_number = None if eval_images is None else len(held_out)
    conditions, eval_conditions = condition_lists(c, eval_c, len(images), eval_number)
    check_trainable(flow, "flow")
    prior = FlowPrior(getattr(flow, "normalizing_flow", flow))
    for batch in (images, held_out):
        prior.check(batch.to(like_weights(flow, batch).device))
    unwrapped(prior.normalizing_flow).sigma_range = (float(sigma), float(sigma)) if sigma else None
    model = FlowModel(flow.to(device), dequantise, generator, compile)
    initialised(model.flow, images, dequantise, generator, sigma, conditions)
    if sigma:
        objective: dict[str, Any] = dict(
            losses=ScoreMatching(sigma), physics=Conditioned(GaussianNoise(sigma)), grad_clip=1.0
        )
        eval_samples = ImageSamples(held_out, y=noisy(held_out, sigma, torch.Generator()), c=eval_conditions)
    else:
        check_range(images, dequantise)
        objective = dict(losses=FlowNLL(), physics=Conditioned(), grad_clip=2.0 * images[0].numel())
        eval_samples = ImageSamples(held_out, c=eval_conditions)
    samples = ImageSamples(images, augment, sigma, generator, c=conditions)
    fit(
        ScoreModel(FlowDenoiser(prior), float(sigma)) if sigma else model,
        lr=lr, save_path=save_path, resume=resume, keep_best=eval_images is not None,
        train_dataloader=_batches(samples, batch_size, generator, RandomSampler(samples, generator=generator)),
        eval_dataloader=_batches(eval_samples, batch_size, generator),
        generator=generator, epochs=epochs, early_stop=early_stop, mixed_precision=mixed_precision, device=device,
        verbose=verbose, keep_interval=max(1, epochs // 20), **{**objective, **trainer_options},
    )  # fmt: skip
    return flow


def _batches(
    samples: Dataset, size: int, generator: torch.Generator, sampler: RandomSampler | None = None
) -> DataLoader:
    return DataLoader(samples, size, sampler=sampler, collate_fn=same, generator=generator)


def _widen_range(prior: PatchNR, images: list[Tensor]) -> None:
    """Remember the least and the largest value of all images on which the prior was trained, now and before."""
    low, high = min(float(image.min()) for image in images), max(float(image.max()) for image in images)
    if prior.sigma_range:
        low, high = noisy_range(prior.sigma_range, low, high)
    before = prior.image_range or (low, high)
    prior.image_range = (min(low, before[0]), max(high, before[1]))
