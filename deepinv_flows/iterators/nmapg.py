"""Non-monotone accelerated proximal gradient descent, as an optimizer and as a function of any energy."""

import functools
from collections.abc import Callable

import torch
from deepinv.optim import BacktrackingConfig, DataFidelity, Prior
from torch import Tensor

from ..checks import at_iteration, check_finite
from .base import PriorTerm, Problem, check_not_nan, coefficient, per_sample, rounding, square
from .optimizer import Optim
from .search import DEFAULT, SearchIteration, as_config, as_steps, shorten


def _pick(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _barzilai_borwein(move: Tensor, change: Tensor, otherwise: Tensor) -> Tensor:
    """Each sample's squared move over its curvature, where that is positive."""
    curvature = (move * change).flatten(1).sum(1)
    step = square(move) / curvature
    return _pick((curvature > 0) & torch.isfinite(step) & (step > 0), step.view_as(otherwise), otherwise)


class _Advance:
    """One iteration on a smooth and a proximable term, steps searched where ``config`` is given."""

    def __init__(self, smooth, proximable, config: BacktrackingConfig | None, eta: float):
        self.smooth, self.proximable, self.config, self.eta = smooth, proximable, config, eta
        self.gamma = (DEFAULT if config is None else config).gamma
        self.monitored = smooth.explicit and proximable.explicit

    @torch.no_grad()
    def energy(self, u: Tensor) -> Tensor:
        return self.smooth.value(u) + self.proximable.value(u)

    def descend(self, u: Tensor, grad: Tensor, step, bound: Callable[[Tensor], Tensor]):
        """A proximal gradient step from u, its energy, the sufficient fall and the step size."""

        def trial(step):
            gamma = coefficient(step, u)
            u_new = self.proximable.prox(u - gamma * grad, gamma)
            if not self.monitored:
                return u_new, None, None
            flat = step.flatten() if torch.is_tensor(step) else step
            return u_new, self.energy(u_new), self.gamma / flat * square(u_new.detach() - u.detach())

        if self.config is None:
            return *trial(step), step
        (u_new, F_new, fall), step = shorten(trial, lambda s, v, F, fall: bound(F + fall), step, self.config)
        return u_new, F_new, fall, step

    def __call__(self, x: Tensor, z: Tensor, past: dict, step) -> tuple[Tensor, Tensor, dict]:
        t_before, t = past.get("t", (0.0, 1.0))
        y = x + t_before / t * (z - x) + (t_before - 1) / t * (x - past.get("x", x))
        grad_y = self.smooth.grad(y)
        if not (inside := torch.isfinite(grad_y).flatten(1).all(1)).all():  # extrapolated out of the domain
            y = _pick(inside, y, x)
            grad_y = self.smooth.grad(y)
            check_finite("the gradient", grad_y)
        history = self.config is not None and "y" in past
        if history:
            step = _barzilai_borwein(y - past["y"], grad_y - past["grad_y"], step)
        c = past["c"] if "c" in past else self.energy(x) if self.monitored else None
        F_y = functools.cache(lambda: self.energy(y))

        def below(F, bound=c):
            return bound + rounding(bound) >= F

        def below_either(F):
            ok = below(F)
            return ok if ok.all() else ok | below(F, F_y())

        z, F_z, fall, step_z = self.descend(y, grad_y, step, below_either)
        if history and self.monitored:  # the search from an extrapolation out of the domain says nothing of steps
            inside = torch.isfinite(F_z)
            step_z, z = _pick(inside, step_z, step), _pick(inside, z, x)
        step, x_new, F = step_z, z, F_z
        if self.monitored and not (good := below(F_z + fall)).all():
            grad_x = self.smooth.grad(x)
            step_x = _barzilai_borwein(x - past["y"], grad_x - past["grad_y"], step) if history else step
            v, F_v, _, _ = self.descend(x, grad_x, step_x, below)
            good = good | (F_z <= F_v)
            x_new, F = _pick(good, z, v), torch.where(good, F_z, F_v)
            check_not_nan("the energy", F)
            if self.config is not None:  # not even the shortest step falls
                x_new, F = _pick(below(F), x_new, x), torch.where(below(F), F, c)
        q = self.eta * past.get("q", 1.0) + 1
        past = {"x": x, "t": (t, ((4 * t**2 + 1) ** 0.5 + 1) / 2), "q": q, "y": y, "grad_y": grad_y, "step": step}
        if self.monitored:
            past |= {"c": c + (F - c) / q, "F": F}
        return x_new, z, past


class _Energy:
    """A function (B, ...) to (B,) as a smooth term; deepinv's default gradient would record a graph of the gradient."""

    explicit = True

    def __init__(self, value: Callable[[Tensor], Tensor]):
        self.function = value

    def value(self, u: Tensor) -> Tensor:
        return per_sample(self.function(u), u)

    def grad(self, u: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf).sum(), leaf)[0]


