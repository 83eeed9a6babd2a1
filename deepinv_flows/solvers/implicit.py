"""Derivatives of a minimiser in whatever its objective depends on, by the implicit function theorem."""

from collections.abc import Callable

import torch
from deepinv.optim.linear import minres
from torch import Tensor

Hessian = Callable[[Tensor], Tensor]


def precise(hessian: Hessian, v: Tensor) -> Tensor:
    """Solve a linear system by MINRES, as the Hessian may be indefinite, to the last digits."""
    return minres(hessian, v, max_iter=200, tol=10 * torch.finfo(v.dtype).eps)


def differentiable(
    u: Tensor,
    slope: Tensor,
    grad: Callable[[Tensor], Tensor],
    solve: Callable[[Hessian, Tensor], Tensor] = precise,
) -> Tensor:
    r"""
    Give a minimiser u of an objective F its derivatives.

    From :math:`\nabla F(u) = 0` follows :math:`H\,du = -d_\theta \nabla F(u)` with the Hessian H of F at u. When a gradient
    arrives in the backward pass, a system with H is solved, and the gradient in :math:`\theta` is that of
    :math:`-\langle v, \nabla F(u) \rangle` for its solution v. What u lacks of a minimiser is not corrected.

    :param torch.Tensor u: minimiser (B, ...), without a graph.
    :param torch.Tensor slope: the gradient of F at u, with a graph in all that u shall have derivatives in.
    :param Callable grad: the gradient of F, differentiable in its argument.
    :param Callable solve: maps H, as a function of tensors like u, and a right-hand side to v.
    :return: u with a graph.

    >>> import torch
    >>> from deepinv_flows.solvers import differentiable
    >>> t = torch.tensor(3.0, requires_grad=True)
    >>> u = torch.full((1, 2), 1.5)  # the minimiser of |u|^2 - t sum(u)
    >>> differentiable(u, 2 * u - t, lambda u: 2 * u).sum().backward()
    >>> round(float(t.grad), 4)
    1.0
    """
    if not slope.requires_grad:
        return u
    with torch.enable_grad():
        out = u - (slope - slope.detach())

    def solved(v: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            at_leaf = grad(leaf)

        def hessian(w: Tensor) -> Tensor:
            return torch.autograd.grad(at_leaf, leaf, w, retain_graph=True)[0]

        with torch.no_grad():
            return solve(hessian, v.detach())

    out.register_hook(solved)
    return out.view_as(out)  # the hook must not act on gradients with respect to the result itself
