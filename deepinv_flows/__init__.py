"""Normalizing-flow priors for deepinv."""

from .contract import Reversed, as_flow
from .dialects import CheckpointError
from .flows import allinone_flow, build_flow, glow_flow
from .likelihood import BitsPerDim, FlowModel, FlowNLL
from .patchnr import PatchNR
from .splitting import EquivariantSplittingLoss
from .splitting_masks import LineSplittingMaskGenerator
from .training import fit_patchnr

__version__ = "0.1.0"
__all__ = [
    "BitsPerDim",
    "CheckpointError",
    "EquivariantSplittingLoss",
    "FlowModel",
    "FlowNLL",
    "LineSplittingMaskGenerator",
    "PatchNR",
    "Reversed",
    "allinone_flow",
    "as_flow",
    "build_flow",
    "fit_patchnr",
    "glow_flow",
]
