"""
Solvers of smooth problems, every sample of a batch with its own state.

L-BFGS is in :mod:`~deepinv_flows.solvers.lbfgs`, descent by torch's optimizers in :mod:`~deepinv_flows.solvers.first_order`, the
proximity operator of a smooth potential, with its derivatives, in :mod:`~deepinv_flows.solvers.proximal`.
"""

from .batch import dot, finite, norm, per_sample, rounding
from .first_order import first_order
from .lbfgs import lbfgs
from .objective import Objective
from .proximal import gamma_like, gradient, prox

__all__ = [
    "Objective",
    "dot",
    "finite",
    "first_order",
    "gamma_like",
    "gradient",
    "lbfgs",
    "norm",
    "per_sample",
    "prox",
    "rounding",
]
