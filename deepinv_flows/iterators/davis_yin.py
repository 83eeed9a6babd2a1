"""Davis-Yin: one smooth term and two proximable terms."""

from deepinv.optim import DataFidelity, Prior
from torch import Tensor

from .base import Iteration, Problem
from .optimizer import Optim


class DavisYinIteration(Iteration):
    """
    One iteration of :class:`deepinv_flows.DavisYin`. ``est`` is (x, z), and a missing z is x.

    ``params_algo`` holds ``stepsize``, ``lambda``, ``beta``, and optionally ``prior_2``, ``lambda_2``, ``g_param_2``.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import DavisYinIteration
    >>> params = {"stepsize": 1.0, "lambda": 0.1, "prior_2": dinv.optim.L1Prior()}
    >>> model = dinv.optim.optim_builder(DavisYinIteration(), 5, params, dinv.optim.L2(), dinv.optim.TVPrior(n_it_max=5))
    >>> model(torch.rand(1, 1, 8, 8), dinv.physics.Denoising()).shape
    torch.Size([1, 1, 8, 8])
    """

    defaults = {"beta": 1.0}
    refuses = {
        "anderson_acceleration": "its fixed point is that of z, and deepinv accelerates x alone",
        "backtracking": "its cost may rise from one iterate to the next",
    }

    def reasons(self, params: dict, unfolded: bool = False) -> dict[str, str]:
        if "prior_2" not in params:
            return self.refuses
        return {
            **self.refuses,
            "DEQ": "with prior_2 its fixed point is that of z, and deepinv differentiates with respect to x alone",
        }

    def step(self, X: dict, problem: Problem) -> dict:
        x, z = (X["est"][0], X["est"][-1])
        gamma = problem.coefficient("stepsize", x)
        v = problem.g_2.prox(z, gamma)
        x = problem.proximable.prox(2 * v - z - gamma * problem.smooth.grad(v), gamma)
        return {"est": (x, z + problem.coefficient("beta", x) * (x - v))}


class DavisYin(Optim):
    r"""
    Three-operator splitting.

    .. math::

        \min_x \; f(x) + \lambda\, g(x) + \lambda_2\, g_2(x)

    with f = ``data_fidelity`` smooth, g = ``prior`` and :math:`g_2` = ``prior_2`` proximable, by

    .. math::

        v_k &= \operatorname{prox}_{\gamma \lambda_2 g_2}(z_k) \\
        x_{k+1} &= \operatorname{prox}_{\gamma \lambda g}(2 v_k - z_k - \gamma \nabla f(v_k)) \\
        z_{k+1} &= z_k + \beta\, (x_{k+1} - v_k)

    With ``g_first=True`` data fidelity and prior change places: a flow prior enters by its gradient and f by its proximity
    operator, beside a constraint or a second prior. Without ``prior_2`` it is proximal gradient descent, and without the smooth
    term it is Douglas-Rachford splitting.

    **Steps.** For convex terms it converges when :math:`0 < \gamma < 2/L` with the Lipschitz constant L of the smooth gradient,
    and :math:`0 < \beta < 2 - \gamma L / 2`.

    In an unfolded model, all numbers are trainable. DEQ is possible without ``prior_2``, when the fixed point is that of x alone,
    and refused with it. Anderson acceleration and backtracking are refused.

    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is 0.
    :param deepinv.optim.Prior prior: g; ``None`` is 0.
    :param float, torch.Tensor lambda_reg: :math:`\lambda`. Like every number here, it is one number, a tensor (B,) with one for
        each sample, or a list with one for each iteration.
    :param float, torch.Tensor stepsize: :math:`\gamma`.
    :param float beta: relaxation :math:`\beta`.
    :param deepinv.optim.Prior prior_2: :math:`g_2`; ``None`` is 0.
    :param float, torch.Tensor lambda_reg_2: :math:`\lambda_2`.
    :param float g_param_2: the parameter of ``prior_2``.
    :param bool g_first: whether the prior is the smooth term and the data fidelity the proximable one.
    :param kwargs: ``g_param, sigma_denoiser, max_iter, crit_conv, thres_conv, early_stop, custom_metrics, custom_init, unfold,
        trainable_params, DEQ, cost_fn, params_algo, get_output``, as in :class:`deepinv.optim.DRS`.
    :raises ValueError: for a step size that is not positive, and an option that is refused.

    Source: Davis & Yin, "A three-operator splitting scheme and its optimization applications", Set-Valued Var. Anal. 25
    (2017), arXiv 1504.01032.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import DavisYin
    >>> class NonNegative(dinv.optim.Prior):
    ...     explicit_prior = True
    ...     fn = lambda self, x, *args, **kwargs: torch.where((x < 0).flatten(1).any(1), torch.inf, 0.0)
    ...     prox = lambda self, x, *args, **kwargs: x.clamp(min=0)
    >>> y = torch.tensor([[[[2.0, -2.0, 0.5]]]])
    >>> model = DavisYin(dinv.optim.L2(), NonNegative(), prior_2=dinv.optim.L1Prior())
    >>> model(y, dinv.physics.Denoising())
    tensor([[[[1., 0., 0.]]]])
    """

    iteration = DavisYinIteration

    def __init__(
        self,
        data_fidelity: DataFidelity | list[DataFidelity] | None = None,
        prior: Prior | list[Prior] | None = None,
        lambda_reg: float | Tensor | list = 1.0,
        stepsize: float | Tensor | list = 1.0,
        beta: float | Tensor | list = 1.0,
        *,
        prior_2: Prior | None = None,
        lambda_reg_2: float | Tensor | list = 1.0,
        g_param_2: float | Tensor | list | None = None,
        **kwargs,
    ):
        parameters: dict = {"lambda": lambda_reg, "stepsize": stepsize, "beta": beta}
        if prior_2 is not None:
            parameters |= {"prior_2": prior_2, "lambda_2": lambda_reg_2, "g_param_2": g_param_2}
        super().__init__(parameters, data_fidelity=data_fidelity, prior=prior, **kwargs)
