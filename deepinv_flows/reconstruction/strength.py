r"""
The weight of the prior, where no clean images tell it: by a rule, by the discrepancy principle, by an unbiased estimate of the
risk.

Morozov's principle asks for residuals as large as the noise. Those of a good reconstruction are smaller, as part of the noise
is fitted. With a Gaussian prior of covariance C, :math:`y - A x = \sigma^2 \Sigma^{-1} y` for the covariance
:math:`\Sigma = A C A^\top + \sigma^2 I` of y, so that the mean of :math:`\|y - A x\|^2` is
:math:`\sigma^4 \operatorname{tr} \Sigma^{-1} = \sigma^2 (m - d)` with d the trace of what maps y to Ax.

Noise is known from ``physics.noise_model``: Gaussian, Poisson, or both, so that a measurement of mean u has variance
:math:`v(u) = \sigma^2 + \gamma u`.
"""

from collections.abc import Callable

import torch
from deepinv.optim import DataFidelity, Prior
from deepinv.optim.data_fidelity import L2, PoissonLikelihood
from deepinv.optim.linear import minres
from deepinv.physics import GaussianNoise, LinearPhysics, PoissonGaussianNoise, PoissonNoise
from torch import Tensor

from ..latent import FlowPrior
from ..patchnr import PatchNR
from ..solvers import per_sample
from .objective import DataTerm, is_smooth, parts

RULES = ("rule", "discrepancy", "sure")
SEEN = 0.5  # share of the directions of an image that A has to see for SURE to tell its error


def dimension(prior: Prior, x: Tensor) -> float:
    """
    What to multiply a prior by so that it grows with the image as a sum over patches or pixels does; 1 for those that do.

    :param deepinv.optim.Prior prior: the prior.
    :param torch.Tensor x: images (B, C, H, W).
    """
    if isinstance(prior, PatchNR):
        margin = (1 if prior.pad else -1) * (prior.patch_size - 1)
        return float((x.shape[2] + margin) * (x.shape[3] + margin))
    return float(x[0].numel()) if isinstance(prior, FlowPrior) and prior.per_dim else 1.0


def variance(physics, clean: Tensor) -> Tensor:
    """
    Variance of each measurement, given its mean.

    :raises ValueError: for noise of another kind, or of level 0.
    """
    noise = physics.noise_model
    gaussian, poisson = (
        isinstance(noise, GaussianNoise | PoissonGaussianNoise),
        isinstance(noise, PoissonNoise | PoissonGaussianNoise),
    )
    if not (gaussian or poisson) or (poisson and not getattr(noise, "normalize", True)):
        raise ValueError(
            f"expected Gaussian or Poisson noise of known level, normalised, in physics.noise_model; got {type(noise).__name__}"
        )
    found = torch.zeros_like(clean.real)
    for known, name in ((gaussian, "sigma"), (poisson, "gain")):
        if known:
            level = torch.as_tensor(getattr(noise, name), dtype=found.dtype, device=found.device)
            level = level.reshape(-1, *[1] * (clean.ndim - 1))
            found = found + (level**2 if name == "sigma" else level * clean.real.clamp_min(0))
    if not bool((found.flatten(1).sum(1) > 0).all()):
        raise ValueError(f"expected noise of a level > 0 in physics.noise_model; got {noise}")
    return found


def by_rule(prior: Prior, data_fidelity: DataFidelity, y, physics, x: Tensor) -> Tensor:
    r"""
    :math:`\lambda` from noise and sizes, (B,): what is said under "Choosing lambda_reg" of :class:`PatchNR`, and 1 for the
    negative log-likelihood of a :class:`FlowPrior`, each times the variance of the noise that ``data_fidelity`` does not
    divide by.

    :raises ValueError: for another prior, data fidelity or noise.
    """
    if isinstance(prior, PatchNR):
        count = 0.2 * x.shape[2] * x.shape[3] / prior.patch_size**2
    elif isinstance(prior, FlowPrior):
        count = dimension(prior, x)
    else:
        raise ValueError(
            f'lambda_reg="rule" knows PatchNR and FlowPrior; got {type(prior).__name__}: give a number, or use tune()'
        )
    ones = x.flatten(1)[:, 0].new_ones(len(x))
    if isinstance(data_fidelity, PoissonLikelihood):
        return count * ones
    if type(data_fidelity) is not L2 or not torch.is_tensor(y):
        raise ValueError(
            f'lambda_reg="rule" knows the data fidelities L2 and PoissonLikelihood of one physics; got '
            f"{type(data_fidelity).__name__}: give a number, or use tune()"
        )
    level = variance(physics, y).flatten(1).mean(1).to(ones)
    return count * float(data_fidelity.norm) * level * ones


