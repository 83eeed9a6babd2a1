"""iPiano: proximal gradient descent with inertia, for a smooth term that need not be convex."""

from deepinv.optim import DataFidelity, Prior
from torch import Tensor

from ..solvers import dot, rounding
from .base import Problem
from .optimizer import Optim
from .search import SearchIteration, shorten
from .terms import coefficient, flat, square, unchanged

# the fraction taken of the longest admissible step, 2 (1 - inertia) / L
SAFETY = 0.99


class IPianoIteration(SearchIteration):
    """
    One iteration of :class:`deepinv_flows.IPiano`. ``est`` is (x, previous x), and a missing previous x is x.

    ``params_algo`` holds ``stepsize``, ``lambda``, ``inertia`` and ``backtracking``.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import IPianoIteration
    >>> params = {"stepsize": 0.5, "lambda": 0.1, "inertia": 0.5}
    >>> model = dinv.optim.optim_builder(IPianoIteration(), 5, params, dinv.optim.L2(), dinv.optim.TVPrior(n_it_max=5))
    >>> model(torch.rand(1, 1, 8, 8), dinv.physics.Denoising()).shape
    torch.Size([1, 1, 8, 8])
    """

    defaults = {**SearchIteration.defaults, "inertia": 0.5}

    def step(self, X: dict, problem: Problem) -> dict:
        x, before = X["est"][0], X["est"][-1]
        inertia, grad = problem.coefficient("inertia", x), problem.smooth.grad(x)
        smooth = problem.smooth.identity
        last = X.get("step") if unchanged(X.get("smooth", ()), smooth) else None
        step, config = self.first_step(problem, x, last)

        def trial(step):
            gamma = coefficient(step, x)
            return (problem.proximable.prox(x - gamma * grad + inertia * (x - before), gamma),)

        if config is None:
            return {"est": (*trial(step), x)}
        self.check_explicit(problem.smooth)
        f_x = problem.smooth.value(x)

        def majorised(step, x_new):
            # L = 2 SAFETY (1 - inertia) / step bounds the curvature along this move
            move = x_new - x
            model = f_x + dot(grad, move) + SAFETY * (1 - flat(inertia)) / step * square(move)
            return problem.smooth.value(x_new) <= model + rounding(f_x)

        (x_new,), step, _ = shorten(trial, majorised, step, config)
        return {"est": (x_new, x), "step": self.accept(step), "smooth": smooth}


class IPiano(Optim):
    r"""
    Proximal gradient descent with inertia, for a smooth term that need not be convex.

    .. math::

        \min_x \; f(x) + \lambda\, g(x), \qquad
        x_{k+1} = \operatorname{prox}_{\alpha \lambda g}\big(x_k - \alpha \nabla f(x_k) + \mu\, (x_k - x_{k-1})\big)

    with f = ``data_fidelity`` smooth and g = ``prior`` convex; ``g_first=True`` exchanges the two, so that a flow prior enters by
    its gradient.

    **Steps.** It converges to a critical point when :math:`0 \le \mu < 1` and :math:`\alpha < 2 (1 - \mu) / L` with the Lipschitz
    constant L of the smooth gradient. Backtracking is on by default, except in an unfolded model. It begins with ``stepsize`` and
    shortens the step of each sample on its own whenever
    :math:`f(x_{k+1}) > f(x_k) + \langle \nabla f(x_k), x_{k+1} - x_k \rangle + \frac{L_k}{2} \|x_{k+1} - x_k\|^2`
    with :math:`L_k = 1.98\, (1 - \mu) / \alpha`.

    In an unfolded model, ``stepsize``, ``lambda``, ``inertia`` and ``g_param`` are trainable, and the given steps are taken. DEQ
    differentiates at the fixed point with the shortest accepted step. Anderson acceleration treats the iteration as a map of x.

    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is 0.
    :param deepinv.optim.Prior prior: g; ``None`` is 0.
    :param float, torch.Tensor lambda_reg: :math:`\lambda`. Like every number here, it is one number, a tensor (B,) with one for
        each sample, or a list with one for each iteration.
    :param float, torch.Tensor stepsize: :math:`\alpha`; with backtracking, its first value. A list switches the search off.
    :param float, torch.Tensor inertia: :math:`\mu` in [0, 1). The name ``beta`` is avoided, as deepinv sets it to 1.
    :param bool, deepinv.optim.BacktrackingConfig backtracking: the line search. In each iteration a step is multiplied by its
        ``eta`` at most ``max_iter`` times; its ``gamma`` is not used.
    :param bool g_first: whether the prior is the smooth term and the data fidelity the proximable one.
    :param kwargs: ``g_param, sigma_denoiser, max_iter, crit_conv, thres_conv, early_stop, custom_metrics, custom_init, unfold,
        trainable_params, DEQ, anderson_acceleration, cost_fn, params_algo, get_output``, as in :class:`deepinv.optim.PGD`.
    :raises ValueError: for an inertia outside [0, 1), a step size that is not positive, and backtracking with a smooth term that
        does not have a value.

    Source: Ochs, Chen, Brox & Pock, "iPiano: inertial proximal algorithm for nonconvex optimization", SIAM J. Imaging Sci. 7
    (2014), arXiv 1404.4805.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import IPiano
    >>> y = torch.tensor([[[[2.0, -2.0, 0.5]]]])
    >>> model = IPiano(dinv.optim.L2(), dinv.optim.L1Prior(), inertia=0.3, max_iter=100)
    >>> model(y, dinv.physics.Denoising()).allclose(torch.tensor([1.0, -1.0, 0.0]), atol=1e-5)
    True
    """

    iteration = IPianoIteration

    def __init__(
        self,
        data_fidelity: DataFidelity | list[DataFidelity] | None = None,
        prior: Prior | list[Prior] | None = None,
        lambda_reg: float | Tensor | list = 1.0,
        stepsize: float | Tensor | list = 1.0,
        inertia: float | Tensor | list = 0.5,
        **kwargs,
    ):
        parameters = {"lambda": lambda_reg, "stepsize": stepsize, "inertia": inertia}
        super().__init__(parameters, data_fidelity=data_fidelity, prior=prior, **kwargs)
