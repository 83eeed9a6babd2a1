"""Recovery of images in the latent space of a flow or another generator."""

import math
from collections.abc import Callable, Sequence

import torch
from deepinv.models.base import Reconstructor
from deepinv.optim import L2
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import check_autograd, check_choice, positive_int
from ..flows import Conditions, ImageGenerator, like_weights
from ..solvers import Objective, first_order, lbfgs
from .images import images_of
from .measurements import as_physics_takes, check_measurements, check_physics, fidelity_of_each, parts
from .metrics import Metrics
from .start import first_finite, known_init, start

PENALTIES = ("norm", "squared")
# optimizers that treat every entry by itself, with a step for latents of variance 1
FIRST_ORDER = {
    "adam": (torch.optim.Adam, 0.05),
    "adamax": (torch.optim.Adamax, 0.05),
    "nadam": (torch.optim.NAdam, 0.05),
    "rmsprop": (torch.optim.RMSprop, 0.01),
    "sgd": (torch.optim.SGD, 1e-3),
}


class LatentMAP(Reconstructor):
    r"""
    Recovery in the latent space of a generator G, such as an invertible flow.

    .. math::

        \hat x = G(\hat z), \qquad \hat z \in \arg\min_z \; f(G(z), y, A) + \lambda\, r(z)

    An invertible G can represent every image, so images unlike those it was trained on are recovered too. Started at z = 0,
    the optimizer goes to likely images first, and needs no penalty when there is little noise.

    Each image of a batch is a problem of its own: its steps, line search and end do not depend on the others'. A step to
    where the objective is not finite is rejected, and what is returned is the best iterate. The units of y, A and f do not
    matter to any optimizer but ``"sgd"``, whose step is ``stepsize`` times the gradient.

    **Physics.** Any of deepinv's that takes the images that G makes: nonlinear ones, those whose measurements or images are
    complex, and stacks, of which each operator has its own data fidelity, or all the same. Images for MRI have two channels, the
    real and the imaginary part. Not ``Haze``, which takes an image with its depth and light, and, with a flow on images
    (N, C, H, W), not ``DynamicMRI`` and ``SequentialMRI``, whose images have a time axis. ``SinglePhotonLidar`` of deepinv 0.5.0
    measures one image at a time.

    **Conditional flows**, p(x | c), take ``c``; as a function of y and physics, such as
    ``lambda y, physics: physics.A_dagger(y)``, it makes a posterior flow p(x | y) of one that was trained on such pairs.

    :param torch.nn.Module flow: a flow, run in reverse as G; a :class:`deepinv_flows.FlowPrior`; or any generator, z to images.
        Also one compiled by :func:`torch.compile` or in ``DataParallel``.
    :param deepinv.optim.DataFidelity data_fidelity: f, with a value for each image; ``None`` is ``L2()``,
        :math:`\frac12\|Ax-y\|^2`. Of stacked physics it is summed over the operators, unless it is a
        ``StackedPhysicsDataFidelity``.
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
    :param float thres_conv: an image has converged when an iteration lowers its objective by less than this times the objective,
        or to less than the square of this times the objective at the start (``"lbfgs"``); or when an iteration moves z by less
        than this times its length (the other optimizers).
    :param int history: steps that L-BFGS remembers; each takes the memory of two latents.
    :param tuple latent_shape: shape of a latent; needed for a generator that is not a flow, unless ``init`` tells.
    :param torch.Tensor, list, Callable c: conditions of a conditional flow, or the only one, each (B, C', H, W); or a function
        of y and physics that returns them.
    :param torch.Generator generator: source of random starts; ``None`` is one of its own, with a fixed seed.
    :param bool show_progress_bar: show the iterations.
    :raises ValueError: for an unknown choice, or a number out of range.
    :raises TypeError: for what is not a flow or generator, for a prior on patches, and for a flow that is called in another way
        than ``flow(x, rev=False)``.

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

    c: Conditions | Callable = None  # objects that 0.1.0 pickled have none

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
        c: Conditions | Callable = None,
        generator: torch.Generator | None = None,
        show_progress_bar: bool = False,
    ):
        super().__init__()
        self.flow = images_of(flow).module
        self.data_fidelity = L2() if data_fidelity is None else data_fidelity
        check_choice("penalty", penalty, PENALTIES)
        check_choice("optimizer", optimizer, ("lbfgs", *FIRST_ORDER))
        self.lambda_reg, self.penalty, self.optimizer = lambda_reg, penalty, optimizer
        default = 1.0 if optimizer == "lbfgs" else FIRST_ORDER[optimizer][1]
        self.stepsize = default if stepsize is None else stepsize
        self.max_iter, self.history = positive_int(max_iter=max_iter, history=history)
        self.init, self.init_std = known_init(init), init_std
        self.early_stop, self.thres_conv, self.latent_shape = early_stop, thres_conv, latent_shape
        for name, value in dict(stepsize=self.stepsize, init_std=init_std).items():
            if not 0 < value < math.inf:
                raise ValueError(f"expected a finite {name} > 0; got {value}")
        _check_weight(lambda_reg)
        self.c = c
        self.generator = torch.Generator() if generator is None else generator
        self.show_progress_bar = show_progress_bar

    def extra_repr(self) -> str:
        init = self.init if isinstance(self.init, str) else type(self.init).__name__
        names = ("lambda_reg", "penalty", "optimizer", "stepsize", "max_iter", "thres_conv", "history", "latent_shape")
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in names), f"init={init!r}"])

    @property
    def images(self) -> ImageGenerator:
        """The flow as the generator G."""
        known = self.__dict__.get("_images")
        if known is None or known.module is not self.flow:
            known = self.__dict__["_images"] = ImageGenerator(self.flow)
        return known

    def forward(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        init: str | Tensor | Callable | None = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        c: Conditions | Callable = None,
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
        :param c: conditions in place of those of the constructor.
        :return: images (B, C, H, W), without a graph; with ``compute_metrics`` a tuple of images and metrics.
        :raises ValueError: when y is empty or not finite, or not what physics makes of G's images; when the objective is not
            finite where the search starts or, with the iteration, no longer where it was.
        :raises TypeError: when y is not in the precision of the flow's weights.
        :raises RuntimeError: under :func:`torch.inference_mode`.
        """
        with torch.no_grad():
            value_and_grad, z, generate = self.problem(y, physics, init, c)
            metrics = Metrics(generate, z, x_gt) if compute_metrics else None
            with tqdm(total=self.max_iter, disable=not self.show_progress_bar, desc="LatentMAP") as bar:

                def callback(z, value):
                    bar.update()
                    if metrics is not None:
                        metrics.update(z, value)

                z = self.minimise(value_and_grad, z, callback)
            x = generate(z)
        return x if metrics is None else (x, metrics.values)

    def problem(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        init: str | Tensor | Callable | None = None,
        c: Conditions | Callable = None,
    ) -> tuple[Objective, Tensor, Callable[[Tensor], Tensor]]:
        """
        The problem that measurements pose, checked; the parameters are those of the call.

        :return: the objective and its gradient as a function of z; latents to start from; and G at the conditions.
        """
        check_autograd("LatentMAP")
        check_measurements(y, like_weights(self.flow, parts(y)[0].real if torch.is_tensor(parts(y)[0]) else None))
        _check_weight(self.lambda_reg, len(parts(y)[0]))
        c = self.c if c is None else c
        conditions: Conditions = c(y, physics) if callable(c) else c

        def value_and_grad(z):
            return self.value_and_grad(z, y, physics, conditions)

        def generate(z):
            return self.generate(z, conditions)

        with torch.no_grad():
            z = start(self, y, physics, self.init if init is None else known_init(init), conditions)
            check_physics(generate(z), y, physics)
            return value_and_grad, first_finite(value_and_grad, z), generate

    def generate(self, z: Tensor, c: Conditions = None) -> Tensor:
        """
        :param torch.Tensor z: latents (B, ...).
        :param torch.Tensor, list c: conditions of a conditional flow, or the only one.
        :return: the images G(z).
        """
        return self.images.decode(z, c)

    def value_and_grad(
        self, z: Tensor, y: Tensor | TensorList, physics: Physics, c: Conditions = None
    ) -> tuple[Tensor, Tensor]:
        """
        Objective and its gradient in the latents.

        :param torch.Tensor z: latents (B, ...).
        :param torch.Tensor y: measurements (B, ...), or a list of them from stacked physics.
        :param deepinv.physics.Physics physics: of the measurements.
        :param torch.Tensor, list c: conditions of a conditional flow, or the only one.
        :return: (B,), and a tensor like z.
        """
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = self.objective(leaf, y, physics, c)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    def objective(self, z: Tensor, y: Tensor | TensorList, physics: Physics, c: Conditions = None) -> Tensor:
        """
        The objective, differentiable as often as G and the data fidelity are; the parameters are those of :meth:`value_and_grad`.

        :return: (B,)
        """
        x = as_physics_takes(self.generate(z, c), physics)
        value = fidelity_of_each(self.data_fidelity, physics)(x, y, physics)
        if value.shape != z.shape[:1]:
            raise ValueError(f"expected a data fidelity of shape ({len(z)},); got {tuple(value.shape)}")
        length = torch.linalg.vector_norm(z.flatten(1), dim=1)
        penalty = length if self.penalty == "norm" else 0.5 * length**2
        return value + torch.as_tensor(self.lambda_reg, dtype=z.dtype, device=z.device).reshape(-1) * penalty

    def minimise(
        self, value_and_grad: Objective, z: Tensor, callback: Callable[[Tensor, Tensor], None] = lambda z, value: None
    ) -> Tensor:
        """
        :param Callable value_and_grad: an objective and its gradient, as :meth:`problem` returns it.
        :param torch.Tensor z: latents to start from, (B, ...).
        :param Callable callback: is shown latents and values after each iteration.
        :return: the latents of the least value found for each image.
        """
        options = dict(max_iter=self.max_iter, tol=self.thres_conv if self.early_stop else 0.0, callback=callback)
        if self.optimizer == "lbfgs":
            return lbfgs(value_and_grad, z, step=self.stepsize, history=self.history, **options)
        kind, _ = FIRST_ORDER[self.optimizer]
        options["any_unit"] = kind is not torch.optim.SGD
        return first_order(value_and_grad, z, lambda params: kind(params, lr=self.stepsize), **options)


def _check_weight(lambda_reg: float | Tensor, batch: int | None = None) -> None:
    weight = torch.as_tensor(lambda_reg)
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError(f"expected a finite lambda_reg >= 0; got {lambda_reg}")
    if batch is not None and weight.numel() not in (1, batch):
        raise ValueError(f"expected one lambda_reg, or one for each of {batch} images; got {tuple(weight.shape)}")
