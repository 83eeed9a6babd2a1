"""
PatchNR: the patch prior, and the potential that computes its value and gradients over all patches.

An image goes from :mod:`~deepinv_flows.patchnr.prior` through :mod:`~deepinv_flows.patchnr.patches` to
:mod:`~deepinv_flows.patchnr.potential`, which differentiates by autograd (:mod:`~deepinv_flows.patchnr.plain`) or, if every part
of the flow is known, by :mod:`~deepinv_flows.patchnr.fused`.
"""

from .distributed import DistributedPatchNR
from .patches import PatchIndex
from .potential import Asked, patch_nll
from .prior import PatchNR
from .score import score

__all__ = ["Asked", "DistributedPatchNR", "PatchIndex", "PatchNR", "patch_nll", "score"]
