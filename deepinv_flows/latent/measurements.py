"""Measurements and their physics: checks at the boundary, stacks of operators, complex images."""

import torch
from deepinv.optim import DataFidelity
from deepinv.optim.data_fidelity import StackedPhysicsDataFidelity
from deepinv.physics import Physics, StackedPhysics
from deepinv.utils import TensorList
from torch import Tensor


def parts(y: Tensor | TensorList) -> list[Tensor]:
    """The measurements of each operator of a stack, or of the only operator."""
    return list(y.x) if isinstance(y, TensorList) else [y]


def check_measurements(y: Tensor | TensorList, like: Tensor) -> None:
    """
    Refuse everything but a batch of finite measurements in the precision of ``like``.

    :raises TypeError: for anything but real or complex floating-point tensors of this precision.
    :raises ValueError: for an empty batch, and for NaN or infinite entries.
    """
    for part in parts(y):
        if not torch.is_tensor(part):
            raise TypeError(f"expected measurements as a tensor; got {type(part).__name__}")
        shape = tuple(part.shape)
        if not (part.is_floating_point() or part.is_complex()):
            raise TypeError(f"expected floating-point measurements; got {part.dtype} of shape {shape}")
        if part.real.dtype != like.dtype:
            raise TypeError(f"expected measurements of {like.dtype}, as the flow's weights; got {part.dtype}")
        if part.numel() == 0:
            raise ValueError(f"expected a batch of measurements that is not empty; got shape {shape}")
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"the measurements of shape {shape} hold NaN or infinite entries")


def as_physics_takes(x: Tensor, physics: Physics) -> Tensor:
    """The images ``x``, converted to a complex dtype if the physics takes complex images."""
    operators = physics.physics_list if isinstance(physics, StackedPhysics) else [physics]
    dtypes = [operator.dtype for operator in operators if getattr(operator, "dtype", None) is not None]
    return x.to(next((dtype for dtype in dtypes if dtype.is_complex), x.dtype))


def check_physics(x: Tensor, y: Tensor | TensorList, physics: Physics) -> None:
    """
    Refuse measurements of another shape than the physics gives to images like x, and physics that cannot take such images.

    :raises ValueError: with the shapes of both sides.
    """
    try:
        made = physics.A(as_physics_takes(x, physics))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{type(physics).__name__} cannot measure the images of the generator, {x.dtype} of shape {tuple(x.shape)}: {error}"
        ) from error
    found, expected = ([tuple(part.shape) for part in parts(those)] for those in (y, made))
    if found != expected:
        got, wanted = (str(shapes[0] if len(shapes) == 1 else shapes) for shapes in (found, expected))
        raise ValueError(
            f"expected measurements of shape {wanted}, as {type(physics).__name__} makes of images {tuple(x.shape)}; got {got}"
        )


def fidelity_of_each(data_fidelity: DataFidelity, physics: Physics) -> DataFidelity:
    """For a stack of operators the sum of this data fidelity over them, unless it is such a sum already."""
    one = isinstance(data_fidelity, DataFidelity) and not isinstance(data_fidelity, StackedPhysicsDataFidelity)
    if not (isinstance(physics, StackedPhysics) and one):
        return data_fidelity
    return StackedPhysicsDataFidelity([data_fidelity] * len(physics.physics_list))