class NMAPGIteration(SearchIteration):
    """
    One iteration of :class:`NMAPG`; ``est`` is (x, z), and a missing z is x. The rest of its history is in ``"nmapg"``.

    ``params_algo`` holds ``stepsize``, ``lambda``, ``eta`` and ``backtracking``.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import NMAPGIteration
    >>> params = {"stepsize": 0.5, "lambda": 0.1}
    >>> model = dinv.optim.optim_builder(NMAPGIteration(), 5, params, dinv.optim.L2(), dinv.optim.TVPrior(n_it_max=5))
    >>> model(torch.rand(1, 1, 8, 8), dinv.physics.Denoising()).shape
    torch.Size([1, 1, 8, 8])
    """

    defaults = {**SearchIteration.defaults, "eta": 0.8}
    constants = ("eta",)
    refuses = {"anderson_acceleration": "it accelerates itself, and deepinv drops the history it needs"}

    def step(self, X: dict, problem: Problem) -> dict:
        x, z, past = X["est"][0], X["est"][-1], X.get("nmapg", {})
        step, config = self.first_step(problem, x, past.get("step"))
        if config is not None:
            self.check_explicit(problem.smooth, problem.proximable)
        advance = _Advance(problem.smooth, problem.proximable, config, problem["eta"])
        x, z, past = advance(x, z, past, step)
        if config is not None:
            self.accept(past["step"])
        X = {"est": (x, z), "nmapg": past}
        if self.user_cost is None and advance.monitored:
            X["cost"] = past["F"]
        return X


