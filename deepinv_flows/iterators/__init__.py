"""
Iterations that deepinv lacks, each with its optimizer in a module of its name, and builders of unfolded and equilibrium models.

``base`` and ``search`` hold what the iterations share, ``optimizer`` and ``parameters`` what the optimizers share.
"""

from .builders import DEQ_builder, unfolded_builder
from .condat_vu import CondatVu, CondatVuIteration
from .davis_yin import DavisYin, DavisYinIteration
from .ipiano import IPiano, IPianoIteration
from .latent_gd import LatentGD, LatentGDIteration
from .learned_primal_dual import LearnedPrimalDual, LearnedPrimalDualIteration
from .nmapg import NMAPG, NMAPGIteration, nmapg
from .terms import exact_prox, poisson, poisson_grad

__all__ = [
    "NMAPG",
    "CondatVu",
    "CondatVuIteration",
    "DEQ_builder",
    "DavisYin",
    "DavisYinIteration",
    "IPiano",
    "IPianoIteration",
    "LatentGD",
    "LatentGDIteration",
    "LearnedPrimalDual",
    "LearnedPrimalDualIteration",
    "NMAPGIteration",
    "exact_prox",
    "nmapg",
    "poisson",
    "poisson_grad",
    "unfolded_builder",
]
