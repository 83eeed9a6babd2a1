r"""
Bilevel training of a PatchNR: its weights, and the weight of the prior, are those whose reconstructions are best.

.. math::

    \min_{\theta, \lambda} \; \mathbb E\, \|\hat x_{\theta,\lambda}(y) - x\|^2, \qquad
    \hat x_{\theta,\lambda}(y) \in \arg\min_x f(x, y) + \lambda\, g_\theta(x)
"""

import math
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from deepinv.optim import DataFidelity
from deepinv.physics import Physics
from torch import Tensor
from torch.utils.data import DataLoader

from ..checks import check_input, check_positive, positive_int
from ..flows import like_weights
from ..patchnr import PatchNR
from ..reconstruction import MAP, by_rule, candidates, scaled
from .boundary import check_options, check_trainable
from .inner import Inner, SquaredError
from .measuring import Measured, crops, mirrored, whole
from .runs import fit
from .samples import RandomBatches, image_list, same, stacked
from .streams import source

OWN = {"mixed_precision", "online_measurements", "physics_generator"}


def fit_bilevel(
    prior: PatchNR,
    images: Tensor | Iterable[Tensor],
    physics: Physics,
    eval_images: Tensor | Iterable[Tensor] | None = None,
    *,
    data_fidelity: DataFidelity | None = None,
    lambda_reg: float | str = "rule",
    crop: int | None = None,
    epochs: int = 20,
    steps_per_epoch: int = 10,
    batch_size: int = 4,
    lr: float = 1e-3,
    lr_lambda: float = 2e-2,
    max_iter: int = 200,
    tol: float = 3e-3,
    linear_iter: int = 20,
    jacobian_free: bool = False,
    augment: bool = True,
    early_stop: int | None = None,
    save_path: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
    verbose: bool = True,
    **trainer_options: Any,
) -> MAP:
    r"""
    Train a prior for the reconstructions that it gives, by implicit differentiation, and :class:`deepinv.Trainer`.

    .. math::

        \min_{\theta, \lambda} \; \mathbb E \, \|\hat x - x\|^2, \qquad
        \hat x \in \arg\min_u F(u) = f(u, y, A) + \lambda\, g_\theta(u)

    for clean images x and measurements y that are simulated anew in each step. The minimiser is found by :class:`MAP`; its
    derivatives follow from :math:`\nabla F(\hat x) = 0` as :math:`-v^\top \partial_\theta \nabla F(\hat x)` with
    :math:`\nabla^2 F(\hat x)\, v = \hat x - x`, up to the factor of the loss, which is solved by MINRES since the Hessian may be
    indefinite. Memory does not grow with the number of iterations of the minimisation. Hessian-vector products take about as
    long as gradients where what they have in common, about 20 to 80 KB a patch, is not more than 512 MB in all, and twice as long
    otherwise.

    Begin with a prior that :func:`fit_patchnr` has trained. Smooth activations
    (``glow_flow(..., activation="silu")``) suit second derivatives; of ReLU, which has none, the networks count as linear. The
    weights end as those of a regulariser for this physics and noise: they are no density any more, and no denoiser.

    :param PatchNR prior: prior to train, in place, on all patches.
    :param torch.Tensor images: clean images (B, C, H, W), or a list of (C, H, W), in the range that the prior knows.
    :param deepinv.physics.Physics physics: what measures them, with its noise.
    :param torch.Tensor eval_images: clean images, used whole and with fixed noise, for the evaluation loss; the weights of its
        best epoch are returned. ``None`` returns the last weights.
    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is ``L2()``.
    :param float, str lambda_reg: first :math:`\lambda > 0`, for images of the size of the first image; ``"rule"`` as in
        :class:`MAP`.
    :param int crop: side in pixels of the square pieces that are reconstructed in a step, such as 48, for a physics of any image
        size; ``None`` takes whole images, which have one size then.
    :param int epochs: number of epochs.
    :param int steps_per_epoch: steps in an epoch.
    :param int batch_size: images in a step.
    :param float lr: largest learning rate of the weights.
    :param float lr_lambda: largest learning rate of :math:`\log \lambda`.
    :param int max_iter: bound on the iterations of a minimisation, in training and in the model returned.
    :param float tol: of the minimisation, as in :class:`MAP`; derivatives are as exact as minimisers.
    :param int linear_iter: most iterations of MINRES in a step.
    :param bool jacobian_free: take :math:`v = (\hat x - x)\, \|\hat x - x\| / \|\nabla^2 F\, (\hat x - x)\|`, with one
        Hessian-vector product in place of ``linear_iter``; the direction is only roughly that of the gradient.
    :param bool augment: also use flipped and, of crops, rotated images.
    :param int early_stop: stop when the evaluation loss has not improved for this many epochs.
    :param str save_path: folder of this training, for the Trainer's checkpoints; ``None`` keeps none.
    :param bool resume: continue from the newest readable checkpoint under ``save_path``, as in :func:`fit_patchnr`.
    :param str device: device of the training.
    :param torch.Generator generator: source of batches and noise; ``None`` is a generator with a fixed seed.
    :param bool verbose: show progress, with the largest relative gradient of the last minimisers (``gradient``) and the largest
        relative residual of the last linear systems (``linear``).
    :param trainer_options: further options of :class:`deepinv.Trainer`.
    :return: the trained reconstruction, with :math:`\lambda` for images of the size of the first one; for others it grows with
        them. ``model.tuned`` holds the residuals of the last epoch, ``model.prior`` is the prior.
    :raises ValueError: for images that are not finite, of other channels or too small; a physics that does not fit them; frozen
        weights; a :math:`\lambda` that is not finite and positive, or ``"rule"`` for noise that it does not know; and when the
        training diverges.
    :raises TypeError: for another prior than :class:`PatchNR`, another dtype than that of the weights, and unknown options.
    :warns UserWarning: when minimisations end too far from a minimiser for derivatives to be right.

    Sources: Samuel & Tappen, "Learning optimized MAP estimates in continuously-valued MRF models", CVPR 2009; Fung et al., "JFB:
    Jacobian-free backpropagation for implicit networks", AAAI 2022; the comparison of learned regularisers in arXiv 2510.01755.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import PatchNR, fit_bilevel, glow_flow
    >>> prior = PatchNR(glow_flow(9, num_layers=1, sub_net_size=8, activation="silu"), patch_size=3)
    >>> images, physics = torch.rand(2, 1, 12, 12), dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    >>> model = fit_bilevel(prior, images, physics, epochs=1, steps_per_epoch=1, batch_size=2, verbose=False)
    >>> model(physics(images), physics).shape
    torch.Size([2, 1, 12, 12])
    """
    positive_int(epochs=epochs, steps_per_epoch=steps_per_epoch, batch_size=batch_size, linear_iter=linear_iter)
    check_positive(lr=lr, lr_lambda=lr_lambda)
    check_options(trainer_options, OWN)
    generator = source(generator)
    images, held_out = _checked(prior, images, eval_images, crop, early_stop)
    start = 1.0 if lambda_reg == "rule" else _positive(lambda_reg)
    model = MAP(
        prior.to(device), data_fidelity, start, solver="lbfgs", max_iter=max_iter, tol=tol, verbose=False
    )  # fmt: skip
    physics = physics.to(device)
    draw = mirrored(stacked(images), augment, generator) if crop is None else crops(images, crop, augment, generator)
    samples = Measured(*draw, physics, torch.device(device), generator)
    y = _fitting(physics, images, crop, device)
    if lambda_reg == "rule":
        start = float(by_rule(prior, model.data_fidelity, y, physics, images[0][None].to(device)))
    inner = Inner(model, start, images[0].shape[1:], linear_iter, jacobian_free)
    batches = RandomBatches(len(samples), batch_size, steps_per_epoch, generator)
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=same, generator=generator)
    trainer = fit(
        inner.to(device), SquaredError(_spread(images)), lr, save_path, resume, keep_best=eval_images is not None,
        rates={"log_lambda": lr_lambda}, train_dataloader=loader, eval_dataloader=_evaluated(held_out, physics, device),
        physics=physics, generator=generator, epochs=epochs, early_stop=early_stop, device=device, verbose=verbose,
        **{"grad_clip": 1.0, **trainer_options},
    )  # fmt: skip
    return _finished(model, inner, trainer, images, steps_per_epoch, verbose)


