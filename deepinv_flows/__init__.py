"""Normalizing-flow priors for deepinv."""

from .builders import DEQ_builder, unfolded_builder
from .building import build_flow
from .contract import Reversed, as_flow
from .denoiser import FlowDenoiser
from .dialects import CheckpointError
from .distributed import DistributedPatchNR
from .flow_prior import FlowPrior
from .flows import allinone_flow, glow_flow
from .image_flows import image_flow
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
from .latent import LatentMAP
from .likelihood import BitsPerDim, FlowModel, FlowNLL
from .parallel import DistributedTrainer
from .patchnr import PatchNR
from .registry import register, registered, unregister
from .splitting import EquivariantSplittingLoss
from .splitting_masks import LineSplittingMaskGenerator
from .training import fit_flow, fit_patchnr

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
    "DistributedPatchNR",
    "DistributedTrainer",
    "EquivariantSplittingLoss",
    "FlowDenoiser",
    "FlowModel",
    "FlowNLL",
    "FlowPrior",
    "IPiano",
    "IPianoIteration",
    "LatentGD",
    "LatentGDIteration",
    "LatentMAP",
    "LearnedPrimalDual",
    "LearnedPrimalDualIteration",
    "LineSplittingMaskGenerator",
    "NMAPGIteration",
    "PatchNR",
    "Reversed",
    "allinone_flow",
    "as_flow",
    "build_flow",
    "fit_flow",
    "fit_patchnr",
    "glow_flow",
    "image_flow",
    "nmapg",
    "register",
    "registered",
    "unfolded_builder",
    "unregister",
]
