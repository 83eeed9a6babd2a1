"""Iterations that deepinv lacks, each with its optimizer."""

from .condat_vu import CondatVu, CondatVuIteration
from .davis_yin import DavisYin, DavisYinIteration
from .ipiano import IPiano, IPianoIteration
from .latent_gd import LatentGD, LatentGDIteration
from .learned_primal_dual import LearnedPrimalDual, LearnedPrimalDualIteration
from .nmapg import NMAPG, NMAPGIteration, nmapg

__all__ = [
    "NMAPG",
    "CondatVu",
    "CondatVuIteration",
    "DavisYin",
    "DavisYinIteration",
    "IPiano",
    "IPianoIteration",
    "LatentGD",
    "LatentGDIteration",
    "LearnedPrimalDual",
    "LearnedPrimalDualIteration",
    "NMAPGIteration",
    "nmapg",
]
