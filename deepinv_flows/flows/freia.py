"""
FrEIA 0.2 with its rough edges taken off; imported only when a FrEIA flow is built.

FrEIA keeps lambdas inside its blocks, which do not pickle. A Householder block caches a non-leaf matrix in each forward pass,
which does not deep-copy. The log-determinant of a volume-preserving flow is the number zero in place of a tensor. Rotations are
drawn from numpy's global random state.
"""

import copy
import math

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import transformed
from . import state
from .rotations import check_rotation, orthogonal, rotated

SAMPLES_PER_CHANNEL = 10  # with as many, or more, sample variances are taken as they are
LEAST_VARIANCE = 1e-6  # of a channel, as a multiple of the mean over channels


class Clamp:
    r"""Soft clamp :math:`u \mapsto a \cdot h(b\,u)`, which couplings multiply by their ``clamp``."""

    def __init__(self, function: str, outer: float = 1.0, inner: float = 1.0):
        self.function, self.outer, self.inner = function, outer, inner

    def __call__(self, u: Tensor) -> Tensor:
        if u.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(u.device.type):
            u = u.float()  # the log-determinant sums up many of these, and half precision would lose it
        return self.outer * getattr(torch, self.function)(self.inner * u)

    @classmethod
    def named(cls, name: str, clamp: float) -> "Clamp":
        """The clamps of deepinv >= 0.4.1 (``"deepinv"``) and of FrEIA (``"ATAN"``, ``"TANH"``, ``"SIGMOID"``)."""
        return {
            "deepinv": lambda: cls("atan", 2 / math.pi, 1 / clamp),
            "ATAN": lambda: cls("atan", 0.636),
            "TANH": lambda: cls("tanh"),
            "SIGMOID": lambda: cls("tanh", 1.0, 0.5),  # 2 (sigmoid(u) - 1/2) = tanh(u / 2)
        }[name]()


class GlobalScale:
    """The positive scale of ``AllInOneBlock``'s global affine map as a function of its parameter."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, a: Tensor) -> Tensor:
        if self.kind == "SIGMOID":
            return 10 * torch.sigmoid(a - 2.0)
        if self.kind == "SOFTPLUS":
            return 0.1 * nn.functional.softplus(a, beta=0.5)
        return torch.exp(a)


def shrinkage(samples: int, channels: int) -> float:
    """The weight of the mean over channels in an estimate of their variances; 0 from ten samples for each channel on."""
    return max(0.0, 1 - samples / (SAMPLES_PER_CHANNEL * channels))


def _standardising(x: Tensor) -> tuple[Tensor, Tensor]:
    """
    The logarithm of the scale, and the offset, that give each channel of ``x`` mean 0 and variance 1.

    Variances from few samples are shrunk towards their mean over channels, and are taken as at least a millionth of this mean.
    """
    samples, channels = x[:, 0].numel(), x.shape[1]
    var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=min(1, samples - 1))
    average, rounding = var.mean(), 10 * torch.finfo(x.dtype).eps * x.abs().max()
    average = torch.where(average > rounding**2, average, torch.ones_like(average))
    var = torch.lerp(var, average.expand_as(var), shrinkage(samples, channels)).clamp_min(LEAST_VARIANCE * average)
    log_scale = -0.5 * var.log()
    return log_scale, -mean * log_scale.exp()


class AllInOneBlock(Fm.AllInOneBlock):
    """FrEIA's block, which can be pickled and deep-copied at any time, also after a forward pass."""

    def __init__(self, dims_in, dims_c=(), global_affine_type: str = "SOFTPLUS", **kwargs):
        # FrEIA draws its rotation from numpy's global state: seed that from torch's, and restore it afterwards
        kept = np.random.get_state()
        np.random.seed(int(torch.randint(2**31, ())))
        try:
            super().__init__(dims_in, list(dims_c), global_affine_type=global_affine_type, **kwargs)
        finally:
            np.random.set_state(kept)
        self.global_scale_activation = GlobalScale(global_affine_type)
        if self.input_rank == 2:
            self.permute_function = rotated
        # In FrEIA these are frozen parameters, which requires_grad_(True) on the flow would make trainable
        for name in ("w_0",) if self.householder else ("w_perm", "w_perm_inv"):
            rotation = getattr(self, name).data
            delattr(self, name)
            self.register_buffer(name, rotation)

    def _orthogonalise(self):
        w = self.w_0 if self.householder else self.w_perm
        w.data = orthogonal(w.detach().flatten(1)).view_as(w)
        if not self.householder:
            self.w_perm_inv.data = w.flatten(1).T.reshape(w.shape)

    @torch.no_grad()
    def initialise(self, x: Tensor, c=()) -> None:
        """Set the global affine map, of type ``"EXP"``, so that each channel of the output for ``x`` is standardised."""
        self.global_scale.zero_()
        self.global_offset.zero_()
        (out,), _ = self.forward((x,), c)
        log_scale, offset = _standardising(self.permute_function(out, self.w_perm_inv))
        self.global_scale.copy_(log_scale)
        self.global_offset.copy_(offset)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._orthogonalise()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        name = "w_0" if self.householder else "w_perm"
        check_rotation(prefix + name, getattr(self, name).flatten(1), args[-1])
        self._orthogonalise()

    def forward(self, x, c=(), rev=False, jac=True):
        # FrEIA stores a product of reflections in the block it evaluates: evaluate a copy, as other threads may use this block
        block = copy.copy(self) if self.householder else self
        return Fm.AllInOneBlock.forward(block, x, c, rev, jac)


