"""Pickles and compares deepinv's transforms and mask generators, which hold local classes and lambdas."""

import inspect
import operator
from dataclasses import dataclass
from enum import Enum

from deepinv.physics import NoiseModel
from deepinv.physics.generator import PhysicsGenerator
from deepinv.transform import Transform
from torch import Tensor, nn

# deepinv defines the classes of `t1 * t2`, `t1 + t2` and `t1 | t2` inside these operators, where pickle cannot find them
_COMBINED = {"ChainTransform": operator.mul, "StackTransform": operator.add, "EitherTransform": operator.or_}
_PLAIN = (int, float, str, tuple, list, Enum, Tensor)
_DEFAULT_STEP = inspect.signature(PhysicsGenerator).parameters["step"].default


class Portable:
    """Mixin of modules whose transforms and mask generators are packed when pickled or copied."""

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_modules": _packed_children(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict) -> None:
        modules = {k: unpack(m) for k, m in state["_modules"].items()}
        super().__setstate__(state | {"_modules": modules})  # type: ignore[misc]


def recipe(module: nn.Module | None):
    """
    How a transform, mask generator or noise model was made. Modules of equal recipes draw from the same distribution.

    A recipe holds the attributes that are named like an argument of the class, not what the module has drawn since.
    """
    if module is None:
        return None
    names = {
        name for cls in type(module).__mro__ for name in inspect.signature(vars(cls).get("__init__", object)).parameters
    }
    made = {k: _plain(v) for k, v in vars(module).items() if k.strip("_") in names and isinstance(v, _PLAIN)}
    if made.get("random_split_ratio"):
        made.pop("split_ratio", None)  # the last ratio that was drawn
    buffers = {k: v.tolist() for k, v in module._buffers.items() if v is not None and k != "initial_random_state"}
    return type(module).__qualname__, made, buffers, [recipe(child) for child in module.children()]


def _plain(value):
    if isinstance(value, Tensor):
        return value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value


@dataclass
class _Packed:
    maker: type | str
    children: dict
    attributes: dict


def _packed_children(module: nn.Module) -> dict:
    return {name: pack(child) for name, child in module._modules.items()}


def pack(module):
    attributes = {k: v for k, v in vars(module).items() if k != "_modules"} if module is not None else {}
    if isinstance(module, Transform) and "<locals>" in type(module).__qualname__ and type(module).__name__ in _COMBINED:
        return _Packed(type(module).__name__, _packed_children(module), attributes)
    if isinstance(module, PhysicsGenerator):
        if attributes.get("step_func") is _DEFAULT_STEP:
            del attributes["step_func"]
        return _Packed(type(module), _packed_children(module), attributes)
    if isinstance(module, NoiseModel) and "<locals>" in getattr(module.noise_model, "__qualname__", ""):
        return _Packed(type(module), _packed_children(module), attributes | {"noise_model": _unchanged})
    return module


def _unchanged(x: Tensor) -> Tensor:
    """The function of a noise model that was made without one, where deepinv has a local lambda."""
    return x


def unpack(packed):
    if not isinstance(packed, _Packed):
        return packed
    children = {name: unpack(child) for name, child in packed.children.items()}
    if packed.maker in _COMBINED:
        module = _COMBINED[packed.maker](children["t1"], children["t2"])
        module.__dict__.update(packed.attributes)
        return module
    module = packed.maker.__new__(packed.maker)
    defaults = {"step_func": _DEFAULT_STEP} if issubclass(packed.maker, PhysicsGenerator) else {}
    module.__dict__.update(defaults | packed.attributes | {"_modules": children})
    return module
