"""A flow on whole images as a prior."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from deepinv.optim import Prior
from torch import Tensor, nn

from .. import solvers
from .. import weights as checkpoints
from ..checks import check_autograd, check_input, positive_int
from ..flows import Conditions, Given, Reversed, as_flow, condition_list, evaluate, like_weights, nll, unwrapped
from .images import images_of


class FlowPrior(Prior):
    r"""
    Negative log-likelihood of whole images under a flow.

    .. math::

        g(x) = -\log p(x) = \tfrac12\|z\|^2 + \tfrac D2 \log 2\pi - \log|\det J_f(x)|, \qquad z = f(x)

    in nats. With ``L2(sigma=noise)`` as data fidelity, ``lambda_reg=1`` gives the maximum a posteriori estimate, and
    ``alpha=1`` makes deepinv's Langevin samplers draw from the posterior.

    :param torch.nn.Module normalizing_flow: a flow on images (N, C, H, W), such as :func:`deepinv_flows.image_flow`'s, or any
        module that :func:`deepinv_flows.as_flow` adapts.
    :param str pretrained: path of weights written by :meth:`save`, or name of shipped weights. The file holds the architecture
        too; a ``normalizing_flow`` that is also given must have the same one.
    :param bool per_dim: divide g by the number D of entries of an image.
    :param torch.Generator generator: source of samples; ``None`` is a generator of the prior's own, with a fixed seed.
    :raises ValueError: without flow and weights, for weights that cannot be used, and for a flow on vectors.
    :raises TypeError: for a prior on patches, and for a flow that is not called as ``flow(x, rev=False)``.

    Source: Asim et al., "Invertible generative models for inverse problems: mitigating representation error and dataset
    bias", ICML 2020, arXiv 1905.11672.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import FlowPrior, image_flow
    >>> prior = FlowPrior(image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4))
    >>> x = torch.rand(2, 1, 8, 8)
    >>> prior(x).shape, prior.sample(3).shape
    (torch.Size([2]), torch.Size([3, 1, 8, 8]))
    >>> torch.allclose(prior.decode(prior.encode(x)), x, atol=1e-5)
    True
    >>> model = dinv.optim.GD(data_fidelity=dinv.optim.L2(), prior=prior, lambda_reg=1e-3, stepsize=0.5, max_iter=3)
    >>> model(x, dinv.physics.Denoising()).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        normalizing_flow: nn.Module | None = None,
        pretrained: str | os.PathLike | None = None,
        *,
        per_dim: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.explicit_prior, self.per_dim = True, per_dim
        self.generator = torch.Generator() if generator is None else generator
        flow = _loaded(normalizing_flow, pretrained) if pretrained else normalizing_flow
        if flow is None:
            raise ValueError("expected a normalizing_flow or pretrained weights; got neither")
        self.normalizing_flow = as_flow(flow)
        if (dim := images_of(self.normalizing_flow).dim) is not None:
            raise ValueError(f"expected a flow on images (N, C, H, W); got one on vectors of {dim} entries")

    def extra_repr(self) -> str:
        size = getattr(unwrapped(self.normalizing_flow), "img_size", None)
        return f"per_dim={self.per_dim}" + (f", img_size={tuple(size)}" if size else "")

    @property
    def sigma_range(self) -> tuple[float, float] | None:
        """The noise level, as least and largest, that the flow has learned to remove; ``None`` for a flow of clean images."""
        flow = unwrapped(self.normalizing_flow)
        while isinstance(flow, Given | Reversed):
            flow = unwrapped(flow.flow)
        return getattr(flow, "sigma_range", None)

    def given(self, c: Tensor | Sequence[Tensor]) -> "FlowPrior":
        """
        The prior of a conditional flow with its conditions bound, for deepinv's optimizers, which do not pass conditions.

        :param torch.Tensor, list c: conditions, a list or a single one, each (B, C', H, W) or (1, C', H, W).
        :return: a prior on batches of B images, which shares its weights with this one.
        """
        return FlowPrior(Given(self.normalizing_flow, c), per_dim=self.per_dim, generator=self.generator)

    def fn(self, x: Tensor, *args, c: Conditions = None, **kwargs) -> Tensor:
        """
        Negative log-likelihood of each image.

        :param torch.Tensor x: images (B, C, H, W).
        :param torch.Tensor, list c: conditions of a conditional flow, a list or a single one, each (B, C', H, W).
        :return: (B,) in nats, including the constant; divided by D with ``per_dim``.
        :raises ValueError: for another shape, and for NaN or infinite entries.
        :raises TypeError: when x is not a real floating-point tensor of the weights' dtype.
        """
        self.check(x, c)
        return self._value(x, c)

    def _value(self, x: Tensor, c: Conditions = None) -> Tensor:
        value = nll(self.normalizing_flow, x, c=c)
        return value / x[0].numel() if self.per_dim else value

    def grad(self, x: Tensor, *args, c: Conditions = None, **kwargs) -> Tensor:
        """
        Gradient of g at images x. The tensor x itself is not changed.

        :param torch.Tensor x: images (B, C, H, W).
        :param c: conditions, as in :meth:`fn`.
        :return: tensor like x, with a graph if x requires a gradient and gradients are enabled.
        :raises RuntimeError: under :func:`torch.inference_mode`.
        """
        check_autograd("FlowPrior")
        self.check(x, c)
        return solvers.gradient(lambda x: self._value(x, c), x, self.normalizing_flow)

    def prox(
        self,
        x: Tensor,
        *args,
        gamma: float | Tensor = 1.0,
        stepsize_inter: float = 1.0,
        max_iter_inter: int = 50,
        tol_inter: float = 1e-4,
        c: Conditions = None,
        **kwargs,
    ) -> Tensor:
        r"""
        :math:`\operatorname{prox}_{\gamma g}(x)`, a local minimiser of :math:`\gamma g(u) + \frac12\|u-x\|^2`, by descent.

        Differentiable in x, gamma and the weights by the implicit function theorem.

        :param torch.Tensor x: images (B, C, H, W).
        :param float, torch.Tensor gamma: one number >= 0, or one for each image.
        :param float stepsize_inter: length of the first trial step.
        :param int max_iter_inter: largest number of steps.
        :param float tol_inter: stop when a step is shorter than this times the norm of u.
        :param c: conditions, as in :meth:`fn`.
        :return: tensor like x.
        :raises ValueError: for a gamma that is negative or not finite, and for a trial step that is not positive and finite.
        """
        self.check(x)
        gamma = solvers.gamma_like(gamma, x)

        def value_and_grad(u):
            with torch.enable_grad():
                leaf = u.detach().requires_grad_()
                value = self.fn(leaf, c=c)
                return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

        def grad(u):
            return self.grad(u, c=c)

        return solvers.prox(value_and_grad, grad, x, gamma, stepsize_inter, int(max_iter_inter), tol_inter)

    def encode(self, x: Tensor, c: Conditions = None) -> Tensor:
        """
        The latents of images.

        :param torch.Tensor x: images (B, C, H, W).
        :param c: conditions, as in :meth:`fn`.
        :return: z, (B, ...) with as many entries as x. The method ``to_levels`` of a flow that
            :func:`deepinv_flows.image_flow` made splits z into levels.
        """
        self.check(x, c)
        return evaluate(self.normalizing_flow, x, c=c)[0]

    def decode(self, z: Tensor, c: Conditions = None) -> Tensor:
        """
        The images of latents.

        :param torch.Tensor z: latents, shaped as :meth:`encode` returns them.
        :param c: conditions, as in :meth:`fn`.
        :return: images (B, C, H, W).
        """
        condition_list(c)
        return evaluate(self.normalizing_flow, z, rev=True, c=c)[0]

    def sample(
        self,
        n: int,
        img_size: Sequence[int] | None = None,
        std: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
        c: Conditions = None,
    ) -> Tensor:
        """
        Draw images from the flow.

        :param int n: number of images.
        :param tuple img_size: size of the images, (C, H, W). Flows of :func:`deepinv_flows.image_flow` know it; for others it
            must be given.
        :param float, list std: standard deviation of the latents, called temperature in Glow. Values below 1 give more typical
            images. A list holds one for each level, from the finest to the coarsest.
        :param torch.Generator generator: source of the latents; ``None`` is the generator of the prior.
        :param c: conditions of a conditional flow, each (n, C', H, W).
        :return: images (n, C, H, W).
        :raises ValueError: for a standard deviation that is negative or not finite, for an unknown size, and for a list where
            the flow has no levels or another number of them.
        """
        flow = unwrapped(self.normalizing_flow)
        img_size = getattr(flow, "img_size", None) if img_size is None else img_size
        if img_size is None:
            raise ValueError(f"expected img_size, which a {type(flow).__name__} does not know; got None")
        temperatures = _temperatures(std)
        generator, like = self.generator if generator is None else generator, like_weights(self)
        shape = (positive_int(n=n), *img_size)
        z = torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
        with torch.no_grad():
            return self.decode(_scaled(flow, z, temperatures), c)

    def save(self, path: str | os.PathLike) -> None:
        """
        Write weights and architecture to a safetensors file, which ``pretrained`` reads.

        :param str path: file to write. If writing is interrupted, an existing file stays as it was.
        :raises ValueError: for a flow that was not made by a builder of this package.
        """
        checkpoints.write(path, self.normalizing_flow, {"sigma_range": self.sigma_range})

    def check(self, x: Tensor, c: Conditions = None) -> None:
        """Refuse everything but a batch of images that the flow takes, and conditions that are not finite."""
        condition_list(c)
        found = x.shape[1:2] if torch.is_tensor(x) and x.ndim == 4 else (1,)
        channels = getattr(unwrapped(self.normalizing_flow), "img_size", found)[0]
        check_input(x, like_weights(self, x), patch_size=1, channels=channels, images_only=True)


