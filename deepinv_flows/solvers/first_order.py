"""Descent by torch's optimizers on a batch in which each sample is a problem of its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import at_iteration
from .batch import dot, finite, norm, per_sample
from .objective import Objective, check_still_finite, in_unit


@torch.no_grad()
def first_order(
    value_and_grad: Objective,
    z: Tensor,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    max_iter: int = 100,
    tol: float = 0.0,
    any_unit: bool = True,
    callback: Callable[[Tensor, Tensor], None] = lambda z, value: None,
) -> Tensor:
    """
    The best iterate of each sample on the path of one of torch's optimizers.

    The optimizer must work entry by entry, as Adam does. A sample whose value or gradient is not finite goes back to its best
    iterate, and its steps are halved from then on.

    :param Callable value_and_grad: the objective; maps z (B, ...) to values (B,) and gradients (B, ...).
    :param torch.Tensor z: where to start, (B, ...), with finite values.
    :param Callable make_optimizer: makes the optimizer of a list of one tensor.
    :param int max_iter: largest number of steps.
    :param float tol: a sample is done once a step is shorter than ``tol`` times its norm.
    :param bool any_unit: whether to scale the objective so that the entries of its gradient are about 1 at the start. Optimizers
        such as Adam, which divide by the size of the gradient plus a tiny number, then do not depend on the objective's unit.
    :param Callable callback: called after each iteration with the best iterate and its values.
    :return: tensor like z.
    :raises ValueError: when the value or gradient at the best iterate is not finite any more; the message names the iteration.
    """
    z, unit = z.clone(), torch.ones_like(z.flatten(1)[:, 0])
    if any_unit:
        _, grad = value_and_grad(z)
        value_and_grad, unit = in_unit(value_and_grad, norm(grad) / z[0].numel() ** 0.5)
    optimizer = make_optimizer([z])
    best, lowest = z.clone(), torch.full_like(z.flatten(1)[:, 0], torch.inf)
    shortened, alive = torch.ones_like(lowest), torch.ones_like(lowest, dtype=torch.bool)
    for it in range(max_iter + 1):
        with at_iteration(it):
            value, grad = value_and_grad(z)
        good = finite(value, grad)
        lower = good & alive & (value < lowest)
        best, lowest = torch.where(per_sample(lower, z), z, best), torch.where(lower, value, lowest)
        if it > 0:
            with at_iteration(it):
                check_still_finite(value_and_grad, best, alive & ~good)
            callback(best, unit * lowest)
        if it == max_iter or not alive.any():
            break
        shortened = torch.where(good, shortened, shortened / 2)
        z.copy_(torch.where(per_sample(good & alive, z), z, best))
        z.grad = torch.where(per_sample(good, z), grad, torch.zeros_like(grad))
        before = z.clone()
        optimizer.step()
        move = per_sample(shortened * alive, z) * (z - before)
        z.copy_(torch.where(per_sample(finite(lowest, move), z), before + move, before))
        alive = alive & ((dot(move, move) > tol**2 * dot(z, z)) | ~good)
    return best
