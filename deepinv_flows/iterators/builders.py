"""deepinv's ``unfolded_builder`` and ``DEQ_builder`` with correct costs and gradients, for deepinv's algorithms and ours."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from deepinv.optim import L2, Bregman, DataFidelity, DEQConfig, OptimIterator, Prior, optim_iterators
from deepinv.optim.optim_iterators import gStep
from torch import Tensor

from .base import Iteration
from .condat_vu import CondatVuIteration
from .davis_yin import DavisYinIteration
from .ipiano import IPianoIteration
from .latent_gd import LatentGDIteration
from .learned_primal_dual import LearnedPrimalDualIteration
from .nmapg import NMAPGIteration
from .optimizer import Optim
from .parameters import ALIASES, arguments, check_keywords
from .terms import DataTerm, PriorTerm, coefficient

OURS = (
    CondatVuIteration,
    DavisYinIteration,
    IPianoIteration,
    LatentGDIteration,
    LearnedPrimalDualIteration,
    NMAPGIteration,
)
# names in deepinv's documentation, and in its code
SYNONYMS = {"PDCP": "CP"}
# parameters that deepinv's classes set and its builders do not
FORGOTTEN: dict[str, dict] = {"FISTA": {"a": 3}, "CP": {"stepsize_dual": 1.0}}
# arguments that deepinv's builders know by another name, or that Optim adds to those of BaseOptim
FURTHER = ("F_fn", "g_param", "sigma_denoiser")
# the algorithms of deepinv whose next estimate depends on the estimate alone
FIXED_POINT_IN_X = ("GD", "PGD", "HQS", "MD", "PMD")


def _objective(x, data_fidelity, prior, cur_params, y, physics, at=lambda x, cur_params: (x, x)) -> Tensor:
    """f(x) + lambda g(x) for each sample; ``at`` may give other points at which f and g are evaluated."""
    at_f, at_g = at(x, cur_params)
    value = DataTerm(data_fidelity, y, physics).value(at_f)
    term = PriorTerm(prior, cur_params["lambda"], cur_params["g_param"])
    return value + term.value(at_g) if term.explicit else value


def _behind_K(x: Tensor, cur_params: dict, g_first: bool) -> tuple[Tensor, Tensor]:
    Kx = cur_params["K"](x) if "K" in cur_params else x
    return (x, Kx) if g_first else (Kx, x)


class _DualStep(gStep):
    """The dual step of Chambolle and Pock on the prior; in deepinv's, lambda sigma takes the place of the step sigma."""

    def forward(self, x: Tensor, w: Tensor, cur_prior: Prior, cur_params: dict) -> Tensor:
        sigma = coefficient(cur_params["stepsize_dual"], x)
        return PriorTerm(cur_prior, cur_params["lambda"], cur_params["g_param"]).prox_conjugate(x + sigma * w, sigma)


def _primal_dual_start(y, physics, K: Callable | None = None) -> dict:
    x = physics.A_adjoint(y)
    return {"est": (x, x, torch.zeros_like(x if K is None else K(x)))}


def _named(name: str, cost_fn: Callable | None, g_first: bool, bregman_potential: Bregman | None) -> OptimIterator:
    ours = {iteration.__name__: iteration for iteration in OURS}
    iteration = ours.get(f"{name}Iteration") or getattr(optim_iterators, f"{name}Iteration", None)
    if iteration is None:
        known = sorted(n.removesuffix("Iteration") for n in {*vars(optim_iterators), *ours} if n.endswith("Iteration"))
        raise ValueError(f"expected one of {', '.join(known)}; got {name!r}")
    if iteration in ours.values():
        return iteration(g_first=g_first, cost_fn=cost_fn)
    if cost_fn is None:
        at = {"at": functools.partial(_behind_K, g_first=g_first)} if name == "CP" else {}
        cost_fn = functools.partial(_objective, **at)
    found = iteration(g_first=g_first, cost_fn=cost_fn, bregman_potential=bregman_potential)
    if name == "CP" and g_first:
        found.g_step = _DualStep(g_first=True)
    return found


