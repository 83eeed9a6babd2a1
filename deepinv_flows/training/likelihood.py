r"""
Maximum-likelihood training of flows by :class:`deepinv.Trainer`.

.. math::

    \min_\theta \; \mathbb{E}_x\big[ -\log p_\theta(x + u) \big], \qquad
    -\log p_\theta(x) = \tfrac12\|z\|^2 + \tfrac D2 \log 2\pi - \log|\det J(x)|, \quad (z, \log|\det J|) = f_\theta(x)

with uniform noise u as wide as a grey level. Without it, the likelihood of a flow on quantised images is not bounded.
"""

import functools
import math
from collections.abc import Sequence

import torch
from deepinv.loss import Loss
from deepinv.loss.metric import Metric
from deepinv.models.base import Reconstructor
from deepinv.physics import Physics
from torch import Tensor, nn

from ..flows import as_flow, nll
from ..patchnr import Asked, patch_nll
from .conditioning import conditions_of
from .streams import derived


class FlowModel(Reconstructor):
    r"""
    A flow as a model that :class:`deepinv.Trainer` can train: it maps samples to their negative log-likelihoods.

    :param torch.nn.Module flow: any flow, on patches or on images, or a prior that holds one.
    :param float dequantise: width of the uniform noise added to the samples, in the unit of the samples; 1/255 for 8-bit images
        in [0, 1], 0 for no noise.
    :param torch.Generator generator: source of the noise; ``None`` is a generator of the model's own, with a fixed seed.
    :param bool compile: whether to compile the flow by :func:`torch.compile`, which takes half a minute and a C++ compiler.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import BitsPerDim, FlowModel, FlowNLL, glow_flow
    >>> x = torch.randn(64, 4)
    >>> samples = [{"x": x_i, "y": x_i} for x_i in x]
    >>> model = FlowModel(glow_flow(4, num_layers=1, sub_net_size=8), dequantise=0)
    >>> trainer = dinv.Trainer(
    ...     model, dinv.physics.Denoising(), torch.optim.Adam(model.parameters()),
    ...     torch.utils.data.DataLoader(samples, batch_size=32), epochs=1, losses=FlowNLL(), metrics=BitsPerDim(),
    ...     save_path=None, device="cpu", verbose=False)
    >>> model = trainer.train()
    """

    def __init__(
        self,
        flow: nn.Module,
        dequantise: float = 1 / 255,
        generator: torch.Generator | None = None,
        compile: bool = False,
    ):
        super().__init__()
        self.compile_flow, self.asked = compile, Asked(weights=True)
        if dequantise < 0:
            raise ValueError(f"expected a width of the dequantisation noise >= 0; got {dequantise}")
        self.flow, self.dequantise = as_flow(getattr(flow, "normalizing_flow", flow)), dequantise
        self.generator = torch.Generator() if generator is None else generator

    def forward(
        self, y: Tensor, physics: Physics | None = None, c: Tensor | Sequence[Tensor] | None = None, **kwargs
    ) -> Tensor:
        """
        Negative log-likelihoods of samples.

        :param torch.Tensor y: samples (N, D) or (N, C, H, W).
        :param deepinv.physics.Physics physics: holds the conditions in a training by :func:`deepinv_flows.fit_flow`; not used
            otherwise.
        :param torch.Tensor, list c: conditions of a conditional flow, a list or a single one.
        :return: (N,) in nats, including the constant D/2 log(2 pi).
        :raises ValueError: for samples that are not finite floating-point numbers.
        """
        if not y.is_floating_point() or not bool(torch.isfinite(y.detach()).all()):
            raise ValueError(f"expected finite floating-point samples; got {y.dtype} of shape {tuple(y.shape)}")
        if self.dequantise:
            noise = torch.rand(y.shape, generator=derived(self.generator, y.device), device=y.device, dtype=y.dtype)
            y = y + self.dequantise * (noise - 0.5)
        c = conditions_of(physics) if c is None else c
        if y.ndim == 2 and c is None and not self.compile_flow:
            return patch_nll(self.flow, y, self.asked)
        return (_compiled() if self.compile_flow else nll)(self.flow, y, c=c)


@functools.cache
def _compiled():
    return torch.compile(nll)


class FlowNLL(Loss):
    """
    Negative log-likelihood as a loss of deepinv: it returns the output of :class:`deepinv_flows.FlowModel`.

    >>> import torch
    >>> from deepinv_flows import FlowNLL
    >>> FlowNLL()(x_net=torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """

    unit = "nats"

    def forward(self, x_net: Tensor, *args, **kwargs) -> Tensor:
        """
        The loss.

        :param torch.Tensor x_net: output of :class:`deepinv_flows.FlowModel`, (N,).
        :return: ``x_net``, (N,).
        :raises ValueError: for other shapes, such as the images of a reconstruction network.
        """
        return _check_nll(x_net)


class BitsPerDim(Metric):
    r"""
    Bits per dimension of quantised data under a flow, :math:`\frac{-\log_2 p(x)}{D} - \log_2 b` for grey levels at distance b.

    :param float bin_width: distance b of two grey levels; 1/255 for 8-bit images in [0, 1]. With 1 the metric is that of
        continuous data.

    >>> import torch
    >>> from deepinv_flows import BitsPerDim
    >>> BitsPerDim(bin_width=1 / 4)(torch.tensor([0.0]), torch.rand(1, 36))
    tensor([2.])
    """

    def __init__(self, bin_width: float = 1 / 255, **kwargs):
        super().__init__(**kwargs)
        self.bin_width = bin_width

    def metric(self, x_net: Tensor, x: Tensor, *args, **kwargs) -> Tensor:
        """
        The metric.

        :param torch.Tensor x_net: output of :class:`deepinv_flows.FlowModel`, (N,).
        :param torch.Tensor x: the samples, (N, D) or (N, C, H, W).
        :return: bits per dimension, (N,).
        """
        return _check_nll(x_net) / (x[0].numel() * math.log(2)) - math.log2(self.bin_width)


def _check_nll(x_net: Tensor) -> Tensor:
    if x_net.ndim != 1:
        raise ValueError(f"expected the (N,) negative log-likelihoods of a FlowModel; got shape {tuple(x_net.shape)}")
    return x_net
