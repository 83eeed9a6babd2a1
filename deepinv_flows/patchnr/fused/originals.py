"""
Whether modules still compute what their classes say.

Hooks are noticed, and so are methods replaced on an instance (``block._coupling1 = ...``) or on a class
(``nn.Linear.forward = ...``). A class of FrEIA or deepinv is compared with what it was when it was first seen, when all its
methods have to come from its own module. A replaced ``nn.Module.__call__``, and functions replaced in ``torch`` or in
``torch.nn.functional``, are not noticed: subclass a layer instead, so that autograd evaluates the flow.
"""

import types

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}", {}) for name in _HOOKS]
_first_seen: dict[type, dict[str, types.FunctionType]] = {}  # the methods of each class


def unchanged(flow: nn.Module) -> bool:
    """Whether a call of each module runs the ``forward`` of its class and nothing else."""
    modules = list(flow.modules())
    if any(_GLOBAL_HOOKS) or any(vars(module).get(name) for module in modules for name in _HOOKS):
        return False
    methods = {kind: _methods(kind) for kind in {type(module) for module in modules}}
    for kind, found in methods.items():
        if kind not in _first_seen and _own(kind):
            _first_seen[kind] = found
        if found != _first_seen.get(kind):
            return False
    return all(methods[type(module)].keys().isdisjoint(vars(module)) for module in modules)


def _methods(kind: type) -> dict[str, types.FunctionType]:
    """The methods of a class, without those of ``nn.Module``."""
    found: dict[str, types.FunctionType] = {}
    for ancestor in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(ancestor).items():
            if isinstance(value, types.FunctionType):
                found.setdefault(name, value)
    return found


def _own(kind: type) -> bool:
    """Whether the methods of a class come from the module that defines the class."""
    ancestors = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = [(c, f) for c in ancestors for f in vars(c).values() if isinstance(f, types.FunctionType)]
    return all(f.__module__ == c.__module__ for c, f in functions)


for kind in (nn.Sequential, nn.Linear, nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU):
    _first_seen[kind] = _methods(kind)
