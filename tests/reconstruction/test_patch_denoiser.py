"""A patch flow as a denoiser: Wiener's for Gaussian patches, borders and sizes, derivatives, levels, files, training."""

import math

import deepinv as dinv
import pytest
import torch
import torch.nn.functional as F
from cases import central_difference, make

from deepinv_flows import CheckpointError, DistributedPatchNR, FlowDenoiser, PatchNR, fit_patchnr, glow_flow
from deepinv_flows.flows import gaussianise

SIGMA, P, MEAN = 0.5, 3, 0.4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance():
    """Of patches of a stationary image whose pixels at distance r are correlated by exp(-r / 2)."""
    at = torch.cartesian_prod(torch.arange(P), torch.arange(P)).double()
    return torch.exp(-torch.cdist(at, at) / 2)


def gaussian_prior(sigma_range=None, unit=1.0):
    """The exact prior of such patches with mean MEAN under noise, in this unit."""
    flow = glow_flow(P**2, 1, 8, whiten=True, generator=generator()).double()
    gaussianise(flow, torch.randn(100, P**2, generator=generator(), dtype=torch.float64))
    values, vectors = torch.linalg.eigh((covariance() + SIGMA**2 * torch.eye(P**2).double()) / unit**2)
    first = flow.module_list[0]
    with torch.no_grad():
        first.rotation.copy_(vectors.T)
        first.log_scale.copy_((-0.5 * values.log()).view_as(first.log_scale))
        first.offset.copy_(
            (-values.rsqrt() * (vectors.T @ torch.full((P**2,), MEAN / unit, dtype=torch.float64))).view_as(
                first.offset
            )
        )
    prior = PatchNR(flow, patch_size=P)
    prior.sigma_range = sigma_range
    return prior


def wiener():
    C = covariance()
    return C @ torch.linalg.inv(C + SIGMA**2 * torch.eye(P**2, dtype=C.dtype))


def averaged_wiener(y):
    """The mean of the posterior means of all patches of the mirrored image, patch by patch."""
    padded, out = F.pad(y, [P - 1] * 4, mode="reflect"), torch.zeros_like(F.pad(y, [P - 1] * 4))
    for i in range(padded.shape[2] - P + 1):
        for j in range(padded.shape[3] - P + 1):
            place = (slice(None), slice(None), slice(i, i + P), slice(j, j + P))
            patch = padded[place].flatten(1)
            out[place] += ((patch - MEAN) @ wiener().T + MEAN).view(-1, 1, P, P) / P**2
    return out[:, :, P - 1 : 1 - P, P - 1 : 1 - P]


def some_prior(**options):
    return PatchNR(make("glow_white", P**2), patch_size=P, **options)


def noisy_images(n=2, shape=(7, 9)):
    return torch.randn(n, 1, *shape, generator=generator(1), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 9), (P, P), (P, 20)], ids=str)
def test_posterior_mean_of_gaussian_patches(shape):
    y = noisy_images(2, shape)
    torch.testing.assert_close(FlowDenoiser(gaussian_prior())(y, SIGMA), averaged_wiener(y), rtol=1e-10, atol=1e-10)


def test_a_constant_image_stays_constant():
    """Patches with the covariance of white noise, for which a constant patch moves towards the mean by a known factor."""
    flow = glow_flow(P**2, 1, 8, whiten=True, generator=generator()).double()
    gaussianise(flow, torch.randn(100, P**2, generator=generator(), dtype=torch.float64))
    with torch.no_grad():
        flow.module_list[0].log_scale.fill_(-0.5 * math.log(1 + SIGMA**2))
        flow.module_list[0].offset.zero_()
    y = torch.full((1, 1, 8, 8), 0.7, dtype=torch.float64)
    torch.testing.assert_close(FlowDenoiser(PatchNR(flow, patch_size=P))(y, SIGMA), y / (1 + SIGMA**2))
    assert FlowDenoiser(some_prior())(y, 0.3).std() < 1e-12  # any flow's answer is one number for all pixels


def test_a_patch_is_denoised_by_its_gradient_at_every_pixel():
    """In the middle: y - sigma^2 n / p^2 times the gradient of the mean over the n patches."""
    prior, y = some_prior(), noisy_images()
    n = (y.shape[2] - P + 1) * (y.shape[3] - P + 1)
    expected = y - 0.3**2 * n / P**2 * prior.grad(y).detach()
    inside = (..., slice(P - 1, 1 - P), slice(P - 1, 1 - P))
    torch.testing.assert_close(FlowDenoiser(prior)(y, 0.3)[inside], expected[inside], rtol=1e-10, atol=1e-10)