def _temperatures(std: float | Sequence[float]) -> Tensor:
    try:
        stds = torch.as_tensor(std, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"expected std to be a number, or a list of numbers; got {std!r}") from None
    if stds.ndim > 1 or not bool((torch.isfinite(stds) & (stds >= 0)).all()):
        raise ValueError(f"expected a finite std >= 0, or a list of them; got {std}")
    return stds


def _scaled(flow: Any, z: Tensor, stds: Tensor) -> Tensor:
    """Latents times one number, or each of their levels times a number of its own."""
    flow = unwrapped(flow.flow) if isinstance(flow, Given) else flow
    if stds.ndim == 0:
        return float(stds) * z
    if not hasattr(flow, "to_levels"):
        raise ValueError(f"expected one std, as a {type(flow).__name__} does not have levels; got {stds.tolist()}")
    levels = flow.to_levels(z)
    if len(levels) != len(stds):
        raise ValueError(f"expected one std, or one for each of {len(levels)} levels; got {stds.tolist()}")
    return flow.from_levels([std * level for std, level in zip(stds.tolist(), levels)])


def _loaded(flow: nn.Module | None, pretrained: str | os.PathLike) -> nn.Module:
    """The given flow with these weights, or a new flow of the architecture in the file."""
    with checkpoints.guarded(pretrained):
        weights = checkpoints.find(pretrained)
        if flow is None:
            if weights.config is None or weights.dialect or weights.patch:
                raise checkpoints.CheckpointError(
                    "expected weights that FlowPrior.save wrote; found those of another flow, such as one on patches"
                )
            flow = checkpoints.new_flow(weights)
        checkpoints.load_into(flow, weights.state)
    unwrapped(flow).sigma_range = weights.known.get("sigma_range")
    return flow
