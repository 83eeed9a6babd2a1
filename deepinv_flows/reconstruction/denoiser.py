"""A flow as a Gaussian denoiser."""

from collections.abc import Sequence

import numpy as np
import torch
from deepinv.models.base import Denoiser
from torch import Tensor

from ..latent import FlowPrior
from ..patchnr import PatchNR, score

ROUNDING = 1e-3  # relative; a level by another route (25 / 255, a schedule's end) is still that level


class FlowDenoiser(Denoiser):
    r"""
    The posterior mean under a flow of noisy images, or of their noisy patches, by Tweedie's formula.

    .. math::

        D(y) = y + \sigma^2\, \nabla \log p(y), \qquad
        p = p_x * \mathcal N(0, \sigma^2 I) \;\Rightarrow\; D(y) = \mathbb E[x \,|\, y = x + \sigma n]

    The estimate of least squared error, where a maximum a posteriori estimate is the likeliest image. The flow's p has to be the
    density of *noisy* images, at one noise level: ``fit_flow(flow, images, sigma=sigma)`` trains it for that, by the error of D
    itself, which is denoising score matching. D is a gradient field, of a known potential.

    With a :class:`deepinv_flows.PatchNR`, D is the average of the posterior means of the :math:`p^2` patches of each pixel,

    .. math::

        D(y) = \frac1{p^2} \sum_i P_i^T \big( P_i y - \sigma^2\, \nabla h(P_i y) \big) = y - \sigma^2 \frac n{p^2} \nabla g(y)

    for images of any size, mirrored at their borders, near which D is not a gradient field. ``fit_patchnr(images, sigma=sigma)``
    trains it, for one level, or for a range ``(low, high)``: the flow is then one of :math:`y / \sigma`, whose noise has variance
    1. A prior knows the levels that it was trained for (``prior.sigma_range``), and others are refused.

    Works wherever a deepinv denoiser does, save under :func:`torch.inference_mode`: in ``dinv.optim.PnP``, or trained by
    :class:`deepinv.Trainer` as ``dinv.models.ArtifactRemoval(denoiser, mode="direct")``, with any loss.

    :param FlowPrior, PatchNR prior: what knows :math:`-\log p`.
    :raises TypeError: for anything else.

    Source: Robbins 1956 (Tweedie's formula); Vincent, "A connection between score matching and denoising autoencoders", Neural
    Computation 2011; the flows as in Asim et al. 2020, arXiv 1905.11672, and Altekrueger et al. 2023, arXiv 2205.12021.

    >>> import torch
    >>> from deepinv_flows import FlowDenoiser, FlowPrior, PatchNR, image_flow
    >>> denoiser = FlowDenoiser(FlowPrior(image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4)))
    >>> denoiser(torch.rand(2, 1, 8, 8), sigma=0.1).shape
    torch.Size([2, 1, 8, 8])
    >>> FlowDenoiser(PatchNR(patch_size=3, num_layers=1))(torch.rand(2, 1, 20, 30), sigma=0.1).shape
    torch.Size([2, 1, 20, 30])
    """

    def __init__(self, prior: FlowPrior | PatchNR):
        super().__init__()
        if not isinstance(prior, FlowPrior | PatchNR):
            raise TypeError(f"expected a FlowPrior or a PatchNR; got {type(prior).__name__}")
        self.prior = prior

    def extra_repr(self) -> str:
        return self.prior.extra_repr()

    def forward(self, x: Tensor, sigma: float | Tensor, c: Tensor | Sequence[Tensor] | None = None, **kwargs) -> Tensor:
        """
        Denoise images.

        :param torch.Tensor x: noisy images (B, C, H, W).
        :param float, torch.Tensor sigma: standard deviation of their noise: one number, or one an image.
        :param torch.Tensor, list c: conditions of a conditional flow on images, or the only one, each (B, C', H, W).
        :return: tensor like x; with a graph where x or the weights ask for one.
        :raises ValueError: for a level that is negative, not finite or none that the prior was trained for, and for images that
            the prior refuses.
        :raises TypeError: for a level that is not a number, and for images that the prior refuses.
        :raises RuntimeError: under :func:`torch.inference_mode`.
        """
        if isinstance(self.prior, PatchNR):
            return of_patches(self.prior, x, sigma)
        level = levels(sigma, x)
        _check_known(level, self.prior.sigma_range)
        grad = self.prior.grad(x, c=c) * (x[0].numel() if self.prior.per_dim else 1)
        return x - (level**2).to(x.dtype) * grad


def of_patches(prior: PatchNR, x: Tensor, sigma: float | Tensor, borders: bool = True) -> Tensor:
    """The denoised images, or, without ``borders``, their pixels at least p - 1 away from the borders."""
    level = levels(sigma, x)
    _check_known(level, prior.sigma_range)
    # the square of a level vanishes in half precision, but not the level
    unit = level.to(x.dtype) if scaled(prior.sigma_range) else 1.0
    grad = score(prior, x / unit, borders)
    cut = 0 if borders else prior.patch_size - 1
    x = x[:, :, cut : x.shape[2] - cut, cut : x.shape[3] - cut]
    return x - (level**2 / unit).to(x.dtype) * grad


def scaled(trained: tuple[float, float] | None) -> bool:
    """Whether a prior that was trained for these levels is one of images divided by their level."""
    return trained is not None and trained[0] < trained[1]


def _check_known(level: Tensor, trained: tuple[float, float] | None) -> None:
    if trained is None:
        return
    least, most = (float(end) for end in level.detach().aminmax())
    low, high = trained
    if least < (1 - ROUNDING) * low or most > (1 + ROUNDING) * high:
        named = f"sigma = {low:.4g}" if low == high else f"sigma in [{low:.4g}, {high:.4g}]"
        raise ValueError(f"expected {named}, for which the prior was trained; got {least:.4g} to {most:.4g}")


def levels(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Noise levels, as (1, 1, 1, 1) or (B, 1, 1, 1), in float32 or float64."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32  # squares vanish in half precision
    try:
        known = torch.is_tensor(sigma) or isinstance(sigma, np.ndarray | np.generic)
        sigma = torch.as_tensor(sigma, dtype=None if known else exact, device=x.device)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"expected sigma to be a number, or one for each image; got {type(sigma).__name__}") from None
    if sigma.dtype not in (torch.float32, torch.float64):
        sigma = sigma.to(exact)
    if sigma.numel() not in (1, len(x)):
        raise ValueError(
            f"expected sigma to be one number, or one for each of {len(x)} images; got {tuple(sigma.shape)}"
        )
    if not bool((sigma.detach() >= 0).all()) or not bool(torch.isfinite(sigma.detach()).all()):
        raise ValueError(f"expected a finite sigma >= 0; got {sigma.detach().flatten().tolist()}")
    return sigma.reshape(-1, 1, 1, 1)
