"""
Puts our classes where deepinv looks for them, and removes them again.

deepinv 0.5.0 does not load plugins: it finds algorithms by name in ``deepinv.optim.optim_iterators``, and all else by import.
All our objects also work without registration. :func:`deepinv_flows.register` is for code that uses deepinv's names.

The names are ours as long as someone holds them. The holders are :func:`deepinv_flows.register`, until
:func:`deepinv_flows.unregister`, and each open block of :func:`deepinv_flows.registered` in any thread. When the last one leaves,
the names are deepinv's again.
"""

import contextlib
import copyreg
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import iterators
from .iterators import DEQ_builder, unfolded_builder
from .patchnr import PatchNR
from .splitting import EquivariantSplittingLoss

_PUBLIC = [getattr(iterators, name) for name in iterators.__all__]
_ITERATIONS = tuple(obj for obj in _PUBLIC if obj.__name__.endswith("Iteration"))
_OPTIMIZERS = tuple(obj for obj in _PUBLIC if isinstance(obj, type) and obj not in _ITERATIONS)
# for each entry-point group of pyproject.toml: the objects, and the modules of deepinv that hold their names
GROUPS = {
    "deepinv.priors": ((PatchNR,), ("deepinv.optim", "deepinv.optim.prior")),
    "deepinv.losses": ((EquivariantSplittingLoss,), ("deepinv.loss", "deepinv.loss.es")),
    "deepinv.optim_iterators": (_ITERATIONS, ("deepinv.optim", "deepinv.optim.optim_iterators")),
    "deepinv.optimizers": (_OPTIMIZERS, ("deepinv.optim", "deepinv.optim.optimizers")),
    "deepinv.builders": (
        (unfolded_builder, DEQ_builder),
        ("deepinv.unfolded", "deepinv.unfolded.unfolded", "deepinv.unfolded.deep_equilibrium"),
    ),
}
# the groups whose names deepinv does not have: they are added, and the names of all other groups replaced
NEW = ("deepinv.optim_iterators", "deepinv.optimizers")
# an attribute that tells a pickled state of our class from one of deepinv's class, where both can be pickled
MARKS: dict[type, str] = {PatchNR: "patch_size"}
# a reload of this module has to find what it left
_ABSENT = globals().get("_ABSENT", object())
Place = tuple[str, str]


@dataclass
class _State:
    """Who holds the names, and which object stood at each place (module, name) before ours."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    registered: bool = False
    contexts: int = 0
    replaced: dict[Place, tuple[object, object]] = field(default_factory=dict)
    own: dict[type, Any] = field(default_factory=dict)  # the ``__setstate__`` of our classes that another stands in for


_state: _State = globals().get("_state") or _State()


def _places() -> Iterator[tuple[str, str, object, bool]]:
    """The module, name and object of each place, and whether the name is new there."""
    for group, (objects, modules) in GROUPS.items():
        for obj in objects:
            for module in modules:
                if group in NEW or _current(module, obj.__name__) is not _ABSENT:
                    yield module, obj.__name__, obj, group in NEW


def _current(module: str, name: str) -> object:
    return vars(importlib.import_module(module)).get(name, _ABSENT)


def _check(found: object, module: str, name: str, ours: object, new: bool) -> None:
    """Our object may replace nothing, itself or deepinv's object of that name, but not an object that is new to us."""
    origin = getattr(found, "__module__", None) or ""
    if found is _ABSENT or found is ours or (not new and origin.split(".")[0] == "deepinv"):
        return
    what = f"{found!r} of {origin or None}"
    if origin.split(".")[0] == __name__.split(".")[0]:
        what += (
            ", another copy of our own class: deepinv_flows was imported twice, or reloaded, while registered. "
            "Unregister before reloading it, or start a new process"
        )
    raise RuntimeError(f"{module}.{name} is {what}, so {ours!r} was not registered; nothing was changed")


def _apply() -> None:
    """Check all places, and then set the names that are not ours yet."""
    missing = []
    for module, name, ours, new in _places():
        found = _current(module, name)
        _check(found, module, name, ours, new)
        if found is not ours:
            missing.append((module, name, ours, found))
    for module, name, ours, found in missing:
        _state.replaced[module, name] = (found, ours)
        setattr(importlib.import_module(module), name, ours)
        if isinstance(found, type):
            copyreg.pickle(found, _reduce)
            if ours in MARKS and ours not in _state.own:
                _state.own[ours] = vars(ours).get("__setstate__")
                setattr(ours, "__setstate__", _arriving(getattr(ours, "__setstate__"), found, MARKS[ours]))  # noqa: B009, B010


