"""
The flow contract, on which every prior of this package relies, and adapters for modules that almost satisfy it.

A **flow** is a :class:`torch.nn.Module` called as ``flow(x, rev=False)`` that returns ``(z, log_det)``. ``x`` has shape (N, D) or
(N, C, H, W), and ``z`` holds as many numbers. ``log_det`` of shape (N,) is :math:`\\log|\\det J|` of the direction evaluated, so
it changes sign with ``rev``. FrEIA's ``SequenceINN`` and ``GraphINN``, deepinv's ``NormalizingFlow`` and every builder in
:mod:`deepinv_flows.flows` satisfy it. :func:`deepinv_flows.as_flow` adapts bare FrEIA modules and zuko flows.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .state import KnowsItsConfig

PARALLEL = ("DataParallel", "DistributedDataParallel")


class Reversed(KnowsItsConfig, nn.Module):
    """
    The inverse of a flow as a flow: ``Reversed(flow)(x) == flow(x, rev=True)``.

    :param torch.nn.Module flow: any flow but a reversed one.
    :raises TypeError: when ``flow`` is not a :class:`torch.nn.Module`.
    :raises ValueError: when ``flow`` is reversed already.

    >>> import torch
    >>> from deepinv_flows import Reversed, glow_flow
    >>> flow = glow_flow(4, num_layers=1, sub_net_size=8)
    >>> x = torch.rand(3, 4)
    >>> torch.equal(Reversed(flow)(x)[0], flow(x, rev=True)[0])
    True
    """

    def __init__(self, flow: nn.Module):
        super().__init__()
        if not isinstance(flow, nn.Module):
            raise TypeError(f"expected a torch.nn.Module as flow; got {type(flow).__name__}")
        if isinstance(flow, Reversed):
            raise ValueError("a flow reversed twice is the flow itself: use its .flow")
        self.flow = flow

    @property
    def config(self) -> dict:  # type: ignore[override]
        return {**self.flow.config, "reversed": True}  # type: ignore[dict-item]

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        return evaluate(self.flow, x, not rev)


class _TupleFlow(nn.Module):
    """A bare FrEIA ``InvertibleModule``, which takes and returns tuples, as a flow."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        out, log_det = self.module((x,), rev=rev, jac=True)
        return out[0], _log_dets(log_det, out[0])


class _ZukoFlow(nn.Module):
    """A zuko flow over a standard normal base as a flow."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        transform = self.module().transform
        return (transform.inv if rev else transform).call_and_ladj(x)


def as_flow(module: nn.Module) -> nn.Module:
    """
    Make a module satisfy the flow contract: FrEIA and zuko modules are adapted, others are returned as they are.

    :param torch.nn.Module module: a flow, a bare FrEIA ``InvertibleModule`` (a block, or a network with
        ``force_tuple_output``), or a zuko flow over a standard normal base.
    :return: module called as ``flow(x, rev=False) -> (z, log_det)``.
    :raises TypeError: when ``module`` is not a :class:`torch.nn.Module`.

    >>> import FrEIA.modules as Fm, torch
    >>> from deepinv_flows import as_flow
    >>> flow = as_flow(Fm.PermuteRandom([(6,)], seed=0))
    >>> [tuple(out.shape) for out in flow(torch.rand(2, 6))]
    [(2, 6), (2,)]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as normalizing flow; got {type(module).__name__}")
    ancestors = {f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(module).__mro__}
    if "zuko.LazyDistribution" in ancestors:
        _check_standard_normal(module)
        return _ZukoFlow(module)
    if "FrEIA.InvertibleModule" in ancestors:
        is_network = ancestors & {"FrEIA.SequenceINN", "FrEIA.GraphINN"}
        if not is_network or module.force_tuple_output:
            return _TupleFlow(module)
    return module


def _check_standard_normal(module: nn.Module) -> None:
    try:
        base = module().base
        standard = type(base).__name__ == "DiagNormal" and bool((base.mean == 0).all() and (base.stddev == 1).all())
    except Exception as error:
        raise TypeError(f"expected an unconditional zuko flow; this {type(module).__name__} fails: {error}") from error
    if not standard:
        raise TypeError(f"expected a zuko flow over a standard normal base; {type(module).__name__} has {base}")


