r"""
The score of an image under its patches: the sum over all patches, each weighted by :math:`1/p^2`.

.. math::

    s(y) = \frac1{p^2} \sum_i P_i^T\, \nabla h(P_i y), \qquad h = -\log p
"""

import torch.nn.functional as F
from torch import Tensor

from ..checks import check_autograd
from .patches import PatchIndex
from .prior import PatchNR


def score(prior: PatchNR, y: Tensor, borders: bool = True) -> Tensor:
    r"""
    The score at images, in which each pixel has the average over the :math:`p^2` patches that it lies in.

    All patches are taken, whatever ``pad``, ``stride`` and ``n_patches`` of the prior are.

    :param PatchNR prior: the prior.
    :param torch.Tensor y: images (B, C, H, W).
    :param bool borders: whether to mirror the images at their borders by p - 1 pixels, so that border pixels lie in as many
        patches. Otherwise only pixels at least p - 1 away from the borders are returned.
    :return: tensor like y, or (B, C, H - 2p + 2, W - 2p + 2); differentiable as :meth:`deepinv_flows.PatchNR.grad` is.
    :raises ValueError, TypeError: for images that the prior refuses, and that are too small to have such pixels.
    """
    prior._check(y, images_only=True)
    check_autograd("PatchNR")
    margin = prior.patch_size - 1
    if not borders and min(y.shape[2:]) <= 2 * margin:
        raise ValueError(f"expected images of more than {2 * margin} pixels a side; got shape {tuple(y.shape)}")
    images = F.pad(y, [margin] * 4, mode="reflect") if borders and margin else y
    index = PatchIndex(images.shape, prior.patch_size, device=y.device)
    weight = index.per_image / prior.patch_size**2
    grad = weight * prior._over(index).grad(images)
    return grad[:, :, margin : grad.shape[2] - margin, margin : grad.shape[3] - margin]
