"""Recovery of images in the latent space of a flow or another generator."""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from deepinv.loss.metric import PSNR
from deepinv.models.base import Reconstructor
from deepinv.optim import L2
from deepinv.utils import TensorList
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import check_choice, positive_int
from ..flows import as_flow, evaluate, like_weights
from ..solvers import finite, first_order, lbfgs, per_sample

PENALTIES = ("norm", "squared")
# optimizers that treat every entry by itself, with a step for latents of variance 1
FIRST_ORDER = {
    "adam": (torch.optim.Adam, 0.05),
    "adamax": (torch.optim.Adamax, 0.05),
    "nadam": (torch.optim.NAdam, 0.05),
    "rmsprop": (torch.optim.RMSprop, 0.01),
    "sgd": (torch.optim.SGD, 1e-3),
}
INITS = ("zero", "random", "pinv")


class LatentMAP(Reconstructor):
    r"""
    Recovery in the latent space of a generator G, such as an invertible flow.

    .. math::

        \hat x = G(\hat z), \qquad \hat z \in \arg\min_z \; f(G(z), y, A) + \lambda\, r(z)

    An invertible G can represent every image, so images unlike those it was trained on are recovered too. Started at z = 0,
    the optimizer goes to likely images first, and needs no penalty when there is little noise.

    Each image of a batch is a problem of its own: its steps, line search and end do not depend on the others'. A step to
    where the objective is not finite is rejected, and what is returned is the best iterate.

    :param torch.nn.Module flow: a flow, run in reverse as G; a :class:`deepinv_flows.FlowPrior`; or any generator, z to images.
    :param deepinv.optim.DataFidelity data_fidelity: f, with a value for each image; ``None`` is ``L2()``,
        :math:`\frac12\|Ax-y\|^2`.
    :param float lambda_reg: weight :math:`\lambda \ge 0`; with ``L2(sigma=noise)`` and ``"squared"``, 1 is the most likely z
        given y.
    :param str penalty: ``"norm"``, :math:`r(z) = \|z\|`, as published, or ``"squared"``, :math:`\frac12\|z\|^2`.
    :param str optimizer: ``"lbfgs"``, or one of torch's that treat each entry by itself: ``"adam"``, ``"adamax"``, ``"nadam"``,
        ``"rmsprop"``, ``"sgd"``.
    :param float stepsize: of the optimizer; for L-BFGS the first trial step, as a multiple of the quasi-Newton step. ``None``
        is 1 for L-BFGS, and for others what suits latents of variance 1.
    :param int max_iter: bound on the number of iterations. One of L-BFGS takes one evaluation of G and its gradient, or a
        few.
    :param str, torch.Tensor, Callable init: where to start: ``"zero"``; ``"random"``, normal of standard deviation
        ``init_std``; ``"pinv"``, the latent of ``physics.A_dagger(y)``; latents (B, ...) or (1, ...); or a function of y and
        physics that returns latents. Images whose objective is not finite there start at zero, with a warning.
    :param float init_std: standard deviation of a random start.
    :param bool early_stop: end the search for an image once it has converged.
    :param float thres_conv: it has when an iteration lowers the objective (of L-BFGS; else, moves z) by less than this,
        relatively; or (of L-BFGS) when the objective is below the square of this times what it was.
    :param int history: steps that L-BFGS remembers; each takes the memory of two latents.
    :param tuple latent_shape: shape of a latent; needed for a generator that is no flow, unless ``init`` tells.
    :param torch.Generator generator: source of random starts; ``None`` is one of its own, with a fixed seed.
    :param bool show_progress_bar: show the iterations.
    :raises ValueError: for an unknown choice, or a number out of range.

    Sources: Asim et al., "Invertible generative models for inverse problems", ICML 2020, arXiv 1905.11672; for generators that
    are not invertible Bora et al., "Compressed sensing using generative models", ICML 2017, arXiv 1703.03208.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import LatentMAP, image_flow
    >>> x = torch.rand(2, 1, 8, 8)
    >>> physics = dinv.physics.Inpainting((1, 8, 8), mask=0.5)
    >>> model = LatentMAP(image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4), max_iter=30)
    >>> x_net = model(physics(x), physics)
    >>> torch.allclose(physics(x_net), physics(x), atol=0.05)
    True
    """

    def __init__(
        self,
        flow: nn.Module,
        data_fidelity: nn.Module | None = None,
        lambda_reg: float | Tensor = 0.0,
        penalty: str = "norm",
        optimizer: str = "lbfgs",
        stepsize: float | None = None,
        max_iter: int = 100,
        init: str | Tensor | Callable = "zero",
        init_std: float = 1.0,
        early_stop: bool = True,
        thres_conv: float = 1e-6,
        *,
        history: int = 20,
        latent_shape: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        show_progress_bar: bool = False,
    ):
        super().__init__()
        if not isinstance(flow, nn.Module):
            raise TypeError(f"expected a torch.nn.Module as flow or generator; got {type(flow).__name__}")
        self.flow = as_flow(getattr(flow, "normalizing_flow", flow))
        self.invertible = "rev" in inspect.signature(self.flow.forward).parameters
        self.data_fidelity = L2() if data_fidelity is None else data_fidelity
        check_choice("penalty", penalty, PENALTIES)
        check_choice("optimizer", optimizer, ("lbfgs", *FIRST_ORDER))
        self.lambda_reg, self.penalty, self.optimizer = lambda_reg, penalty, optimizer
        default = 1.0 if optimizer == "lbfgs" else FIRST_ORDER[optimizer][1]
        self.stepsize = default if stepsize is None else stepsize
        self.max_iter, self.init, self.init_std = positive_int(max_iter=max_iter), _known(init), init_std
        self.history = positive_int(history=history)
        self.early_stop, self.thres_conv, self.latent_shape = early_stop, thres_conv, latent_shape
        for name, value in dict(stepsize=self.stepsize, init_std=init_std).items():
            if not 0 < value < math.inf:
                raise ValueError(f"expected a finite {name} > 0; got {value}")
        _check_weight(lambda_reg)
        self.generator = torch.Generator() if generator is None else generator
        self.show_progress_bar = show_progress_bar

    def forward(
        self,
        y: Tensor,
        physics,
        init: str | Tensor | Callable | None = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        **kwargs,
    ) -> Tensor | tuple[Tensor, dict[str, list[list[float]]]]:
        """
        Recover images from their measurements.

        :param torch.Tensor y: measurements (B, ...), or a list of them from stacked physics.
        :param deepinv.physics.Physics physics: of the measurements.
        :param init: in place of that of the constructor.
        :param torch.Tensor x_gt: true images, for the PSNR.
        :param bool compute_metrics: also return ``cost``, ``residual`` and, with ``x_gt``, ``psnr`` of each image after each
            iteration, as deepinv's optimizers do.
        :return: images (B, C, H, W), without a graph; with ``compute_metrics`` a tuple of images and metrics.
        :raises ValueError: when y is not finite, or the objective is not where the search starts or, with the iteration, not
            any more where it was.
        """
        for part in _parts(y):
            if not bool(torch.isfinite(part).all()):
                raise ValueError(f"the measurements of shape {tuple(part.shape)} hold NaN or infinite entries")
        _check_weight(self.lambda_reg, len(_parts(y)[0]))
        with torch.no_grad():
            z = self._start(y, physics, self.init if init is None else _known(init))
            z = self._first_finite(z, y, physics)
            metrics = _Metrics(self.generate, z, x_gt) if compute_metrics else None
            with tqdm(total=self.max_iter, disable=not self.show_progress_bar, desc="LatentMAP") as bar:

                def callback(z, value):
                    bar.update()
                    if metrics is not None:
                        metrics.update(z, value)

                z = self._minimise(lambda z: self.value_and_grad(z, y, physics), z, callback)
            x = self.generate(z)
        return (x, metrics.values) if compute_metrics else x

    def generate(self, z: Tensor) -> Tensor:
        """
        :param torch.Tensor z: latents (B, ...).
        :return: the images G(z).
        """
        return evaluate(self.flow, z, rev=True)[0] if self.invertible else self.flow(z)

    def value_and_grad(self, z: Tensor, y: Tensor, physics) -> tuple[Tensor, Tensor]:
        """
        Objective and its gradient in the latents.

        :param torch.Tensor z: latents (B, ...).
        :return: (B,), and a tensor like z.
        """
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = self.data_fidelity(self.generate(leaf), y, physics)
            if value.shape != z.shape[:1]:
                raise ValueError(f"expected a data fidelity of shape ({len(z)},); got {tuple(value.shape)}")
            length = torch.linalg.vector_norm(leaf.flatten(1), dim=1)
            penalty = length if self.penalty == "norm" else 0.5 * length**2
            value = value + torch.as_tensor(self.lambda_reg, dtype=z.dtype, device=z.device).reshape(-1) * penalty
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    def _minimise(self, value_and_grad, z, callback):
        options = dict(max_iter=self.max_iter, tol=self.thres_conv if self.early_stop else 0.0, callback=callback)
        if self.optimizer == "lbfgs":
            return lbfgs(value_and_grad, z, step=self.stepsize, history=self.history, **options)
        kind, _ = FIRST_ORDER[self.optimizer]
        return first_order(value_and_grad, z, lambda params: kind(params, lr=self.stepsize), **options)

    def _start(self, y: Tensor, physics, init) -> Tensor:
        batch, like = len(_parts(y)[0]), like_weights(self.flow, _parts(y)[0].real)
        if callable(init) or torch.is_tensor(init):
            z = init(y, physics) if callable(init) else init
            if len(z) not in (1, batch):
                raise ValueError(f"expected 1 or {batch} initial latents; got shape {tuple(z.shape)}")
            return z.detach().to(like).expand(batch, *z.shape[1:]).contiguous()
        if init == "pinv":
            if not self.invertible:
                raise ValueError(
                    f'init="pinv" needs the inverse of G, which a {type(self.flow).__name__} does not have'
                )
            return evaluate(self.flow, physics.A_dagger(y).to(like))[0]
        shape = (batch, *self._latent_shape(y, physics))
        if init == "zero":
            return like.new_zeros(shape)
        noise = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=like.dtype)
        return self.init_std * noise.to(like.device)

    def _latent_shape(self, y: Tensor, physics) -> Sequence[int]:
        if self.latent_shape is not None:
            return self.latent_shape
        known = getattr(self.flow, "img_size", None)
        if known is not None:
            return known
        if not self.invertible:
            raise ValueError("expected latent_shape for a generator that is no flow; got None")
        x = physics.A_adjoint(y)
        return evaluate(self.flow, torch.zeros_like(x.real))[0].shape[1:]

    def _first_finite(self, z: Tensor, y: Tensor, physics) -> Tensor:
        """z, or 0 for samples where the objective is not finite at z."""
        good = finite(*self.value_and_grad(z, y, physics))
        if good.all():
            return z
        z = torch.where(per_sample(good, z), z, torch.zeros_like(z))
        bad = (~finite(*self.value_and_grad(z, y, physics))).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the objective of images {bad} of the batch is not finite where the search starts, nor at z = 0"
            )
        moved = (~good).nonzero().flatten().tolist()
        warnings.warn(f"the objective of images {moved} of the batch is not finite at their start: z = 0", stacklevel=5)
        return z


