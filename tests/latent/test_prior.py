"""FlowPrior: density, gradient, prox, deepinv's optimizers and samplers, samples of the flow."""

import copy
import math
import pickle

import deepinv as dinv
import pytest
import torch
from cases import central_difference
from latent_cases import SIZE, Gaussian, image_prior

from deepinv_flows import CheckpointError, FlowDenoiser, FlowModel, FlowPrior, PatchNR, glow_flow, image_flow


def test_density_of_a_gaussian():
    x = torch.randn(3, *SIZE, dtype=torch.float64)
    expected = -torch.distributions.Normal(0.4, 0.3).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(FlowPrior(Gaussian())(x), expected)
    torch.testing.assert_close(FlowPrior(Gaussian(), per_dim=True)(x), expected / 32)


def test_is_what_training_minimises():
    prior, x = image_prior(), torch.rand(2, *SIZE, dtype=torch.float64)
    torch.testing.assert_close(FlowModel(prior, dequantise=0)(x), prior(x))


def test_gradient():
    prior, x = image_prior(), torch.rand(2, *SIZE, dtype=torch.float64)
    direction = torch.randn_like(x)
    grad = prior.grad(x)
    assert not x.requires_grad
    expected = central_difference(lambda: prior(x).sum(), x, direction)
    torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        frozen = prior.grad(x)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, grad)


@pytest.mark.parametrize("gamma", [0.01, 1.0, 100.0])
def test_prox_of_a_gaussian(gamma):
    prior, x = FlowPrior(Gaussian()), torch.randn(3, *SIZE, dtype=torch.float64)
    expected = (x + gamma / 0.09 * 0.4) / (1 + gamma / 0.09)
    torch.testing.assert_close(prior.prox(x, gamma=gamma, tol_inter=1e-9), expected, rtol=1e-6, atol=1e-6)


