"""Non-monotone accelerated proximal gradient descent, as an optimizer and as a function that minimises any energy."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from deepinv.optim import BacktrackingConfig, BaseOptim, DataFidelity, Prior
from torch import Tensor

from ..checks import at_iteration, check_autograd, positive_int
from ..console import Console
from .accelerated import Advance, History
from .base import Problem
from .converged import Criterion, Part, cut
from .optimizer import Optim
from .parameters import check_ranges
from .search import SearchIteration, as_config, as_steps, check_explicit
from .terms import EnergyTerm, PriorTerm, pick, unchanged

# of the starts of `nmapg`: in half precision its tolerances are below rounding
PRECISIONS = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class NMAPGIteration(SearchIteration):
    """
    One iteration of :class:`deepinv_flows.NMAPG`. ``est`` is (x, z), and a missing z is x; ``"nmapg"`` holds the rest of the
    history.

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
    refuses = {"anderson_acceleration": "it has an acceleration of its own, and deepinv drops the history it needs"}

    #: when a sample has converged; ``None`` without ``early_stop``
    criterion: Criterion | None = None

    def adopted(self, optimizer: BaseOptim, params: dict, options: dict) -> None:
        super().adopted(optimizer, params, options)
        if options.get("early_stop"):
            self.criterion = Criterion(options["crit_conv"], options["thres_conv"])

    def step(self, X: dict, problem: Problem) -> dict:
        x, z = X["est"][0], X["est"][-1]
        smooth, proximable = problem.smooth, problem.proximable
        past, terms = X.get("nmapg"), [smooth.identity, proximable.identity]
        kept = [unchanged(*pair) for pair in zip(X.get("terms", terms), terms)]
        # another smooth term may allow longer steps
        last = None if past is None else past.step if kept[0] else 2 * past.step
        step, config = self.first_step(problem, x, last)
        if config is not None:
            self.check_explicit(smooth, proximable)
        advance = Advance(smooth, proximable, config, problem["eta"])
        if past is None:
            past = History.starting(x, advance.energy(x), as_steps(step, x))
        elif not all(kept):
            past, z = self.changed(past, x, z, advance.energy(x), same_smooth=kept[0])
        past = dataclasses.replace(past, step=as_steps(step, x))
        of_samples = {name: X[name] for name in ("settled", "part") if name in X} if all(kept) else {}
        if self.criterion is None or config is None or not advance.monitored:
            x, z, past = advance(x, z, past)
        else:
            x, z, past, of_samples = self._without_settled(self.criterion, advance, (x, z, past), problem, **of_samples)
        if config is not None:
            self.accept(past.step)
        X = {"est": (x, z), "nmapg": past, "terms": terms, **of_samples}
        if self.user_cost is None and advance.monitored:
            X["cost"] = past.F
        return X

    def _without_settled(
        self,
        criterion: Criterion,
        advance: Advance,
        iterate: tuple[Tensor, Tensor, History],
        problem: Problem,
        settled: Tensor | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, Tensor, History, dict]:
        """
        The next x, z and history, where samples that have converged keep theirs, and are not evaluated if the problem can be cut.

        :param torch.Tensor settled: the samples that have converged, (B,).
        :param Part part: the terms of the other samples, as they were last cut.
        :return: x, z and the history, and a dict of the new ``settled`` and ``part``.
        """
        x, z, past = iterate
        settled = torch.zeros(len(x), dtype=torch.bool, device=x.device) if settled is None else settled
        rows = (~settled).nonzero().flatten()
        if settled.any() and len(rows) and (part is None or len(part.rows) != len(rows)):
            part = Part.of(problem, x, rows)
        if not len(rows):
            new = x, z, past
        elif part is not None and part.smooth is not None and part.proximable is not None:
            alone = Advance(part.smooth, part.proximable, advance.config, cut(advance.eta, rows, len(x)))
            x_rows, z_rows, past_rows = alone(x[rows], z[rows], past.rows(rows))
            new = x.index_put((rows,), x_rows), z.index_put((rows,), z_rows), past.with_rows(rows, past_rows)
        else:
            x_all, z_all, past_all = advance(x, z, past)
            new = pick(settled, x, x_all), pick(settled, z, z_all), past.with_rows(rows, past_all.rows(rows))
        small = criterion(x, new[0], past.F, new[2].F)
        return *new, {"settled": settled | (new[2].accepted & small), "part": part}

    def changed(self, past: History, x: Tensor, z: Tensor, F: Tensor, same_smooth: bool) -> tuple[History, Tensor]:
        """
        The history and z under another objective: the step is kept, and the curvature if the smooth term is the same. An
        unfolded model keeps its acceleration too, since its iterations are one network.
        """
        new = History.starting(x, F, past.step)
        if self.unfolded:
            return dataclasses.replace(past, F=F, c=F, q=new.q), z
        return dataclasses.replace(new, y=past.y, grad_y=past.grad_y) if same_smooth else new, x


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

    with :math:`t_{k+1} = \frac12 (1 + \sqrt{4 t_k^2 + 1})`. The ceiling :math:`c_k` is a weighted mean of the energies so far, in
    which each energy weighs :math:`\eta (1 - 1/t_k)^8` times as much as the one after it. F can therefore hardly rise at first,
    when a rise from a poor start would be large; with ``eta=0`` it never rises. When the objective differs from that of the
    iteration before (by a list of parameters, priors or data fidelities), the mean and the acceleration start anew.

    **Steps.** The first search begins with ``stepsize``. Each later one begins with the step of Barzilai and Borwein,
    :math:`\alpha = \|s\|^2 / \langle s, r \rangle` for the last move s and the change r of the gradient along it. The step is
    shortened until F decreases enough, for each sample on its own. No Lipschitz constant is needed, and every limit point is
    critical. With ``backtracking=False``, and in an unfolded model, all steps are ``stepsize``, which then has to be less than
    1 / L for the Lipschitz constant L of the smooth gradient.

    In an unfolded model, ``stepsize``, ``lambda`` and ``g_param`` are trainable, and a prior without a value (a denoiser) is
    allowed; then :math:`x_{k+1} = z_{k+1}`. DEQ differentiates at the fixed point with the shortest accepted step. Anderson
    acceleration is refused.

    **Batches.** With ``early_stop=True`` each sample stops on its own, after an accepted step that changes it, or its cost, by at
    most ``thres_conv`` times its size. A sample that has converged is not evaluated again, if the problem can be cut: the
    measurements, the physics, the data fidelity and the parameters are reduced to the other samples, and compared with the whole
    each time that a sample converges. Where they differ (in a prior that holds an entry for each sample, say), the whole batch is
    evaluated. A model of ``deepinv.optim.optim_builder`` does the same, but ends by deepinv's rule, the mean over the batch.

    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is 0.
    :param deepinv.optim.Prior prior: g; ``None`` is 0.
    :param float, torch.Tensor lambda_reg: :math:`\lambda`. Like every number here, it is one number, a tensor (B,) with one for
        each sample, or a list with one for each iteration.
    :param float, torch.Tensor stepsize: the first :math:`\alpha`. A list switches the search off.
    :param float eta: :math:`\eta` in [0, 1).
    :param bool, deepinv.optim.BacktrackingConfig backtracking: the line search. A step is multiplied by its ``eta`` at most
        ``max_iter`` times; its ``gamma`` is :math:`\delta`.
    :param bool g_first: whether the prior is the smooth term and the data fidelity the proximable one.
    :param kwargs: ``g_param, sigma_denoiser, max_iter, crit_conv, thres_conv, early_stop, custom_metrics, custom_init, unfold,
        trainable_params, DEQ, cost_fn, params_algo, get_output``, as in :class:`deepinv.optim.FISTA`.
    :raises ValueError: for an eta outside [0, 1), a step size that is not positive, and a line search with a term that does not
        have a value.

    Source: Li & Lin, "Accelerated proximal gradient methods for nonconvex programming", NeurIPS 2015, supplement,
    algorithm 4. This differs from it: 1. the decrease is measured with :math:`\delta / \alpha` instead of :math:`\delta`, so that
    scaling F changes nothing; 2. the weights of the mean vary with k, where theirs are constant; 3. while :math:`c_k` is infinite
    (after a start that violates a constraint), a step is accepted if the smooth term is below its quadratic model at the point
    where the step starts; 4. the acceleration starts anew after a search that accepted no step.

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
        lambda_reg: float | Tensor | list = 1.0,
        stepsize: float | Tensor | list = 1.0,
        eta: float = 0.8,
        **kwargs,
    ):
        parameters = {"lambda": lambda_reg, "stepsize": stepsize, "eta": eta}
        super().__init__(parameters, data_fidelity=data_fidelity, prior=prior, **kwargs)


