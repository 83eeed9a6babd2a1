"""Equivariant splitting: self-supervised reconstruction from incomplete, noisy measurements."""

import warnings
from typing import Any

import torch
from deepinv.loss import Loss, MCLoss, Neighbor2Neighbor, R2RLoss, SplittingLoss
from deepinv.loss.metric import MSE
from deepinv.loss.r2r import R2RModel
from deepinv.physics import Physics
from deepinv.physics.generator import BernoulliSplittingMaskGenerator, PhysicsGenerator
from deepinv.transform import Transform
from torch import Tensor, nn

from ..checks import positive_int
from .model import EquivariantSplittingModel, SplitReconstructor
from .parts import observed_mask, rest
from .pickling import recipe
from .recorruption import Recorruption
from .terms import term, unknown_levels

_TRANSPARENT = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class EquivariantSplittingLoss(Loss):
    r"""
    Equivariant splitting: learns to reconstruct from incomplete and noisy measurements of one operator, without ground truth.

    .. math::

        \mathcal L = \mathbb E_g\, \mathbb E_{y_1, A_1 \mid y, A T_g} \Big\{ \tfrac1{m_1}\|A_1 R(y_1, A_1) - A_1 x\|^2
        + \tfrac1{m_2}\|A_2 R(y_1, A_1) - A_2 x\|^2 \Big\}, \qquad
        R(y, A) = \tfrac1{|G|} \sum_{g \in G} T_g \tilde R(y, A T_g)

    It replaces :class:`deepinv.loss.EquivariantSplittingLoss`, with the same arguments and the same checkpoints. The first term,
    consistency, is estimated by ``consistency_loss``, and the second, prediction, by ``prediction_loss``. Both are computed for
    each sample on its own, as means over the entries of its mask; :mod:`deepinv_flows.splitting.terms` gives their expectations.
    In evaluation, the reconstruction of each of the ``eval_n_samples`` splits is compared with the measurements that this split
    held out.

    Source: Sechaud, Scanvic, Barthelemy, Abry, Tachella, *Equivariant splitting* (arXiv 2510.00929).

    :param deepinv.physics.generator.PhysicsGenerator mask_generator: generator of the splitting masks. The default draws
        Bernoulli masks of the shape ``img_size`` that keep 0.9 of the pixels. For vectors (B, m) use
        ``BernoulliSplittingMaskGenerator((m,), ratio, pixelwise=False)``, and for the angles of a sinogram
        :class:`deepinv_flows.LineSplittingMaskGenerator`.
    :param deepinv.loss.Loss consistency_loss: :class:`deepinv.loss.MCLoss` (default) for noiseless measurements;
        :class:`deepinv.loss.SureGaussianLoss`, :class:`deepinv.loss.SurePoissonLoss`, :class:`deepinv.loss.SurePGLoss` or
        :class:`deepinv.loss.R2RLoss` for noisy ones. With ``unsure=True`` the noise levels are buffers of the adapted model, and
        each backward pass takes an ascent step on them. The state dict holds them as metadata, so that models without them load
        the same file.
    :param deepinv.loss.Loss prediction_loss: :class:`deepinv.loss.MCLoss` by default, which is unbiased up to a constant if the
        noise of the two parts is independent.
    :param int eval_n_samples: number of splittings averaged in evaluation; R2R multiplies it by its own ``eval_n_samples``.
    :param deepinv.transform.Transform transform: random transform :math:`T_g` in training; ``None`` for a reconstructor that is
        equivariant by itself.
    :param deepinv.transform.Transform eval_transform: transform in evaluation, such as all elements of the group; ``None`` is
        ``transform``.
    :param tuple img_size: shape of the measurements without batch, for the default masks: (C, H, W), (C, N, H, W) for N coils,
        which are all split alike, or (m,) for vectors.
    :raises ValueError: without masks or their shape, for ``eval_transform`` without ``transform``, and for R2R or an unknown
        noise level in the prediction term alone.
    :raises TypeError: for a loss that is not defined on a split, such as :class:`deepinv.loss.Neighbor2Neighbor`, and for lists
        of losses or transforms.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import EquivariantSplittingLoss
    >>> _ = torch.manual_seed(0)
    >>> physics = dinv.physics.Inpainting((1, 8, 8), mask=0.5, noise_model=dinv.physics.GaussianNoise(0.1))
    >>> loss = EquivariantSplittingLoss(
    ...     img_size=(1, 8, 8),
    ...     consistency_loss=dinv.loss.R2RLoss(),
    ...     transform=dinv.transform.Rotate(multiples=90) * dinv.transform.Reflect(dim=[-1]))
    >>> model = loss.adapt_model(dinv.models.ArtifactRemoval(dinv.models.DnCNN(1, 1, depth=2, pretrained=None)))
    >>> y = physics(torch.ones(2, 1, 8, 8))
    >>> x_net = model(y, physics, update_parameters=True)
    >>> loss(x_net, y, physics, model).shape
    torch.Size([2])
    """

    def __init__(
        self,
        *,
        mask_generator: PhysicsGenerator | None = None,
        consistency_loss: Loss | None = None,
        prediction_loss: Loss | None = None,
        eval_n_samples: int = 5,
        transform: Transform | None = None,
        eval_transform: Transform | None = None,
        img_size: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self._name = "es"
        if transform is None and eval_transform is not None:
            raise ValueError("If eval_transform is specified, transform must also be specified.")
        if mask_generator is None and img_size is None:
            raise ValueError(
                "Either `mask_generator` or `img_size` must be specified to determine the splitting scheme."
            )
        if mask_generator is not None and img_size is not None:
            warnings.warn("`img_size` is ignored when `mask_generator` is specified.", UserWarning, stacklevel=2)
        self.mask_generator = _default_masks(img_size) if mask_generator is None else mask_generator
        self.transform = transform
        self.eval_transform = transform if eval_transform is None else eval_transform
        self.consistency_loss = MCLoss(metric=MSE()) if consistency_loss is None else consistency_loss
        self.prediction_loss = MCLoss(metric=MSE()) if prediction_loss is None else prediction_loss
        self.eval_n_samples = positive_int(eval_n_samples=eval_n_samples)
        self._warned = False
        _check_kind(PhysicsGenerator, mask_generator=self.mask_generator)
        _check_kind(Loss, consistency_loss=self.consistency_loss, prediction_loss=self.prediction_loss)
        _check_transforms(transform=transform, eval_transform=eval_transform)
        _check_inner(self.consistency_loss, self.prediction_loss)

    def extra_repr(self) -> str:
        masks = {name: getattr(self.mask_generator, name, None) for name in ("img_size", "split_ratio")}
        return ", ".join(
            f"{k}={v}" for k, v in (masks | {"eval_n_samples": self.eval_n_samples}).items() if v is not None
        )

    def adapt_model(self, model: nn.Module, **kwargs) -> nn.Module:
        """
        The reconstructor that splits its input and averages over the transforms.

        :param torch.nn.Module model: reconstructor ``model(y, physics)``. A model that a loss of equal settings has adapted is
            returned as it is, so that several losses can share it.
        :return: the adapted model, ``model(y, physics, update_parameters=False)``, whose parameters are those of ``model``.
        :raises ValueError: for a model that a splitting loss of other settings has adapted.
        :raises TypeError: for anything but a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a reconstructor, a torch.nn.Module; got {type(model).__name__}")
        adapted = _splitting_models(model)
        if not adapted:
            if any(isinstance(m, SplittingLoss.SplittingModel | R2RModel) for m in model.modules()):
                raise ValueError(
                    "expected a model that no other splitting or R2R loss has adapted, since their masks and noise would nest; "
                    "list EquivariantSplittingLoss before a plain SplittingLoss, use R2RLoss as its consistency_loss, and "
                    "leave out any other loss that adapts the model"
                )
            if self.transform is not None:
                model = SplitReconstructor(model, self.transform, self.eval_transform)
            model = EquivariantSplittingModel(
                model, self.mask_generator, self.eval_n_samples, _recorruption(self.consistency_loss)
            )
            adapted = [model]
        else:
            _check_equal_settings(self, adapted[0])
        adapted[0].hold_levels(unknown_levels(self.consistency_loss))
        return model

    def forward(self, x_net: Tensor, y: Tensor, physics: Physics, model: nn.Module, **kwargs) -> Tensor:
        """
        The loss of the last forward pass with ``update_parameters=True``.

        :param torch.Tensor x_net: reconstruction of that pass, (B, ...).
        :param torch.Tensor y: measurements, (B, ...).
        :param deepinv.physics.Physics physics: physics of the measurements.
        :param torch.nn.Module model: the adapted model, or a wrapper of it (DistributedDataParallel, torch.compile).
        :return: the loss of each sample, (B,), with the default metrics in squared units of y.
        :raises ValueError: before such a pass, and when y or x_net are not those of that pass.
        :raises RuntimeError: for a model that is not adapted, or that another loss has wrapped.
        """
        adapted, terms, observed = _the_splitting_model(model), [], observed_mask(physics, y)
        adapted.check_pass(y, x_net)
        for split in adapted.get_splits():
            x_split = x_net if split.x_net is None else split.x_net
            losses = (self.consistency_loss, self.prediction_loss)
            for inner, part in zip(losses, (split.mask, rest(split.mask, observed))):
                terms.append(term(inner, part, split, x_split, y, physics, adapted, **kwargs))
        values, present = (torch.stack(t).unflatten(0, (-1, 2)) for t in zip(*terms))
        if not self._warned and not bool(present.all()):
            self._warned = True
            warnings.warn(
                "Some splitting masks keep all or none of a sample's observed entries. Its other term alone counts there; "
                "a split_ratio further from 0 and 1 avoids this.",
                UserWarning,
                stacklevel=2,
            )
        return (values.sum(0) / present.sum(0).clamp(min=1)).sum(0)


def _splitting_models(model: nn.Module) -> list[EquivariantSplittingModel]:
    # wrappers such as DistributedDataParallel and torch.compile hold the adapted model somewhere inside
    return [m for m in model.modules() if isinstance(m, EquivariantSplittingModel)]


def _the_splitting_model(model: nn.Module) -> EquivariantSplittingModel:
    found = _splitting_models(model)
    outer: Any = model
    if len(found) != 1:
        raise RuntimeError(
            f"Unregistered model {type(model)}. Make sure to adapt the model using `adapt_model` before computing the loss."
        )
    while isinstance(outer, _TRANSPARENT) or hasattr(outer, "_orig_mod"):  # the latter by torch.compile
        outer = outer.module if isinstance(outer, _TRANSPARENT) else outer._orig_mod
    if outer is not found[0] and not found[0].splits:
        raise RuntimeError(
            f"expected the adapted model; got {type(outer).__name__} around it, which does not pass update_parameters=True on. "
            "If another loss of the training has wrapped the model, remove that loss; R2RLoss is passed to this loss as its "
            "consistency_loss"
        )
    return found[0]


def _recorruption(loss: Loss) -> Recorruption | None:
    return Recorruption(loss.alpha, loss.noise_model, loss.eval_n_samples) if isinstance(loss, R2RLoss) else None


def _check_equal_settings(loss: EquivariantSplittingLoss, adapted: EquivariantSplittingModel) -> None:
    """Refuse an adapted model that this loss would have made with other settings."""
    averaging = adapted.model if isinstance(adapted.model, SplitReconstructor) else None
    recorruption = _recorruption(loss.consistency_loss)
    settings = {
        "mask_generator": (recipe(adapted.mask_generator), recipe(loss.mask_generator)),
        "transform": (recipe(averaging and averaging.transform), recipe(loss.transform)),
        "eval_transform": (recipe(averaging and averaging.eval_transform), recipe(loss.eval_transform)),
        "eval_n_samples": (adapted.eval_n_samples, loss.eval_n_samples),
        "R2RLoss": (adapted.recorruption and adapted.recorruption.recipe, recorruption and recorruption.recipe),
    }
    for name, (theirs, ours) in settings.items():
        if theirs != ours:
            raise ValueError(f"expected a model adapted with the same {name} as this loss has, {ours}; got {theirs}")


def _default_masks(img_size: tuple[int, ...] | None) -> BernoulliSplittingMaskGenerator:
    if not isinstance(img_size, tuple | list) or not img_size or not all(isinstance(n, int) for n in img_size):
        raise TypeError(
            "expected img_size to be the shape of the measurements without batch, such as (1, 64, 64) or (100,); "
            f"got {img_size!r}"
        )
    pixelwise = len(img_size) > 1  # a vector does not have channels
    return BernoulliSplittingMaskGenerator(tuple(img_size), split_ratio=0.9, pixelwise=pixelwise)


def _check_kind(kind: type, **values) -> None:
    for name, value in values.items():
        if not isinstance(value, kind):
            hint = ": pass one loss for each term" if isinstance(value, list | tuple) and kind is Loss else ""
            raise TypeError(f"expected {name} to be a deepinv {kind.__name__}; got {type(value).__name__}{hint}")


def _check_transforms(**transforms: Transform | None) -> None:
    for name, transform in transforms.items():
        if transform is None:
            continue
        if not isinstance(transform, Transform):
            raise TypeError(
                f"expected {name} to be a deepinv Transform; got {type(transform).__name__}: combine several transforms by * or |"
            )
        if type(transform).__name__ == "StackTransform":
            raise ValueError(
                "expected a transform that keeps the batch size; got a sum t1 + t2: use t1 | t2 or t1 * t2"
            )
        try:
            list(transform.modules())
        except TypeError as error:
            raise TypeError(
                f"expected a transform that a model can hold; got {type(transform).__name__}: {error}. "
                "deepinv 0.5.0's homographies are dataclasses without hash, so no module that holds one lists its parameters"
            ) from None


def _check_inner(consistency: Loss, prediction: Loss) -> None:
    for loss in (consistency, prediction):
        if isinstance(loss, Neighbor2Neighbor):
            raise TypeError(
                "expected a loss of the measurements on their own grid; got Neighbor2Neighbor, which compares two images of half "
                "their size. The operators and masks of the split do not apply to these, and the zeros of the entries left "
                "out would count as neighbours. Use R2RLoss, or SureGaussianLoss(unsure=True) if the noise level is unknown"
            )
        if type(loss).adapt_model is not Loss.adapt_model and not isinstance(loss, R2RLoss):
            raise TypeError(
                f"expected a loss that does not adapt the model itself, or R2RLoss; got {type(loss).__name__}"
            )
    if getattr(prediction, "unsure", False):
        raise ValueError("expected a known noise level in prediction_loss, whose divergence is 0; got unsure=True")
    if isinstance(prediction, R2RLoss) and not isinstance(consistency, R2RLoss):
        raise ValueError(
            "expected R2RLoss as consistency_loss too, since its noise enters both terms; got it as prediction_loss alone"
        )
