"""A reconstruction by MAP as a model with weights: minimisers, and their derivatives in the weights."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepinv.loss import Loss
from deepinv.models.base import Reconstructor
from deepinv.optim.linear import minres
from torch import Tensor, nn

from ..patchnr import PatchNR
from ..reconstruction import MAP, candidates, dimension, frozen
from ..solvers import differentiable, norm, per_sample

LOOSE = 0.05  # relative gradient of a minimiser from which on it is said not to be one


class Inner(Reconstructor):
    r"""
    The minimiser of :math:`f(x) + \lambda g_\theta(x)` as a model that :class:`deepinv.Trainer` trains.

    Its parameters are :math:`\theta` and :math:`\log \lambda`. ``watched`` holds, a number a step, the largest relative gradient
    of the minimisers of a batch, :math:`\|\nabla f + \lambda \nabla g\| / \max(\|\nabla f\|, \|\lambda \nabla g\|)`, and the
    largest relative residual of the linear systems.

    :param MAP model: what reconstructs, by a :class:`PatchNR`.
    :param float weight: :math:`\lambda` at first, for images of a size.
    :param Sequence size: (H, W) of these images; for others the patches have the same weight each.
    :param int linear_iter: most iterations of MINRES.
    :param bool jacobian_free: take a multiple of the identity for the inverse of the Hessian.
    :param float linear_tol: relative change at which MINRES ends.
    """

    def __init__(
        self,
        model: MAP,
        weight: float,
        size: Sequence[int],
        linear_iter: int = 20,
        jacobian_free: bool = False,
        linear_tol: float = 1e-3,
    ):
        super().__init__()
        self.map = model
        self.prior._asked.second = (
            True  # from the first step on, so that a training that is resumed takes the same road
        )
        like = next(self.prior.parameters())
        self.log_lambda = nn.Parameter(like.new_tensor(math.log(weight)))
        self.patches = dimension(self.prior, like.new_empty(1, 1, *size))
        self.linear_iter, self.linear_tol, self.jacobian_free = linear_iter, linear_tol, jacobian_free
        self.watched: dict[str, list[float]] = {"gradient": [], "linear": []}

    @property
    def prior(self) -> PatchNR:
        return self.map.prior  # type: ignore[return-value]

    def weight(self, x: Tensor) -> Tensor:
        """:math:`\\lambda` for images like x, (B,)."""
        return (self.log_lambda.exp() * dimension(self.prior, x) / self.patches).expand(len(x))

    def forward(self, y: Tensor, physics: Any, **kwargs) -> Tensor:
        """The minimisers, with a graph in :math:`\\theta` and :math:`\\lambda` where gradients are enabled."""
        with torch.no_grad():
            found = candidates(y, physics)
            weight = self.weight(next(iter(found.values())))
            x = self.map.solve(y, physics, weight, found)[0]
        return self._recorded(x, y, physics) if torch.is_grad_enabled() else x

    def _recorded(self, x: Tensor, y: Tensor, physics: Any) -> Tensor:
        data, weight = self.map.data_fidelity, per_sample(self.weight(x), x)
        pull, push = data.grad(x.clone(), y, physics).detach(), weight * self.prior.grad(x)
        sizes = torch.stack([norm(part.detach()) for part in (pull + push, pull, push)])
        self._watch("gradient", sizes[0] / sizes[1:].amax(0).clamp_min(torch.finfo(x.dtype).tiny))
        prior, weight = frozen(self.prior), weight.detach()
        return differentiable(x, pull + push, lambda u: data.grad(u, y, physics) + weight * prior.grad(u), self._solve)

    def _solve(self, hessian: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """An approximate solution of H w = v, in units of v and of H, as deepinv's MINRES has absolute tolerances."""
        unit, image = norm(v), hessian(v)
        stiffness = norm(image) / unit
        unit, stiffness = (per_sample(torch.where(s > 0, s, 1.0), v) for s in (unit, stiffness))
        if self.jacobian_free:
            found, image = v / stiffness, image / stiffness
        else:
            options: Any = dict(max_iter=self.linear_iter, tol=self.linear_tol, eps=torch.finfo(v.dtype).eps)
            found = minres(lambda w: hessian(w) / stiffness, v / unit, **options) * unit / stiffness
            image = hessian(found)
        self._watch("linear", norm(image - v) / unit.flatten())
        return found

    def _watch(self, name: str, residual: Tensor) -> None:
        worst = float(residual.max())
        if not math.isfinite(worst):
            raise ValueError(f"the training diverged: the residual ({name}) of the inner problem is {worst}")
        if name == "gradient" and worst > LOOSE >= max(self.watched[name], default=0.0):
            warnings.warn(
                f"expected minimisers of the inner problem with a relative gradient of at most {LOOSE}; got {worst:.2g} after at "
                f"most {self.map.max_iter} iterations, from which derivatives are wrong: raise max_iter, or lower tol",
                stacklevel=2,
            )
        self.watched[name].append(worst)

    def figures(self) -> dict[str, float]:
        """What the progress of a training shows of the inner problem."""
        return {name: values[-1] for name, values in self.watched.items() if values}


class SquaredError(Loss):
    r"""
    The mean squared error in units of the images' variance, :math:`\|\hat x - x\|^2 / (n s^2)`.

    :param float s: standard deviation of the images.
    """

    def __init__(self, s: float):
        super().__init__()
        self.s = s

    def forward(self, x_net: Tensor, x: Tensor, *args, **kwargs) -> Tensor:
        """
        The loss.

        :param torch.Tensor x_net: reconstructions (B, C, H, W).
        :param torch.Tensor x: clean images (B, C, H, W).
        :return: (B,)
        """
        return (((x_net - x) / self.s) ** 2).flatten(1).mean(1)
