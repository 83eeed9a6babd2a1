"""The conditions of a batch reach the model that deepinv's Trainer trains as parameters of its physics."""

from collections.abc import Sequence

from deepinv.physics import Denoising, Physics
from torch import Tensor

from ..flows import condition_list


class Conditioned(Denoising):
    """Denoising with parameters ``c0``, ``c1``, ..., the conditions of the batch, which do not change the measurements."""

    c: list[Tensor] | None = None

    def update(self, **params) -> None:
        self.c = [params[f"c{k}"] for k in range(len(params))] or None


def conditions_of(physics: Physics | None) -> list[Tensor] | None:
    """The conditions that the physics of a batch holds, if it holds any."""
    return physics.c if isinstance(physics, Conditioned) else None


def condition_lists(
    c: Tensor | Sequence[Tensor] | None, eval_c: Tensor | Sequence[Tensor] | None, number: int, eval_number: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """
    The conditions of the training images and of the evaluation images, as lists of tensors.

    :param int number: number of training images.
    :param int eval_number: number of evaluation images; ``None`` evaluates on the training images, with their conditions.
    :raises TypeError: for anything but tensors.
    :raises ValueError: for a condition of another number of images, and unless both have the same number of conditions.
    """
    conditions = _condition_list(c, number)
    if eval_number is None:
        if eval_c is not None:
            raise ValueError("expected eval_images, whose conditions eval_c are; got None")
        return conditions, conditions
    eval_conditions = _condition_list(eval_c, eval_number)
    if len(eval_conditions) != len(conditions):
        raise ValueError(
            f"expected as many conditions of eval_images as of images, {len(conditions)}; got eval_c with {len(eval_conditions)}"
        )
    return conditions, eval_conditions


def _condition_list(c: Tensor | Sequence[Tensor] | None, number: int) -> list[Tensor]:
    conditions = condition_list(c)
    for condition in conditions:
        if len(condition) != number:
            raise ValueError(f"expected a condition for each of {number} images; got shape {tuple(condition.shape)}")
    return conditions
