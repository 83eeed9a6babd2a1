"""Normalizing-flow priors for deepinv."""

from .checkpoints import CheckpointError
from .flows import Reversed, allinone_flow, as_flow, build_flow, glow_flow
from .likelihood import BitsPerDim, FlowModel, FlowNLL, fit_patchnr
from .patchnr import PatchNR

__version__ = "0.1.0"
__all__ = [
    "BitsPerDim",
    "CheckpointError",
    "FlowModel",
    "FlowNLL",
    "PatchNR",
    "Reversed",
    "allinone_flow",
    "as_flow",
    "build_flow",
    "fit_patchnr",
    "glow_flow",
]
