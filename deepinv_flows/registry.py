"""
Put our classes where deepinv looks for them, and take them out again.

deepinv 0.5.0 has no plugin loader: algorithms are found by name in ``deepinv.optim.optim_iterators``, priors and losses by
import. Everything here works unregistered, by passing objects; :func:`register` is for code that names deepinv's.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator

from . import iterators
from .iterators import DEQ_builder, unfolded_builder
from .patchnr import PatchNR
from .splitting import EquivariantSplittingLoss

# by the entry-point groups of pyproject.toml: the objects, and the deepinv modules that hold the name
GROUPS = {
    "deepinv.priors": ((PatchNR,), ("deepinv.optim", "deepinv.optim.prior")),
    "deepinv.losses": ((EquivariantSplittingLoss,), ("deepinv.loss", "deepinv.loss.es")),
    "deepinv.optim_iterators": (
        tuple(getattr(iterators, name) for name in iterators.__all__ if name.endswith("Iteration")),
        ("deepinv.optim.optim_iterators",),
    ),
    "deepinv.builders": ((unfolded_builder, DEQ_builder), ("deepinv.unfolded",)),
}
_ABSENT = object()
# (module, name) of each object that stands registered, with what it replaced
_replaced: dict[tuple[str, str], object] = {}


def _places() -> Iterator[tuple[str, str, object]]:
    for objects, modules in GROUPS.values():
        for obj in objects:
            for module in modules:
                yield module, obj.__name__, obj


def _current(module: str, name: str) -> object:
    return vars(importlib.import_module(module)).get(name, _ABSENT)


def _may_replace(found: object, name: str, ours: object) -> bool:
    """Nothing, ours, or deepinv's own object of that name: but no iteration that deepinv has since."""
    if found is _ABSENT or found is ours:
        return True
    return not name.endswith("Iteration") and getattr(found, "__module__", "").split(".")[0] == "deepinv"


def _apply() -> list[tuple[str, str]]:
    """Write what is missing; the places written."""
    missing = []
    for module, name, ours in _places():
        found = _current(module, name)
        if not _may_replace(found, name, ours):
            raise RuntimeError(
                f"{module}.{name} is {found!r} of {getattr(found, '__module__', None)}, so {ours!r} was not registered; "
                "nothing was changed"
            )
        if found is not ours:
            missing.append((module, name, ours, found))
    for module, name, ours, found in missing:
        _replaced[module, name] = found
        setattr(importlib.import_module(module), name, ours)
    return [(module, name) for module, name, *_ in missing]


def _undo(places: list[tuple[str, str]]) -> None:
    ours = {(module, name): obj for module, name, obj in _places()}
    for place in places:
        if place not in _replaced:
            continue
        before, found, (module, name) = _replaced.pop(place), _current(*place), place
        if found is not ours[place]:
            warnings.warn(f"{module}.{name} was replaced by {found!r} since; it is left alone", stacklevel=3)
        elif before is _ABSENT:
            delattr(importlib.import_module(module), name)
        else:
            setattr(importlib.import_module(module), name, before)


def register() -> None:
    """
    Make deepinv's own names ours.

    Afterwards ``deepinv.optim.PatchNR`` is :class:`deepinv_flows.PatchNR`, ``deepinv.loss.EquivariantSplittingLoss`` is
    :class:`deepinv_flows.EquivariantSplittingLoss`, ``optim_builder("NMAPG", ...)`` finds our iterations,
    and ``deepinv.unfolded``'s builders are ours. Calling it again does nothing, or, after a deepinv module was reloaded,
    registers there anew. A name bound before by ``from deepinv.optim import PatchNR`` stays what it was: register before such
    imports.

    :raises RuntimeError: when a name is taken by an object that is neither deepinv's nor ours; then nothing is changed.

    >>> import deepinv as dinv
    >>> import deepinv_flows
    >>> deepinv_flows.register()
    >>> dinv.optim.PatchNR is deepinv_flows.PatchNR
    True
    >>> deepinv_flows.unregister()
    >>> dinv.optim.PatchNR is deepinv_flows.PatchNR
    False
    """
    _apply()


def unregister() -> None:
    """
    Undo :func:`register`: every name holds again the object that it held.

    A name that someone else has replaced since is left alone, and named in a warning.

    >>> import deepinv_flows
    >>> deepinv_flows.unregister()
    """
    _undo(list(_replaced))


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """
    :func:`register` within a ``with`` block; what was registered before stays registered after.

    >>> import deepinv as dinv
    >>> import deepinv_flows
    >>> with deepinv_flows.registered():
    ...     dinv.optim.PatchNR is deepinv_flows.PatchNR
    True
    >>> dinv.optim.PatchNR is deepinv_flows.PatchNR
    False
    """
    places = _apply()
    try:
        yield
    finally:
        _undo(places)
