"""
From measurements to an image, by any of the priors here.

:class:`~deepinv_flows.FlowDenoiser` is the posterior mean of a noisy image.
"""

from .denoiser import FlowDenoiser

__all__ = ["FlowDenoiser"]
