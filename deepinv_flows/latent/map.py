"""Recovery of images in the latent space of a flow or another generator."""

import math
from collections.abc import Callable, Sequence

import torch
from deepinv.models.base import Reconstructor
from deepinv.optim import L2
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor, nn

from ..checks import check_autograd, check_choice, positive_int
from ..console import Console
from ..flows import Conditions, ImageGenerator, like_weights
from ..solvers import Objective, first_order, lbfgs
from .images import images_of
from .measurements import as_physics_takes, check_measurements, check_physics, fidelity_of_each, parts
from .metrics import Metrics
from .start import first_finite, known_init, start

PENALTIES = ("norm", "squared")
# torch's optimizers that update every entry on its own, each with a step size for latents of variance 1
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
    the optimizer reaches likely images first, and needs no penalty when there is little noise.

    Each image of a batch is a problem of its own: its steps, its line search and its stopping do not depend on the other images.
    A step to where the objective is not finite is rejected, and the best iterate is returned. The units of y, A and f do not
    matter, except to ``"sgd"``, whose step is ``stepsize`` times the gradient.

    **Physics.** LatentMAP takes every physics of deepinv that can measure the images of G: nonlinear ones, those whose
    measurements or images are complex, and stacks, with one data fidelity for all operators or one for each. Images for MRI have
    two channels, the real and the imaginary part. LatentMAP does not take ``Haze``, which measures an image together with its
    depth and light; nor, with a flow on images (N, C, H, W), ``DynamicMRI`` and ``SequentialMRI``, whose images have a time axis.
    ``SinglePhotonLidar`` of deepinv 0.5.0 measures one image at a time. ``NonCartesianMRI``, ``PET``, ``RadioInterferometry`` and
    ``TomographyWithAstra``, which need further packages, are the ones that our tests do not try.

    **Conditional flows**, p(x | c), take conditions ``c``. A flow that was trained on pairs of images and reconstructions is a
    posterior flow p(x | y) if ``c`` is a function that computes the reconstruction, such as
    ``lambda y, physics: physics.A_dagger(y)``.

    :param torch.nn.Module flow: a flow, run in reverse as G; a :class:`deepinv_flows.FlowPrior`; or any generator, a module that
        maps z to images. It may be compiled by :func:`torch.compile` or wrapped in ``DataParallel``.
    :param deepinv.optim.DataFidelity data_fidelity: f, with a value for each image; ``None`` is ``L2()``,
        :math:`\frac12\|Ax-y\|^2`. With stacked physics it is summed over the operators, unless it is a
        ``StackedPhysicsDataFidelity``.
    :param float lambda_reg: weight :math:`\lambda \ge 0`, one number or one for each image. With ``L2(sigma=noise)`` and
        ``"squared"``, the weight 1 gives the most likely z for y.
    :param str penalty: ``"norm"``, :math:`r(z) = \|z\|`, as published, or ``"squared"``, :math:`\frac12\|z\|^2`.
    :param str optimizer: ``"lbfgs"``, or one of torch's that treat each entry by itself: ``"adam"``, ``"adamax"``, ``"nadam"``,
        ``"rmsprop"``, ``"sgd"``.
    :param float stepsize: step size of the optimizer. For L-BFGS it is the first trial step, as a multiple of the quasi-Newton
        step. ``None`` is 1 for L-BFGS, and for the others a step that suits latents of variance 1.
    :param int max_iter: largest number of iterations. An iteration of L-BFGS takes one or a few evaluations of G and its
        gradient.
    :param str, torch.Tensor, Callable init: where to start: ``"zero"``; ``"random"``, normal of standard deviation
        ``init_std``; ``"pinv"``, the latent of ``physics.A_dagger(y)``; latents (B, ...) or (1, ...); or a function of y and
        physics that returns latents. Images whose objective is not finite there start at zero, with a warning.
    :param float init_std: standard deviation of a random start.
    :param bool early_stop: end the search for an image once it has converged.
    :param float thres_conv: tolerance t of convergence. For ``"lbfgs"``, an image has converged when an iteration lowers its
        objective by less than t times the objective, or when the objective is less than t squared times that at the start. For
        the other optimizers, an image has converged when an iteration moves z by less than t times the norm of z.
    :param int history: number of steps that L-BFGS remembers; each takes the memory of two latents.
    :param tuple latent_shape: shape of the latent of one image; needed for a generator that is not a flow, unless ``init``
        returns or is a tensor of latents.
    :param torch.Tensor, list, Callable c: conditions of a conditional flow, a list or a single one, each (B, C', H, W); or a
        function of y and physics that returns them.
    :param torch.Generator generator: source of random starts; ``None`` is a generator of the model's own, with a fixed seed.
    :param bool verbose: show a progress bar in a terminal, and print one line at the end, if it takes more than two seconds.
    :raises ValueError: for an unknown choice, or a number out of range.
    :raises TypeError: for anything but a flow or generator, for a prior on patches, and for a flow that is not called as
        ``flow(x, rev=False)``.

    Sources: Asim et al., "Invertible generative models for inverse problems", ICML 2020, arXiv 1905.11672; for generators that
    are not invertible Bora et al., "Compressed sensing using generative models", ICML 2017, arXiv 1703.03208.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import LatentMAP, image_flow
    >>> x = torch.rand(2, 1, 8, 8)
    >>> physics = dinv.physics.Inpainting((1, 8, 8), mask=0.5)
    >>> flow = image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4)
    >>> model = LatentMAP(flow, max_iter=30, verbose=False)
    >>> x_net = model(physics(x), physics)
    >>> torch.allclose(physics(x_net), physics(x), atol=0.05)
    True
    """

    # objects that 0.1.0 pickled have neither
    c: Conditions | Callable = None
    verbose: bool = True

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
        verbose: bool = True,
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
        self.verbose = verbose

    def extra_repr(self) -> str:
        init = self.init if isinstance(self.init, str) else type(self.init).__name__
        names = ("lambda_reg", "penalty", "optimizer", "stepsize", "max_iter", "thres_conv", "history", "latent_shape")
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in names), f"init={init!r}"])

    @property
    def images(self) -> ImageGenerator:
        """The flow, as the generator G."""
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
        :param deepinv.physics.Physics physics: physics of the measurements.
        :param init: start that replaces the one of the constructor.
        :param torch.Tensor x_gt: true images, for the PSNR.
        :param bool compute_metrics: also return ``cost``, ``residual`` and, with ``x_gt``, ``psnr`` of each image after each
            iteration, as deepinv's optimizers do.
        :param c: conditions that replace those of the constructor.
        :return: images (B, C, H, W), without a graph; with ``compute_metrics`` a tuple of images and metrics.
        :raises ValueError: when y is empty or not finite, or does not have the shape that physics gives to images of G; when the
            objective is not finite where the search starts; and, naming the iteration, when an evaluation of the same latents
            is no longer finite.
        :raises TypeError: when y does not have the precision of the flow's weights.
        :raises RuntimeError: under :func:`torch.inference_mode`.
        """
        with torch.no_grad():
            value_and_grad, z, generate = self.problem(y, physics, init, c)
            metrics = Metrics(generate, z, x_gt) if compute_metrics else None
            with Console("LatentMAP", self.max_iter, self.verbose) as console:

                def callback(z, value):
                    console.update(objective=value)
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
        The problem that the measurements pose, checked. The parameters are those of :meth:`forward`.

        :return: a function that maps z to the objective and its gradient; latents to start from; and G with its conditions
            bound.
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
        :param torch.Tensor, list c: conditions of a conditional flow, a list or a single one.
        :return: the images G(z).
        """
        return self.images.decode(z, c)

    def value_and_grad(
        self, z: Tensor, y: Tensor | TensorList, physics: Physics, c: Conditions = None
    ) -> tuple[Tensor, Tensor]:
        """
        The objective and its gradient with respect to the latents.

        :param torch.Tensor z: latents (B, ...).
        :param torch.Tensor y: measurements (B, ...), or a list of them from stacked physics.
        :param deepinv.physics.Physics physics: physics of the measurements.
        :param torch.Tensor, list c: conditions of a conditional flow, a list or a single one.
        :return: the objective (B,), and its gradient, a tensor like z.
        """
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = self.objective(leaf, y, physics, c)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    def objective(self, z: Tensor, y: Tensor | TensorList, physics: Physics, c: Conditions = None) -> Tensor:
        """
        The objective, differentiable as often as G and the data fidelity are. The parameters are those of :meth:`value_and_grad`.

        :return: the objective, (B,).
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
        Minimise an objective over the latents, by the optimizer of this model.

        :param Callable value_and_grad: function that maps z to the objective and its gradient, as :meth:`problem` returns it.
        :param torch.Tensor z: latents to start from, (B, ...).
        :param Callable callback: called as ``callback(z, value)`` after each iteration.
        :return: for each image the latents of least objective that were found, (B, ...).
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
