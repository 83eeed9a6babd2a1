"""Samples from the posterior of images, by Hamiltonian Monte Carlo in latent space."""

import math
import warnings
from collections.abc import Callable

import torch
from deepinv.models.base import Reconstructor
from deepinv.optim import L2
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor, nn

from ..checks import check_positive, positive_int
from ..console import Console
from ..flows import Conditions
from .effective import Trace
from .hamiltonian import Kernel
from .map import LatentMAP
from .preconditioner import curvature

FEW = 10  # independent samples, from which a variance is known to within a half


class LatentSampler(Reconstructor):
    r"""
    Samples from the posterior of an image, drawn in the latent space of a flow.

    .. math::

        x = G(z), \qquad z \sim \exp\big( -f(G(z), y, A) - \tfrac12 \|z\|^2 / \tau^2 \big)

    With :math:`\tau = 1` and f the negative log-likelihood of y, the images x follow the posterior whose prior is the density of
    the flow. No Jacobian determinant appears, since the one of the change of variables x = G(z) cancels the one of the density.
    The chain is Hamiltonian Monte Carlo with a Metropolis test, started at the most likely z. Every image has a chain of its own,
    whose step size is adapted during the warm-up. The momenta have the covariance :math:`I / \tau^2 + V E V^\top`, where V holds
    the ``rank`` directions in which f curves most at the start and E the curvatures there. Without :math:`V E V^\top` the
    direction that is measured best would dictate a short step for all directions.

    ``sampler(y, physics)`` returns the posterior mean. ``sampler.sample(y, physics)`` returns the mean and the variance, as the
    samplers of :mod:`deepinv.sampling` do.

    Where many measurements have little noise, f curves in many directions, which turn as z moves, so that steps are short. If
    ``num_steps`` of them do not cross the posterior, the chain stays near its start, however many samples it accepts, and its
    variance is too small. The attribute ``effective`` tells how many independent samples each chain is worth, and a warning
    tells if they are fewer than ten.

    :param torch.nn.Module flow: a flow, run in reverse as G, or a :class:`deepinv_flows.FlowPrior`.
    :param deepinv.optim.DataFidelity data_fidelity: f, with a value for each image; ``None`` is ``L2()``. For Gaussian noise of
        standard deviation s, ``L2(sigma=s)`` gives the posterior.
    :param float temperature: :math:`\tau`, the standard deviation of the latents under the prior. A value above 1 widens the
        posterior of a flow that is overconfident.
    :param int max_iter: number of samples of each chain.
    :param int warm_up: number of iterations before the first sample, in which the step size is adapted.
    :param int num_steps: largest number of leapfrog steps in an iteration, each with one gradient. An iteration makes as many as
        it takes to cross the posterior: more where steps are short. 1 is Langevin's algorithm with a Metropolis test.
    :param float acceptance: acceptance rate to which the step size is adapted, between 0 and 1.
    :param int rank: number of directions V in the covariance of the momenta; 0 for none.
    :param int map_iter: iterations of the :class:`deepinv_flows.LatentMAP` that finds the start; 0 starts at z = 0.
    :param torch.Tensor, list, Callable c: conditions of a conditional flow, as in :class:`deepinv_flows.LatentMAP`.
    :param tuple latent_shape: shape of the latent of one image; needed where the flow does not know it.
    :param torch.Generator generator: source of all random numbers of the chain; ``None`` is a generator of the sampler's own,
        with a fixed seed.
    :param bool verbose: show a progress bar in a terminal, and print one line at the end, if it takes more than two seconds.
    :raises ValueError: for numbers out of range.

    Sources: Neal, "MCMC using Hamiltonian dynamics", 2011, arXiv 1206.1901; Hoffman & Gelman, "The No-U-Turn Sampler", JMLR 2014,
    arXiv 1111.4246, for the adaptation; flows as priors as in Asim et al. 2020, arXiv 1905.11672.

    >>> import torch, deepinv as dinv
    >>> from deepinv_flows import LatentSampler, image_flow
    >>> flow = image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4)
    >>> physics = dinv.physics.Inpainting((1, 8, 8), mask=0.5)
    >>> sampler = LatentSampler(flow, dinv.optim.L2(sigma=0.1), max_iter=20, warm_up=10, verbose=False)
    >>> mean, variance = sampler.sample(physics(torch.rand(2, 1, 8, 8)), physics)
    >>> mean.shape, variance.shape
    (torch.Size([2, 1, 8, 8]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(
        self,
        flow: nn.Module,
        data_fidelity: nn.Module | None = None,
        temperature: float = 1.0,
        max_iter: int = 100,
        warm_up: int = 50,
        num_steps: int = 200,
        acceptance: float = 0.8,
        *,
        rank: int = 10,
        map_iter: int = 50,
        c: Conditions | Callable = None,
        latent_shape: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        verbose: bool = True,
    ):
        super().__init__()
        self.max_iter, self.warm_up, self.num_steps = positive_int(
            max_iter=max_iter, warm_up=warm_up, num_steps=num_steps
        )
        for name, number in dict(rank=rank, map_iter=map_iter).items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"expected {name} to be an integer >= 0; got {number!r}")
        check_positive(temperature=temperature)
        if math.isinf(temperature):
            raise ValueError(f"expected a finite temperature; got {temperature}")
        if not 0 < acceptance < 1:
            raise ValueError(f"expected 0 < acceptance < 1; got {acceptance}")
        fidelity = L2() if data_fidelity is None else data_fidelity
        self.map = LatentMAP(
            flow, fidelity, temperature**-2, "squared", max_iter=max(1, map_iter), c=c, latent_shape=latent_shape
        )
        self.temperature, self.acceptance, self.rank, self.map_iter = temperature, acceptance, rank, map_iter
        self.generator = torch.Generator() if generator is None else generator
        self.verbose = verbose
        self.accepted: Tensor | None = None
        self.effective: Tensor | None = None

    def extra_repr(self) -> str:
        names = ("temperature", "max_iter", "warm_up", "num_steps", "acceptance", "rank", "map_iter")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, y: Tensor | TensorList, physics: Physics, **kwargs) -> Tensor:
        """
        The posterior mean.

        :param torch.Tensor y: measurements (B, ...), or a list of them from stacked physics.
        :param deepinv.physics.Physics physics: physics of the measurements.
        :param kwargs: further arguments of :meth:`sample`.
        :return: images (B, C, H, W).
        """
        return self.sample(y, physics, **kwargs)[0]

    @torch.no_grad()
    def sample(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        init: str | Tensor | Callable | None = None,
        g_statistics: Callable[[Tensor], Tensor] = lambda x: x,
        c: Conditions | Callable = None,
        callback: Callable[[Tensor, Tensor], None] = lambda x, z: None,
    ) -> tuple[Tensor, Tensor]:
        """
        Posterior mean and variance of a statistic of the image, by default of the image itself.

        :param torch.Tensor y: measurements (B, ...), or a list of them from stacked physics.
        :param deepinv.physics.Physics physics: physics of the measurements.
        :param init: where the search for the start begins, as in :class:`deepinv_flows.LatentMAP`.
        :param Callable g_statistics: images (B, C, H, W) to the statistic, (B, ...), of real numbers, or of booleans whose mean
            is a probability.
        :param c: conditions that replace those of the constructor.
        :param Callable callback: called as ``callback(x, z)`` with each sample x of the batch and its latent z.
        :return: mean and variance, both of the shape of the statistic. The attribute ``accepted`` (B,) then holds the mean
            acceptance probability of each image, and ``effective`` (B,) the number of independent samples that its chain is
            worth, of the latent or the statistic, whichever is less.
        :raises ValueError: as :class:`deepinv_flows.LatentMAP` raises, and for a statistic of another shape.
        """
        with Console("LatentSampler", self.map_iter + self.warm_up + self.max_iter, self.verbose) as console:
            return self._sample(console, *self.map.problem(y, physics, init, c), g_statistics, callback)

    def _sample(self, console: Console, value_and_grad, z, generate, g_statistics, callback) -> tuple[Tensor, Tensor]:
        if self.map_iter:
            z = self.map.minimise(value_and_grad, z, lambda z, value: console.update(objective=value))
        metric = curvature(value_and_grad, z, self.rank, self.temperature**-2, self.generator)
        kernel = Kernel(value_and_grad, z, metric, self.num_steps, self.acceptance, self.generator)
        trace, statistic = Trace(), _checked(g_statistics, generate(z))
        mean = squares = accepted = torch.zeros(())
        for it in range(self.warm_up + self.max_iter):
            rate = kernel.step(adapt=it < self.warm_up)
            console.update(acceptance=rate)
            if (n := it - self.warm_up + 1) < 1:
                continue
            x = generate(kernel.z)
            callback(x, kernel.z)
            g = statistic(x)
            trace.add(kernel.z, g)
            delta = g - mean
            mean = mean + delta / n
            squares = squares + delta * (g - mean)
            accepted = accepted + (rate - accepted) / n
        self.accepted, self.effective = accepted, (effective := trace.effective())
        console.result = f"{self.max_iter} samples, worth {float(effective.mean()):.0f} independent ones"
        self._warn_of_short_chains(effective)
        return mean, squares / max(1, self.max_iter - 1)

    def _warn_of_short_chains(self, effective: Tensor) -> None:
        short = (effective < FEW).nonzero().flatten().tolist()
        if short:
            warnings.warn(
                f"the chains of images {short} of the batch are worth as few as {float(effective[short].min()):.1f} "
                f"independent samples, too few to tell a variance: raise max_iter (now {self.max_iter}) or num_steps (now "
                f"{self.num_steps})",
                stacklevel=5,
            )


def _checked(g_statistics: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The statistic in floating-point numbers; refused, before the chain begins, unless it has real numbers for each image x."""
    g = g_statistics(x)
    if not torch.is_tensor(g) or g.is_complex() or g.ndim == 0 or len(g) != len(x):
        got = f"{g.dtype} of shape {tuple(g.shape)}" if torch.is_tensor(g) else type(g).__name__
        raise ValueError(
            f"expected a statistic of real numbers for each of {len(x)} images, ({len(x)}, ...); got {got}"
        )

    def statistic(x: Tensor) -> Tensor:
        g = g_statistics(x)
        return g if g.is_floating_point() else g.to(x.dtype)

    return statistic
