"""
PatchNR: the patch prior, and the potential (value and gradients over all patches) that it is computed by.

An image goes from :mod:`~deepinv_flows.patchnr.prior` through :mod:`~deepinv_flows.patchnr.patches` to
:mod:`~deepinv_flows.patchnr.potential`, which differentiates by autograd or, where every part of the flow is known, by
:mod:`~deepinv_flows.patchnr.fused`.
"""

from .distributed import DistributedPatchNR
from .patches import PatchIndex
from .prior import PatchNR

__all__ = ["DistributedPatchNR", "PatchIndex", "PatchNR"]
