r"""
PatchNR over the processes of a group: each evaluates a share of the rows of patches.

.. math::

    g(x) = \sum_{k=1}^{m} \frac1n \sum_{i \in I_k} h(P_i x)

with the rows of patches split into :math:`I_1, \dots, I_m`, of which process k needs the pixel rows alone (those of neighbours
overlap by ``patch_size - 1``), and the number n of all patches. Sums over processes and copies to them are each other's
transposes, so gradients of any order follow.
"""

from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import potential as patchwise
from .patches import PatchIndex
from .prior import PatchNR

# images are compared by so many pixels, whose standard deviation over the processes is rounding if so much smaller
PROBES, TOLERANCE = 64, 2e-3


class DistributedPatchNR(PatchNR):
    r"""
    :class:`PatchNR` whose patches are shared out, row by row, to the processes of a :mod:`torch.distributed` group.

    Every process is given the same image and gets the same result: value, gradient and proximity operator of
    :class:`PatchNR`, borders included, up to rounding; also gradients in the weights, in an unfolded network or in training.
    deepinv's optimizers and ours take it as any prior, beside a physics and data fidelity that are distributed
    (:func:`deepinv.distributed.distribute`) or not. A process evaluates its share of the patches in the memory of its share of
    the image; an evaluation of the value or of the gradient is one all-reduce. Without a group it is a :class:`PatchNR`.

    A random subset (``n_patches``) is the one that the first process draws. :func:`deepinv.distributed.distribute` refuses
    priors: it tiles maps from images to images, and tiles of a prior's gradient would lack the patches across their borders
    and count their own alone.

    :param torch.distributed.ProcessGroup group: the processes; ``None`` is the default group, if there is one.
    :param args: as in :class:`PatchNR`, and so are ``kwargs``; equal on all processes, as are the weights.
    :raises ValueError: as :class:`PatchNR`; for patches, which are not shared out; for images that differ between processes.

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

    @property
    def _sums(self) -> "_Shares | ModuleType":
        return _Shares(self.group) if dist.is_initialized() else patchwise

    def _check(self, x: Tensor, images_only: bool = False) -> None:
        super()._check(x, images_only=True)

    def _index(self, padded: Tensor) -> PatchIndex:
        if self.n_patches != -1 and dist.is_initialized():
            state = self.generator.get_state().to(padded.device)
            dist.broadcast(state, 0 if self.group is None else dist.get_global_rank(self.group, 0), self.group)
            self.generator.set_state(state.cpu())
        return super()._index(padded)


class _Shares:
    """This process's part in what :mod:`deepinv_flows.patchnr.potential` computes, under the same names."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.place = group, (dist.get_rank(group), dist.get_world_size(group))
        if self.place[0] < 0:
            raise ValueError(f"expected a process of the group; process {dist.get_rank()} is none")

    def image_nll(self, flow: nn.Module, x: Tensor, index: PatchIndex, *options) -> Tensor:
        part, rows = index.share(*self.place)
        shared, weights = self._copies(flow, x)
        return self._sum(x, patchwise.under(flow, weights, patchwise.image_nll, shared[:, :, rows], part, *options))[0]

    def value_and_grad(self, flow: nn.Module, x: Tensor, index: PatchIndex, *options) -> tuple[Tensor, Tensor]:
        part, rows = index.share(*self.place)
        value, grad = patchwise.value_and_grad(flow, x[:, :, rows], part, *options)
        return self._sum(x, value, _among(grad, rows, x))

    def differentiable_grad(self, flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int | None) -> Tensor:
        part, rows = index.share(*self.place)
        shared, weights = self._copies(flow, x)
        grad = patchwise.under(flow, weights, patchwise.differentiable_grad, shared[:, :, rows], part, chunk_size)
        return self._sum(x, _among(grad, rows, x))[0]

    def _copies(self, flow: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The image and those weights that ask for a gradient, which is then summed over the processes."""
        named = {name: t for name, t in [("", x), *flow.named_parameters()] if t.requires_grad}
        copies = dict(zip(named, _Copy.apply(self.group, *named.values()))) if named else {}
        return copies.pop("", x), copies

    def _sum(self, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over the processes, if these agree on the image."""
        flat = x.detach().reshape(-1)
        probe = flat[:: max(1, len(flat) // PROBES)]
        *sums, mean, square = _Sum.apply(self.group, *parts, probe / self.place[1], probe**2 / self.place[1])
        # the same numbers on all processes, so that either all of them raise or none
        if ((square - mean**2).max() > (TOLERANCE**2 * square).max()).item():
            raise ValueError(
                f"expected the same image on all {self.place[1]} processes of the group; got different ones (is noise or a "
                "start drawn from seeds that differ?)"
            )
        return tuple(sums)


def _among(grad: Tensor, rows: slice, x: Tensor) -> Tensor:
    """Gradient in x from the one in its ``rows``."""
    return F.pad(grad, (0, 0, rows.start, x.shape[2] - rows.stop))


class _Sum(torch.autograd.Function):
    """Sums over the processes, all by one all-reduce."""

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
    """One tensor of all processes as one of each: what a process does with it adds to its gradient."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_Sum.apply(ctx.group, *grads)
