r"""
The two terms of an equivariant splitting loss, each computed by a loss of deepinv that does not know about the split.

The following holds for one split :math:`A = [A_1; A_2]` with :math:`m_1, m_2` entries, noisy measurements :math:`y_i` of the
clean :math:`u_i = A_i x`, and :math:`\hat x = R(y_1, A_1)`. For independent noise, the prediction term is an unbiased estimate of

.. math::  \tfrac1{m_2}\|A_2 \hat x - u_2\|^2 + \tfrac1{m_2}\mathbb E\|y_2 - u_2\|^2,

The consistency term is an unbiased estimate of :math:`\tfrac1{m_1}\|A_1\hat x-u_1\|^2` plus a bias, which the list gives for each
loss. In it, :math:`\mathrm{div}` is the divergence of :math:`y_1 \mapsto A_1 R(y_1, A_1)` over the :math:`m_1` entries of the
split, with the mask and the transform held fixed:

- SURE :math:`\tfrac1{m_1}\|A_1\hat x-y_1\|^2-\sigma^2+\tfrac{2\sigma^2}{m_1}\mathrm{div}`: no bias;
- Poisson :math:`\tfrac1{m_1}\|A_1\hat x-y_1\|^2-\tfrac\gamma{m_1}1^\top y_1
  +\tfrac{2\gamma}{m_1}\sum_i y_{1,i}\partial_i(A_1\hat x)_i`: no bias if R is linear, and otherwise second
  derivatives times :math:`\gamma^2`; the same holds for Poisson-Gaussian noise;
- UNSURE: as SURE, with :math:`\sigma^2` as the multiplier of the constraint div = 0 (Tachella, Davies, Jacques, arXiv
  2409.01985);
- R2R, which re-corrupts :math:`y` to the independent pair :math:`(y', y'')` before it is split: the estimate is that at
  :math:`\hat x=R(y_1',A_1)`, and the bias is the noise :math:`\tfrac1{m_1}\mathbb E\|y_1''-u_1\|^2`, which is
  :math:`\sigma^2/\alpha` for Gaussian noise;
- MC, for noiseless measurements: no bias.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from deepinv.loss import Loss, SplittingLoss, SureGaussianLoss, SurePGLoss, SurePoissonLoss
from torch import Tensor, nn
from torch.nn import functional

from .joint import Alone, JointNoise
from .model import EquivariantSplittingModel, Split
from .parts import aligned, shares

_ENTRYWISE: dict[type, Callable] = {
    nn.MSELoss: lambda metric: functional.mse_loss,
    nn.L1Loss: lambda metric: functional.l1_loss,
    nn.SmoothL1Loss: lambda metric: partial(functional.smooth_l1_loss, beta=metric.beta),
    nn.HuberLoss: lambda metric: partial(functional.huber_loss, delta=metric.delta),
}
_SURE = (SureGaussianLoss, SurePoissonLoss, SurePGLoss)


class Reconstruction:
    """
    The reconstructor as a function of the measurements in ``part`` alone. Split, transform and re-corruption are held fixed.

    :param EquivariantSplittingModel model: the adapted model.
    :param Split split: the split that it made.
    :param torch.Tensor part: mask of the entries that vary.
    :param JointNoise noise: context that is paused while the reconstructor draws random numbers of its own.
    """

    def __init__(
        self, model: EquivariantSplittingModel, split: Split, part: Tensor, physics, noise: JointNoise | None = None
    ):
        self.model, self.split, self.physics, self.noise = model, split, physics, noise
        self.part = aligned(part, split.y)
        self.training = model.training and torch.is_grad_enabled()

    def __call__(self, y: Tensor, physics=None, **kwargs) -> Tensor:
        y = torch.where(self.part > 0, y, self.split.y)
        y1, physics1 = self.model.split(self.split.mask, y, self.physics)
        with torch.set_grad_enabled(self.training), self.noise.pause() if self.noise else nullcontext():
            return self.split.random.run(self.model.model, y1, physics1)

    def get_corruption(self) -> Tensor:
        """The re-corrupted measurements, for :class:`deepinv.loss.R2RLoss`."""
        return self.part * self.split.y

    def __getattr__(self, name: str):
        return getattr(self.model, name)


def term(
    loss: Loss,
    part: Tensor,
    split: Split,
    x_net: Tensor,
    y: Tensor,
    physics,
    model: EquivariantSplittingModel,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """
    A loss of deepinv on the measurements that a mask keeps, divided by the fraction of entries kept.

    :param torch.Tensor part: mask of A_1 or of A_2, (B, ...).
    :param torch.Tensor x_net: reconstruction from this split, (B, ...).
    :return: the values, (B,), which are 0 where the mask keeps nothing; and where it keeps something, (B,).
    :raises ValueError: for a loss that does not have a value for each sample.
    """
    if part is split.mask:
        y_part, physics_part = aligned(part, y) * y, split.physics
    else:
        y_part, physics_part = SplittingLoss.split(part, y, physics)
    noise = None if isinstance(model.joint_draws, Alone) else JointNoise(model.joint_draws, y.shape)
    reconstruct = Reconstruction(model, split, part, physics, noise)
    share = shares(part)
    with _per_sample_metric(loss), _full_precision(loss, split) as rounded, noise or nullcontext():
        arguments = dict(x_net=reconstruct(y_part) if rounded else x_net, y=y_part, physics=physics_part)
        value, sigma2, ascend = _call(loss, reconstruct, arguments | kwargs)
    if value.numel() != len(y):
        raise ValueError(
            f"expected one value per sample, ({len(y)},), from {type(loss).__name__}; got shape {tuple(value.shape)}: "
            "each sample has its own mask, so its metric has to reduce over all dimensions but the first"
        )
    value, present = value.reshape(-1), share > 0
    if torch.is_tensor(sigma2) or sigma2:
        # SURE subtracts the noise of all entries, while only those that are kept are noisy
        value = value + (1 - share) * sigma2
    value = torch.where(present, value / share.clamp(min=torch.finfo(share.dtype).tiny), 0.0)
    if ascend is not None:
        _once_in_backward(value, ascend)
    return value, present


def _once_in_backward(value: Tensor, act: Callable[[], None]) -> None:
    def hook(gradient: Tensor) -> None:
        handle.remove()
        act()

    handle = value.register_hook(hook)


def unknown_levels(loss: Loss) -> dict[str, Tensor]:
    """The initial noise levels of UNSURE, which it learns as multipliers."""
    unsure = getattr(loss, "unsure", False)
    return {name: getattr(loss, name).detach().clone() for name in ("sigma2", "gain") if unsure and hasattr(loss, name)}


def _call(loss: Loss, reconstruct: Reconstruction, arguments: dict):
    """
    The loss, the noise variance that it subtracts, and the step on UNSURE's multipliers that the backward pass has to take.

    The multipliers belong to the model, so that checkpoints hold them. deepinv's loss takes an ascent step whenever it is called.
    Here that step waits for the backward pass, which Trainer runs in training and not in evaluation.
    """
    sigma2 = loss.sigma2 if isinstance(loss, SureGaussianLoss | SurePGLoss) else 0.0
    levels = {name: getattr(reconstruct.model, name) for name in unknown_levels(loss)}
    if not levels:
        return loss(model=reconstruct, **arguments), sigma2, None
    before = {k: v for k, v in vars(loss).items() if k != "training" and k[0] != "_"}
    try:
        for name, level in levels.items():
            setattr(loss, name, level.detach().clone().requires_grad_(reconstruct.training))
        loss.unsure, sigma2 = reconstruct.training, loss.sigma2
        value = loss(model=reconstruct, **arguments)
        after = {k: vars(loss)[k] for k in before}
    finally:
        vars(loss).update(before)
    if not reconstruct.training:
        return value, sigma2, None
    joint = reconstruct.model.joint_draws  # all processes take the step of the whole batch
    steps = {name: joint.mean(after.pop(name).detach() - level) for name, level in levels.items()}
    after = {name: joint.mean(value) if torch.is_tensor(value) else value for name, value in after.items()}

    def ascend() -> None:
        vars(loss).update(after)
        for name, level in levels.items():
            level.add_(steps[name])
            setattr(loss, name, level.clone().requires_grad_())

    return value, sigma2, ascend


@contextmanager
def _full_precision(loss: Loss, split: Split):
    """Leaves autocast for a divergence by differences, which its rounding would destroy; yields whether that was necessary."""
    device_type = split.y.device.type
    rounded = isinstance(loss, _SURE) and (split.autocast or torch.is_autocast_enabled(device_type))
    with torch.autocast(device_type, enabled=False) if rounded else nullcontext():
        yield rounded


@contextmanager
def _per_sample_metric(loss: Loss):
    """Context in which the metric of a loss returns a number for each sample, even if it usually returns one for the batch."""
    metric = getattr(loss, "metric", None)
    if not isinstance(metric, nn.Module) or isinstance(loss, _SURE):  # in these, `metric` is a linear operator
        yield
        return
    del loss.metric  # a module refuses a plain function under the name of a submodule
    loss.metric = _of_each_sample(metric)
    try:
        yield
    finally:
        loss.metric = metric


def _of_each_sample(metric: nn.Module):
    """The metric as a function that returns values (B,); metrics of torch are called once for the whole batch."""
    entrywise = _ENTRYWISE[type(metric)](metric) if type(metric) in _ENTRYWISE else None

    def values(x_net: Tensor, x: Tensor, *args, **kwargs) -> Tensor:
        if entrywise is not None:
            each = entrywise(x_net, x, reduction="none").reshape(len(x), -1)
            return each.sum(1) if metric.reduction == "sum" else each.mean(1)
        value = metric(x_net, x, *args, **kwargs)
        if value.numel() == 1:
            value = torch.stack([metric(x_net[i : i + 1], x[i : i + 1], *args, **kwargs) for i in range(len(x))])
        return value.reshape(len(x), -1).mean(1)

    return values