def test_prox_is_stationary_descends_and_differentiates():
    prior, x = image_prior(), torch.randn(2, *SIZE, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor([0.05, 0.2], dtype=torch.float64)
    u = prior.prox(x, gamma=gamma, tol_inter=1e-12, max_iter_inter=500)
    residual = u - x + gamma.view(-1, 1, 1, 1) * prior.grad(u)
    assert residual.abs().max() < 1e-6  # also where it is differentiated with respect to u itself
    direction = torch.randn_like(x)
    (grad,) = torch.autograd.grad((u * direction).sum(), x)
    moved, plain = torch.randn_like(x), x.detach().clone()

    def loss():
        return (prior.prox(plain, gamma=gamma, tol_inter=1e-12, max_iter_inter=500) * direction).sum()

    torch.testing.assert_close((grad * moved).sum(), central_difference(loss, plain, moved), rtol=1e-4, atol=1e-6)


OPTIMIZERS = {
    "GD": lambda **k: dinv.optim.GD(**k),
    "PGD": lambda **k: dinv.optim.PGD(**k),
    "FISTA": lambda **k: dinv.optim.FISTA(**k),
    "HQS": lambda **k: dinv.optim.HQS(**k),
    "ADMM": lambda **k: dinv.optim.ADMM(**k),
    "DRS": lambda **k: dinv.optim.DRS(**k),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_deepinvs_optimizers(name):
    """Denoising under a Gaussian has a closed form; half-quadratic splitting adds its step size to the variance of the noise."""
    sigma, x = 0.2, 0.4 + 0.3 * torch.randn(2, *SIZE, dtype=torch.float64)
    y = x + sigma * torch.randn_like(x)
    physics = dinv.physics.Denoising()
    model = OPTIMIZERS[name](
        data_fidelity=dinv.optim.L2(sigma=sigma), prior=FlowPrior(Gaussian()), stepsize=0.02, lambda_reg=1.0,
        max_iter=200, early_stop=False,
    )  # fmt: skip
    weight = 0.3**2 / (0.3**2 + sigma**2 + (0.02 if name == "HQS" else 0))
    torch.testing.assert_close(model(y, physics), 0.4 + weight * (y - 0.4), rtol=0, atol=1e-3)


def test_posterior_of_a_gaussian_by_langevin():
    sigma, y = 0.3, torch.full((1, 1, 24, 24), 1.0, dtype=torch.float64)
    options = dict(max_iter=2500, burnin_ratio=0.2, step_size=0.01, thinning=1, alpha=1.0, verbose=False)
    sampler = dinv.sampling.ULA(prior=FlowPrior(Gaussian()), data_fidelity=dinv.optim.L2(sigma=sigma), **options)
    mean, var = sampler(y, dinv.physics.Denoising(), seed=0)
    # N(0.4, 0.09) and noise of the same variance: mean 0.7, variance 0.045 (and ULA's own step adds about a tenth)
    assert abs(mean.mean() - 0.7) < 0.01
    assert 0.045 * 0.9 < var.mean() < 0.045 * 1.25


def test_samples_have_the_flows_moments():
    prior = FlowPrior(Gaussian())
    state = torch.get_rng_state()
    x = prior.sample(2000, img_size=SIZE).double()
    assert torch.equal(state, torch.get_rng_state())
    assert abs(x.mean() - 0.4) < 0.01 and abs(x.std() - 0.3) < 0.01
    assert prior.sample(2000, img_size=SIZE, std=0.5).std() < 0.16
    assert image_prior().sample(2).shape == (2, *SIZE)
    with pytest.raises(ValueError, match="expected img_size, which a Gaussian does not know"):
        prior.sample(2)


@pytest.mark.parametrize("std", [math.nan, -1.0, math.inf, [1.0, math.nan]], ids=str)
def test_temperatures_refused(std):
    with pytest.raises(ValueError, match="expected a finite std >= 0, or a list of them; got"):
        image_prior().sample(2, std=std)


def test_a_temperature_for_each_level():
    prior = image_prior()
    flow, seeded = prior.normalizing_flow, lambda: torch.Generator().manual_seed(3)
    levels = flow.to_levels(prior.encode(prior.sample(4, generator=seeded())))
    cold = flow.to_levels(prior.encode(prior.sample(4, std=[0.5, 1.0], generator=seeded())))
    torch.testing.assert_close(cold, [0.5 * levels[0], levels[1]])
    assert torch.equal(prior.sample(1, std=0), prior.decode(torch.zeros(1, *SIZE).double()))
    with pytest.raises(ValueError, match=r"one std, or one for each of 2 levels; got \[1.0, 1.0, 1.0\]"):
        prior.sample(2, std=[1, 1, 1])
    with pytest.raises(ValueError, match="one std, as a Gaussian does not have levels"):
        FlowPrior(Gaussian()).sample(2, img_size=SIZE, std=[1.0, 0.5])


def conditional_prior():
    flow = image_flow(SIZE, 2, 1, 4, activation="silu", dims_c=[(2, 4, 8)]).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return FlowPrior(flow)


def test_conditional_prior():
    prior, x, c = conditional_prior(), torch.rand(2, *SIZE).double(), torch.rand(2, 2, 4, 8).double()
    given, physics = prior.given(c), dinv.physics.Denoising()
    assert not torch.allclose(prior(x, c=c), prior(x, c=c + 1))
    for c_i, x_i, value in zip(c, x, prior(x, c=c)):
        torch.testing.assert_close(prior(x_i[None], c=c_i[None])[0], value)
    torch.testing.assert_close(given(x), prior(x, c=c))
    torch.testing.assert_close(given.grad(x), prior.grad(x, c=[c]))
    torch.testing.assert_close(given.prox(x, gamma=0.1), prior.prox(x, gamma=0.1, c=c))
    torch.testing.assert_close(prior.decode(prior.encode(x, c=c), c=c), x)
    assert torch.equal(given.sample(2, std=[1, 0.5]), conditional_sample(prior, c))
    torch.testing.assert_close(FlowDenoiser(prior)(x, 0.1, c=c), FlowDenoiser(given)(x, 0.1))
    model = dinv.optim.PGD(data_fidelity=dinv.optim.L2(), prior=given, stepsize=0.1, max_iter=3)
    assert model(x, physics).isfinite().all()
    direction = torch.randn_like(x)
    expected = central_difference(lambda: prior(x, c=c).sum(), x, direction)
    torch.testing.assert_close((prior.grad(x, c=c) * direction).sum(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="expected 1 conditions, of dims_c = .*; got 0"):
        prior(x)
    parallel = FlowPrior(torch.nn.DataParallel(prior.normalizing_flow)).given(c)
    assert parallel.sample(2, std=[1, 0.5]).isfinite().all()


@pytest.mark.parametrize("method", ["__call__", "grad", "encode", "decode", "given"])
def test_conditions_that_are_not_finite_are_refused(method):
    prior, x, c = conditional_prior(), torch.rand(2, *SIZE).double(), torch.full((2, 2, 4, 8), math.nan).double()
    call = getattr(prior, method)
    with pytest.raises(ValueError, match=r"a condition of shape \(2, 2, 4, 8\) holds NaN or infinite entries"):
        call(c) if method == "given" else call(x, c=c)
    with pytest.raises(TypeError, match="expected conditions as tensors; got ndarray"):
        call([c.numpy()]) if method == "given" else call(x, c=[c.numpy()])


def conditional_sample(prior, c):
    return prior.sample(2, std=[1, 0.5], generator=torch.Generator(), c=c)


@pytest.mark.parametrize("step", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("make", [image_prior, lambda: PatchNR(glow_flow(9, 1, 8).double(), patch_size=3)])
def test_prox_refuses_steps(make, step):
    x = torch.rand(1, *SIZE).double()
    with pytest.raises(ValueError, match="expected a finite stepsize_inter > 0; got"):
        make().prox(x, stepsize_inter=step)
    with pytest.raises(ValueError, match="expected a finite tol_inter >= 0; got"):
        make().prox(x, tol_inter=math.nan)


def test_prox_of_each_image_as_if_alone():
    prior = image_prior()
    x = torch.randn(3, *SIZE).double() * torch.tensor([0.1, 1.0, 5.0]).view(3, 1, 1, 1).double()
    together = prior.prox(x, gamma=0.5)
    for k in range(3):
        torch.testing.assert_close(prior.prox(x[k : k + 1], gamma=0.5)[0], together[k], rtol=1e-9, atol=1e-9)


def test_says_what_it_is():
    prior = image_prior(per_dim=True)
    assert "per_dim=True, img_size=(1, 4, 8)" in repr(prior) and "img_size=(1, 4, 8)" in repr(FlowDenoiser(prior))


def test_encode_and_decode():
    prior, x = image_prior(), torch.rand(2, *SIZE, dtype=torch.float64)
    torch.testing.assert_close(prior.decode(prior.encode(x)), x)


def test_saves_copies_and_pickles(tmp_path):
    prior, x = image_prior(dtype=torch.float32), torch.rand(2, *SIZE)
    prior.save(tmp_path / "flow.safetensors")
    again = FlowPrior(pretrained=tmp_path / "flow.safetensors")
    into = FlowPrior(copy.deepcopy(prior.normalizing_flow), pretrained=tmp_path / "flow.safetensors")
    for other in (again, into, copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(other(x), prior(x))
    with pytest.raises(CheckpointError, match="levels"):
        FlowPrior(image_flow((1, 8, 8), 1, 1, 4), pretrained=tmp_path / "flow.safetensors")
    with pytest.raises(CheckpointError, match="no file or shipped weights"):
        FlowPrior(pretrained=tmp_path / "nothing")


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.rand(2, 4, 8).double(), ValueError, r"expected images \(B, 1, H, W\); got shape \(2, 4, 8\)"),
        (torch.rand(2, *SIZE), TypeError, "dtype torch.float64, as the flow's weights; got torch.float32"),
        (torch.full((2, *SIZE), math.nan).double(), ValueError, "NaN or infinite"),
        (torch.rand(2, 1, 8, 8).double(), ValueError, r"shape \(N, 1, 4, 8\); got \(2, 1, 8, 8\)"),
    ],
)
def test_bad_images(x, error, message):
    prior = image_prior()
    for call in (prior, prior.grad, prior.prox, prior.encode):
        with pytest.raises(error, match=message):
            call(x)
    with pytest.raises(ValueError, match="neither"):
        FlowPrior()
    with pytest.raises(ValueError, match=r"expected 1 channels; got image of shape \(2, 3, 4, 8\)$"):
        prior(torch.rand(2, 3, 4, 8).double())
    with pytest.raises(ValueError, match=r"flow on images \(N, C, H, W\); got one on vectors of 9 entries"):
        FlowPrior(glow_flow(9, 1, 8))
    with pytest.raises(TypeError, match="expected a flow on whole images; got a PatchNR"):
        FlowPrior(PatchNR(patch_size=3))


def test_weights_of_patches_and_of_images_are_not_mixed_up():
    with pytest.raises(CheckpointError, match="gravel: expected weights that FlowPrior.save wrote"):
        FlowPrior(pretrained="gravel")
    for load in (lambda: PatchNR(pretrained="lfw"), lambda: PatchNR.from_checkpoint("lfw")):
        with pytest.raises(CheckpointError, match="lfw: expected weights of a flow on patches"):
            load()
