r"""
The proximity operator of a smooth, non-convex potential that is given by its value and gradient.

.. math::

    \operatorname{prox}_{\gamma g}(x) \in \arg\min_u F(u), \qquad F(u) = \gamma g(u) + \tfrac12 \|u - x\|^2

It is found by descent, :math:`u^+ = u - s\, \nabla F(u)`, with Barzilai-Borwein step sizes s (Barzilai & Borwein 1988), each of
which is shortened until F falls enough (Armijo 1966). F therefore never rises, whatever gamma is. Each sample has its own step
size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import iteration
from .batch import dot, finite, per_sample, rounding
from .implicit import differentiable

SUFFICIENT_DECREASE = 1e-4
MAX_SHORTENINGS = 20


def gamma_like(gamma: float | Tensor, x: Tensor) -> Tensor:
    """``gamma``, one number or one for each sample, checked and reshaped so that it multiplies ``x``."""
    gamma = torch.as_tensor(gamma, dtype=x.dtype, device=x.device)
    if gamma.numel() not in (1, x.shape[0]):
        raise ValueError(f"expected gamma to be one number or one for each of {x.shape[0]} samples; got {gamma.shape}")
    if not bool((gamma.detach() >= 0).all()) or not bool(torch.isfinite(gamma.detach()).all()):
        raise ValueError(f"expected a finite gamma >= 0; got {gamma.detach().flatten().tolist()}")
    return per_sample(gamma.reshape(-1), x)


@torch.no_grad()
def minimise(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    gamma: Tensor,
    step: float = 1.0,
    max_iter: int = 50,
    tol: float = 1e-4,
) -> Tensor:
    """
    A local minimiser u of F, by the descent above, starting from u = x.

    :param Callable value_and_grad: g; maps images (B, ...) to values (B,) and gradients (B, ...).
    :param torch.Tensor x: images (B, ...).
    :param torch.Tensor gamma: as :func:`deepinv_flows.solvers.gamma_like` returns it.
    :param float step: first trial step size.
    :param int max_iter: largest number of accepted steps.
    :param float tol: a sample is done when a step moves it by less than ``tol`` times its norm.
    :return: tensor like ``x`` with F(u) <= F(x), up to rounding, for each sample.
    :raises ValueError: when the value or gradient of g is not finite at x.
    """

    def energy(u):
        g, grad = value_and_grad(u)
        return gamma.flatten() * g + 0.5 * dot(u - x, u - x), gamma * grad + u - x

    u = x.clone()
    F, grad = energy(u)
    if not finite(F, grad).all():
        raise ValueError(f"the value or gradient of the prior is not finite where its prox begins{iteration()}")
    s, alive = torch.full_like(F, step), torch.ones_like(F, dtype=torch.bool)
    slack = rounding(F)
    for _ in range(max_iter):
        u_next, F_next, grad_next, s, accepted = _line_search(energy, u, F, grad, s, slack, alive)
        move = u_next - u
        moved, curvature = dot(move, move), dot(move, grad_next - grad)
        u, F, grad = u_next, F_next, grad_next
        # a sample whose steps were all refused is done: F is flat to rounding there, or has a kink
        alive = alive & accepted & (moved > tol**2 * dot(u, u))
        if not alive.any():
            break
        s = torch.where(curvature > 0, moved / curvature, 4 * s).clamp(1e-12, 1e3)
    return u


def _line_search(energy, u, F, grad, s, slack, alive):
    """Take, for each live sample, the first of the steps s, s/4, s/16, ... that lowers F enough, or none if none does."""
    slope = dot(grad, grad)
    u_next, F_next, grad_next, searching = u, F, grad, alive
    for _ in range(MAX_SHORTENINGS):
        trial = torch.where(per_sample(searching, u), u - per_sample(s, u) * grad, u)
        F_trial, grad_trial = energy(trial)
        enough = F_trial <= F - SUFFICIENT_DECREASE * s * slope
        # where F is constant up to rounding, only the gradient shows progress (Hager & Zhang 2005)
        enough |= (F_trial <= F + slack) & (dot(grad_trial, grad_trial) < slope)
        new = enough & searching & finite(F_trial, grad_trial)
        keep = per_sample(new, u)
        u_next, grad_next = torch.where(keep, trial, u_next), torch.where(keep, grad_trial, grad_next)
        F_next, searching = torch.where(new, F_trial, F_next), searching & ~new
        if not searching.any():
            break
        s = torch.where(searching, s / 4, s)
    return u_next, F_next, grad_next, s, alive & ~searching


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, weights: torch.nn.Module) -> Tensor:
    """Gradient of the sum of ``function`` at x, with a graph if x or the weights ask for a gradient; x is not changed."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in weights.parameters()))
    with torch.enable_grad():
        leaf = x if recorded and x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf, create_graph=recorded)[0]


def prox(
    value_and_grad: Callable,
    grad: Callable[[Tensor], Tensor],
    x: Tensor,
    gamma: Tensor,
    stepsize_inter: float,
    max_iter_inter: int,
    tol_inter: float,
) -> Tensor:
    """The minimiser with these options; differentiable in x, gamma and the weights if gradients are enabled."""
    if not 0 < stepsize_inter < math.inf:
        raise ValueError(f"expected a finite stepsize_inter > 0; got {stepsize_inter}")
    if not 0 <= tol_inter < math.inf:
        raise ValueError(f"expected a finite tol_inter >= 0; got {tol_inter}")
    u = minimise(value_and_grad, x.detach(), gamma.detach(), stepsize_inter, max_iter_inter, tol_inter)
    return attach_implicit_gradient(u, x, gamma, grad) if torch.is_grad_enabled() else u


def attach_implicit_gradient(u: Tensor, x: Tensor, gamma: Tensor, grad: Callable[[Tensor], Tensor]) -> Tensor:
    r"""
    Give a minimiser u of F its derivatives in x, gamma and the weights, by the implicit function theorem.

    :math:`\nabla F(u) = u - x + \gamma \nabla g(u)`.

    :param torch.Tensor u: minimiser, without a graph.
    :param torch.Tensor x: images, possibly asking for a gradient.
    :param torch.Tensor gamma: as :func:`deepinv_flows.solvers.gamma_like` returns it, possibly asking for a gradient.
    :param Callable grad: gradient of g, differentiable in its argument and in the weights.
    :return: u with a graph.
    """
    fixed = gamma.detach()
    return differentiable(u, u - x + gamma * grad(u), lambda leaf: leaf + fixed * grad(leaf))
