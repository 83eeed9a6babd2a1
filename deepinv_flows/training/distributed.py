"""Training by several processes, with the losses and gradients of one."""

import itertools

import numpy as np
import torch.distributed as dist
from deepinv import Trainer
from deepinv.utils import AverageMeter, TensorList
from torch.nn.parallel import DistributedDataParallel


class DistributedTrainer(Trainer):
    r"""
    :class:`deepinv.Trainer` whose batches are shared out over a process group.

    .. math::

        \nabla \frac1N \sum_{i=1}^N \ell(x_i) = \frac1W \sum_{r=1}^W \nabla \frac WN \sum_{i \in S_r} \ell(x_i)

    Each of the W processes draws the whole batch of N samples, with the noise of its measurements, and works on its share
    :math:`S_r`; gradients are averaged by :class:`torch.nn.parallel.DistributedDataParallel`. Losses and metrics are those of the
    whole batch, in every process, so that all stop early together; the first process prints and saves. Checkpoints are those of
    one process, and either may resume from the other's. With deepinv's own class, processes collide over the folder of
    checkpoints, report the losses of their shares, and write weights that one process cannot load.

    All processes must draw the same batches and the same noise: seed them alike before the data are made. Without a process group
    it is deepinv's class.

    :param kwargs: those of :class:`deepinv.Trainer`; one physics for all samples, so no ``physics_generator``. The number of
        samples in each batch must be a multiple of W.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import DistributedTrainer, FlowModel, FlowNLL, glow_flow
    >>> model = FlowModel(glow_flow(4, num_layers=1, sub_net_size=8), dequantise=0)
    >>> samples = [{"x": x, "y": x} for x in torch.randn(64, 4)]
    >>> trainer = DistributedTrainer(
    ...     model, dinv.physics.Denoising(), torch.optim.Adam(model.parameters()),
    ...     torch.utils.data.DataLoader(samples, batch_size=32), epochs=1, losses=FlowNLL(), metrics=None,
    ...     save_path=None, device="cpu", verbose=False)
    >>> model = trainer.train()
    """

    def setup_train(self, train: bool = True, **kwargs):
        if not _world():
            return super().setup_train(train, **kwargs)
        if self.physics_generator is not None:
            raise ValueError(f"expected one physics for all samples, to share them out; got {self.physics_generator}")
        if dist.get_rank() > 0:
            self.save_path, self.verbose = None, False
        super().setup_train(train, **kwargs)
        groups = [self.logs_losses_train, self.logs_losses_eval, self.logs_metrics_train, self.logs_metrics_eval]
        groups += [
            [self.logs_total_loss_train, self.logs_total_loss_eval],
            getattr(self, "logs_metrics_no_learning", []),
        ]
        for meter in itertools.chain(*groups):
            meter.__class__ = _JointMeter
        if train:
            self.model = _Parallel(self.model)

    def train(self):
        """
        Train.

        :return: the trained model, the same in every process.
        """
        try:
            super().train()
        finally:
            if isinstance(self.model, _Parallel):
                self.model = self.model.module
        return self.model

    def get_samples(self, iterators, g):
        """This process's share of a batch."""
        x, y, physics = super().get_samples(iterators, g)
        return _share(x), _share(y), physics


class _Parallel(DistributedDataParallel):
    """With the weights' names of the model inside."""

    def state_dict(self, *args, **kwargs):
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.module.load_state_dict(*args, **kwargs)


class _JointMeter(AverageMeter):
    def update(self, val, n: int = 1) -> None:
        parts = [None] * _world()
        dist.all_gather_object(parts, np.atleast_1d(val))
        super().update(np.concatenate(parts), n)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


def _share(batch):
    if batch is None or not _world():
        return batch
    if isinstance(batch, TensorList):
        return TensorList([_share(part) for part in batch])
    if len(batch) % _world():
        raise ValueError(
            f"expected batches of a multiple of {_world()} samples, for as many processes; got one of {len(batch)}"
        )
    return batch.chunk(_world())[dist.get_rank()]