def balance(prior_grad: Callable, data: DataTerm, x: Tensor) -> Tensor:
    """A weight (B,) at which the terms pull alike at x: where a search may begin if there is no rule."""
    pull, other = (grad.flatten(1).norm(dim=1) for grad in (data.value_and_grad(x)[1], prior_grad(x)))
    ratio, far = 0.1 * pull / other, data.value_and_grad(torch.zeros_like(x))[1].flatten(1).norm(dim=1)
    pulls = torch.isfinite(ratio) & (ratio > 0) & ~(pull < 1e-6 * far)  # x may fit y but for rounding
    return torch.where(pulls, ratio, torch.ones_like(ratio))


def discrepancy(physics, y, x: Tensor, shift: Tensor | None = None, moved: Tensor | None = None) -> Tensor:
    r"""
    :math:`\log \frac{1}{m - d} \sum_i |(Ax - y)_i|^2 / v_i` (B,), which is 0 where Ax is as far from y as the noise is but for
    the d degrees of freedom of the reconstruction, which follow the noise. From how far a reconstruction ``moved`` with
    measurements that were shifted by :func:`small_shift`,

    .. math::

        d = m\, \frac{\langle \delta, A (x' - x) \rangle_{1/v}}{\langle \delta, \delta \rangle_{1/v}}.

    Without them d is 0, as Morozov has it.

    Sources: Hall & Titterington, J. Roy. Statist. Soc. B 49 (1987); Ramani, Blu & Unser 2008 (d by a shift).
    """
    if not torch.is_tensor(y):
        raise ValueError('lambda_reg="discrepancy" is for one physics; got a stack of them')
    clean, level, measured = _noisy(physics, y, x)
    number = measured.flatten(1).sum(1).clamp_min(1).to(level)
    square = ((clean - y).abs() ** 2 / level * measured).flatten(1).sum(1)
    if shift is None or moved is None:
        return (square / number).log()
    along = ((shift.conj() * (physics.A(moved) - clean)).real / level).flatten(1).sum(1)
    share = along / (shift.abs() ** 2 / level).flatten(1).sum(1)
    return (square / number / (1 - share).clamp_min(1e-3)).log()


def deviation(physics, y, x: Tensor) -> Tensor:
    """Relative standard deviation of the noise's variance as m measurements tell it, the root of 2 / m, (B,)."""
    return (2 / _noisy(physics, y, x)[2].flatten(1).sum(1).clamp_min(1).to(x.real)).sqrt()


def small_shift(physics, y: Tensor, x: Tensor, signs: Tensor) -> Tensor:
    """As large as the noise where something was measured; counts stay counts."""
    _, level, measured = _noisy(physics, y, x)
    shift = signs * level.sqrt() * measured
    return shift.maximum(-y.clamp_min(0)) if isinstance(physics.noise_model, PoissonNoise) else shift


