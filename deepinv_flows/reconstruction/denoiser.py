"""A flow as a Gaussian denoiser."""

from collections.abc import Sequence

import numpy as np
import torch
from deepinv.models.base import Denoiser
from torch import Tensor

from ..latent import FlowPrior


class FlowDenoiser(Denoiser):
    r"""
    The posterior mean under a flow of noisy images, by Tweedie's formula.

    .. math::

        D(y) = y + \sigma^2\, \nabla \log p(y), \qquad
        p = p_x * \mathcal N(0, \sigma^2 I) \;\Rightarrow\; D(y) = \mathbb E[x \,|\, y = x + \sigma n]

    The estimate of least squared error, where a maximum a posteriori estimate is the likeliest image. The flow's p has to be the
    density of *noisy* images, at one noise level: ``fit_flow(flow, images, sigma=sigma)`` trains it for that, by the error of D
    itself, which is denoising score matching. D is a gradient field, of a known potential.

    Works wherever a deepinv denoiser does, save under :func:`torch.inference_mode`: in ``dinv.optim.PnP``, or trained by
    :class:`deepinv.Trainer` as ``dinv.models.ArtifactRemoval(denoiser, mode="direct")``, with any loss.

    :param FlowPrior prior: what knows :math:`-\log p`.
    :raises TypeError: for anything else.

    Source: Robbins 1956 (Tweedie's formula); Vincent, "A connection between score matching and denoising autoencoders", Neural
    Computation 2011; the flow as in Asim et al. 2020, arXiv 1905.11672.

    >>> import torch
    >>> from deepinv_flows import FlowDenoiser, FlowPrior, image_flow
    >>> denoiser = FlowDenoiser(FlowPrior(image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4)))
    >>> denoiser(torch.rand(2, 1, 8, 8), sigma=0.1).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, prior: FlowPrior):
        super().__init__()
        if not isinstance(prior, FlowPrior):
            raise TypeError(f"expected a FlowPrior; got {type(prior).__name__}")
        self.prior = prior

    def extra_repr(self) -> str:
        return self.prior.extra_repr()

    def forward(self, x: Tensor, sigma: float | Tensor, c: Tensor | Sequence[Tensor] | None = None, **kwargs) -> Tensor:
        """
        Denoise images.

        :param torch.Tensor x: noisy images (B, C, H, W).
        :param float, torch.Tensor sigma: standard deviation of their noise: one number, or one an image.
        :param torch.Tensor, list c: conditions of a conditional flow, or the only one, each (B, C', H, W).
        :return: tensor like x; with a graph where x or the weights ask for one.
        :raises ValueError: for a level that is negative or not finite, and for images that :class:`FlowPrior` refuses.
        :raises TypeError: for a level that is not a number, and for images that :class:`FlowPrior` refuses.
        :raises RuntimeError: under :func:`torch.inference_mode`.
        """
        score = -self.prior.grad(x, c=c) * (x[0].numel() if self.prior.per_dim else 1)
        return x + _variance(sigma, x) * score


def _variance(sigma, x: Tensor) -> Tensor:
    """The square of a noise level, to multiply ``x``."""
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
    return (sigma.reshape(-1, 1, 1, 1) ** 2).to(x.dtype)
