"""Condat-Vu: a smooth term, a proximable term, and a proximable term composed with a linear operator."""

from collections.abc import Callable

import torch
from deepinv.optim import DataFidelity, Prior
from torch import Tensor

from .base import Iteration, Problem
from .optimizer import Optim


def _operators(problem: Problem) -> tuple[Callable, Callable]:
    K, K_adjoint = problem["K"], problem["K_adjoint"]
    if (K is None) != (K_adjoint is None):
        raise ValueError(f"expected K and K_adjoint together, or neither; got K={K!r}, K_adjoint={K_adjoint!r}")
    return (K, K_adjoint) if K is not None else (lambda x: x, lambda u: u)


class CondatVuIteration(Iteration):
    """
    One iteration of :class:`deepinv_flows.CondatVu`. ``est`` is (x, z, u); a missing z is x, and a missing u is 0.

    ``params_algo`` holds ``stepsize``, ``stepsize_dual``, ``lambda``, ``beta``, and optionally ``K`` with ``K_adjoint``,
    ``prior_2``, ``lambda_2``, ``g_param_2``.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import CondatVuIteration
    >>> params = {"stepsize": 0.5, "stepsize_dual": 0.5, "lambda": 0.1}
    >>> model = dinv.optim.optim_builder(CondatVuIteration(), 5, params, dinv.optim.L2(), dinv.optim.TVPrior(n_it_max=5))
    >>> model(torch.rand(1, 1, 8, 8), dinv.physics.Denoising()).shape
    torch.Size([1, 1, 8, 8])
    """

    defaults = {"K": None, "K_adjoint": None, "stepsize_dual": 1.0, "beta": 1.0}
    refuses = {
        "DEQ": "its fixed point is that of (x, u), and deepinv differentiates with respect to x alone",
        "anderson_acceleration": "its fixed point is that of (x, u), and deepinv accelerates x alone",
        "backtracking": "its cost may rise from one iterate to the next",
    }

    def objective(self, est: tuple[Tensor, ...], problem: Problem) -> Tensor:
        x, (K, _) = est[0], _operators(problem)
        value = problem.f.value(x)
        if problem.g.explicit:
            value = value + problem.g.value(K(x))
        if problem.g_2.explicit:
            value = value + problem.g_2.value(x)
        return value

    def step(self, X: dict, problem: Problem) -> dict:
        K, K_adjoint = _operators(problem)
        x, z, u = (*X["est"], *[None] * 2)[:3]
        Kz = K(x if z is None else z)
        u = torch.zeros_like(Kz) if u is None else u
        tau, sigma = problem.coefficient("stepsize", x), problem.coefficient("stepsize_dual", Kz)
        u = problem.g.prox_conjugate(u + sigma * Kz, sigma)
        x_new = problem.g_2.prox(x - tau * (problem.f.grad(x) + K_adjoint(u)), tau)
        return {"est": (x_new, x_new + problem.coefficient("beta", x) * (x_new - x), u)}


class CondatVu(Optim):
    r"""
    Primal-dual splitting of three terms, one of them composed with a linear operator K.

    .. math::

        \min_x \; f(x) + \lambda_2\, g(x) + \lambda\, h(Kx)

    with f = ``data_fidelity`` smooth, h = ``prior`` and g = ``prior_2`` proximable, by

    .. math::

        u_{k+1} &= \operatorname{prox}_{\sigma (\lambda h)^*}(u_k + \sigma K z_k) \\
        x_{k+1} &= \operatorname{prox}_{\tau \lambda_2 g}(x_k - \tau \nabla f(x_k) - \tau K^\top u_{k+1}) \\
        z_{k+1} &= x_{k+1} + \beta\, (x_{k+1} - x_k)

    **Steps.** For convex terms and :math:`\beta = 1` it converges when
    :math:`\frac1\tau - \sigma \|K\|^2 \ge \frac{L}{2}` with the Lipschitz constant L of :math:`\nabla f`. With f = 0 it is
    Chambolle and Pock's algorithm.

    In an unfolded model, all numbers are trainable. DEQ and Anderson acceleration are refused, since the fixed point is that of
    (x, u) and deepinv follows x alone. Backtracking is refused, since the cost may rise from one iterate to the next.

    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is 0.
    :param deepinv.optim.Prior prior: h; ``None`` is 0.
    :param float, torch.Tensor lambda_reg: :math:`\lambda`. Like every number here, it is one number, a tensor (B,) with one for
        each sample, or a list with one for each iteration.
    :param float, torch.Tensor stepsize: :math:`\tau`.
    :param float, torch.Tensor stepsize_dual: :math:`\sigma`.
    :param float beta: :math:`\beta`.
    :param Callable K: linear operator, which maps images (B, ...) to (B, ...); ``None`` is the identity.
    :param Callable K_adjoint: adjoint of K.
    :param deepinv.optim.Prior prior_2: g, such as the indicator of a constraint; ``None`` is 0.
    :param float, torch.Tensor lambda_reg_2: :math:`\lambda_2`.
    :param float g_param_2: the parameter of ``prior_2``.
    :param kwargs: ``g_param, sigma_denoiser, max_iter, crit_conv, thres_conv, early_stop, custom_metrics, custom_init, unfold,
        trainable_params, cost_fn, params_algo, get_output``, as in :class:`deepinv.optim.PDCP`.
    :raises ValueError: for step sizes that are not positive, K without K_adjoint, and an option that is refused.

    Sources: Condat, "A primal-dual splitting method for convex optimization involving Lipschitzian, proximable and linear
    composite terms", J. Optim. Theory Appl. 158 (2013); Vu, "A splitting algorithm for dual monotone inclusions involving
    cocoercive operators", Adv. Comput. Math. 38 (2013), arXiv 1110.1697.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import CondatVu
    >>> y = torch.tensor([[[[2.0, -2.0, 0.5]]]])
    >>> model = CondatVu(dinv.optim.L2(), dinv.optim.L1Prior(), stepsize=0.9, stepsize_dual=0.5, max_iter=100)
    >>> model(y, dinv.physics.Denoising()).allclose(torch.tensor([1.0, -1.0, 0.0]), atol=1e-5)
    True
    """

    iteration = CondatVuIteration

    def __init__(
        self,
        data_fidelity: DataFidelity | list[DataFidelity] | None = None,
        prior: Prior | list[Prior] | None = None,
        lambda_reg: float | Tensor | list = 1.0,
        stepsize: float | Tensor | list = 1.0,
        stepsize_dual: float | Tensor | list = 1.0,
        beta: float | Tensor | list = 1.0,
        *,
        K: Callable[[Tensor], Tensor] | None = None,
        K_adjoint: Callable[[Tensor], Tensor] | None = None,
        prior_2: Prior | None = None,
        lambda_reg_2: float | Tensor | list = 1.0,
        g_param_2: float | Tensor | list | None = None,
        **kwargs,
    ):
        if (K is None) != (K_adjoint is None):
            raise ValueError(f"expected K and K_adjoint together, or neither; got K={K!r}, K_adjoint={K_adjoint!r}")
        parameters: dict = {"lambda": lambda_reg, "stepsize": stepsize, "stepsize_dual": stepsize_dual, "beta": beta}
        if K is not None:
            parameters |= {"K": K, "K_adjoint": K_adjoint}
        if prior_2 is not None:
            parameters |= {"prior_2": prior_2, "lambda_2": lambda_reg_2, "g_param_2": g_param_2}
        super().__init__(parameters, data_fidelity=data_fidelity, prior=prior, **kwargs)