def test_options_of_the_prior_do_not_matter():
    y, expected = noisy_images(), FlowDenoiser(some_prior())(noisy_images(), 0.3)
    for options in (dict(pad="circular"), dict(stride=2), dict(n_patches=5), dict(chunk_size=7)):
        torch.testing.assert_close(FlowDenoiser(some_prior(**options))(y, 0.3), expected, rtol=1e-12, atol=1e-12)
    shared = DistributedPatchNR(make("glow_white", P**2), patch_size=P)
    torch.testing.assert_close(FlowDenoiser(shared)(y, 0.3), expected, rtol=1e-12, atol=1e-12)


def test_colour():
    prior = PatchNR(make("glow_white", 12), patch_size=2, channels=3)
    y = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    assert FlowDenoiser(prior)(y, 0.1).shape == y.shape


def scaled_prior():
    prior = some_prior()
    prior.sigma_range = (0.1, 0.4)
    return prior


@pytest.mark.parametrize("prior", [some_prior, scaled_prior])
def test_a_batch_is_its_images_one_by_one(prior):
    denoiser, y, levels = FlowDenoiser(prior()), noisy_images(3), torch.tensor([0.1, 0.2, 0.4]).double()
    apart = torch.cat([denoiser(image[None], float(level)) for image, level in zip(y, levels)])
    torch.testing.assert_close(denoiser(y, levels), apart, rtol=1e-12, atol=1e-12)


def test_a_range_is_learned_in_the_unit_of_the_noise():
    """For each level the exact prior of y / sigma, and so the exact answer."""
    y = noisy_images()
    denoiser = FlowDenoiser(gaussian_prior((0.1, 1.0), unit=SIGMA))
    torch.testing.assert_close(denoiser(y, SIGMA), averaged_wiener(y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 9), (20, 20)], ids=["by autograd", "written out"])
@pytest.mark.parametrize("prior", [some_prior, scaled_prior])
def test_derivatives(prior, shape):
    prior, y = prior(), noisy_images(1, shape)
    denoiser, weight = FlowDenoiser(prior), torch.randn(shape, generator=generator(2), dtype=torch.float64)
    leaf = y.clone().requires_grad_()
    parameters = [p for p in prior.parameters() if p.requires_grad]

    def loss():
        return (weight * denoiser(leaf, 0.3)).sum()

    grads = torch.autograd.grad(loss(), [leaf, *parameters], allow_unused=True)
    for p, grad in list(zip([leaf, *parameters], grads))[::4]:
        direction = torch.randn(p.shape, generator=generator(3), dtype=p.dtype)
        slope = 0.0 if grad is None else float((grad * direction).sum())
        assert math.isclose(slope, float(central_difference(loss, p, direction)), rel_tol=1e-5, abs_tol=1e-7)


def test_levels_that_were_not_trained_are_refused():
    y, one = noisy_images(), some_prior()
    one.sigma_range = (0.2, 0.2)
    assert FlowDenoiser(one)(y, 0.2).shape == y.shape
    with pytest.raises(ValueError, match=r"expected sigma = 0.2, for which the prior was trained; got 0.25 to 0.25"):
        FlowDenoiser(one)(y, 0.25)
    with pytest.raises(ValueError, match=r"expected sigma in \[0.1, 0.4\], for which .* got 0.2 to 0.5"):
        FlowDenoiser(scaled_prior())(y, torch.tensor([0.2, 0.5]))


def test_levels_are_kept_in_files(tmp_path):
    prior, y = scaled_prior(), noisy_images()
    prior.save(tmp_path / "weights")
    for again in (
        PatchNR.from_checkpoint(tmp_path / "weights"),
        PatchNR(pretrained=tmp_path / "weights", patch_size=P),
    ):
        assert again.sigma_range == (0.1, 0.4)
        assert torch.equal(FlowDenoiser(again)(y, 0.2), FlowDenoiser(prior)(y, 0.2))
    some_prior().save(tmp_path / "weights")
    assert PatchNR.from_checkpoint(tmp_path / "weights").sigma_range is None


