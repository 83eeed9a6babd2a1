"""Random numbers for the samples of a batch of which this process may have only a share."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Alone:
    """
    The batch of one process, which is whole.

    A trainer that shares batches out over several processes puts an object of the same methods in the place of this one, as the
    attribute ``joint_draws`` of the model. All processes then draw the same numbers for the whole batch, and each takes its
    share: together they train as one process does.
    """

    def size(self, n: int) -> int:
        """The number of samples of the whole batch, for ``n`` in each process."""
        return n

    def whole(self, share: Tensor) -> Tensor:
        """The whole batch, of which each process has a share."""
        return share

    def share(self, whole: Tensor) -> Tensor:
        """This process's share of the whole batch."""
        return whole

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        return value


class JointNoise(TorchFunctionMode):
    """
    Context in which noise filled into a tensor of a given shape is drawn for the whole batch.

    deepinv's SURE losses draw the directions of their divergences so, by ``torch.empty_like(y).normal_()``.

    :param joint: as :class:`Alone`.
    :param torch.Size shape: of the share.
    """

    FILLS = (Tensor.normal_, Tensor.uniform_)

    def __init__(self, joint, shape: torch.Size):
        super().__init__()
        self.joint, self.shape, self.paused = joint, shape, False

    @contextmanager
    def pause(self):
        """Context in which noise is drawn as if this were not there."""
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
    """Values of each sample in y as those of the whole batch; a value of all samples as it is."""
    return joint.whole(values) if len(values) == len(y) else values
