r"""
PatchNR over the processes of a group, each of which evaluates a share of the rows of patches.

.. math::

    g(x) = \sum_{k=1}^{m} \frac1n \sum_{i \in I_k} h(P_i x)

with the number n of all patches, whose rows are split into :math:`I_1, \dots, I_m`. Process k needs only the pixel rows of its
own patches; those of neighbouring processes overlap by ``patch_size - 1`` rows. A sum over processes and a copy to each of them
are transposes of each other, so that gradients of any order are right.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .patches import PatchIndex
from .potential import PatchPotential
from .prior import PatchNR

# Processes compare their images at PROBES pixels; a relative standard deviation below TOLERANCE counts as rounding
PROBES, TOLERANCE = 64, 2e-3


class DistributedPatchNR(PatchNR):
    r"""
    :class:`deepinv_flows.PatchNR` whose rows of patches are distributed over the processes of a :mod:`torch.distributed` group.

    Every process is given the same image and gets the same result: the value, gradient and proximity operator of
    :class:`deepinv_flows.PatchNR`, borders included, up to rounding. Gradients in the weights are the same as well, in an
    unfolded network or in training. deepinv's optimizers and ours take it as any other prior, and the physics and data
    fidelity may be distributed (:func:`deepinv.distributed.distribute`) or not. A process needs the memory that its share of
    the patches and of the image takes. An evaluation of the value or of the gradient is one all-reduce. Without a group, the
    class does what :class:`deepinv_flows.PatchNR` does.

    A random subset (``n_patches``) is drawn by the first process for all of them. :func:`deepinv.distributed.distribute` does not
    take priors: it splits maps from images to images into tiles, and the tiles of a prior's gradient would lack the patches
    across their borders and would be averaged over their own patches alone.

    :param torch.distributed.ProcessGroup group: the processes; ``None`` is the default group, if there is one.
    :param args: as in :class:`deepinv_flows.PatchNR`, as are ``kwargs``. They are equal on all processes, as are the weights.
    :raises ValueError: as :class:`deepinv_flows.PatchNR`, for patches in place of images, and for images that differ between
        processes.

    >>> import torch
    >>> from deepinv_flows import DistributedPatchNR, PatchNR
    >>> prior = PatchNR(patch_size=3, num_layers=1, sub_net_size=8)
    >>> shared = DistributedPatchNR(prior.normalizing_flow, patch_size=3)  # on each process of `torchrun --nproc-per-node=2`
    >>> x = torch.rand(1, 1, 16, 16)
    >>> torch.allclose(shared(x), prior(x)), torch.allclose(shared.grad(x), prior.grad(x))
    (True, True)
    """

    def __init__(self, *args, group: dist.ProcessGroup | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.group = group

    def _check(self, x: Tensor, images_only: bool = False) -> None:
        super()._check(x, images_only=True)

    def _index(self, x: Tensor, method: str) -> PatchIndex:
        if self.n_patches != -1 and dist.is_initialized():
            state = self.generator.get_state().to(x.device)
            dist.broadcast(state, 0 if self.group is None else dist.get_global_rank(self.group, 0), self.group)
            self.generator.set_state(state.cpu())
        return super()._index(x, method)

    def _over(self, index: PatchIndex) -> PatchPotential:
        whole = super()._over(index)
        return SharedPotential(whole, self.group) if dist.is_initialized() else whole


class SharedPotential(PatchPotential):
    """
    The potential of all patches, of which this process evaluates a share of the rows.

    :param PatchPotential whole: the potential of all patches.
    :param torch.distributed.ProcessGroup group: the processes; ``None`` is the default group.
    """

    def __init__(self, whole: PatchPotential, group: dist.ProcessGroup | None):
        super().__init__(whole.flow, whole.index, whole.chunk_size, whole.precision, whole.asked)
        self.group, self.place = group, (dist.get_rank(group), dist.get_world_size(group))
        if self.place[0] < 0:
            raise ValueError(f"expected a process of the group; process {dist.get_rank()} is not in it")
        self.share, self.rows = self.index.share(*self.place)

    def value(self, x: Tensor) -> Tensor:
        shared, own = self._copies(x)
        return self._sum(x, own.value(shared[:, :, self.rows]))[0]

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self._own({}).value_and_grad(x[:, :, self.rows])
        value, grad = self._sum(x, value, self._among(grad, x))
        return value, grad

    def grad(self, x: Tensor) -> Tensor:
        if not self.trainable and not (x.requires_grad and torch.is_grad_enabled()):
            return self.value_and_grad(x)[1]
        shared, own = self._copies(x)
        return self._sum(x, self._among(own.grad(shared[:, :, self.rows]), x))[0]

    def _own(self, weights: dict[str, Tensor]) -> PatchPotential:
        return PatchPotential(self.flow, self.share, self.chunk_size, self.precision, self.asked, weights)

    def _copies(self, x: Tensor) -> tuple[Tensor, PatchPotential]:
        """The image and the potential of this process's share, both with gradients that are summed over the processes."""
        recording = torch.is_grad_enabled()
        named = {name: t for name, t in [("", x), *self.params.items()] if t.requires_grad and recording}
        copies = dict(zip(named, _Copy.apply(self.group, *named.values()))) if named else {}
        return copies.pop("", x), self._own(copies)

    def _among(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient in x from the gradient in this process's rows of x."""
        return F.pad(grad, (0, 0, self.rows.start, x.shape[2] - self.rows.stop))

    def _sum(self, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over the processes; refused if these do not have the same image."""
        flat = x.detach().reshape(-1)
        probe = flat[:: max(1, len(flat) // PROBES)]
        *sums, mean, square = _Sum.apply(self.group, *parts, probe / self.place[1], probe**2 / self.place[1])
        # all processes compare the same numbers, so that either all of them raise or none does
        if ((square - mean**2).max() > (TOLERANCE**2 * square).max()).item():
            raise ValueError(
                f"expected the same image on all {self.place[1]} processes of the group; got different ones (is noise or a "
                "start drawn from seeds that differ?)"
            )
        return tuple(sums)


class _Sum(torch.autograd.Function):
    """Sums of tensors over the processes, by one all-reduce."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=group)
        return tuple(t.view(like.shape).to(like) for t, like in zip(flat.split([t.numel() for t in tensors]), tensors))

    @staticmethod
    def backward(ctx, *grads):
        return None, *_Copy.apply(ctx.group, *grads)


class _Copy(torch.autograd.Function):
    """A copy for each process of a tensor that all processes share; the gradients of the copies are summed."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_Sum.apply(ctx.group, *grads)
