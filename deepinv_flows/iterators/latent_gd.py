"""Gradient descent on the latent code of a generator."""

import torch
from deepinv.optim import DataFidelity, Prior
from torch import Tensor, nn

from ..flows import ImageGenerator
from ..solvers import rounding
from .base import Problem
from .optimizer import Optim
from .search import SearchIteration, shorten
from .terms import coefficient, square, unchanged


class LatentGDIteration(SearchIteration):
    """
    One iteration of :class:`LatentGD`; ``est`` is (G(z), z).

    ``params_algo`` holds ``generator``, ``stepsize``, ``lambda`` and optionally ``latent_shape`` and ``backtracking``. A
    generator that can be iterated over, such as a FrEIA chain, is passed as ``[generator]``. Of deepinv's own starts, the pair of
    :math:`A^\\top y` becomes z = 0; with ``compute_metrics=True`` give ``init=(G(z), z)``.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import LatentGDIteration
    >>> decoder = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Unflatten(1, (1, 4, 4)))
    >>> params = {"generator": [decoder], "latent_shape": [(3,)], "stepsize": 0.1, "lambda": 0.1}
    >>> model = dinv.optim.optim_builder(LatentGDIteration(), 5, params, dinv.optim.L2(), dinv.optim.Tikhonov())
    >>> model(torch.rand(1, 1, 4, 4), dinv.physics.Denoising()).shape
    torch.Size([1, 1, 4, 4])
    """

    defaults = {"backtracking": False, "latent_shape": None}
    refuses = {
        "DEQ": "its fixed point is a latent, and deepinv differentiates in the image",
        "anderson_acceleration": "its fixed point is a latent, and deepinv accelerates the image",
    }

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.cost_fn = None  # deepinv calls it on starts that may be latents; forward computes each iterate's

    def start(self, X: dict, problem: Problem) -> dict:
        """(G(z), z) from a latent, an image, (G(z), z) itself, or deepinv's pair of equal images."""
        G, est = ImageGenerator(problem["generator"]), X["est"]
        if len(est) > 1 and not (est[0].shape == est[1].shape and torch.equal(est[0], est[1])):
            z = est[1]
        elif len(est) > 1:
            z = self._zeros(est[0], G, problem)
        else:
            z = self._latent(est[0], G, problem)
        return {"est": (G.decode(z), z), "latent": True}

    def _latent(self, init: Tensor, G: ImageGenerator, problem: Problem) -> Tensor:
        """``init`` where it has the shape of a latent, encoded where it has that of an image."""
        image = problem.physics.A_adjoint(problem.y)
        if problem["latent_shape"] is None and not G.invertible:
            return init if init.shape != image.shape else self._encoded(init, G)
        shape = self._zeros(image, G, problem).shape
        if init.shape == shape:
            return init
        if init.shape != image.shape:
            raise ValueError(
                f"expected init to be a latent {tuple(shape)} or an image {tuple(image.shape)}; got shape {tuple(init.shape)}"
            )
        return self._encoded(init, G)

    def _zeros(self, image: Tensor, G: ImageGenerator, problem: Problem) -> Tensor:
        """The latent 0 of images like ``image``."""
        shape = problem["latent_shape"]
        if shape is not None:
            return image.new_zeros(image.shape[0], *((shape,) if isinstance(shape, int) else shape))
        if not G.invertible:
            raise ValueError(f"expected latent_shape, or a latent as init, as {G.name} is not invertible; got neither")
        return torch.zeros_like(self._encoded(torch.zeros_like(image), G))

    @torch.no_grad()
    def _encoded(self, image: Tensor, G: ImageGenerator) -> Tensor:
        if not G.invertible:
            raise ValueError(
                f"expected init to be a latent, as {G.name} is not invertible; got an image {tuple(image.shape)}. If it is a "
                f"latent, say so by latent_shape={tuple(image.shape[1:])}"
            )
        return G.encode(image)

    def objective(self, est: tuple[Tensor, ...], problem: Problem) -> Tensor:
        value = problem.f.value(est[0])
        return value + problem.g.value(est[1]) if problem.g.explicit else value

    def step(self, X: dict, problem: Problem) -> dict:
        if "latent" not in X:
            X = self.start(X, problem)
        G, z = ImageGenerator(problem["generator"]), X["est"][1]
        grad = self._gradient(z, G, problem)
        objective = problem.f.identity + problem.g.identity
        last = X.get("step") if unchanged(X.get("objective", ()), objective) else None
        step, config = self.first_step(problem, z, last)

        def trial(step):
            z_new = z - coefficient(step, z) * grad
            return G.decode(z_new), z_new

        if config is None:
            return {"est": trial(step), "latent": True}
        self.check_explicit(problem.g)
        F = self.objective(X["est"], problem)

        def enough(step, *est):
            return self.objective(est, problem) <= F - config.gamma * step * square(grad) + rounding(F)

        est, step, _ = shorten(trial, enough, step, config)
        return {"est": est, "latent": True, "step": step, "objective": objective}

    def _gradient(self, z: Tensor, G: ImageGenerator, problem: Problem) -> Tensor:
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = z if recorded and z.requires_grad else z.detach().requires_grad_()
            x = G.decode(leaf)
        pulled = torch.autograd.grad(x, leaf, problem.f.grad(x), create_graph=recorded)[0]
        return pulled + problem.g.grad(leaf if recorded else z)