@torch.no_grad()
def nmapg(
    energy: Callable[..., Tensor],
    x: Tensor,
    prior: Prior | None = None,
    *,
    data: Sequence[Tensor] | None = None,
    stepsize: float | Tensor = 1.0,
    eta: float = 0.8,
    max_iter: int = 100,
    tol: float = 1e-5,
    backtracking: BacktrackingConfig | bool = True,
    callback: Callable[[Tensor, Tensor], None] | None = None,
    verbose: bool = True,
) -> Tensor:
    r"""
    A critical point of :math:`f(x) + g(x)`, by the algorithm of :class:`deepinv_flows.NMAPG`, without physics or measurements.

    Each sample stops on its own. With ``data``, the functions ``energy(x, *data)`` and ``prior`` are evaluated only on samples
    that have not converged, with the data of these samples. Without ``data``, ``energy(x)`` always gets the whole batch.

    :param Callable energy: f, a function that maps tensors (B, ...) to (B,) and that autograd can differentiate.
    :param torch.Tensor x: where to start, (B, ...), real or complex.
    :param deepinv.optim.Prior prior: g, proximable and with a value; ``None`` is 0.
    :param list[torch.Tensor] data: tensors (B, ...) that ``energy`` takes after x, each with an entry for each sample; the list
        may be empty.
    :param float, torch.Tensor stepsize: the first step size, one number or one for each sample, (B,).
    :param float eta: :math:`\eta` in [0, 1); with 0 the energy never rises.
    :param int max_iter: largest number of iterations.
    :param float tol: a sample has converged when an accepted step moves it by at most ``tol`` times its norm.
    :param bool, deepinv.optim.BacktrackingConfig backtracking: the line search, as in :class:`deepinv_flows.NMAPG`.
    :param Callable callback: called after each iteration as ``callback(x, F)`` with the energies F (B,) of x.
    :param bool verbose: show a progress bar in a terminal, and print one line at the end, if it takes more than two seconds.
    :return: tensor like x, without a graph.
    :raises ValueError: for an option out of its range and for data of another number of samples; and, naming the iteration, when
        the gradient is not finite or the energy is NaN.
    :raises TypeError: when x is not a tensor of single or double precision, or ``data`` is not a list of tensors.
    :raises RuntimeError: under :func:`torch.inference_mode`.

    Source: that of :class:`deepinv_flows.NMAPG`.

    >>> import torch
    >>> from deepinv_flows import nmapg
    >>> nmapg(lambda x: ((x**2 - 1) ** 2).sum(1), torch.tensor([[0.3], [-0.5]])).round(decimals=3)
    tensor([[ 1.],
            [-1.]])
    """
    _check_problem(x, data)
    check_ranges({"stepsize": [stepsize], "eta": [eta], "tol": [tol]})
    positive_int(max_iter=max_iter)
    config, g = as_config(backtracking), PriorTerm(prior)
    if config is not None:
        check_explicit("nmapg", g)
    start = Advance(EnergyTerm(energy, tuple(data or ())), g, config, eta).energy(x)
    z, past = x, History.starting(x, start, as_steps(stepsize, x))
    alive, converged = torch.ones(x.shape[0], dtype=torch.bool, device=x.device), Criterion("residual", tol)
    with Console("nmapg", max_iter, verbose) as console:
        for it in range(max_iter):
            rows = (alive if data is not None else torch.ones_like(alive)).nonzero().flatten()
            advance = Advance(EnergyTerm(energy, tuple(d[rows] for d in data or ())), g, config, eta)
            with at_iteration(it):
                x_new, z_new, new = advance(x[rows], z[rows], past.rows(rows))
            small, live = converged(x[rows], x_new, past.F[rows], new.F), alive[rows]
            going = rows[live]
            x, z = x.index_put((going,), x_new[live]), z.index_put((going,), z_new[live])
            past = past.with_rows(going, new.rows(live))
            alive = alive.index_put((going,), ~(new.accepted & small)[live])
            console.update(energy=past.F)
            if callback is not None:
                callback(x, past.F)
            if not alive.any():
                break
    return x


def _check_problem(x: Tensor, data: Sequence[Tensor] | None) -> None:
    check_autograd("nmapg")
    if not torch.is_tensor(x) or x.dtype not in PRECISIONS:
        raise TypeError(f"expected x to be a real or complex tensor of single or double precision; got {_kind(x)}")
    if x.ndim < 2:
        raise ValueError(f"expected a batch (B, ...); got shape {tuple(x.shape)}: pass numbers as x[:, None]")
    if torch.is_tensor(data) or not all(torch.is_tensor(d) for d in data or ()):
        raise TypeError(f"expected data to be a list of tensors; got {_kind(data)}")
    for d in data or ():
        if len(d) != len(x):
            raise ValueError(f"expected data with an entry for each of {len(x)} samples; got shape {tuple(d.shape)}")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if torch.is_tensor(value) else repr(value)