class Permutation(Fm.InvertibleModule):
    """Fixed permutation of the entries: output ``i`` is input ``perm[i]``."""

    def __init__(self, dims_in, dims_c=None, perm: Tensor | None = None):
        super().__init__(dims_in, dims_c)
        self.register_buffer("perm", perm)

    def forward(self, x, c=(), rev=False, jac=True):
        perm = self.perm.long()  # functional_call with a state dict puts floating-point numbers here
        perm = torch.argsort(perm) if rev else perm
        return (x[0].index_select(1, perm),), x[0].new_zeros(x[0].shape[0])

    def output_dims(self, input_dims):
        return input_dims

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "perm"] = self.perm.float()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key, errors = prefix + "perm", args[-1]
        if key in state_dict:
            try:
                state_dict[key] = state.as_permutation(state_dict[key])
            except ValueError as error:
                errors.append(f"{key}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


class ChannelAffine(Fm.InvertibleModule):
    r"""A fixed rotation of the channels of an image, then a learned scale and offset for each: :math:`y = e^a \odot Rx + b`."""

    def __init__(self, dims_in, dims_c=None):
        super().__init__(dims_in, dims_c)
        channels = dims_in[0][0]
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(channels, channels))[0])
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1))

    @torch.no_grad()
    def initialise(self, x: Tensor, c=()) -> None:
        """Rotate to the principal axes of the channels of ``x``, then scale and shift so that these are standardised."""
        pixels = x.movedim(1, 0).flatten(1).double().cpu()  # in float32 eigh may fail on a singular covariance
        self.rotation.copy_(torch.linalg.eigh(torch.cov(pixels, correction=0)).eigenvectors.T.flip(0))
        log_scale, offset = _standardising(F.conv2d(x, self.rotation[:, :, None, None]))
        self.log_scale.copy_(log_scale)
        self.offset.copy_(offset)

    def forward(self, x, c=(), rev=False, jac=True):
        (x,) = x
        log_det = self.log_scale.sum() * x[0, 0].numel()
        if rev:
            return (
                rotated((x - self.offset) * torch.exp(-self.log_scale), self.rotation.T[:, :, None, None]),
            ), -log_det
        return (rotated(x, self.rotation[:, :, None, None]) * self.log_scale.exp() + self.offset,), log_det

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.rotation.data = orthogonal(self.rotation)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        check_rotation(prefix + "rotation", self.rotation, args[-1])
        self.rotation.data = orthogonal(self.rotation)

    def output_dims(self, input_dims):
        return input_dims


class Squeeze(Fm.InvertibleModule):
    """
    Turn 2x2 pixels into 4 channels: as they are (``"checkerboard"``), or as their orthonormal Haar coefficients (``"haar"``).

    It replaces FrEIA's ``HaarDownsampling``, which overwrites its input in reverse.
    """

    def __init__(self, dims_in, dims_c=None, kind: str = "haar"):
        super().__init__(dims_in, dims_c)
        self.haar = kind == "haar"

    def forward(self, x, c=(), rev=False, jac=True):
        (x,) = x
        if rev:
            return (F.pixel_shuffle(self._rotated(x), 2),), x.new_zeros(len(x))
        out = self._rotated(F.pixel_unshuffle(x, 2))
        if not transformed(out):  # whose layout is not ours to choose
            out = out.contiguous(memory_format=torch.channels_last)  # in which convolutions are fastest
        return (out,), x.new_zeros(len(x))

    def _rotated(self, x: Tensor) -> Tensor:
        if not self.haar:
            return x
        # the matrix is symmetric and its own inverse
        a, b, c, d = x.unflatten(1, (-1, 4)).unbind(2)
        return 0.5 * torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 2).flatten(1, 2)

    def output_dims(self, input_dims):
        ((channels, height, width),) = input_dims
        return [(4 * channels, height // 2, width // 2)]


class SequenceFlow(state.KnowsItsConfig, Ff.SequenceINN):
    """
    A ``SequenceINN`` that knows the call of the builder that made it, and always returns ``log_det`` of shape (N,).

    ``load_state_dict`` also takes the names of deepinv's ``NormalizingFlow``, if that is the same function.
    """

    def __init__(self, *dims: int, config: dict):
        super().__init__(*dims)
        self.config = config

    def forward(self, x_or_z, c=None, rev=False, jac=True):
        out, log_det = super().forward(x_or_z, c, rev, jac)
        if not torch.is_tensor(log_det) or log_det.ndim == 0:
            log_det = out.new_zeros(out.shape[0]) + log_det
        return out, log_det

    def to_deepinv_state_dict(self) -> dict[str, Tensor]:
        """
        State dict that deepinv's ``NormalizingFlow.load_state_dict`` takes.

        :raises ValueError: when deepinv does not have a flow of this function, as with permutations.
        """
        return state.deepinv_state_dict(self)

    def _glow_blocks(self) -> list[nn.Module]:
        return [block for block in self.module_list if type(block) is Fm.GLOWCouplingBlock]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix[:-1] in getattr(destination, "_metadata", {}):
            order = [list(state.order(block)) for block in self._glow_blocks()[:1]]
            destination._metadata[prefix[:-1]].update({state.NETWORKS: order[0]} if order else {})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        order = local_metadata.get(state.NETWORKS)
        if prefix + state.EXTRA in state_dict:
            order = state.FREIA_ORDER
        elif state.rename_deepinv(state_dict, prefix, self):
            order = state.DEEPINV_ORDER
        for block in self._glow_blocks():
            if order is not None and state.order(block) != tuple(order):
                state.exchange(block)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
