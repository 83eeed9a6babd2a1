"""Normalizing-flow priors for deepinv."""

from .flows import Reversed, allinone_flow, as_flow, build_flow, glow_flow, image_flow
from .images import load_images
from .iterators import (
    NMAPG,
    CondatVu,
    CondatVuIteration,
    DavisYin,
    DavisYinIteration,
    DEQ_builder,
    IPiano,
    IPianoIteration,
    LatentGD,
    LatentGDIteration,
    LearnedPrimalDual,
    LearnedPrimalDualIteration,
    NMAPGIteration,
    nmapg,
    unfolded_builder,
)
from .latent import FlowPrior, LatentMAP, LatentSampler
from .patchnr import DistributedPatchNR, PatchNR
from .reconstruction import MAP, FlowDenoiser
from .registry import register, registered, unregister
from .splitting import EquivariantSplittingLoss, LineSplittingMaskGenerator
from .training import BitsPerDim, DistributedTrainer, FlowModel, FlowNLL, fit_bilevel, fit_flow, fit_patchnr
from .weights import CheckpointError

__version__ = "0.1.0"
__all__ = [
    "MAP",
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
    "LatentSampler",
    "LearnedPrimalDual",
    "LearnedPrimalDualIteration",
    "LineSplittingMaskGenerator",
    "NMAPGIteration",
    "PatchNR",
    "Reversed",
    "allinone_flow",
    "as_flow",
    "build_flow",
    "fit_bilevel",
    "fit_flow",
    "fit_patchnr",
    "glow_flow",
    "image_flow",
    "load_images",
    "nmapg",
    "register",
    "registered",
    "unfolded_builder",
    "unregister",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
