"""PatchNR: the negative log-likelihood of image patches under a normalizing flow, as a deepinv prior."""

import deepinv
import torch
from deepinv.optim import Prior
from torch import Tensor, nn

from .. import solvers
from ..checks import check_autograd, check_choice, check_input, positive_int, transformed, warn_outside
from ..flows import as_flow, evaluate, glow_flow, like_weights
from . import weights
from .padding import PAD_MODES, PaddedPotential, padded
from .patches import SUBSETS, PatchIndex
from .plain import check_dimension
from .potential import Asked, PatchPotential
from .subsets import Draws


class PatchNR(deepinv.optim.PatchNR):
    r"""
    Patch prior by a normalizing flow; a drop-in for :class:`deepinv.optim.PatchNR` that also takes images.

    .. math::

        g(x) = \frac1n \sum_{i=1}^{n} \Big( \tfrac12 \|f(P_i x)\|^2 - \log |\det J_f(P_i x)| \Big)

    with the overlapping patches :math:`P_i x` of the image and a flow :math:`f`. The result of ``prior(x)`` depends on x:

    - images (B, C, H, W) give (B,), the mean over the patches of each image. (deepinv's class fails for images, or takes them
      as patches (B, n, p, p). Such patches are passed as (B, n, 1, p, p) here.)
    - patches (B, n, D) or (B, n, C, p, p) give (B, n), so that ``deepinv.optim.PatchPrior(PatchNR(...))`` works.

    **Choosing** ``lambda_reg``. g is a mean, of the order of D nats, while deepinv's ``L2(sigma)`` is a sum over the
    measurements divided by :math:`2\sigma^2`. A sum over patches counts each pixel about :math:`p^2` times, so
    :math:`-\log p(x) \approx \frac{HW}{p^2} g(x)`. Beside ``L2(sigma=noise)`` start from :math:`0.2\,\frac{HW}{p^2}`
    (0.2 since neighbouring patches are not independent) and tune by factors of 2. Beside ``L2()``, whose sigma is 1,
    multiply by the variance of the noise. For Langevin sampling (``deepinv.sampling``) with ``L2(sigma=noise)`` start from
    ``alpha`` = :math:`0.6\,\frac{HW}{p^2}`, for which intervals were found to be calibrated.

    **Speed.** Flows whose parts are all known (those of our builders, FrEIA chains of the same blocks, and deepinv's) are
    evaluated without a graph, on all of torch's threads, in memory that does not grow with the image, but for up to 512 MB that
    second derivatives keep. Other flows, and those with hooks or replaced methods, are evaluated by autograd. In a loop of your
    own, weights collect gradients too unless they are frozen: ``prior.requires_grad_(False)`` saves up to a third of the time.
    :func:`torch.compile` leaves a prior as it is: it compiles the code around it, with a break of the graph at each call.

    A call never changes the flow, so that threads may share a prior. Layers whose output depends on the
    other patches of a batch (BatchNorm in training mode) are refused. ``isinstance(prior, deepinv.optim.PatchNR)`` holds.
    What is known of a training is saved with the weights: ``image_range``, the (lowest, highest) value of its images, far outside
    which the first call warns; ``sigma_range``, of the noise in them, for :class:`deepinv_flows.FlowDenoiser`; and ``effort``,
    its sizes and steps.

    :param torch.nn.Module normalizing_flow: a flow (see :mod:`deepinv_flows.flows`) on (N, D) with
        D = ``channels * patch_size**2``, or any module :func:`deepinv_flows.as_flow` adapts. ``None`` builds
        :func:`deepinv_flows.glow_flow`.
    :param str pretrained: path of a checkpoint of any dialect, an open binary file, name of shipped weights (``"gravel"``),
        deepinv's ``"PatchNR_lodopab_small2"``, or ``None``. A file that ``save`` wrote brings the sizes of its flow along.
    :param int patch_size: side p of a patch, in pixels.
    :param int channels: channels C of the images.
    :param int num_layers: number of coupling blocks of the default flow.
    :param int sub_net_size: width of the networks of the default flow.
    :param str device: device of the flow.
    :param bool, str pad: pad images by ``patch_size - 1`` pixels on each side, so that border pixels are in as many patches as
        others: a padding mode of :func:`torch.nn.functional.pad`, or ``True`` for ``"reflect"``.
    :param int n_patches: number of random patches, drawn anew at each call, to evaluate; -1 for all. Every position is equally
        likely, so that the result is an unbiased estimate of the one on all patches.
    :param int stride: step between patches, at most ``patch_size``; the last row and column are always included.
    :param torch.Generator generator: source of random patches and samples; ``None`` is a generator of the prior's own, with a
        fixed seed. torch's global random state is never used. A call that :func:`torch.utils.checkpoint.checkpoint` repeats
        inside a backward pass takes the random patches of the first call again.
    :param int chunk_size: number of patches that each thread evaluates at a time; ``None`` chooses it.
    :param str subset: ``"uniform"`` draws ``n_patches`` patches without replacement, ``"grid"`` takes about as many on a regular
        grid with a random offset, which covers the image evenly.
    :param str precision: ``"bfloat16"`` allows matrix products in this dtype, as :func:`torch.autocast` does, if the hardware has
        them (AVX512-BF16, AMX, CUDA) and only the image needs a gradient. Otherwise it does not have an effect. ``None`` is the
        dtype of the weights.
    :raises ValueError: for sizes that do not fit together, or a checkpoint that cannot be used.

    Source: Altekrueger et al., "PatchNR: learning from very few images by patch normalizing flow regularization",
    Inverse Problems 39 (2023), arXiv 2205.12021.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import PatchNR
    >>> prior = PatchNR(patch_size=6, channels=1, num_layers=2, sub_net_size=32)
    >>> prior(torch.rand(2, 1, 20, 30)).shape
    torch.Size([2])
    >>> prior(torch.rand(2, 10, 36)).shape
    torch.Size([2, 10])
    >>> physics = dinv.physics.Denoising()
    >>> model = dinv.optim.GD(data_fidelity=dinv.optim.L2(), prior=prior, lambda_reg=0.1, stepsize=0.1, max_iter=3)
    >>> model(torch.rand(1, 1, 20, 30), physics).shape
    torch.Size([1, 1, 20, 30])
    """

    save, to_deepinv_state_dict = weights.save, weights.to_deepinv_state_dict
    load_state_dict, from_checkpoint = weights.load_state_dict, classmethod(weights.from_checkpoint)

    def __init__(
        self,
        normalizing_flow: nn.Module | None = None,
        pretrained: weights.Source | None = None,
        patch_size: int = 6,
        channels: int = 1,
        num_layers: int = 5,
        sub_net_size: int = 256,
        device: str | torch.device = "cpu",
        *,
        pad: bool | str = False,
        n_patches: int = -1,
        stride: int = 1,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        subset: str = "uniform",
        precision: str | None = None,
    ):
        Prior.__init__(self)  # that of deepinv's PatchNR would draw a flow
        self.explicit_prior = True
        self.patch_size, self.channels = positive_int(patch_size=patch_size, channels=channels)
        self.pad = "reflect" if pad is True else pad
        self.n_patches, self.stride, self.chunk_size = n_patches, stride, chunk_size
        self.subset, self.precision = subset, precision
        self._check_options()
        self.generator = torch.Generator() if generator is None else generator
        self.image_range: tuple[float, float] | None = None
        self.sigma_range: tuple[float, float] | None = None
        self.effort: dict | None = None
        self._draws, self._asked, self._warned = Draws(), Asked(), False
        sizes = (num_layers, sub_net_size) if normalizing_flow is None else None
        # draws a flow also if weights will replace it, as deepinv does, so that a seeded script goes on with the same numbers
        self.normalizing_flow = as_flow(
            glow_flow(self.dim, num_layers, sub_net_size).to(device) if normalizing_flow is None else normalizing_flow
        )
        if pretrained:
            weights.load_pretrained(self, pretrained, sizes, device)
        check_dimension(self.normalizing_flow, self.dim, f"patch_size {patch_size}, channels {channels}")

    @property
    def dim(self) -> int:
        """Dimension D of a flattened patch."""
        return self.channels * self.patch_size**2

    @torch.compiler.disable
    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        r"""
        Mean negative log-likelihood of the patches of each image, or the negative log-likelihood of each patch.

        :param torch.Tensor x: images (B, C, H, W), or patches (B, n, D) or (B, n, C, p, p).
        :param args: ``g_param`` and ``reduce``, which deepinv's optimizers pass, do not have an effect.
        :return: (B,) for images, (B, n) for patches, in nats.
        :raises ValueError: for another shape, an image smaller than a patch, an empty batch, NaN or infinite entries.
        :raises TypeError: when x is not a real floating-point tensor of the weights' dtype.
        """
        self._check(x)
        images, potential = self._potential(x, "fn")
        value = potential.value(images)
        return value if x.ndim == 4 else value.view(x.shape[:2])

    @torch.compiler.disable
    def nll_map(self, x: Tensor) -> Tensor:
        r"""
        Map of the negative log-likelihoods :math:`h(P_i x)` of all patches, which shows what the prior finds unlikely.

        :param torch.Tensor x: images (B, C, H, W).
        :return: (B, H - p + 1, W - p + 1) in nats, by the upper left pixel of each patch; larger with ``pad``, for the padded
            images. It is differentiable, as ``fn`` is. ``stride`` and ``n_patches`` do not have an effect.

        >>> import torch
        >>> from deepinv_flows import PatchNR
        >>> PatchNR(patch_size=3, num_layers=1).nll_map(torch.rand(2, 1, 8, 9)).shape
        torch.Size([2, 6, 7])
        """
        self._check(x, images_only=True)
        p = self.patch_size
        patches = padded(x, p - 1, self.pad).unfold(2, p, 1).unfold(3, p, 1).permute(0, 2, 3, 1, 4, 5)
        columns, potential = self._of_patches(patches.flatten(1, 2))
        return potential.value(columns).view(patches.shape[:3])

    @torch.compiler.disable
    def grad(self, x: Tensor, *args, **kwargs) -> Tensor:
        r"""
        Gradient of g at images x, or of the sum of g over patches x; x is not changed.

        Under :func:`torch.no_grad` (as in deepinv's optimizers), or if neither x nor a weight asks for a gradient, the result
        does not have a graph. Otherwise it is differentiable in both.

        :param torch.Tensor x: images (B, C, H, W), or patches as in ``fn``.
        :return: tensor like x.
        :raises RuntimeError: under :func:`torch.inference_mode`.
        :raises ValueError, TypeError: as ``fn`` does.
        """
        self._check(x)
        check_autograd("PatchNR")
        images, potential = self._potential(x, "grad")
        return potential.grad(images).view(x.shape)

    @torch.compiler.disable
    def prox(
        self,
        x: Tensor,
        *args,
        gamma: float | Tensor = 1.0,
        stepsize_inter: float = 1.0,
        max_iter_inter: int = 50,
        tol_inter: float = 1e-4,
        **kwargs,
    ) -> Tensor:
        r"""
        :math:`\operatorname{prox}_{\gamma g}(x)`, a local minimiser u of :math:`\gamma g(u) + \frac12\|u-x\|^2`.

        It is found by descent from u = x, with steps that adapt to the curvature and are shortened until the objective falls,
        so that it cannot diverge. The result is differentiable in x, gamma and the weights by the implicit function theorem,
        which is exact at convergence: lower ``tol_inter`` for accurate derivatives.

        :param torch.Tensor x: images (B, C, H, W), or patches as in ``fn``, each of which is a problem of its own.
        :param float, torch.Tensor gamma: one number >= 0, or one for each entry of the batch.
        :param float stepsize_inter: first trial step size.
        :param int max_iter_inter: largest number of steps.
        :param float tol_inter: stop when a step is shorter than this number times the norm of u.
        :return: tensor like x.
        :raises ValueError: for a negative or infinite option, and as ``fn`` does.
        """
        self._check(x)
        check_autograd("PatchNR")
        gamma = solvers.gamma_like(gamma, x)
        images, potential = self._potential(x, "prox")
        if x.ndim != 4:
            gamma = gamma.expand(*x.shape[:2], *gamma.shape[2:]).reshape(-1, 1, 1, 1)
        options = (stepsize_inter, int(max_iter_inter), tol_inter)
        u = solvers.prox(potential.value_and_grad, potential.grad, images, gamma, *options)
        return u.view(x.shape)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """
        Draw patches from the flow.

        :param int n: number of patches.
        :param torch.Generator generator: source of the latents; ``None`` is the prior's own.
        :return: patches (n, C, p, p).

        >>> from deepinv_flows import PatchNR
        >>> PatchNR(patch_size=3, channels=2, num_layers=1).sample(5).shape
        torch.Size([5, 2, 3, 3])
        """
        like = self._like()
        generator = self.generator if generator is None else generator
        z = torch.randn(positive_int(n=n), self.dim, generator=generator, device=generator.device, dtype=like.dtype)
        with torch.no_grad():
            patches, _ = evaluate(self.normalizing_flow, z.to(like.device), rev=True)
        return patches.view(n, self.channels, self.patch_size, self.patch_size)

    def _like(self) -> Tensor:
        return like_weights(self.normalizing_flow)

    def __setstate__(self, state: dict) -> None:
        # priors that 0.1.0 pickled whole do not have these attributes
        new = dict.fromkeys(weights.KNOWN) | {"_draws": Draws(), "_asked": Asked(), "_warned": False}
        super().__setstate__(new | state)

    def extra_repr(self) -> str:
        options = ("patch_size", "channels", "pad", "n_patches", "stride", "chunk_size", "subset", "precision")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)

    def _check_options(self) -> None:
        # called at each evaluation too, as a user may set these attributes
        if self.n_patches != -1:
            positive_int(n_patches=self.n_patches)
        if positive_int(stride=self.stride) > self.patch_size:
            raise ValueError(
                f"expected stride <= patch_size = {self.patch_size}, so that every pixel is in a patch; got {self.stride}"
            )
        if self.chunk_size is not None:
            positive_int(chunk_size=self.chunk_size)
        check_choice("pad", self.pad, PAD_MODES)
        check_choice("subset", self.subset, SUBSETS)
        check_choice("precision", self.precision, (None, "bfloat16"))

    def _check(self, x: Tensor, images_only: bool = False) -> None:
        self._check_options()
        check_input(x, self._like(), self.patch_size, self.channels, images_only)
        if self.image_range is not None and not self._warned and not transformed(x):
            self._warned = warn_outside(x, self.image_range)

    def _potential(self, x: Tensor, method: str) -> tuple[Tensor, PatchPotential | PaddedPotential]:
        """Images, and the potential of their patches; its values and gradients are those of x."""
        if x.ndim != 4:
            return self._of_patches(x)
        return x, PaddedPotential(self._over(self._index(x, method)), self.patch_size - 1, self.pad)

    def _of_patches(self, x: Tensor) -> tuple[Tensor, PatchPotential]:
        """Each patch as an image of D channels and one pixel."""
        columns = x.reshape(-1, self.dim, 1, 1)
        return columns, PatchNR._over(self, PatchIndex(columns.shape, 1, device=x.device))

    def _over(self, index: PatchIndex) -> PatchPotential:
        return PatchPotential(self.normalizing_flow, index, self.chunk_size, self.precision, self._asked)

    def _index(self, x: Tensor, method: str) -> PatchIndex:
        margin = 2 * (self.patch_size - 1) if self.pad else 0
        shape = (*x.shape[:2], *(side + margin for side in x.shape[2:]))
        source = self.generator if self.n_patches == -1 else self._draws.source(self.generator, method, x)
        return PatchIndex(shape, self.patch_size, self.stride, self.n_patches, source, x.device, self.subset)