class LatentGD(Optim):
    r"""
    Gradient descent on the latent code of a generator G, whose estimate is G(z).

    .. math::

        \min_z \; f(G(z)) + \lambda\, r(z), \qquad
        z_{k+1} = z_k - \gamma\, \nabla_z \big( f(G(z)) + \lambda\, r(z) \big) \big|_{z = z_k}

    with f = ``data_fidelity`` and r = ``prior`` on latents. It starts from z = 0 unless ``init`` is a latent, or an image, which
    an invertible G encodes and another refuses; what has the shape of both is taken as a latent.

    **Steps.** Where the gradient has Lipschitz constant L the objective falls when :math:`\gamma < 2 / L`. With
    ``backtracking=True`` each step is the last one shortened until the objective falls by :math:`\delta \gamma \|\nabla\|^2`
    (Armijo 1966), for each sample on its own.

    Unfolded, ``stepsize``, ``lambda`` and ``g_param`` are trainable, and the weights of G unless frozen. DEQ and Anderson
    acceleration are refused, as the fixed point is a latent and deepinv follows the image.

    :param torch.nn.Module generator: a flow ``flow(x, rev=False) -> (z, log_det)``, invertible, or a module that makes images
        (B, C, H, W) of latents (B, ...).
    :param deepinv.optim.DataFidelity data_fidelity: f; ``None`` is 0.
    :param deepinv.optim.Prior prior: r, such as ``deepinv.optim.Tikhonov()``; ``None`` is 0.
    :param float, torch.Tensor lambda_reg: :math:`\lambda`; like all numbers here one, a tensor with one for each sample, (B,),
        or a list with one for each iteration.
    :param float, torch.Tensor stepsize: :math:`\gamma`.
    :param tuple latent_shape: shape of a latent without its batch; needed by the default start of a G that is not invertible.
    :param bool, deepinv.optim.BacktrackingConfig backtracking: ``eta`` shortens a step, at most ``max_iter`` times an iteration,
        and ``gamma`` is :math:`\delta`.
    :param kwargs: ``g_param, sigma_denoiser, max_iter, crit_conv, thres_conv, early_stop, custom_metrics, custom_init, unfold,
        trainable_params, cost_fn, params_algo, get_output``, as in :class:`deepinv.optim.GD`.
    :raises ValueError: for a start that G cannot take, a step that is not positive, or an option that is refused.

    Sources: Bora, Jalal, Price & Dimakis, "Compressed sensing using generative models", ICML 2017, arXiv 1703.03208; for
    invertible G, Asim, Daniels, Leong, Ahmed & Hand, "Invertible generative models for inverse problems", ICML 2020, arXiv
    1905.11672.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import LatentGD
    >>> decoder = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Unflatten(1, (1, 4, 4)))
    >>> model = LatentGD(decoder, dinv.optim.L2(), dinv.optim.Tikhonov(), 0.1, stepsize=0.1, latent_shape=(3,))
    >>> model(torch.rand(2, 1, 4, 4), dinv.physics.Denoising()).shape
    torch.Size([2, 1, 4, 4])
    """

    iteration = LatentGDIteration

    def __init__(
        self,
        generator: nn.Module,
        data_fidelity: DataFidelity | list[DataFidelity] | None = None,
        prior: Prior | list[Prior] | None = None,
        lambda_reg: float | Tensor | list = 1.0,
        stepsize: float | Tensor | list = 1.0,
        *,
        latent_shape: tuple[int, ...] | None = None,
        **kwargs,
    ):
        if not callable(generator):
            raise TypeError(f"expected a generator that maps latents to images; got {type(generator).__name__}")
        parameters = {
            "lambda": lambda_reg,
            "stepsize": stepsize,
            "generator": generator,
            "latent_shape": [latent_shape],
        }
        super().__init__(parameters, data_fidelity=data_fidelity, prior=prior, **kwargs)
