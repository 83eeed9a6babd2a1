"""
Solvers of smooth problems, every sample of a batch with its own state.

L-BFGS and first-order descent are in :mod:`~deepinv_flows.solvers.lbfgs`, the proximity operator of a smooth potential, with its
derivatives, in :mod:`~deepinv_flows.solvers.proximal`.
"""

from .lbfgs import finite, first_order, lbfgs, per_sample
from .proximal import gamma_like, gradient, prox

__all__ = ["finite", "first_order", "gamma_like", "gradient", "lbfgs", "per_sample", "prox"]
