"""Normalizing-flow priors for deepinv."""

from .builders import DEQ_builder, unfolded_builder
from .contract import Reversed, as_flow
from .dialects import CheckpointError
from .flows import allinone_flow, build_flow, glow_flow
from .iterators import (
    NMAPG,
    CondatVu,
    CondatVuIteration,
    DavisYin,
    DavisYinIteration,
    IPiano,
    IPianoIteration,
    LatentGD,
    LatentGDIteration,
    LearnedPrimalDual,
    LearnedPrimalDualIteration,
    NMAPGIteration,
    nmapg,
)
from .likelihood import BitsPerDim, FlowModel, FlowNLL
from .patchnr import PatchNR
from .registry import register, registered, unregister
from .splitting import EquivariantSplittingLoss
from .splitting_masks import LineSplittingMaskGenerator
from .training import fit_patchnr

__version__ = "0.1.0"
__all__ = [
    "NMAPG",
    "BitsPerDim",
    "CheckpointError",
    "CondatVu",
    "CondatVuIteration",
    "DEQ_builder",
    "DavisYin",
    "DavisYinIteration",
    "EquivariantSplittingLoss",
    "FlowModel",
    "FlowNLL",
    "IPiano",
    "IPianoIteration",
    "LatentGD",
    "LatentGDIteration",
    "LearnedPrimalDual",
    "LearnedPrimalDualIteration",
    "LineSplittingMaskGenerator",
    "NMAPGIteration",
    "PatchNR",
    "Reversed",
    "allinone_flow",
    "as_flow",
    "build_flow",
    "fit_patchnr",
    "glow_flow",
    "nmapg",
    "register",
    "registered",
    "unfolded_builder",
    "unregister",
]