def _noisy(physics, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measurements of x, their variances, bounded from below, and where there is one."""
    clean = physics.A(x)
    level = variance(physics, clean)
    level = torch.maximum(level, 1e-3 * per_sample(level.flatten(1).mean(1), level))
    return clean, level, (y != 0) | (clean != 0)  # a mask leaves zeros, which are not measurements


def check_sure(
    prior: Prior,
    constraint: Prior | None,
    data_fidelity: DataFidelity,
    y,
    physics,
    x: Tensor,
    generator: torch.Generator,
) -> None:
    """
    Refuse what SURE cannot judge, or whose minimisers it cannot differentiate.

    :raises ValueError: unless noise is Gaussian, the data fidelity L2, A linear, and at least half of the directions of an image
        are seen by A above a thirtieth of its norm; with a constraint or a second prior, with a prior known by its proximity
        operator, and with one whose gradient does not have a graph.
    """
    why = None
    if not isinstance(physics.noise_model, GaussianNoise):
        why = f"Gaussian noise; got {type(physics.noise_model).__name__}"
    elif type(data_fidelity) is not L2 or not isinstance(physics, LinearPhysics) or len(parts(y)) > 1:
        why = f"L2 and one linear physics; got {type(data_fidelity).__name__} and {type(physics).__name__}"
    elif x.is_complex() or y.is_complex():
        why = f"real images and measurements; got {x.dtype} and {y.dtype}"
    elif constraint is not None:
        why = f"an objective without a constraint; got {type(constraint).__name__}"
    elif not is_smooth(prior):
        why = f"a prior known by its gradient; got {type(prior).__name__}"
    elif not _has_a_graph(prior, x):
        why = f"a prior whose gradient has a graph; that of {type(prior).__name__} has none"
    elif (share := _seen(physics, y, x, generator)) < SEEN:
        why = (
            f"an A that determines the image, as it sees the error of A x alone; this one sees {share:.0%} of its "
            "directions"
        )
    if why is not None:
        raise ValueError(f'lambda_reg="sure" needs {why}: use "discrepancy" or tune()')
    variance(physics, y)


@torch.enable_grad()
def _has_a_graph(prior: Prior, x: Tensor) -> bool:
    return prior.grad(x.detach().clone().requires_grad_()).requires_grad


def _seen(physics, y: Tensor, x: Tensor, generator: torch.Generator) -> float:
    """Share of the directions of an image that A scales by more than about a thirtieth of its norm; the least in the batch."""
    probe = signs(x, generator)
    v, length = probe, float(probe[0].norm())
    for _ in range(10):
        v = physics.A_adjoint_A(v / length)
        length = max(float(v.flatten(1).norm(dim=1).max()), torch.finfo(v.dtype).tiny)
    gamma = 1e3 / length
    hidden = physics.prox_l2(probe, torch.zeros_like(y), gamma)
    return float((1 - (probe * hidden).flatten(1).mean(1)).min())


def signs(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of size 1 like x, the same for every sample, so that none depends on the others of its batch."""
    draw = torch.randint(2, (2 if x.is_complex() else 1, 1, *x.shape[1:]), generator=generator, device=generator.device)
    real = (2 * draw - 1).to(x).expand(-1, *x.shape)
    return (real[0] + 1j * real[1]) / 2**0.5 if x.is_complex() else real[0]


def sure(data_fidelity: DataFidelity, grad, weight: Tensor, y: Tensor, physics, x: Tensor, probe: Tensor) -> Tensor:
    r"""
    Stein's unbiased estimate (B,) of :math:`\frac1m \|A (x_\lambda - x)\|^2` for a minimiser :math:`x_\lambda`,

    .. math::

        \frac1m \|A x_\lambda - y\|^2 - \sigma^2 + \frac{2 \sigma^2}{m}\, b^T A\, \big(A^T A + s^2 \lambda H\big)^{-1} A^T b

    with random signs b, the Hessian H of the prior at :math:`x_\lambda` and the s of ``L2(sigma=s)``: the derivative of a
    fixed point by the implicit function theorem.

    :param Callable grad: gradient of the prior, differentiable.
    :param torch.Tensor probe: b, like y.

    Sources: Stein, Annals of Statistics 9 (1981); Ramani, Blu & Unser, IEEE Trans. Image Processing 17 (2008).
    """
    m, level = y[0].numel(), variance(physics, y).flatten(1).mean(1)
    scale = per_sample(weight, x) / data_fidelity.norm
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        slope = grad(leaf)

    def hessian(v: Tensor) -> Tensor:
        curved = torch.autograd.grad(slope, leaf, v, retain_graph=True)[0] if slope.requires_grad else 0
        return physics.A_adjoint_A(v) + scale * curved

    with torch.no_grad():
        moved = minres(hessian, physics.A_adjoint(probe), max_iter=30, tol=1e-3)
        divergence = (probe * physics.A(moved)).flatten(1).sum(1)
        return (physics.A(x) - y).flatten(1).square().mean(1) - level + 2 * level * divergence / m
