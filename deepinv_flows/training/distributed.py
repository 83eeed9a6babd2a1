"""Training by several processes, with the losses and gradients of a single process."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepinv import Trainer
from deepinv.datasets import check_dataset
from deepinv.datasets.base import batch_as_dict
from deepinv.utils import AverageMeter, TensorList
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from .streams import InStep

TRAIN, EVALUATE, TEST = range(3)


@dataclass
class DistributedTrainer(Trainer):
    r"""
    :class:`deepinv.Trainer` that divides each batch between the processes of a group.

    .. math::

        \nabla \frac1N \sum_{i=1}^N \ell(x_i) = \frac1W \sum_{r=1}^W \nabla \frac WN \sum_{i \in S_r} \ell(x_i)

    Each of the W processes draws the whole batch of N samples, with the noise of its measurements, and works on its share
    :math:`S_r`; :class:`torch.nn.parallel.DistributedDataParallel` averages the gradients. Every process has the losses and
    metrics of the whole batch, so that all stop early together. The first process prints and saves. Checkpoints are the same as
    those of a single process, and a training by one process can resume from those of several, or the reverse. With deepinv's
    class, the processes write to the same folder, report the losses of their shares, and save weights that a single process
    cannot load.

    **Random numbers.** The order of the samples, their augmentation and the noise of their measurements follow a random stream of
    their own, which ``torch.initial_seed()`` of the first process and the epoch seed, for one process as for several. What is
    drawn from the global random state does not affect it. The model that :class:`deepinv_flows.EquivariantSplittingLoss` adapts
    draws its masks and noise for the whole batch and takes its share of them, as does any module whose class has an attribute
    ``joint_draws``. Other modules, such as dropout, and deepinv's ``SplittingLoss`` draw the same numbers in every process. Their
    losses are unbiased, but not those of a single process. Set the same seed in all processes before the data are made.

    Without a process group, the class behaves as deepinv's, apart from that stream.

    :param dict ddp_options: options of :class:`torch.nn.parallel.DistributedDataParallel`, such as
        ``{"find_unused_parameters": True}`` for a model that does not use all of its weights in each step.
    :param kwargs: options of :class:`deepinv.Trainer`. All samples have the same physics, so ``physics_generator`` is refused,
        but samples ``(x, y, params)`` may have parameters of their own. The number of samples in a batch must be a multiple of W.
    :raises ValueError: for a ``physics_generator``, and for a batch whose size is not a multiple of W.
    :raises RuntimeError: in every remaining process of the group, when one of them has ended early.

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

    ddp_options: dict = field(default_factory=dict)

    def setup_train(self, train: bool = True, **kwargs):
        if _world() and self.physics_generator is not None:
            raise ValueError(
                f"expected one physics for all samples, without physics_generator; got {self.physics_generator}"
            )
        if _world() and dist.get_rank() > 0:
            self.save_path, self.verbose = None, False
        super().setup_train(train, **kwargs)
        if train:
            self.train_dataloader: Any = self._in_step(self.train_dataloader, TRAIN, self.epoch_start)
            if self.eval_dataloader is not None:
                self.eval_dataloader: Any = self._in_step(self.eval_dataloader, EVALUATE, self.epoch_start)
        if not _world():
            return
        groups = [self.logs_losses_train, self.logs_losses_eval, self.logs_metrics_train, self.logs_metrics_eval]
        groups += [
            [self.logs_total_loss_train, self.logs_total_loss_eval],
            getattr(self, "logs_metrics_no_learning", []),
        ]
        for meter in itertools.chain(*groups):
            meter.__class__ = _JointMeter
        for module in self.model.modules():
            if hasattr(type(module), "joint_draws"):
                module.joint_draws = Joint()
        if train:
            self.model: Any = _Parallel(self.model, **self.ddp_options)

    def train(self):
        """
        Train the model.

        :return: the trained model, which is the same in every process.
        """
        loaders = self.train_dataloader, self.eval_dataloader
        try:
            with _one_line_for_a_lost_process():
                super().train()
        finally:
            self.train_dataloader, self.eval_dataloader = loaders
            self._alone()
        return self.model

    def test(self, test_dataloader: DataLoader | list[DataLoader], *args, **kwargs) -> dict:
        """
        Test the model.

        :param torch.utils.data.DataLoader test_dataloader: test samples, in batches whose size is a multiple of the number of
            processes; a list of data loaders is tested one after another.
        :param kwargs: further arguments of the method of :class:`deepinv.Trainer`.
        :return: the metrics of all samples, which are the same in every process.
        """
        loaders = test_dataloader if isinstance(test_dataloader, list | tuple) else [test_dataloader]
        for loader in loaders:
            if isinstance(loader, DataLoader):
                check_dataset(loader.dataset)
        try:
            with _one_line_for_a_lost_process():
                return super().test(self._in_step(loaders, TEST), *args, **kwargs)
        finally:
            self._alone()

    def get_samples(self, iterators: Sequence[Iterator], g: int):
        """The share of the next batch that belongs to this process."""
        if self.G > 1:
            # deepinv draws the order of several data loaders from numpy's global stream, which differs between processes
            g = _of_first(g)
        batch = batch_as_dict(next(iterators[g]))
        with getattr(iterators[g], "stream", nullcontext()):
            x, y, physics = super().get_samples({g: iter([batch])}, g)
        if _world() and batch.get("params"):
            physics.update(**_share_parameters(batch["params"], _length(y), self.device))
        return _share(x), _share(y), physics

    def _in_step(self, loaders: list, part: int, epoch: int = 0) -> list[InStep]:
        seed = _of_first(torch.initial_seed()) % 2**64
        return [InStep(loader, self.device, epoch, (seed, part, g)) for g, loader in enumerate(loaders)]

    def _alone(self) -> None:
        if isinstance(self.model, _Parallel):
            self.model = self.model.module
        for module in self.model.modules():
            if isinstance(vars(module).get("joint_draws"), Joint):
                del module.joint_draws


