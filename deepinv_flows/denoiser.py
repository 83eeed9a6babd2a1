"""A flow as a Gaussian denoiser."""

import torch
from deepinv.models.base import Denoiser
from torch import Tensor

from .flow_prior import FlowPrior


class FlowDenoiser(Denoiser):
    r"""
    The posterior mean under a flow of noisy images, by Tweedie's formula.

    .. math::

        D(y) = y + \sigma^2\, \nabla \log p(y), \qquad
        p = p_x * \mathcal N(0, \sigma^2 I) \;\Rightarrow\; D(y) = \mathbb E[x \,|\, y = x + \sigma n]

    The estimate of least squared error, where a maximum a posteriori estimate is the likeliest image. The flow's p has to be the
    density of *noisy* images, at one noise level: ``fit_flow(flow, images, sigma=sigma)`` trains it for that, by the error of D
    itself, which is denoising score matching. D is a gradient field, of a known potential.

    Works wherever a deepinv denoiser does: as ``dinv.optim.PnP(denoiser=...)``, or trained by :class:`deepinv.Trainer` as
    ``dinv.models.ArtifactRemoval(denoiser, mode="direct")``, with any loss.

    :param FlowPrior prior: what knows :math:`-\log p`, in nats.
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
        if not isinstance(prior, FlowPrior) or prior.per_dim:
            found = "one with per_dim=True" if isinstance(prior, FlowPrior) else type(prior).__name__
            raise TypeError(f"expected a FlowPrior in nats; got {found}")
        self.prior = prior

    def forward(self, x: Tensor, sigma: float | Tensor, **kwargs) -> Tensor:
        """
        Denoise images.

        :param torch.Tensor x: noisy images (B, C, H, W).
        :param float, torch.Tensor sigma: standard deviation of their noise: one number, or one an image.
        :return: tensor like x; with a graph where x or the weights ask for one.
        :raises ValueError: for a level that is negative or not finite, and for images that :class:`FlowPrior` refuses.
        """
        sigma = self._handle_sigma(sigma, reference_tensor=x)
        if not bool((sigma.detach() >= 0).all()) or not bool(torch.isfinite(sigma.detach()).all()):
            raise ValueError(f"expected a finite sigma >= 0; got {sigma.detach().flatten().tolist()}")
        return x - sigma**2 * self.prior.grad(x)
