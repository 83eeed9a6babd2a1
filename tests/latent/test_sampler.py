"""LatentSampler: exact posteriors of Gaussians, invariances of the kernel, calibration."""

import math
import warnings

import deepinv as dinv
import pytest
import torch
from latent_cases import SIZE, Around, Gaussian, image_prior

from deepinv_flows import LatentSampler
from deepinv_flows.latent.effective import effective
from deepinv_flows.latent.hamiltonian import Kernel
from deepinv_flows.latent.preconditioner import curvature


def linear_physics(m, seed=0):
    A = torch.randn(m, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A, dinv.physics.LinearPhysics(
        A=lambda x, **kwargs: x.flatten(1) @ A.T, A_adjoint=lambda y, **kwargs: (y @ A).view(-1, *SIZE)
    )


@pytest.mark.parametrize("num_steps, rank, max_iter", [(10, 0, 1200), (10, 8, 800), (1, 8, 4000)])
def test_posterior_of_a_gaussian(num_steps, rank, max_iter):
    """Mean and variance of each pixel are exact, for measurements whose precision differs a hundredfold between directions."""
    sigma, prior_std = 0.3, 0.3
    A, physics = linear_physics(8)
    x = 0.4 + prior_std * torch.randn(2, *SIZE, dtype=torch.float64)
    y = physics(x) + sigma * torch.randn(2, 8, dtype=torch.float64)
    precision = torch.eye(32).double() / prior_std**2 + A.T @ A / sigma**2
    covariance = torch.linalg.inv(precision)
    mean = (covariance @ (A.T @ y.T / sigma**2 + 0.4 / prior_std**2)).T
    options = dict(max_iter=max_iter, warm_up=200, num_steps=num_steps, rank=rank, latent_shape=SIZE)
    sampler = LatentSampler(Gaussian(0.4, prior_std), dinv.optim.L2(sigma=sigma), **options)
    state = torch.get_rng_state()
    found, variance = sampler.sample(y, physics)
    assert torch.equal(state, torch.get_rng_state())
    error = (found.flatten(1) - mean) / covariance.diagonal().sqrt()
    assert error.pow(2).mean().sqrt() < 0.2, error
    ratio = variance.flatten(1) / covariance.diagonal()
    assert 0.85 < ratio.mean() < 1.15 and ratio.std() < 0.25, ratio
    assert (sampler.accepted > 0.6).all()


def test_effective_samples():
    """Independent samples, a chain of known autocorrelation, and one that stays where it is."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 200, generator=generator).double()
    assert effective(noise).mean() / 4000 == pytest.approx(1, abs=0.05)
    chain = [noise[0]]
    for step in noise[1:]:  # an autoregression: n (1 - a) / (1 + a)
        chain.append(0.8 * chain[-1] + 0.6 * step)
    assert effective(torch.stack(chain)).mean() / 4000 == pytest.approx(1 / 9, rel=0.1)
    assert effective(torch.full((30, 2), 0.7)).isnan().all()
    opposite = [noise[0]]
    for step in noise[1:100]:
        opposite.append(-0.8 * opposite[-1] + 0.6 * step)
    assert (effective(torch.stack(opposite)) > 30).all()
    assert effective(torch.full((30, 2), torch.inf)).tolist() == [1, 1]
    walk = noise[:300].cumsum(0)
    assert effective(walk).median() < 10


def test_a_chain_that_stays_near_its_start_is_told():
    """Steps much shorter than the posterior is wide."""
    _, physics = linear_physics(8)
    y = physics(torch.rand(2, *SIZE, dtype=torch.float64))
    options = dict(max_iter=30, warm_up=30, rank=0, latent_shape=SIZE)
    with pytest.warns(
        UserWarning, match=r"images \[0, 1\] of the batch are worth .* raise max_iter \(now 30\) or num_steps"
    ):
        stuck = LatentSampler(Gaussian(0.4, 0.3), dinv.optim.L2(sigma=1e-3), num_steps=3, **options)
        stuck(y, physics)
    assert (stuck.effective < 10).all() and (stuck.accepted > 0.5).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = LatentSampler(Gaussian(0.4, 0.3), dinv.optim.L2(sigma=0.3), **options)
        sampler(y, physics)
    assert (sampler.effective > 15).all()


@pytest.mark.filterwarnings("ignore:the chains")
def test_statistics_of_any_kind():
    """What is watched does not change the chain; a probability is the mean of a boolean; what never changes is not counted."""
    physics, y, seen = dinv.physics.Denoising(), torch.rand(2, *SIZE).double(), []
    options = dict(max_iter=15, warm_up=5, rank=0, map_iter=0, latent_shape=SIZE)

    def sample(g_statistics):
        sampler = LatentSampler(Gaussian(0.4, 0.3), dinv.optim.L2(sigma=0.2), **options)
        mean, _ = sampler.sample(y, physics, g_statistics=g_statistics, callback=lambda x, z: seen.append(z))
        return mean, sampler.effective

    likely, _ = sample(lambda x: x > 0.4)
    assert ((likely >= 0) & (likely <= 1)).all() and likely.unique().numel() > 5
    count, known = sample(lambda x: (x > 0.4).sum((1, 2, 3)))
    torch.testing.assert_close(count, likely.sum((1, 2, 3)))
    assert torch.equal(seen[14], seen[29]) and (known > 1).all()
    _, never = sample(lambda x: x > 1e3)
    assert (never >= known).all()
    for wrong in (lambda x: x.mean(), lambda x: x.mean((0, 1)), torch.fft.fft2, lambda x: 1.0):
        with pytest.raises(ValueError, match="expected a statistic of real numbers for each of 2 images"):
            sample(wrong)


def test_chains_make_as_many_steps_as_each_needs():
    """One with large steps waits for one with small steps, and both keep their acceptance."""
    scale = torch.tensor([1.0, 100.0]).double()[:, None]

    def value_and_grad(z):
        return 0.5 * (scale * z**2).sum(1), scale * z

    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double() / scale.sqrt()
    metric = curvature(value_and_grad, z, 0, 1.0, torch.Generator())
    kernel = Kernel(value_and_grad, z, metric, 100, 0.8, torch.Generator().manual_seed(2))
    seen = []
    for k in range(700):
        kernel.step(adapt=k < 100)
        seen.append(kernel.z)
    assert kernel.average.exp()[0] > 5 * kernel.average.exp()[1]
    variance = torch.stack(seen[100:]).var(0).mean(1) * scale[:, 0]
    torch.testing.assert_close(variance, torch.ones(2).double(), rtol=0.15, atol=0)


def test_temperature_scales_the_prior():
    """If almost nothing is measured, the standard deviation of the images is the temperature times that of the flow."""
    physics, y = dinv.physics.Denoising(), torch.full((1, *SIZE), 0.4, dtype=torch.float64)
    options = dict(max_iter=400, warm_up=60, latent_shape=SIZE)
    for temperature in (0.5, 2.0):
        sampler = LatentSampler(Gaussian(0.4, 0.3), dinv.optim.L2(sigma=100.0), temperature, **options)
        _, variance = sampler.sample(y, physics)
        assert abs(float(variance.mean().sqrt()) / (0.3 * temperature) - 1) < 0.1


def test_calibration_on_the_flows_own_images():
    """Images drawn from the flow lie in the central 80% of their posterior in 80% of the cases."""
    prior = image_prior(0.1)
    sigma, x = 0.3, prior.sample(12)
    physics = dinv.physics.Denoising()
    y = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    below, count = torch.zeros_like(x), 0

    def compare(sample, z):
        nonlocal below, count
        below, count = below + (sample < x), count + 1

    mean, variance = LatentSampler(prior, dinv.optim.L2(sigma=sigma), max_iter=150, warm_up=40, rank=4).sample(
        y, physics, callback=compare
    )
    rank = below / count
    assert abs(float(((rank > 0.1) & (rank < 0.9)).double().mean()) - 0.8) < 0.08
    assert 0.8 < float(((mean - x) ** 2 / variance).mean()) < 1.25
    assert float(((mean - x) ** 2).mean()) < float(((y - x) ** 2).mean())


def test_each_image_as_if_alone_and_seeded():
    prior, physics = image_prior(0.05), dinv.physics.Denoising()
    y = torch.rand(1, *SIZE).double()
    options = dict(max_iter=15, warm_up=10, rank=2, num_steps=20)
    sampled = [LatentSampler(prior, dinv.optim.L2(sigma=0.2), **options)(y, physics) for _ in range(2)]
    assert torch.equal(*sampled)
    walls = [
        LatentSampler(prior, dinv.optim.L2(sigma=0.2), **options)(torch.cat([y, factor * y]), physics)
        for factor in (1.0, 50.0)
    ]
    assert walls[1].isfinite().all() and torch.equal(walls[0][0], walls[1][0])


def test_curvature_finds_the_largest_eigenvalues():
    eigenvalues = torch.tensor([1e5, 1e4, 1e3, 1.0, 1.0, 1.0]).double()
    Q = torch.linalg.qr(torch.randn(6, 6).double())[0]
    H = Q @ torch.diag(eigenvalues) @ Q.T

    def value_and_grad(z):
        return 0.5 * (z @ H * z).sum(1), z @ H

    z = torch.randn(2, 6).double()
    metric = curvature(value_and_grad, z, 3, 1.0, torch.Generator())
    torch.testing.assert_close(metric.inverse(z), z @ torch.linalg.inv(H), rtol=1e-3, atol=1e-3)
    assert (metric.root(metric.root(z)) - z @ H).norm() < 1e-3 * (z @ H).norm()
    none = curvature(value_and_grad, z, 0, 4.0, torch.Generator())
    torch.testing.assert_close(none.inverse(z), z / 4)


def test_statistics_and_refusals():
    prior, physics, y = image_prior(0.05), dinv.physics.Denoising(), torch.rand(2, *SIZE).double()
    sampler = LatentSampler(prior, dinv.optim.L2(sigma=0.2), max_iter=10, warm_up=5, rank=0, map_iter=0)
    mean, variance = sampler.sample(y, physics, g_statistics=lambda x: x.amax((1, 2, 3)))
    assert mean.shape == variance.shape == (2,)
    assert "temperature=1.0, max_iter=10" in repr(sampler)
    for options, message in (
        (dict(temperature=0.0), "expected temperature > 0"),
        (dict(temperature=math.nan), "expected temperature > 0"),
        (dict(temperature=math.inf), "expected a finite temperature; got inf"),
        (dict(acceptance=1.0), "expected 0 < acceptance < 1; got 1.0"),
        (dict(max_iter=0), "expected max_iter to be an integer >= 1"),
        (dict(rank=-1), "expected rank to be an integer >= 0; got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentSampler(prior, **options)
    with pytest.raises(TypeError, match="measurements of torch.float64"):
        sampler(y.float(), physics)


def test_half_precision():
    """Its decompositions are those of full precision."""
    flow = image_prior(0.05, torch.bfloat16)
    y = torch.rand(1, *SIZE).bfloat16()
    sampler = LatentSampler(flow, dinv.optim.L2(sigma=0.5), max_iter=12, warm_up=5, num_steps=5, rank=3)
    mean, variance = sampler.sample(y, dinv.physics.Denoising())
    assert mean.dtype == variance.dtype == torch.bfloat16 and mean.isfinite().all()


def test_a_conditional_flow():
    """The condition is the mean of the prior, so that the posterior mean lies in the middle between it and the measurements."""
    y, physics = torch.rand(2, *SIZE, dtype=torch.float64), dinv.physics.Denoising()
    c = torch.rand_like(y)
    sampler = LatentSampler(
        Around(), dinv.optim.L2(sigma=1.0), max_iter=400, warm_up=40, rank=0, c=c, latent_shape=SIZE
    )
    for mean, conditions in ((sampler(y, physics), c), (sampler(y, physics, c=c**2), c**2)):
        error = (mean - (y + conditions) / 2).square().mean().sqrt()
        assert error < 0.1  # standard deviations of 0.7, known from 400 samples
