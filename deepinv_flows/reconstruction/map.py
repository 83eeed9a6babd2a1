"""From measurements to an image in one call, by any prior with a value and a gradient or a proximity operator."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import torch
from deepinv.models.base import Reconstructor
from deepinv.optim import DataFidelity, Prior
from torch import Tensor, nn

from ..checks import check_autograd, check_choice, check_positive, positive_int, warn_outside
from ..console import Console
from . import files, tuning
from .algorithms import ALGORITHMS, NEEDS_GRADIENT, automatic, longest, minimise
from .choices import as_constraint, check_fits, checked_fidelity, checked_weight
from .objective import Objective, data_term, is_smooth, parts
from .progress import Progress
from .starts import candidates, least
from .strength import dimension


class MAP(Reconstructor):
    r"""
    Reconstruction of images from their measurements, with start, algorithm and stopping chosen.

    .. math::

        \hat x \in \arg\min_x \; f(x, y, A) + \lambda\, g(x) + c(x)

    with f = ``data_fidelity``, g = ``prior`` and c = ``constraint``. Each image of a batch is a problem of its own. The
    objective of what is returned is never above that of the start, which is the best of :math:`A^\top y` times its best factor,
    the image nearest to a constant that fits y (a regularised ``A_dagger(y)``), ``physics.A_dagger(y)`` where that is cheap or
    there is nothing else, y itself if it is an image, one of these at coarser scales, and ``init``.

    **Algorithms.** ``"auto"`` takes ``"lbfgs"`` where f and g are known by their gradients (monotone, and the fastest in our
    benchmark ``solvers.py --starts``); ``"nmapg"``, accelerated proximal gradient descent, with a constraint or a prior known by
    its proximity operator; ``"davis_yin"`` with both; ``"adam"`` with a falling step, on random grids of patches, for images of
    half a million patches and more. ``"ipiano"`` is inertial proximal gradient descent. Where pixels are held differently, as in
    inpainting, steps are scaled by the diagonal of the Hessian, unless a proximity operator other than that of bounds forbids it.

    **Choosing** ``lambda_reg``. Best is :meth:`tune`, on a few clean images like those to come, kept from training.
    ``"rule"`` takes what the docstring of the prior says, from the noise and the sizes. ``"discrepancy"`` takes the
    :math:`\lambda` at which :math:`\|Ax - y\|^2 = \sigma^2 (m - d)` for m measurements with Gaussian or Poisson noise of known
    level; the d degrees of freedom of x follow the noise, and a second reconstruction, of measurements with a little more
    noise, tells how many they are. (Morozov's d is 0, which smooths more.) The sum has a relative standard error of
    :math:`\sqrt{2/m}`, so that many :math:`\lambda` fit. Of those within two standard errors the one nearest to the rule's is
    taken; without a rule, the one whose residual is one standard error larger than expected.
    ``"sure"`` takes the one of least estimated error of Ax (Stein), for Gaussian noise and an A that determines the image: for
    others, such as a strong blur, the error of Ax does not tell that of x, and it is refused. Both search anew for every image.

    :param deepinv.optim.Prior prior: g, with a value for each image: :class:`PatchNR`, :class:`FlowPrior`, deepinv's explicit
        priors, or a user's.
    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is ``L2()``, :math:`\frac12\|Ax-y\|^2`.
    :param float, torch.Tensor, str lambda_reg: :math:`\lambda \ge 0`, one or one for each image; or ``"rule"``,
        ``"discrepancy"``, ``"sure"``.
    :param constraint: ``"nonnegative"``, bounds (low, high), or a second prior with a proximity operator; ``None`` is none.
    :param str solver: ``"auto"``, or the name of an algorithm.
    :param int max_iter: bound on the iterations; ``None`` is 200 for ``"adam"``, whose step falls to its end, else 500.
    :param float tol: an image is done when ten iterations moved it by less than this times its norm.
    :param float max_seconds: bound on the time of a reconstruction, of which a search for :math:`\lambda` makes several.
    :param bool verbose: show a progress bar in a terminal, and print one line at the end, if it takes more than two seconds.
    :raises TypeError: for a prior that is not a deepinv prior, and other kinds of ``lambda_reg`` or ``constraint``.
    :raises ValueError: for a prior without a value, a denoiser for example, and numbers out of range.

    Sources: of the prior, see there; Nocedal, "Updating quasi-Newton matrices with limited storage", 1980; Bekas, Kokiopoulou &
    Saad, "An estimator for the diagonal of a matrix", 2007; Li & Lin 2015
    (``"nmapg"``); Morozov 1966 (discrepancy); Hall & Titterington, "Common structure of techniques for choosing smoothing
    parameters in regression problems", 1987 (m - d); Stein 1981, Ramani, Blu & Unser 2008 (Monte-Carlo SURE, and d).

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import MAP, PatchNR
    >>> physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    >>> model = MAP(PatchNR(pretrained="gravel"), max_iter=5, verbose=False)
    >>> x_net = model(torch.rand(1, 1, 16, 16), physics)
    >>> x_net.shape, round(float(model.chosen["lambda_reg"]), 4)
    (torch.Size([1, 1, 16, 16]), 0.0142)
    """

    prior: Prior
    data_fidelity: DataFidelity
    lambda_reg: float | Tensor | str
    constraint: Prior | None

    def __init__(
        self,
        prior: Prior,
        data_fidelity: DataFidelity | None = None,
        lambda_reg: float | Tensor | str = "rule",
        constraint: Prior | str | Sequence[float] | None = None,
        solver: str = "auto",
        *,
        max_iter: int | None = None,
        tol: float = 1e-3,
        max_seconds: float | None = None,
        verbose: bool = True,
    ):
        super().__init__()
        if not isinstance(prior, Prior):
            raise TypeError(f"expected a deepinv.optim.Prior; got {type(prior).__name__}")
        if not prior.explicit_prior:
            raise ValueError(
                f"expected a prior with a value (explicit_prior=True); got {type(prior).__name__}, which has none"
            )
        check_choice("solver", solver, ("auto", *ALGORITHMS))
        if max_seconds is not None:
            check_positive(max_seconds=max_seconds)
        if not (isinstance(tol, Real) and tol >= 0):
            raise ValueError(f"expected tol >= 0; got {tol!r}")
        self.prior, self.data_fidelity = prior, checked_fidelity(data_fidelity)
        self.lambda_reg, self.constraint = checked_weight(lambda_reg), as_constraint(constraint)
        self.solver: str = solver
        self.max_iter: int | None = None if max_iter is None else positive_int(max_iter=max_iter)
        self.tol: float = float(tol)
        self.max_seconds: float | None = max_seconds
        self.verbose: bool = verbose
        #: what :meth:`tune` found; what the last reconstruction chose
        self.tuned: dict = {}
        self.chosen: dict = {}

    def forward(
        self,
        y: Tensor,
        physics: nn.Module,
        init: Tensor | None = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, list[list[float]]]]:
        """
        Reconstruct images.

        :param torch.Tensor y: measurements (B, ...), or the ``TensorList`` of them from stacked physics.
        :param deepinv.physics.Physics physics: of the measurements, linear or not.
        :param torch.Tensor init: one more image to start from, (B, C, H, W) or (1, C, H, W).
        :param torch.Tensor x_gt: true images, for the PSNR.
        :param bool compute_metrics: also return ``cost``, ``residual`` and, with ``x_gt``, ``psnr`` of the best iterate of each
            image after each iteration, as deepinv's optimizers do.
        :return: images (B, C, H, W), without a graph; with ``compute_metrics`` a tuple of images and metrics.
        :raises ValueError: when y is not finite; when the objective is not finite at any start, or falls without bound; when
            ``lambda_reg`` cannot be found, with the reason.
        :raises RuntimeError: under :func:`torch.inference_mode`.
        """
        check_autograd("the objective of MAP")
        for part in parts(y):
            if not bool(torch.isfinite(part).all()):
                raise ValueError(f"the measurements of shape {tuple(part.shape)} hold NaN or infinite entries")
        searches = isinstance(self.lambda_reg, str) and self.lambda_reg != "rule"
        with (
            torch.no_grad(),
            Console("MAP", None if searches else self.max_iter or longest(self.solver), self.verbose) as console,
        ):
            found = candidates(y, physics, init)
            weight, reason = tuning.weight(self, y, physics, found, console.update)
            x, progress, name, start = self.solve(
                y, physics, weight, found, x_gt=x_gt if compute_metrics else None, update=console.update
            )
            console.result = (
                f"{name} from {' and '.join(sorted(set(start)))}, lambda_reg {float(weight.mean()):.4g} "
                f"({tuning.told(self, reason, x)}), objective {float(progress.first.mean()):.5g} to "
                f"{float(progress.value.mean()):.5g}, {progress.iterations} iterations{progress.left}"
            )
        self.chosen = {
            "lambda_reg": weight if len(weight) > 1 else float(weight),
            "by": reason,
            "solver": name,
            "start": sorted(set(start)),
            "iterations": progress.iterations,
        }
        if (known := getattr(self.prior, "image_range", None)) is not None:
            warn_outside(x, known)
        return (x, progress.metrics) if compute_metrics else x

    def solve(
        self,
        y: Tensor,
        physics: nn.Module,
        weight: Tensor,
        found: dict[str, Tensor],
        *,
        x_gt: Tensor | None = None,
        metric: nn.Module | None = None,
        update: Callable[..., None] = lambda **shown: None,
        max_seconds: float = math.inf,
        prior: Prior | None = None,
    ) -> tuple[Tensor, Progress, str, list[str]]:
        """
        Minimise the objective with a given weight.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.Physics physics: of the measurements.
        :param torch.Tensor weight: :math:`\\lambda`, (B,).
        :param dict found: images to start from, by name.
        :param torch.Tensor x_gt: true images, for ``metric``.
        :param torch.nn.Module metric: of images and true images; ``None`` is the PSNR.
        :param Callable update: called as ``update(objective=values)`` after each iteration.
        :param float max_seconds: a further bound on the time.
        :param deepinv.optim.Prior prior: in place of this model's.
        :return: images, the record of the search, the algorithm, and where each image started.
        """
        by_gradient = is_smooth(self.prior) or self.solver in NEEDS_GRADIENT
        prior = self.prior if prior is None else prior
        objective = Objective(data_term(self.data_fidelity, y, physics), prior, weight, self.constraint, by_gradient)
        x, value, start = least(objective, found)
        name = automatic(objective, x) if self.solver == "auto" else self.solver
        check_fits(name, objective)
        seconds = min(max_seconds, math.inf if self.max_seconds is None else self.max_seconds)
        progress = Progress(x, value, self.max_iter or longest(name), self.tol, seconds, x_gt, metric, update)
        return minimise(name, objective, x, progress), progress, name, start

    def tune(
        self,
        images: Tensor | Iterable[Tensor],
        physics: nn.Module,
        metric: nn.Module | None = None,
        n: int = 4,
        *,
        max_seconds: float | None = None,
        generator: torch.Generator | None = None,
    ) -> "MAP":
        r"""
        Choose ``lambda_reg``, and ``max_iter`` where each of several images gains by an early stop, on simulated measurements.

        :math:`\lambda` is enclosed on a log scale by factors of 4, then of 2, and interpolated, so that it does not lie at the
        end of what was tried. For a prior that is a mean over patches it is understood for images of this size, and grows with
        the number of patches of those to come. Where ``max_seconds`` would not last for that, strengths are compared by every
        other patch in each direction of a :class:`PatchNR`, in half the time; ``model.tuned["stride"]`` is then 2.

        :param torch.Tensor images: clean images (B, C, H, W), or a list of (C, H, W) of one size; not those of the training.
        :param deepinv.physics.Physics physics: what measures them, with its noise.
        :param torch.nn.Module metric: a deepinv metric of images and true images; ``None`` is ``PSNR()``.
        :param int n: number of images used at most.
        :param float max_seconds: bound on the time; the best so far is taken, and that time ran out is said.
        :param torch.Generator generator: source of the noise, if the physics has none of its own; ``None`` is one with a fixed
            seed.
        :return: this model; ``model.tuned`` holds what was tried.
        :raises ValueError: for images that are not finite, of one size, and at least one.

        >>> import torch, deepinv as dinv
        >>> from deepinv_flows import MAP, PatchNR
        >>> physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
        >>> model = MAP(PatchNR(pretrained="gravel"), max_iter=3, verbose=False).tune(torch.rand(1, 1, 12, 12), physics)
        >>> sorted(model.tuned)
        ['dimension', 'images', 'iterations', 'lambda_reg', 'metric', 'score', 'seconds', 'tried']
        """
        tuning.tune(self, images, physics, metric, positive_int(n=n), max_seconds, generator)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """
        Write prior and choices to one file, for :meth:`from_checkpoint`; ``PatchNR.from_checkpoint`` reads it too.

        :param str path: file to write; left as it was if writing is interrupted.
        :raises ValueError: for a prior that is not :class:`PatchNR` or :class:`FlowPrior` on a flow of our builders.
        """
        files.save(self, path)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        data_fidelity: DataFidelity | None = None,
        constraint: Prior | str | Sequence[float] | None = "saved",
        **kwargs,
    ) -> "MAP":
        """
        The model that :meth:`save` wrote.

        :param str path: the file, or the name of shipped weights.
        :param deepinv.optim.DataFidelity data_fidelity: needed where it was not ``L2``.
        :param constraint: in place of the saved one; needed where that was a prior of the user's.
        :param kwargs: further arguments of :class:`MAP`, in place of those saved.
        :raises CheckpointError: when the file cannot be read, or is not a MAP's.

        >>> import tempfile
        >>> from deepinv_flows import MAP, PatchNR
        >>> model = MAP(PatchNR(patch_size=3, num_layers=1, sub_net_size=8), lambda_reg=0.1, verbose=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(f"{folder}/map.safetensors")
        ...     MAP.from_checkpoint(f"{folder}/map.safetensors").lambda_reg
        0.1
        """
        arguments, tuned = files.load(path, {"data_fidelity": data_fidelity, "constraint": constraint, **kwargs})
        model = cls(**arguments)
        model.tuned = tuned
        return model

    def weight_for(self, x: Tensor) -> Tensor:
        """The number that ``lambda_reg`` is for images like x, (B,); tuned on images of another size, it grows with them."""
        grown = dimension(self.prior, x) / self.tuned["dimension"] if tuning.is_tuned(self) else 1.0
        weight = torch.as_tensor(self.lambda_reg, dtype=x.real.dtype, device=x.device).reshape(-1) * grown
        if len(weight) not in (1, len(x)):
            raise ValueError(f"expected one lambda_reg, or one for each of {len(x)} images; got {len(weight)}")
        return weight.expand(len(x)).clone()

    def extra_repr(self) -> str:
        weight = self.lambda_reg.tolist() if torch.is_tensor(self.lambda_reg) else self.lambda_reg
        tuned = f" (tuned: {self.tuned['metric']} {self.tuned['score']:.4g})" if tuning.is_tuned(self) else ""
        return f"lambda_reg={weight}{tuned}, solver={self.solver}, max_iter={self.max_iter}, tol={self.tol}"
