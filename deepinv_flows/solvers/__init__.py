"""
Solvers of smooth problems, in which every sample of a batch is a problem of its own.

L-BFGS is in :mod:`~deepinv_flows.solvers.lbfgs`, descent by torch's optimizers in :mod:`~deepinv_flows.solvers.first_order`, and
the proximity operator of a smooth potential in :mod:`~deepinv_flows.solvers.proximal`. A minimiser has its derivatives from
:mod:`~deepinv_flows.solvers.implicit`. The arithmetic of batches is in :mod:`~deepinv_flows.solvers.batch`, what an objective is
in :mod:`~deepinv_flows.solvers.objective`.
"""

from .batch import dot, finite, norm, per_sample, rounding
from .first_order import first_order
from .implicit import differentiable
from .lbfgs import lbfgs
from .objective import Objective
from .proximal import gamma_like, gradient, prox

__all__ = [
    "Objective",
    "differentiable",
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