class NMAPG(Optim):
    r"""
    Non-monotone accelerated proximal gradient descent, for terms that need not be convex.

    .. math::

        \min_x \; F(x) = f(x) + \lambda\, g(x)

    with f = ``data_fidelity`` smooth and g = ``prior`` proximable; ``g_first=True`` exchanges the two, so that a flow prior
    enters by its gradient. From :math:`z_1 = x_1 = x_0`, :math:`t_0 = 0`, :math:`t_1 = 1`,

    .. math::

        y_k &= x_k + \tfrac{t_{k-1}}{t_k} (z_k - x_k) + \tfrac{t_{k-1} - 1}{t_k} (x_k - x_{k-1}), \qquad
        z_{k+1} = \operatorname{prox}_{\alpha \lambda g}(y_k - \alpha \nabla f(y_k)) \\
        x_{k+1} &= z_{k+1} \quad \text{if } F(z_{k+1}) \le c_k - \tfrac{\delta}{\alpha} \|z_{k+1} - y_k\|^2, \\
        x_{k+1} &\in \{z_{k+1},\ v_{k+1} = \operatorname{prox}_{\alpha \lambda g}(x_k - \alpha \nabla f(x_k))\}
        \quad \text{of least } F \text{ otherwise}

    with :math:`t_{k+1} = \frac12 (1 + \sqrt{4 t_k^2 + 1})` and :math:`c_k` a mean of the energies so far in which each older one
    weighs :math:`\eta` times the next: ``eta=0`` makes F monotone.

    **Steps.** Each begins with Barzilai and Borwein's :math:`\alpha = \|s\|^2 / \langle s, r \rangle` of the last move s and
    change of gradient r, the first with ``stepsize``, and is shortened until F falls enough, for each sample on its own: no
    Lipschitz constant is needed, and every limit point is critical. With ``backtracking=False``, and unfolded, all steps are
    ``stepsize``; then :math:`\alpha < 1 / L`.

    Unfolded, ``stepsize``, ``lambda`` and ``g_param`` are trainable; a prior without a value (a denoiser) is admitted there, and
    :math:`x_{k+1} = z_{k+1}`. DEQ differentiates at the fixed point with the shortest accepted step. Anderson acceleration is
    refused.

    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is 0.
    :param deepinv.optim.Prior prior: g; ``None`` is 0.
    :param float, torch.Tensor lambda_reg: :math:`\lambda`, one number or one for each sample.
    :param float, torch.Tensor stepsize: the first :math:`\alpha`.
    :param float eta: :math:`\eta` in [0, 1).
    :param bool, deepinv.optim.BacktrackingConfig backtracking: the line search: ``eta`` shortens a step, at most ``max_iter``
        times; ``gamma`` is :math:`\delta`.
    :param bool g_first: whether the prior is the smooth term and the data fidelity the proximable one.
    :param kwargs: ``g_param, sigma_denoiser, max_iter, crit_conv, thres_conv, early_stop, custom_metrics, custom_init, unfold,
        trainable_params, DEQ, cost_fn, params_algo, get_output``, as in :class:`deepinv.optim.FISTA`.
    :raises ValueError: for an eta outside [0, 1), a step that is not positive, or a line search on a term without value.

    Source: Li & Lin, "Accelerated proximal gradient methods for nonconvex programming", NeurIPS 2015, supplement,
    algorithm 4; the fall is measured by :math:`\delta / \alpha` instead of :math:`\delta`, so that scaling F changes nothing.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import NMAPG
    >>> y = torch.tensor([[[[2.0, -2.0, 0.5]]]])
    >>> model = NMAPG(dinv.optim.L2(), dinv.optim.L1Prior(), max_iter=20)
    >>> model(y, dinv.physics.Denoising()).allclose(torch.tensor([1.0, -1.0, 0.0]), atol=1e-5)
    True
    """

    iteration = NMAPGIteration

    def __init__(
        self,
        data_fidelity: DataFidelity | list[DataFidelity] | None = None,
        prior: Prior | list[Prior] | None = None,
        lambda_reg: float | Tensor = 1.0,
        stepsize: float | Tensor = 1.0,
        eta: float = 0.8,
        **kwargs,
    ):
        parameters = {"lambda": lambda_reg, "stepsize": stepsize, "eta": eta}
        super().__init__(parameters, data_fidelity=data_fidelity, prior=prior, **kwargs)


@torch.no_grad()
def nmapg(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    prior: Prior | None = None,
    *,
    stepsize: float = 1.0,
    eta: float = 0.8,
    max_iter: int = 100,
    tol: float = 1e-5,
    backtracking: BacktrackingConfig | bool = True,
    callback: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    r"""
    A critical point of :math:`f(x) + g(x)` by :class:`NMAPG`, without physics or measurements.

    :param Callable energy: f, tensors (B, ...) to (B,), differentiable by autograd.
    :param torch.Tensor x: where to start, (B, ...).
    :param deepinv.optim.Prior prior: g, proximable and with a value; ``None`` is 0.
    :param float stepsize: the first step.
    :param float eta: 0 makes the energy fall at every iteration.
    :param int max_iter: number of iterations at most.
    :param float tol: stop when no sample moves by more than this times its norm.
    :param bool, deepinv.optim.BacktrackingConfig backtracking: the line search, as in :class:`NMAPG`.
    :param Callable callback: called after each iteration with x and its energies (B,).
    :return: tensor like x, without a graph.
    :raises ValueError: naming the iteration, when the gradient is not finite or the energy is NaN.

    Source: as :class:`NMAPG`.

    >>> import torch
    >>> from deepinv_flows import nmapg
    >>> nmapg(lambda x: ((x**2 - 1) ** 2).sum(1), torch.tensor([[0.3], [-0.5]])).round(decimals=3)
    tensor([[ 1.],
            [-1.]])
    """
    advance = _Advance(_Energy(energy), PriorTerm(prior), as_config(backtracking), eta)
    z, past = x, {}
    for it in range(max_iter):
        before = x
        with at_iteration(it):
            x, z, past = advance(x, z, past, past.get("step", as_steps(stepsize, x)))
        if callback is not None:
            callback(x, past["F"])
        if (square(x - before) <= tol**2 * square(x)).all():
            break
    return x
