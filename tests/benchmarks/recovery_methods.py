"""The recovery problems of :mod:`faces_recovery`, and the methods compared on them."""

import functools

import deepinv as dinv
import numpy as np
import torch
import torch.nn.functional as F
from deepinv.physics.functional import dct_2d, idct_2d

from deepinv_flows import LatentMAP
from deepinv_flows.latent import LatentSampler

# --- problems: physics and measurements ---


def noisy(x, sigma, seed):
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma, rng=torch.Generator().manual_seed(seed)))
    return physics, physics(x), sigma


@functools.cache
def gaussian_matrix(m: int, n: int, device: torch.device) -> torch.Tensor:
    return (torch.randn(m, n, generator=torch.Generator().manual_seed(m)) / m**0.5).to(device)


def sensed(x, m, seed):
    shape, n = x.shape[1:], x[0].numel()
    noise = dinv.physics.GaussianNoise(0.1 / m**0.5, rng=torch.Generator().manual_seed(seed))
    physics = dinv.physics.LinearPhysics(
        A=lambda x, **kwargs: x.flatten(1) @ gaussian_matrix(m, n, x.device).T,
        A_adjoint=lambda y, **kwargs: (y @ gaussian_matrix(m, n, y.device)).view(-1, *shape),
        noise_model=noise,
    )
    physics.norm = (1 + (n / m) ** 0.5) ** 2  # largest eigenvalue of A^T A (Marchenko & Pastur 1967)
    return physics, physics(x), 0.1 / m**0.5


def holed(x, side, seed):
    mask, start = torch.ones_like(x[:1]), (x.shape[-1] - side) // 2
    mask[..., start : start + side, start : start + side] = 0
    noise = dinv.physics.GaussianNoise(0.01, rng=torch.Generator().manual_seed(seed))
    physics = dinv.physics.Inpainting(tuple(x.shape[1:]), mask=mask[0], noise_model=noise)
    return physics, physics(x), 0.01


def moved_to(device, problem):
    """The same measurements of a problem, on a device."""

    def moved(x, seed):
        physics, y, sigma = problem(x, seed=seed)
        return physics.to(device), y.to(device), sigma

    return moved


# --- methods: (physics, y, sigma, strength) to images ---


class Lasso(dinv.optim.Prior):
    """The l1 norm of orthonormal coefficients."""

    def __init__(self, analyse, synthesise):
        super().__init__()
        self.explicit_prior, self.analyse, self.synthesise = True, analyse, synthesise

    def fn(self, x, *args, **kwargs):
        return self.analyse(x).abs().flatten(1).sum(1)

    def prox(self, x, *args, gamma=1.0, **kwargs):
        return self.synthesise(F.softshrink(self.analyse(x), float(gamma)))


def haar(x, levels=4):
    x = x.clone()
    side = x.shape[-1]
    for _ in range(levels):
        a = x[..., :side, :side]
        for dim in (2, 3):
            even, odd = a.unflatten(dim, (-1, 2)).unbind(dim + 1)
            a = torch.cat([even + odd, even - odd], dim) / 2**0.5
        x[..., :side, :side] = a
        side //= 2
    return x


def inverse_haar(w, levels=4):
    w = w.clone()
    for level in reversed(range(levels)):
        side = w.shape[-1] // 2**level
        a = w[..., :side, :side]
        for dim in (3, 2):
            low, high = a.chunk(2, dim)
            a = torch.stack([low + high, low - high], dim + 1).flatten(dim, dim + 1) / 2**0.5
        w[..., :side, :side] = a
    return w


def proximal_descent(prior, physics, y, sigma, strength, iterations):
    model = dinv.optim.FISTA(
        data_fidelity=dinv.optim.L2(), prior=prior, lambda_reg=strength, max_iter=iterations,
        stepsize=0.99 / getattr(physics, "norm", 1.0), early_stop=False,
    )  # fmt: skip
    return model(y, physics)


