"""The problem of :mod:`material_superresolution`, and its methods: functions of (physics, y, strength, ...) to an image."""

import functools
import math

import deepinv as dinv
import torch
import torch.nn.functional as F
from arena import MixturePrior, expectation_maximisation, some_patches
from recovery_methods import total_variation
from torch import Tensor

from deepinv_flows import MAP, FlowDenoiser, PatchNR

NOISE = 0.01
COMPONENTS, PATCH = 200, 6


def make_physics(side: int, device: str = "cpu", seed: int = 0) -> dinv.physics.LinearPhysics:
    line = torch.exp(-((torch.arange(16, device=device) - 7.5) ** 2) / (2 * 2.0**2))
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur_and_subsample(x, **kwargs):
        return F.conv2d(F.pad(x, (0, 12, 0, 12), mode="circular"), kernel, stride=4)

    def adjoint(y, **kwargs):
        x = F.conv_transpose2d(y, kernel, stride=4)
        for dim in (2, 3):
            inside, beyond = x.split([x.shape[dim] - 12, 12], dim)
            x = inside + F.pad(beyond, (0, 0) * (3 - dim) + (0, inside.shape[dim] - 12))
        return x

    noise = dinv.physics.GaussianNoise(NOISE, rng=torch.Generator(device).manual_seed(seed))
    return dinv.physics.LinearPhysics(
        A=blur_and_subsample, A_adjoint=adjoint, img_size=(1, side, side), noise_model=noise, device=device
    )


def bicubic(y: Tensor) -> Tensor:
    """Bicubic interpolation, shifted to where the kernel's centre puts the pixels."""
    return torch.roll(F.interpolate(y, scale_factor=4, mode="bicubic"), (6, 6), (2, 3))


def by_adam(physics, y, strength, prior: PatchNR, iterations: int, step: float) -> Tensor:
    """Adam on sum((Sx - y)^2) + strength * prior(x), as the paper's, with a cosine for its step."""
    x = bicubic(y).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=step)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.01 + 0.99 * math.cos(math.pi * i / iterations / 2) ** 2
    )
    strength = strength * x[0].numel() / 600**2  # the data term is a sum, the prior a mean
    for _ in range(iterations):
        optimizer.zero_grad()
        (((physics.A(x) - y) ** 2).sum() + strength * prior(x).sum()).backward()
        optimizer.step()
        schedule.step()
    return x.detach()


def by_map(physics, y, strength, prior: dinv.optim.Prior) -> Tensor:
    """A minimum of |Sx - y|^2 / 2 sigma^2 + strength * (pixels / pixels of a patch) * prior(x), from MAP's starts."""
    count = y[0].numel() * 16 / prior.patch_size**2
    return MAP(prior, dinv.optim.L2(sigma=NOISE), strength * count, verbose=False)(y, physics)


def by_model(physics, y, strength, model: MAP) -> Tensor:
    return model(y, physics)


def by_tv(physics, y, strength, iterations: int) -> Tensor:
    # 5% above the largest eigenvalue, which the power iteration approaches from below
    physics.norm = 1.05 * float(physics.compute_norm(bicubic(y), verbose=False))
    return total_variation(physics, y, NOISE, strength, iterations)


def plug_and_play(physics, y, strength, denoiser: FlowDenoiser, high: float, low: float, steps: int) -> Tensor:
    """
    Half-quadratic splitting with the level of the denoiser falling from ``high`` to ``low``.

    Each step solves |Sx - y|^2 / 2 sigma^2 + strength |x - z|^2 / 2 s^2 by conjugate gradients, and denoises at the level s.
    """
    z = bicubic(y)
    for k in range(steps):
        level = high * (low / high) ** (k / max(steps - 1, 1))
        gamma = level**2 / (strength * NOISE**2)
        with torch.no_grad():
            x = physics.prox_l2(z, y, gamma, solver="CG", max_iter=100, tol=1e-4)
            z = denoiser(x, level)
    return z


def fitted_mixture(learn: Tensor, device: str, patches: int, steps: int = 60) -> MixturePrior:
    """EPLL's mixture of Gaussians with means, on patches of one image."""
    generator = torch.Generator().manual_seed(0)
    x = some_patches([learn], PATCH, patches, generator).to(device)
    found = expectation_maximisation(x, COMPONENTS, generator, steps, means=True)
    return MixturePrior(*found, PATCH, chunk=8192 if device == "cpu" else 65536)


def ways(denoiser: FlowDenoiser, steps: int) -> dict[str, functools.partial]:
    """Schedules of plug-and-play to choose from, over the levels that the denoiser knows."""
    low, high = denoiser.prior.sigma_range
    return {
        f"from {start:.3g} to {end:.3g}": functools.partial(
            plug_and_play, denoiser=denoiser, high=start, low=end, steps=steps
        )
        for start in (high, (low * high) ** 0.5)
        for end in (low, 2 * low)
    }
