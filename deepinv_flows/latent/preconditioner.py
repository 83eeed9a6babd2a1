r"""
The directions in which an objective curves most, as the covariance of momenta.

.. math::

    M = \delta I + V E V^\top

where V holds the eigenvectors of the largest eigenvalues of the Hessian and E these eigenvalues minus :math:`\delta`, or 0 where
that is negative. They are found by subspace iteration on differences of gradients (Halko, Martinsson & Tropp 2011,
arXiv 0909.4061). Each sample of a batch has an M of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..solvers import Objective, norm, per_sample

ROUNDS = 3


@dataclass
class Metric:
    """M, stored as its floor :math:`\\delta`, the eigenvectors V (B, D, k) and the diagonal of E (B, k)."""

    floor: float
    vectors: Tensor
    added: Tensor

    def root(self, p: Tensor) -> Tensor:
        """M^(1/2) p, (B, ...): it has the covariance M if p is standard normal."""
        return self._apply(p, lambda eigenvalues: eigenvalues.sqrt())

    def inverse(self, p: Tensor) -> Tensor:
        """M^-1 p, (B, ...)."""
        return self._apply(p, lambda eigenvalues: 1 / eigenvalues)

    def _apply(self, p: Tensor, function) -> Tensor:
        floor = function(torch.as_tensor(self.floor, dtype=p.dtype, device=p.device))
        inside = torch.einsum("bdk,bd->bk", self.vectors, p.flatten(1))
        change = (function(self.floor + self.added) - floor) * inside
        return floor * p + torch.einsum("bdk,bk->bd", self.vectors, change).view_as(p)


def curvature(value_and_grad: Objective, z: Tensor, rank: int, floor: float, generator: torch.Generator) -> Metric:
    """
    The metric of an objective at z.

    :param Callable value_and_grad: maps latents (B, ...) to values (B,) and gradients (B, ...).
    :param torch.Tensor z: latents (B, ...).
    :param int rank: number of eigenvectors k.
    :param float floor: the least curvature :math:`\\delta`, that of the prior, which every direction has.
    :param torch.Generator generator: source of the first subspace.
    """
    shape = (len(z), z[0].numel(), min(rank, z[0].numel()))
    exact = torch.promote_types(z.dtype, torch.float32)  # decompositions are not known in half precision
    vectors = torch.randn(shape, generator=generator, device=generator.device, dtype=exact).to(z.device)
    # the error of central differences is least for steps near the cube root of the rounding error
    length = torch.finfo(z.dtype).eps ** (1 / 3) * norm(z).clamp_min(shape[1] ** 0.5)

    def hessian(vectors: Tensor) -> Tensor:
        columns = []
        for v in vectors.to(z.dtype).unbind(2):
            move = per_sample(length / v.norm(dim=1), z) * v.view_as(z)
            difference = value_and_grad(z + move)[1] - value_and_grad(z - move)[1]
            columns.append(difference.flatten(1) * (v.norm(dim=1) / (2 * length))[:, None])
        return torch.stack(columns, 2).to(exact)

    if shape[2] == 0:
        return Metric(floor, vectors.to(z.dtype), z.new_zeros(len(z), 0))
    for _ in range(ROUNDS - 1):
        vectors = torch.linalg.qr(hessian(torch.linalg.qr(vectors)[0]))[0]
    projected = vectors.mT @ hessian(vectors)
    eigenvalues, rotation = torch.linalg.eigh(0.5 * (projected + projected.mT))
    return Metric(floor, (vectors @ rotation).to(z.dtype), (eigenvalues - floor).clamp_min(0).to(z.dtype))
