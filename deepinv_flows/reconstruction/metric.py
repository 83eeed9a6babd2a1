r"""
The metric of a search: the diagonal of the Hessian, where that tells the pixels of an image apart.

It does in inpainting, where observed pixels are stiff and the others are held by the prior alone. The diagonal d of the data
fidelity is estimated with random signs v, as the mean of :math:`v \odot \nabla^2 f\, v` (Bekas, Kokiopoulou & Saad, "An estimator
for the diagonal of a matrix", 2007). Its error comes from the entries beside the diagonal and is large for blurs and tomography.
Two estimates from different signs vary together only by what is true of both, so the deviation of d from its mean is
shrunk by the ratio of their covariance to the variance of d. To the prior belongs one number h.
"""

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ..solvers import per_sample
from .objective import Objective, Term

PROBES = 4  # for each of the two estimates
SHIFT = 0.01  # of the difference quotients, times the root mean square of the image


def metric(objective: Objective, x: Tensor) -> Tensor:
    """
    :math:`(d + h)^{-1/2}` at x, up to a factor for each image: images u times it have equal curvatures in all pixels. It is 1 for
    a physics that is not linear, whose curvature at the start says little of that elsewhere.
    """
    if not isinstance(objective.data.physics, LinearPhysics):
        return torch.ones_like(x.real)
    source = torch.Generator().manual_seed(0)
    a, b = (_diagonal(objective.data, x, PROBES, source) for _ in range(2))
    h = _mean(_diagonal(objective.term, x, 1, source)).abs()
    d = (a + b) / 2
    mean = _mean(d)
    share = _mean((a - _mean(a)) * (b - _mean(b))) / _mean((d - mean) ** 2)
    curvature = h + mean + share.nan_to_num(0, 0, 0).clamp(0, 1) * (d - mean)
    largest = curvature.flatten(1).amax(1)
    curvature = curvature / per_sample(largest, x)
    return torch.where(torch.isfinite(curvature), curvature, 1.0).clamp_min(1e-4).rsqrt()


def _diagonal(term: Term, x: Tensor, probes: int, source: torch.Generator) -> Tensor:
    """An estimate of the diagonal of the Hessian of a term, like x; 0 where the gradient beside x is not finite."""
    grad = term.value_and_grad(x)[1]
    shift = SHIFT * _mean(x.abs() ** 2).sqrt()
    total = torch.zeros_like(x.real)
    for _ in range(probes):
        # the same signs for every image, so that none depends on the others of its batch
        v = torch.randint(0, 2, x.shape[1:], generator=source).to(x) * 2 - 1
        total += v.real * (term.value_and_grad(x + shift * v)[1] - grad).real / shift
    return (total / probes).nan_to_num(0, 0, 0)


def _mean(x: Tensor) -> Tensor:
    """Of each image, shaped so that it combines with x."""
    return x.flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
