"""The patch potential of padded images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import transformed
from .plain import own_graph
from .potential import PatchPotential

PAD_MODES = (False, True, "constant", "reflect", "replicate", "circular")


def padded(x: Tensor, margin: int, mode: str | bool) -> Tensor:
    """Images x with ``margin`` more pixels on each side, or as they are if ``mode`` is ``False``."""
    return F.pad(x, [margin] * 4, mode="reflect" if mode is True else mode) if mode else x


class PaddedPotential:
    """
    The potential of images x whose patches are those of the padded x.

    :param PatchPotential potential: potential of the padded images.
    :param int margin: number of pixels added on each side.
    :param str mode: padding mode of :func:`torch.nn.functional.pad`, ``True`` for ``"reflect"``, or ``False`` for none.
    """

    def __init__(self, potential: PatchPotential, margin: int, mode: str | bool):
        self.potential, self.margin, self.mode = potential, margin, mode

    def value(self, x: Tensor) -> Tensor:
        return self.potential.value(padded(x, self.margin, self.mode))

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.mode:
            return self.potential.value_and_grad(x.detach())
        with torch.enable_grad(), own_graph():
            leaf = x.detach().requires_grad_()
            images = padded(leaf, self.margin, self.mode)
            value, grad = self.potential.value_and_grad(images.detach())
            return value, torch.autograd.grad(images, leaf, grad)[0]

    def grad(self, x: Tensor) -> Tensor:
        if not self.mode:
            return self.potential.grad(x)
        if transformed(x):
            return torch.func.grad(lambda u: self.value(u).sum())(x)
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            images = padded(leaf, self.margin, self.mode)
        grad = self.potential.grad(images if x.requires_grad else images.detach())
        return torch.autograd.grad(images, leaf, grad, create_graph=grad.requires_grad)[0]