def _checked(
    prior: PatchNR, images, eval_images, crop: int | None, early_stop: int | None
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Images to train on and to evaluate on, which the prior takes."""
    if not isinstance(prior, PatchNR):
        raise TypeError(f"expected a PatchNR; got {type(prior).__name__}")
    check_trainable(prior, "prior")
    if prior.n_patches != -1:
        raise ValueError(
            f"expected a prior on all patches, n_patches=-1, whose minimisers have derivatives; got {prior.n_patches}"
        )
    if scaled(prior.sigma_range):
        raise ValueError(
            f"expected a prior of images; got one of images divided by their noise level, of sigma_range {prior.sigma_range}"
        )
    if early_stop is not None and eval_images is None:
        raise ValueError(f"expected eval_images beside early_stop={early_stop}, whose loss ends the training; got None")
    side = prior.patch_size if crop is None else positive_int(crop=crop)
    if side < prior.patch_size:
        raise ValueError(f"expected crop >= {prior.patch_size}, the size of a patch; got {crop}")
    found = image_list(images, side)
    held_out = None if eval_images is None else image_list(eval_images, prior.patch_size)
    for image in [*found, *(held_out or [])]:
        check_input(image[None], like_weights(prior).cpu(), prior.patch_size, prior.channels, images_only=True)
    return found, held_out


def _positive(lambda_reg: Any) -> float:
    number = lambda_reg.numel() == 1 if torch.is_tensor(lambda_reg) else isinstance(lambda_reg, Real)
    if not number or isinstance(lambda_reg, bool):
        raise TypeError(f'expected lambda_reg to be a number or "rule"; got {lambda_reg!r}')
    if not (math.isfinite(lambda_reg) and lambda_reg > 0):
        raise ValueError(f"expected a finite lambda_reg > 0; got {lambda_reg}")
    return float(lambda_reg)


def _fitting(physics: Physics, images: list[Tensor], crop: int | None, device) -> Any:
    """Measurements of one image as it will be in the training."""
    image = images[0] if crop is None else images[0][:, :crop, :crop]
    try:
        y = Measured(*whole([image]), physics, torch.device(device))[0]["y"]
        with torch.no_grad():
            shapes = {tuple(found.shape[1:]) for found in candidates(y, physics).values()}
    except Exception as error:  # whatever a physics raises for images of a size that is not its own
        raise ValueError(
            f"expected a physics of images of shape {tuple(image.shape)}, which are the crops or the whole images to train on; "
            f"got {type(physics).__name__}, which says: {error}"
        ) from error
    if shapes != {tuple(image.shape)}:
        raise ValueError(
            f"expected a physics that reconstructs images of shape {tuple(image.shape)}; got {sorted(shapes)}"
        )
    return y


def _spread(images: list[Tensor]) -> float:
    spread = float(torch.cat([image.flatten() for image in images]).double().std())
    return spread if spread > 0 else 1.0


def _evaluated(held_out: list[Tensor] | None, physics: Physics, device) -> DataLoader | None:
    if held_out is None:
        return None
    return DataLoader(
        Measured(*whole(held_out), physics, torch.device(device)), 1, collate_fn=same, generator=torch.Generator()
    )


def _finished(model: MAP, inner: Inner, trainer: Any, images: list[Tensor], steps: int, verbose: bool) -> MAP:
    """The reconstruction, with what is known of its training."""
    evaluated, trained = trainer.eval_losses(), trainer.step_losses()
    score = min(evaluated) if evaluated else trained[-1] if trained else math.nan
    model.lambda_reg, model.verbose = float(inner.log_lambda.detach().exp()), verbose
    model.prior.sigma_range = None
    model.tuned = {
        "lambda_reg": model.lambda_reg,
        "dimension": inner.patches,
        "metric": "SquaredError",
        "score": float(score),
        "images": len(images),
        **{name: max(values[-steps:], default=math.nan) for name, values in inner.watched.items()},
    }
    return model