def total_variation(physics, y, sigma, strength, iterations=200):
    if isinstance(physics, dinv.physics.Denoising):
        return dinv.models.TVDenoiser(n_it_max=200)(y, strength)
    return proximal_descent(dinv.optim.TVPrior(n_it_max=10), physics, y, sigma, strength, iterations)


orthonormal_dct, inverse_dct = (functools.partial(transform, norm="ortho") for transform in (dct_2d, idct_2d))


def lasso_dct(physics, y, sigma, strength, iterations=200):
    return proximal_descent(Lasso(orthonormal_dct, inverse_dct), physics, y, sigma, strength, iterations)


def lasso_wavelet(physics, y, sigma, strength, iterations=200):
    return proximal_descent(Lasso(haar, inverse_haar), physics, y, sigma, strength, iterations)


def bm3d(physics, y, sigma, strength):
    return dinv.models.BM3D()(y.cpu(), sigma)


def bm3d_rgb(physics, y, sigma, strength):
    """The package's own way with colours, which denoises luminance and chrominance; deepinv's takes channels one by one."""
    import bm3d

    images = [bm3d.bm3d_rgb(image.permute(1, 2, 0).double().cpu().numpy(), sigma) for image in y]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


class Kept:
    """A method whose result for the last measurements is kept, as those who go on from it differ in their strength alone."""

    def __init__(self, method):
        self.method, self.y, self.result = method, None, None

    def __call__(self, physics, y, sigma):
        if y is not self.y:
            self.y, self.result = y, self.method(physics, y, sigma)
        return self.result


def image_map(energies, iterations, start, physics, y, sigma, strength):
    """Adam on |Ax - y|^2 / 2 + strength (-log p(x) by each prior), from another method's result."""
    x = start(physics, y, sigma).clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        prior = sum(energy(x) for energy in energies)
        (dinv.optim.L2()(x, y, physics) + strength * prior).sum().backward()
        optimizer.step()
        schedule.step()
    return x.detach()


def patch_energy(prior):
    """-log p of an image by its patches, as if those side by side were independent."""
    return lambda x: x[0, 0].numel() / prior.patch_size**2 * prior(x)


def latent(flow, iterations, physics, y, sigma, strength, **options):
    """LatentMAP on |A G(z) - y|^2 / 2 sigma^2 + strength |z|."""
    fidelity = dinv.optim.L2(sigma=sigma)
    return LatentMAP(flow, fidelity, lambda_reg=strength, max_iter=iterations, verbose=False, **options)(y, physics)


def posterior(flow, iterations, physics, y, sigma, x):
    """
    The mean of LatentSampler's chain for one image, and how well its spread tells the error.

    That is how often pixels lie within one and two standard deviations of the mean, the mean squares of error and deviation, and
    how many independent samples the chain is worth.
    """
    options = dict(max_iter=iterations, warm_up=iterations // 2, verbose=False)
    sampler = LatentSampler(flow, dinv.optim.L2(sigma=sigma), **options)
    mean, variance = sampler.sample(y, physics)
    error = (mean - x.to(y.device)).abs()
    found = {f"within {k}": float((error <= k * variance.sqrt()).double().mean()) for k in (1, 2)}
    found |= {"square error": float(error.square().mean()), "variance": float(variance.mean())}
    return mean, found | {"effective": float(sampler.effective)}


def by_score(denoiser, physics, y, sigma, strength):
    """One pass of a denoiser."""
    with torch.no_grad():
        return denoiser(y, sigma)


def by_scores_of_views(denoiser, physics, y, sigma, strength):
    """The mean of ten passes: of an image, the same moved by a pixel each way, and the mirror images of these five."""
    padded, (height, width) = F.pad(y, (1, 1, 1, 1), mode="reflect"), y.shape[-2:]
    total, count = torch.zeros_like(padded), torch.zeros_like(padded)
    for i, j in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
        window = (..., slice(i, i + height), slice(j, j + width))
        moved = padded[window]
        with torch.no_grad():
            total[window] += denoiser(moved, sigma) + denoiser(moved.flip(3), sigma).flip(3)
        count[window] += 2
    return (total / count)[..., 1:-1, 1:-1]
