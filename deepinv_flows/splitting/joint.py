"""Random numbers for the samples of a batch that several processes may share."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Alone:
    """
    The batch of a training by one process, which holds all of it.

    A trainer that divides batches between several processes sets the attribute ``joint_draws`` of the model to an object with the
    same methods. All processes then draw the same numbers for the whole batch, and each takes its share, so that together they
    train as one process does.
    """

    def size(self, n: int) -> int:
        """The number of samples of the whole batch, for ``n`` in each process."""
        return n

    def whole(self, share: Tensor) -> Tensor:
        """The whole batch, put together from the shares of all processes."""
        return share

    def share(self, whole: Tensor) -> Tensor:
        """This process's share of the whole batch."""
        return whole

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        return value


class JointNoise(TorchFunctionMode):
    """
    Context in which noise that fills a tensor of a given shape is drawn for the whole batch.

    deepinv's SURE losses draw the directions of their divergences in this way, by ``torch.empty_like(y).normal_()``.

    :param joint: an object with the methods of ``Alone``.
    :param torch.Size shape: shape of the share of this process.
    """

    FILLS = (Tensor.normal_, Tensor.uniform_)

    def __init__(self, joint, shape: torch.Size):
        super().__init__()
        self.joint, self.shape, self.paused = joint, shape, False

    @contextmanager
    def pause(self):
        """Context in which noise is drawn as it is outside of this one."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not self.paused and function in self.FILLS and args[0].shape == self.shape:
            whole = args[0].new_empty(self.joint.size(len(args[0])), *self.shape[1:])
            return args[0].copy_(self.joint.share(function(whole, *args[1:], **(kwargs or {}))))
        return function(*args, **(kwargs or {}))


def of_all(values: Tensor, y: Tensor, joint) -> Tensor:
    """The values of the whole batch, if there is one for each sample of y; a value for all samples is returned as it is."""
    return joint.whole(values) if len(values) == len(y) else values
