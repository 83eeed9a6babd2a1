"""
From measurements to an image, by any of the priors here.

:class:`~deepinv_flows.MAP` minimises data fidelity and prior in one call. Its ``objective`` is split by what the terms allow,
``starts`` are compared, ``algorithms`` descend, watched by ``progress``; the weight of the prior comes from ``strength``, by a
``search``, or from ``tuning`` on clean images; ``files`` hold it all. :class:`~deepinv_flows.FlowDenoiser` is the posterior
mean of a noisy image.
"""

from .denoiser import FlowDenoiser, of_patches, scaled
from .map import MAP
from .objective import Box, frozen
from .starts import candidates
from .strength import by_rule, dimension
from .tuning import kept

__all__ = ["MAP", "Box", "FlowDenoiser", "by_rule", "candidates", "dimension", "frozen", "kept", "of_patches", "scaled"]