def _undo() -> None:
    """Restore each name that still holds our object."""
    for (module, name), (before, ours) in _state.replaced.items():
        found = _current(module, name)
        if isinstance(before, type):
            copyreg.dispatch_table.pop(before, None)
        if found is not ours:
            warnings.warn(f"{module}.{name} has since been replaced by {found!r}; it is left as it is", stacklevel=4)
        elif before is _ABSENT:
            delattr(importlib.import_module(module), name)
        else:
            setattr(importlib.import_module(module), name, before)
    _state.replaced.clear()
    for ours, own in _state.own.items():
        if own is None:
            delattr(ours, "__setstate__")
        else:
            setattr(ours, "__setstate__", own)  # noqa: B010
    _state.own.clear()


def _enter(registered: bool = False) -> None:
    with _state.lock:
        _apply()
        _state.registered = _state.registered or registered
        _state.contexts += not registered


def _leave(registered: bool = False) -> None:
    with _state.lock:
        _state.registered = _state.registered and not registered
        _state.contexts -= not registered
        if not _state.registered and not _state.contexts:
            _undo()


def _arriving(inherited: Callable, theirs: type, mark: str) -> Callable:
    """``__setstate__`` while pickle finds our class under deepinv's name: a state without the mark is one of deepinv's class."""

    def __setstate__(self, state: dict) -> None:
        if mark in state:
            return inherited(self, state)
        self.__class__ = theirs
        return self.__setstate__(state)

    return __setstate__


def _reduce(instance: Any) -> tuple:
    """How to pickle an instance of a class of deepinv whose name is ours now, so that pickle cannot find the class by it."""
    state = tuple(instance.__reduce_ex__(2))[2:]
    return (
        _instance,
        next(place for place, (before, _) in _state.replaced.items() if before is type(instance)),
        *state,
    )


def _instance(module: str, name: str) -> Any:
    """A new instance of the class that deepinv itself has at that place, whether our class is registered there or not."""
    before: Any = _state.replaced.get((module, name), (_current(module, name),))[0]
    return before.__new__(before)


def register() -> None:
    """
    Make deepinv's names refer to our classes.

    Afterwards ``deepinv.optim.PatchNR`` is :class:`deepinv_flows.PatchNR`, ``deepinv.loss.EquivariantSplittingLoss`` is
    :class:`deepinv_flows.EquivariantSplittingLoss`, ``deepinv.unfolded``'s builders are ours, and our optimizers and iterations
    stand beside deepinv's (``deepinv.optim.NMAPG``, ``optim_builder("NMAPG", ...)``). A second call changes nothing, unless a
    module of deepinv was reloaded, where it registers anew. A name that was imported before, by
    ``from deepinv.optim import PatchNR``, keeps its object: register before such imports. Pickled objects of deepinv's classes
    load as objects of these classes, whether they were pickled before or after.

    :raises RuntimeError: when a name is taken by an object that is neither deepinv's nor ours. Then nothing is changed.

    >>> import deepinv as dinv
    >>> import deepinv_flows
    >>> deepinv_flows.register()
    >>> dinv.optim.PatchNR is deepinv_flows.PatchNR
    True
    >>> deepinv_flows.unregister()
    >>> dinv.optim.PatchNR is deepinv_flows.PatchNR
    False
    """
    _enter(registered=True)


def unregister() -> None:
    """
    Undo :func:`deepinv_flows.register`. Every name refers to its former object again, as soon as all blocks of
    :func:`deepinv_flows.registered` are closed.

    A name that someone else has replaced since then is left as it is, and a warning names it.

    >>> import deepinv_flows
    >>> deepinv_flows.unregister()
    """
    _leave(registered=True)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """
    :func:`deepinv_flows.register` within a ``with`` block. Blocks may be nested, and may overlap in several threads.

    >>> import deepinv as dinv
    >>> import deepinv_flows
    >>> with deepinv_flows.registered():
    ...     dinv.optim.PatchNR is deepinv_flows.PatchNR
    True
    >>> dinv.optim.PatchNR is deepinv_flows.PatchNR
    False
    """
    _enter()
    try:
        yield
    finally:
        _leave()