class Joint:
    """The batch of all processes together, for modules that draw random numbers for each of its samples."""

    def size(self, n: int) -> int:
        """The number of samples of the whole batch, for ``n`` in each process."""
        return n * _world()

    def whole(self, share: Tensor) -> Tensor:
        """The whole batch, put together from the shares of all processes, without gradients."""
        real = torch.view_as_real(share.detach()) if share.is_complex() else share.detach()
        parts = [torch.empty_like(real, memory_format=torch.contiguous_format) for _ in range(_world())]
        dist.all_gather(parts, real.contiguous())
        whole = torch.cat(parts)
        return torch.view_as_complex(whole) if share.is_complex() else whole

    def share(self, whole: Tensor) -> Tensor:
        """This process's share of the whole batch."""
        return _share(whole)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, without gradients."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / _world()


class _Parallel(DistributedDataParallel):
    """DistributedDataParallel whose state dicts are those of the model inside."""

    def state_dict(self, *args, **kwargs):
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.module.load_state_dict(*args, **kwargs)


class _JointMeter(AverageMeter):
    def update(self, val, n: int = 1) -> None:
        parts: list[Any] = [None] * _world()
        dist.all_gather_object(parts, np.atleast_1d(val))
        super().update(np.concatenate(parts), n)


@contextmanager
def _one_line_for_a_lost_process():
    try:
        yield
    except RuntimeError as error:
        if not _world() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RuntimeError(
            f"process {dist.get_rank()} of {_world()} stops, since another process of its group has ended early"
        ) from error


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


def _of_first(value: int) -> int:
    """The value in the first process of the group."""
    values = [value]
    if _world():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _share(batch):
    if batch is None or not _world():
        return batch
    if isinstance(batch, TensorList):
        return TensorList([_share(part) for part in batch])
    if len(batch) % _world():
        raise ValueError(
            f"expected batches of a multiple of {_world()} samples, to divide between the processes; got one of {len(batch)}"
        )
    return batch.chunk(_world())[dist.get_rank()]


def _share_parameters(parameters: dict, n_samples: int, device: torch.device) -> dict:
    """The parameters that a batch holds for its physics. Of parameters for each sample, those of this process are kept."""
    return {
        name: _share(value).to(device) if torch.is_tensor(value) and value.ndim and len(value) == n_samples else value
        for name, value in parameters.items()
    }


def _length(y: Tensor | TensorList) -> int:
    return len(y[0]) if isinstance(y, TensorList) else len(y)
