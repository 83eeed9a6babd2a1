"""Splitting masks for which deepinv does not have a generator."""

from contextlib import contextmanager

import torch
from deepinv.physics.generator import BernoulliSplittingMaskGenerator, PhysicsGenerator
from torch import Tensor


class LineSplittingMaskGenerator(BernoulliSplittingMaskGenerator):
    r"""
    Splits whole lines of the measurements at random, such as the angles of a sinogram or the columns of a k-space.

    Of the lines :math:`y_{\cdot,\dots,j}` that hold observed entries, the fraction ``split_ratio`` goes to :math:`A_1`, always at
    least one line and never all of them.

    Source: Noise2Inverse splits projections by their angles in this way (Hendriksen, Pelt, Batenburg, arXiv 2001.11801).

    :param tuple img_size: shape of the measurements without batch, (C, N, A) for :class:`deepinv.physics.Tomography` with N
        detectors and A angles.
    :param float split_ratio: fraction of the lines kept, in (0, 1).
    :param int dim: dimension of ``img_size`` along which the lines are numbered; -1 for tomography.
    :param kwargs: ``device, dtype, rng`` of :class:`deepinv.physics.generator.BernoulliSplittingMaskGenerator`.
    :raises ValueError: for a ratio outside (0, 1).

    >>> from deepinv_flows import LineSplittingMaskGenerator
    >>> mask = LineSplittingMaskGenerator((1, 2, 4), split_ratio=0.5).step(batch_size=1)["mask"]
    >>> mask.shape, mask.sum(-1), bool((mask[..., 0, :] == mask[..., 1, :]).all())
    (torch.Size([1, 1, 2, 4]), tensor([[[2., 2.]]]), True)
    """

    def __init__(self, img_size: tuple[int, ...], split_ratio: float, dim: int = -1, **kwargs):
        if not 0 < split_ratio < 1:
            raise ValueError(f"expected a split_ratio in (0, 1); got {split_ratio}")
        super().__init__(img_size, split_ratio, **kwargs)
        self.dim = dim

    def batch_step(self, input_mask: Tensor | None = None, img_size: tuple | None = None) -> Tensor:
        """
        One splitting mask, which deepinv calls for each sample.

        :param torch.Tensor input_mask: mask of the observed entries, of the shape ``img_size``; ``None`` for all of them.
        :param tuple img_size: size that replaces the last two dimensions.
        :return: the mask, without batch.
        """
        if input_mask is None or input_mask.numel() == 1:
            shape = self.img_size if img_size is None else (*self.img_size[:-2], *img_size[-2:])
            input_mask = torch.ones(shape, **self.factory_kwargs)
        lines = input_mask.movedim(self.dim, 0).flatten(1).any(1).nonzero()[:, 0]
        kept = min(max(round(self.split_ratio * len(lines)), 1), len(lines) - 1)
        order = torch.randperm(len(lines), generator=self.rng, device=self.device).to(lines.device)
        mask = torch.zeros_like(input_mask)
        return mask.index_copy(self.dim, lines[order[:kept]], input_mask.index_select(self.dim, lines[order[:kept]]))


@contextmanager
def sized(generator: PhysicsGenerator, observed: Tensor | None):
    """
    Context in which a generator made for the shape of the measurements draws masks of the shape of the operator's mask.

    The measurements (C, N, H, W) of N coils have one dimension more than the mask of their operator.

    :param torch.Tensor observed: mask of the operator, (B, ...), which may lack the dimension of the coils.
    :raises ValueError: for a generator of masks with fewer dimensions than the mask of the operator.
    """
    size = getattr(generator, "img_size", None)
    if size is None or observed is None or len(size) == observed.ndim - 1:
        yield
        return
    if len(size) < observed.ndim - 1:
        raise ValueError(
            f"expected masks of the shape of the operator's own, {tuple(observed.shape[1:])}; got img_size={tuple(size)}"
        )
    generator.img_size = tuple(observed.shape[1:])
    try:
        yield
    finally:
        generator.img_size = size