def _build(iteration, params_algo, trainable_params, device, cost_fn, g_first, bregman_potential, **kwargs) -> Optim:
    cost_fn = kwargs.pop("F_fn", cost_fn)
    params = {ALIASES.get(name, name): value for name, value in params_algo.items()}
    if isinstance(iteration, str):
        name = SYNONYMS.get(iteration, iteration)
        iteration = _named(name, cost_fn, g_first, bregman_potential)
        params = {**FORGOTTEN.get(name, {}), **params}
        if name == "CP":
            K = params.get("K")
            start = functools.partial(_primal_dual_start, K=K[0] if isinstance(K, Sequence) else K)
            kwargs["custom_init"] = kwargs.get("custom_init") or start
        kwargs["cost_fn"] = cost_fn
        if kwargs.get("DEQ") and not isinstance(iteration, Iteration) and name not in FIXED_POINT_IN_X:
            raise ValueError(
                f"{name} has no DEQ, since its next estimate does not depend on the estimate alone; "
                f"got DEQ_builder({name!r}), expected one of {', '.join(FIXED_POINT_IN_X)}, NMAPG, IPiano, DavisYin"
            )
    else:
        _check_made(iteration, cost_fn, g_first, bregman_potential)
    params.setdefault("lambda", 1.0)
    names = [ALIASES.get(name, name) for name in trainable_params]
    names = [
        name for name in names if name in params or name != "stepsize"
    ]  # deepinv's default names it for every algorithm
    return Optim(params, iterator=iteration, trainable_params=names, **kwargs).to(device)


def _check_made(
    iteration: OptimIterator, cost_fn: Callable | None, g_first: bool, bregman_potential: Bregman | None
) -> None:
    """Refuse options of an iteration beside an iteration that was made without them; deepinv ignores them."""
    name = type(iteration).__name__
    if g_first and not getattr(iteration, "g_first", False):
        raise ValueError(f"expected {name}(g_first=True) beside g_first=True; got one with g_first=False")
    if cost_fn is not None and cost_fn not in (getattr(iteration, "user_cost", None), iteration.cost_fn):
        raise ValueError(f"expected {name}(cost_fn=...) with the cost_fn of the builder; got another one")
    if bregman_potential is not None and bregman_potential is not getattr(iteration, "bregman_potential", None):
        raise ValueError(f"expected {name}(bregman_potential=...) with that of the builder; got another one")


def unfolded_builder(
    iteration: str | OptimIterator,
    params_algo: Mapping | None = None,
    data_fidelity: DataFidelity | list[DataFidelity] | None = None,
    prior: Prior | list[Prior] | None = None,
    max_iter: int = 5,
    trainable_params: Sequence[str] = ("lambda", "stepsize"),
    device: torch.device | str = "cpu",
    cost_fn: Callable | None = None,
    g_first: bool = False,
    bregman_potential: Bregman | None = None,
    **kwargs,
) -> Optim:
    r"""
    Unfold an algorithm: deepinv's ``unfolded_builder`` with the same signature, which knows our algorithms too.

    The cost is :math:`f(x) + \lambda g(x)` for each sample; that of deepinv sums g over the batch and fails for a
    :math:`\lambda` that is an integer or trainable. The result is a :class:`deepinv.optim.BaseOptim` with ``unfold=True``, whose
    state dicts have the form of those of deepinv's ``BaseUnfold``.

    :param str, deepinv.optim.OptimIterator iteration: name of an algorithm (``"PGD"``, ``"NMAPG"``, ...), or an iteration.
    :param dict params_algo: parameters and operands. A parameter is a number, a tensor with a number for each sample, (B,) or
        (B, 1, 1, 1), or a list of ``max_iter`` of these, one for each iteration. An operand is a module, or a list of modules,
        one for each iteration.
    :param deepinv.optim.DataFidelity data_fidelity: f, or a list of ``max_iter``.
    :param deepinv.optim.Prior prior: g, or a list of ``max_iter``.
    :param int max_iter: number of iterations.
    :param list[str] trainable_params: names of the parameters to train, beside the weights of priors and other modules.
    :param torch.device device: device of the model.
    :param Callable cost_fn: a cost of the user's own, ``cost_fn(x, data_fidelity, prior, cur_params, y, physics)``, with one
        number for each sample.
    :param bool g_first: exchanges the roles of f and g.
    :param deepinv.optim.Bregman bregman_potential: for ``"MD"`` and ``"PMD"``.
    :param kwargs: further arguments of :class:`deepinv.optim.BaseOptim`.
    :raises ValueError: for an unknown name, a parameter that cannot be trained, an option that the algorithm refuses, and an
        option beside an iteration that was made without it.
    :raises TypeError: for an argument that does not exist.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import unfolded_builder
    >>> prior = dinv.optim.PnP(dinv.models.DnCNN(in_channels=1, out_channels=1, pretrained=None))
    >>> model = unfolded_builder("NMAPG", {"stepsize": 1.0, "g_param": 0.1}, dinv.optim.L2(), prior)
    >>> model(torch.rand(1, 1, 16, 16), dinv.physics.Denoising()).shape
    torch.Size([1, 1, 16, 16])
    """
    params_algo = {"lambda": 1.0, "stepsize": 1.0} if params_algo is None else params_algo
    check_keywords("unfolded_builder", kwargs, {*arguments(unfolded_builder), *FURTHER})
    kwargs |= {"data_fidelity": data_fidelity, "prior": prior, "max_iter": max_iter, "unfold": True}
    return _build(iteration, params_algo, trainable_params, device, cost_fn, g_first, bregman_potential, **kwargs)