def test_plug_and_play_and_samplers_take_it():
    physics = dinv.physics.Inpainting((1, 12, 12), mask=0.5, rng=generator())
    physics.noise_model = dinv.physics.GaussianNoise(0.1, rng=generator())
    x = torch.rand(1, 1, 12, 12, generator=generator())
    y, denoiser = physics(x), FlowDenoiser(PatchNR(make("glow_white", P**2, torch.float32, 0.0), patch_size=P))
    for kind in (dinv.optim.PGD, dinv.optim.HQS):
        prior = dinv.optim.PnP(denoiser)
        model = kind(data_fidelity=dinv.optim.L2(), prior=prior, stepsize=0.8, g_param=0.1, max_iter=3)
        assert torch.isfinite(model(y, physics)).all()
    assert torch.isfinite(dinv.sampling.DDRM(denoiser, sigmas=[0.3, 0.1])(y, physics)).all()
    fidelity = dinv.optim.L2()
    assert torch.isfinite(dinv.sampling.DiffPIR(denoiser, fidelity, sigma=0.1, max_iter=3)(y, physics)).all()


def images_of_gaussian_patches(n, side):
    """Images whose patches are nearly those of ``covariance``."""
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    root = torch.linalg.cholesky(torch.exp(-torch.cdist(at, at) / 2))
    return MEAN + (torch.randn(n, side**2, generator=generator(), dtype=torch.float64) @ root.T).view(n, 1, side, side)


OPTIONS = dict(patch_size=P, num_layers=1, sub_net_size=8, batch_size=128, verbose=False)


@pytest.mark.parametrize("objective", ["score", "likelihood"])
@pytest.mark.parametrize("sigma", [SIGMA, (0.25, 1.0)], ids=str)
def test_training_nears_the_least_error(sigma, objective):
    x = images_of_gaussian_patches(40, 16)
    y = x[:10] + SIGMA * torch.randn(x[:10].shape, generator=generator(4), dtype=torch.float64)
    prior = fit_patchnr(x[10:], sigma=sigma, objective=objective, epochs=2, steps_per_epoch=20, **OPTIONS)
    with torch.no_grad():
        found = float(((FlowDenoiser(prior)(y, SIGMA) - x[:10]) ** 2).mean())
    least = float(((averaged_wiener(y) - x[:10]) ** 2).mean())
    assert 0.97 * least < found < 1.06 * least < SIGMA**2
    assert prior.sigma_range == ((SIGMA, SIGMA) if sigma == SIGMA else sigma)


@pytest.mark.parametrize("objective", ["score", "likelihood"])
def test_interrupted_training_resumes(tmp_path, objective):
    x = images_of_gaussian_patches(4, 12).float()
    options = dict(**OPTIONS, steps_per_epoch=2, save_path=tmp_path, resume=True)
    if objective == "likelihood":
        options["objective"] = objective
    fit_patchnr(x, x, sigma=SIGMA, epochs=2, **options)
    resumed = fit_patchnr(x, x, sigma=SIGMA, epochs=3, **options)
    assert resumed.sigma_range == (SIGMA, SIGMA)
    with pytest.raises(CheckpointError, match=r"expected weights of a flow .*sigma_range.*0.1.*; found .*0.5"):
        fit_patchnr(x, x, sigma=0.1, epochs=4, **options)
    options.pop("objective", None)
    with pytest.raises(CheckpointError, match="expected weights of a flow|missing tensors"):
        fit_patchnr(x, x, epochs=4, **options)
    with pytest.raises(CheckpointError, match="found the training of a denoiser"):
        PatchNR.from_checkpoint(next(tmp_path.glob("run_0/*/ckp_*.pth.tar")))


def test_what_is_refused():
    x = torch.rand(1, 1, 12, 12)
    for sigma in (-0.1, math.nan, math.inf, (0.0, 0.1), (0.2, 0.1)):
        with pytest.raises(ValueError, match="expected a finite noise level sigma >= 0"):
            fit_patchnr(x, sigma=sigma, **OPTIONS)
    for sigma in ("0.1", (0.1,), None):
        with pytest.raises(TypeError, match="expected sigma to be a number, or two"):
            fit_patchnr(x, sigma=sigma, **OPTIONS)
    with pytest.raises(ValueError, match="at least 15 pixels a side, for patches of 8; got 12"):
        fit_patchnr(x, sigma=0.1, verbose=False)
    with pytest.raises(ValueError, match="compile=False with sigma"):
        fit_patchnr(x, sigma=0.1, compile=True, **OPTIONS)
    with pytest.raises(ValueError, match="expected objective to be one of None, 'score', 'likelihood'; got 'mse'"):
        fit_patchnr(x, sigma=0.1, objective="mse", **OPTIONS)
    with pytest.raises(ValueError, match='expected sigma > 0 for objective="score"'):
        fit_patchnr(x, objective="score", **OPTIONS)
    with pytest.raises(ValueError, match="at least 3 x 3 pixels"):
        FlowDenoiser(some_prior())(torch.rand(1, 1, 2, 9).double(), 0.1)