class _Metrics:
    """What deepinv's optimizers record, under the same names."""

    def __init__(self, generate: Callable[[Tensor], Tensor], z: Tensor, x_gt: Tensor | None):
        self.generate, self.x, self.x_gt = generate, generate(z), x_gt
        self.values = {name: [[] for _ in z] for name in ("psnr", "cost", "residual")}
        self._append("psnr", self._psnr(self.x))

    def update(self, z: Tensor, value: Tensor) -> None:
        x = self.generate(z)
        self._append("residual", ((x - self.x).flatten(1).norm(dim=1) / (x.flatten(1).norm(dim=1) + 1e-6)).tolist())
        self._append("cost", value.tolist())
        self._append("psnr", self._psnr(x))
        self.x = x

    def _psnr(self, x: Tensor) -> list[float]:
        return [] if self.x_gt is None else PSNR()(x, self.x_gt).tolist()

    def _append(self, name: str, values: list[float]) -> None:
        for history, value in zip(self.values[name], values):
            history.append(value)


def _parts(y: Tensor | TensorList) -> list[Tensor]:
    """Measurements of each operator of a stack, or of the only one."""
    return list(y.x) if isinstance(y, TensorList) else [y]


def _known(init):
    if not (torch.is_tensor(init) or callable(init)):
        check_choice("init", init, INITS)
    return init


def _check_weight(lambda_reg: float | Tensor, batch: int | None = None) -> None:
    weight = torch.as_tensor(lambda_reg)
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError(f"expected a finite lambda_reg >= 0; got {lambda_reg}")
    if batch is not None and weight.numel() not in (1, batch):
        raise ValueError(f"expected one lambda_reg, or one for each of {batch} images; got {tuple(weight.shape)}")
