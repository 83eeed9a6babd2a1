"""
Flows on whole images: the prior in image space and the reconstruction in latent space.

:class:`~deepinv_flows.FlowPrior` is the negative log-likelihood of an image; :class:`~deepinv_flows.LatentMAP` searches
the latents for the most likely image, and :class:`~deepinv_flows.LatentSampler` draws images from the posterior.
"""

from .map import LatentMAP
from .prior import FlowPrior
from .sampler import LatentSampler

__all__ = ["FlowPrior", "LatentMAP", "LatentSampler"]