def DEQ_builder(
    iteration: str | OptimIterator,
    params_algo: Mapping | None = None,
    data_fidelity: DataFidelity | list[DataFidelity] | None = None,
    prior: Prior | list[Prior] | None = None,
    cost_fn: Callable | None = None,
    g_first: bool = False,
    bregman_potential: Bregman | None = None,
    *,
    max_iter: int = 5,
    trainable_params: Sequence[str] = ("lambda", "stepsize"),
    device: torch.device | str = "cpu",
    max_iter_backward: int = 50,
    anderson_acceleration_backward: bool = False,
    history_size_backward: int = 5,
    beta_anderson_acc_backward: float = 1.0,
    eps_anderson_acc_backward: float = 1e-4,
    jacobian_free: bool = False,
    **kwargs,
) -> Optim:
    r"""
    Deep equilibrium model of an algorithm: deepinv's ``DEQ_builder``, whose backward pass fails in 0.5.0, with its arguments.

    The gradient is that of the fixed point, by the implicit function theorem; ``max_iter`` has to be large enough to reach the
    fixed point. The result is a :class:`deepinv.optim.BaseOptim` with ``DEQ=DEQConfig(...)``, whose state dicts have the form of
    those of deepinv's ``BaseDEQ``.

    :param str, deepinv.optim.OptimIterator iteration: as in :func:`deepinv_flows.unfolded_builder`; its fixed point has
        to depend on the estimate alone.
    :param dict params_algo: as in :func:`deepinv_flows.unfolded_builder`; ``None`` is
        ``{"lambda": 1.0, "stepsize": 1.0, "g_param": 0.03}``.
    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is ``L2()``.
    :param deepinv.optim.Prior prior: g.
    :param int max_iter: number of iterations to the fixed point.
    :param list[str] trainable_params: names of the parameters to train.
    :param Callable cost_fn: as in :func:`deepinv_flows.unfolded_builder`, like ``g_first``, ``bregman_potential`` and ``device``.
    :param int max_iter_backward: largest number of iterations of the backward pass.
    :param bool anderson_acceleration_backward: whether to accelerate the backward pass.
    :param int history_size_backward: number of iterates that this acceleration remembers.
    :param float beta_anderson_acc_backward: momentum of this acceleration.
    :param float eps_anderson_acc_backward: regularisation of this acceleration.
    :param bool jacobian_free: whether to leave the inverse Jacobian out of the gradient.
    :param kwargs: further arguments of :class:`deepinv.optim.BaseOptim`.
    :raises ValueError: for an algorithm whose fixed point does not depend on the estimate alone, and where
        :func:`deepinv_flows.unfolded_builder` raises it.
    :raises TypeError: for an argument that does not exist.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import DEQ_builder
    >>> prior = dinv.optim.PnP(dinv.models.DnCNN(in_channels=1, out_channels=1, pretrained=None))
    >>> model = DEQ_builder("PGD", {"stepsize": 0.5, "g_param": 0.1}, prior=prior)
    >>> model(torch.rand(1, 1, 16, 16), dinv.physics.Denoising()).sum().backward()
    """
    params_algo = {"lambda": 1.0, "stepsize": 1.0, "g_param": 0.03} if params_algo is None else params_algo
    check_keywords("DEQ_builder", kwargs, {*arguments(DEQ_builder), *FURTHER})
    DEQ = DEQConfig(
        jacobian_free=jacobian_free,
        anderson_acceleration_backward=anderson_acceleration_backward,
        history_size_backward=history_size_backward,
        beta_backward=beta_anderson_acc_backward,
        eps_backward=eps_anderson_acc_backward,
        max_iter_backward=max_iter_backward,
    )
    kwargs |= {"data_fidelity": L2() if data_fidelity is None else data_fidelity, "prior": prior, "max_iter": max_iter}
    options = (trainable_params, device, cost_fn, g_first, bregman_potential)
    return _build(iteration, params_algo, *options, DEQ=DEQ, **kwargs)
