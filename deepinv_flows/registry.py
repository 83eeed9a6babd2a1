"""
Put our classes where deepinv looks for them, and take them out again.

deepinv 0.5.0 has no plugin loader: algorithms are found by name in ``deepinv.optim.optim_iterators``, all else by import.
Everything here works unregistered, by passing objects; :func:`register` is for code that names deepinv's.

Names are ours while anybody holds them: :func:`register`, until :func:`unregister`, and each open :func:`registered` block, in
whatever thread. The last one to leave restores deepinv.
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
# by the entry-point groups of pyproject.toml: the objects, and the deepinv modules that hold the name
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
# the groups whose names deepinv has not: these are added, and all others replaced where they are
NEW = ("deepinv.optim_iterators", "deepinv.optimizers")
# what the state of our class has and that of deepinv's has not, where those can be pickled
MARKS: dict[type, str] = {PatchNR: "patch_size"}
# a reload of this module finds what it left
_ABSENT = globals().get("_ABSENT", object())
Place = tuple[str, str]


@dataclass
class _State:
    """Who holds the names, and what stood at each place (module, name) before our object did."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    registered: bool = False
    contexts: int = 0
    replaced: dict[Place, tuple[object, object]] = field(default_factory=dict)


_state: _State = globals().get("_state") or _State()


def _places() -> Iterator[tuple[str, str, object, bool]]:
    """Module, name and object of each place, and whether the name is new there."""
    for group, (objects, modules) in GROUPS.items():
        for obj in objects:
            for module in modules:
                if group in NEW or _current(module, obj.__name__) is not _ABSENT:
                    yield module, obj.__name__, obj, group in NEW


def _current(module: str, name: str) -> object:
    return vars(importlib.import_module(module)).get(name, _ABSENT)


def _check(found: object, module: str, name: str, ours: object, new: bool) -> None:
    """Ours may stand where nothing does, or in the place of deepinv's own object, but not of one that deepinv has since."""
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
    """Write what is missing, after checking all of it."""
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
            if ours in MARKS and "__setstate__" not in vars(ours):
                setattr(ours, "__setstate__", _arriving(getattr(ours, "__setstate__"), found, MARKS[ours]))  # noqa: B009, B010


def _undo() -> None:
    """Restore each name that still holds our object."""
    for (module, name), (before, ours) in _state.replaced.items():
        found = _current(module, name)
        if isinstance(before, type):
            copyreg.dispatch_table.pop(before, None)
            if ours in MARKS and "__setstate__" in vars(ours):
                delattr(ours, "__setstate__")
        if found is not ours:
            warnings.warn(f"{module}.{name} was replaced by {found!r} since; it is left alone", stacklevel=4)
        elif before is _ABSENT:
            delattr(importlib.import_module(module), name)
        else:
            setattr(importlib.import_module(module), name, before)
    _state.replaced.clear()


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
    """``__setstate__`` while pickle finds our class by deepinv's name: without the mark, the state is of deepinv's class."""

    def __setstate__(self, state: dict) -> None:
        if mark in state:
            return inherited(self, state)
        self.__class__ = theirs
        return self.__setstate__(state)

    return __setstate__


def _reduce(instance: Any) -> tuple:
    """An instance of a class of deepinv's whose name is ours now: pickle finds its class by that name no more."""
    state = tuple(instance.__reduce_ex__(2))[2:]
    return (
        _instance,
        next(place for place, (before, _) in _state.replaced.items() if before is type(instance)),
        *state,
    )


def _instance(module: str, name: str) -> Any:
    """A new instance of the class that deepinv itself has at that place, whether or not ours stands there."""
    before: Any = _state.replaced.get((module, name), (_current(module, name),))[0]
    return before.__new__(before)


def register() -> None:
    """
    Make deepinv's own names ours.

    Afterwards ``deepinv.optim.PatchNR`` is :class:`deepinv_flows.PatchNR`, ``deepinv.loss.EquivariantSplittingLoss`` is
    :class:`deepinv_flows.EquivariantSplittingLoss`, ``deepinv.unfolded``'s builders are ours, and our optimizers and iterations
    stand beside deepinv's (``deepinv.optim.NMAPG``, ``optim_builder("NMAPG", ...)``). Calling it again does nothing, or, after
    a deepinv module was reloaded, registers there anew. A name bound before by ``from deepinv.optim import PatchNR`` stays what
    it was: register before such imports. Objects of deepinv's own classes, pickled before or since, load as what they are.

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
    _enter(registered=True)


def unregister() -> None:
    """
    Undo :func:`register`: every name holds again the object that it held, once no :func:`registered` block is open.

    A name that someone else has replaced since is left alone, and named in a warning.

    >>> import deepinv_flows
    >>> deepinv_flows.unregister()
    """
    _leave(registered=True)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """
    :func:`register` within a ``with`` block; blocks may nest and overlap, in threads too.

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
