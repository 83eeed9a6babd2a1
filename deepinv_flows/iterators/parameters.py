"""Parameters of an optimizer: how they are normalised and checked, and which of them can be trained."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Real

import torch
from deepinv.optim import BaseOptim
from torch import Tensor, nn

ALIASES = {"lambda_reg": "lambda", "sigma_denoiser": "g_param", "lambda_reg_2": "lambda_2"}


def normalise(params: dict) -> dict:
    """
    ``params_algo``, changed in place: the names become those of deepinv, and each value one value or a list of ``max_iter``.

    A tensor is one value, whatever its shape, and so is a module, even one that can be iterated over (a FrEIA chain). Lists
    of modules become a :class:`torch.nn.ModuleList`, so that their weights belong to the model.
    """
    for name in list(params):
        value = params.pop(name)
        if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList | nn.ParameterList):
            value = nn.ModuleList([value])
        elif torch.is_tensor(value):
            value = [value]
        elif isinstance(value, list | tuple) and value and all(isinstance(v, nn.Module) for v in value):
            value = nn.ModuleList(value)
        params[ALIASES.get(name, name)] = value
    return params


def _numbers(value) -> bool:
    values = value if isinstance(value, Iterable) else [value]
    return all(isinstance(v, int | float | Tensor) and not isinstance(v, bool) for v in values)


def trainable(names: Iterable[str] | None, params: dict, constants: tuple[str, ...] = ()) -> list[str]:
    """The names of the parameters to train; by default all that are numbers. Names that cannot be trained are refused."""
    able = [name for name, value in params.items() if name not in constants and _numbers(value)]
    names = able if names is None else list(names)
    if not set(names) <= set(able):
        raise ValueError(f"expected trainable_params among {able}, which are numbers; got {names}")
    return names


def trained(names: Iterable[str] | None, params: dict, iterator) -> tuple[dict, list[str]]:
    """All parameters and the names of those to train. A default of the iteration becomes a parameter if it is to be trained."""
    defaults = getattr(iterator, "defaults", {"beta": 1.0})
    names = None if names is None else [ALIASES.get(name, name) for name in names]
    params = {**{name: defaults[name] for name in names or () if name in defaults}, **params}
    return params, trainable(names, params, getattr(iterator, "constants", ()))


def describe(params: Mapping) -> str:
    """The parameters that are numbers, as a model prints them."""

    def brief(values: list) -> str:
        each = [f"{float(v):.4g}" if torch.as_tensor(v).numel() == 1 else f"{tuple(v.shape)}" for v in values]
        return each[0] if len(each) == 1 else f"[{each[0]}, ..., {each[-1]}]"

    given = {name: list(value) if isinstance(value, Iterable) else [value] for name, value in params.items()}
    return ", ".join(f"{name}={brief(values)}" for name, values in given.items() if values and _numbers(values))


RANGES = {
    "stepsize": ("positive", lambda v: v > 0),
    "stepsize_dual": ("positive", lambda v: v > 0),
    "lambda": ("non-negative", lambda v: v >= 0),
    "lambda_2": ("non-negative", lambda v: v >= 0),
    "beta": ("real", lambda v: v == v),
    "inertia": ("in [0, 1)", lambda v: (v >= 0) & (v < 1)),
    "eta": ("in [0, 1)", lambda v: (v >= 0) & (v < 1)),
    "tol": ("non-negative", lambda v: v >= 0),
}


def _within(value, admissible: Callable[[Tensor], Tensor]) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        return False
    value = torch.as_tensor(value).detach()
    return not value.is_complex() and bool((admissible(value) & torch.isfinite(value)).all())


def check_ranges(params: Mapping) -> None:
    for name in RANGES.keys() & params.keys():
        kind, admissible = RANGES[name]
        given = params[name]
        values = list(given) if isinstance(given, Iterable) and not isinstance(given, str | dict) else [given]
        if not values or not all(_within(v, admissible) for v in values):
            raise ValueError(f"expected {name} to be finite and {kind}, or a list of such; got {given!r}")


def arguments(function: Callable) -> set[str]:
    """The names of the keyword arguments that a function declares."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds} - {"self"}


def check_keywords(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse unknown keyword arguments, which deepinv ignores."""
    known = sorted({*known, *arguments(BaseOptim.__init__)} - {"self", "kwargs", "iterator", "args"})
    for argument in given:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1, cutoff=0.5)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name} has no argument {argument!r}{advice}")