def evaluate(
    flow: nn.Module, x: Tensor, rev: bool = False, c: Tensor | Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """
    Evaluate ``flow(x, rev=rev)``, with conditions c if there are any, and check that the result keeps the flow contract.

    A ``log_det`` of shape (N, 1), a list in place of the tuple, and a ``forward`` without ``rev`` (a density that cannot be
    sampled) are accepted as well.

    :return: z, and ``log_det`` of shape (N,).
    :raises TypeError: when the flow returns something else than two tensors, or does not have an inverse and ``rev`` is true.
    :raises ValueError: when a shape is not that of the contract.
    """
    if c is not None:
        out = flow(x, c=[c] if torch.is_tensor(c) else list(c), rev=rev)
    else:
        out = flow(x, rev=rev) if _knows_rev(flow) else _one_way(flow, x, rev)
    if not (isinstance(out, (tuple, list)) and len(out) == 2 and torch.is_tensor(out[0])):
        raise TypeError(f"expected the flow {type(flow).__name__} to return (z, log_det); got {type(out).__name__}")
    z, log_det = out
    if z.numel() != x.numel():
        raise ValueError(f"expected a flow output of {x.numel()} numbers, as its input {tuple(x.shape)}; got {z.shape}")
    return z, _log_dets(log_det, x)


def _knows_rev(flow: nn.Module) -> bool:
    try:
        parameters = _parameters(flow)
    except (TypeError, ValueError):  # a forward that is not written in Python
        return True
    return "rev" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _one_way(flow: nn.Module, x: Tensor, rev: bool):
    if rev:
        raise TypeError(
            f"expected a flow that is called with rev=True for its inverse, to sample from it; "
            f"{type(flow).__name__}.forward does not take rev: it gives densities only"
        )
    return flow(x)


def nll(flow: nn.Module, x: Tensor, constant: bool = True, c: Tensor | Sequence[Tensor] | None = None) -> Tensor:
    r"""
    Negative log-likelihood of samples, :math:`\tfrac12\|z\|^2 + \tfrac D2 \log 2\pi - \log|\det J|`.

    :param torch.nn.Module flow: flow.
    :param torch.Tensor x: samples (N, D) or (N, C, H, W).
    :param bool constant: whether to add the term :math:`\tfrac D2 \log 2\pi`; the potential of patches does not have it.
    :param torch.Tensor, list c: conditions of a conditional flow, or the only one.
    :return: (N,) in nats.
    """
    z, log_det = evaluate(flow, x, c=c)
    value = 0.5 * z.flatten(1).pow(2).sum(1) - log_det
    return value + 0.5 * x[0].numel() * math.log(2 * math.pi) if constant else value


def _log_dets(log_det: Tensor | float, x: Tensor) -> Tensor:
    """The log-determinants that a flow returned, as one number for each sample (N,)."""
    if not torch.is_tensor(log_det) or log_det.ndim == 0:
        return x.new_zeros(x.shape[0]) + log_det
    if log_det.shape == (len(x), 1):
        return log_det[:, 0]
    if log_det.shape != x.shape[:1]:
        raise ValueError(f"expected log_det of shape ({x.shape[0]},), one per sample; got {tuple(log_det.shape)}")
    return log_det


def unwrapped(module: Any) -> Any:
    """The module inside the wrappers of :func:`torch.compile` and of data-parallel training; anything else as it is."""
    inside = module.module if type(module).__name__ in PARALLEL else getattr(module, "_orig_mod", None)
    return unwrapped(inside) if isinstance(inside, nn.Module) else module


def takes(module: Callable, name: str) -> bool:
    """Whether a module (the one inside its wrappers) or a function has a parameter of this name."""
    return name in _parameters(module)


def _parameters(module: Callable) -> Mapping[str, inspect.Parameter]:
    inner = unwrapped(module)
    function = inner.forward if isinstance(inner, nn.Module) else inner
    of_a_class = getattr(function, "__func__", None)  # a closure would be kept alive, and all that it holds
    return _signature(of_a_class).parameters if of_a_class is not None else inspect.signature(function).parameters


_signature = functools.lru_cache(maxsize=256)(inspect.signature)


def like_weights(module: nn.Module, default: Tensor | None = None) -> Tensor:
    """An empty tensor with the dtype and device of a module's weights, or with those of ``default`` if it has no weights."""
    for p in module.parameters():
        if p.is_floating_point():
            return p.new_empty(0)
    return torch.empty(0) if default is None else default.new_empty(0)
