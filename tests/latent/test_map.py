"""FlowPrior: density, gradient, prox, deepinv's optimizers and samplers. LatentMAP: theory, guards, independence."""

import copy
import math
import pickle

import deepinv as dinv
import pytest
import torch
from cases import central_difference
from latent_theorem import bounds, errors, generator_matrix, linear_flow

from deepinv_flows import CheckpointError, FlowModel, FlowPrior, LatentMAP, PatchNR, image_flow
from deepinv_flows.solvers.lbfgs import first_order, lbfgs

SIZE = (1, 4, 8)


def image_prior(spread=0.1, dtype=torch.float64, **options):
    flow = image_flow(SIZE, num_levels=2, num_steps=1, hidden=4, activation="silu").to(dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(spread * torch.randn_like(p))
    return FlowPrior(flow, **options)


class Gaussian(torch.nn.Module):
    """The flow z = (x - mean) / std on images, whose posteriors are known."""

    def __init__(self, mean=0.4, std=0.3):
        super().__init__()
        self.mean, self.std = mean, torch.nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, x, rev=False):
        log_det = -x[0].numel() * self.std.log().expand(len(x))
        return (x * self.std + self.mean, -log_det) if rev else ((x - self.mean) / self.std, log_det)


class Narrow(torch.nn.Module):
    """A generator that is no flow: 3 numbers to an image; its bias makes images far away not finite."""

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(3, 32).double()

    def forward(self, z):
        return self.map(z).view(-1, *SIZE)


# --- FlowPrior ---


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
    """Denoising under a Gaussian has a closed form; half-quadratic splitting softens the noise by its step."""
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


# --- the optimizers ---


def rosenbrock(z):
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = (100 * (leaf[:, 1:] - leaf[:, :-1] ** 2) ** 2 + (1 - leaf[:, :-1]) ** 2).sum(1)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def with_holes(value_and_grad, limit):
    """NaN where any entry exceeds ``limit``."""

    def holed(z):
        value, grad = value_and_grad(z)
        return torch.where(z.amax(1) > limit, torch.full_like(value, math.nan), value), grad

    return holed


SOLVERS = {
    "lbfgs": lambda f, z, n, **k: lbfgs(f, z, n, **k),
    "adam": lambda f, z, n, **k: first_order(f, z, lambda p: torch.optim.Adam(p, lr=0.02), 10 * n, **k),
}


def test_lbfgs_solves_rosenbrock():
    z = torch.randn(6, 8, dtype=torch.float64)
    value, _ = rosenbrock(lbfgs(rosenbrock, z, 200))
    # the other local minimum is at 3.98
    assert ((value < 1e-12) | ((value - 3.98).abs() < 0.01)).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_do_not_depend_on_each_other(name):
    z = torch.randn(4, 8, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 10]).view(4, 1)
    together = SOLVERS[name](rosenbrock, z, 20)
    for k in range(4):
        torch.testing.assert_close(SOLVERS[name](rosenbrock, z[k : k + 1], 20)[0], together[k], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_non_finite_steps_are_rejected(name):
    z = torch.zeros(2, 8, dtype=torch.float64)
    z[1] = 0.5
    seen = []
    holed = with_holes(rosenbrock, 0.6)  # the minimum, at 1, is in the hole
    end = SOLVERS[name](holed, z, 60, callback=lambda z, value: seen.append(value))
    value, _ = holed(end)
    assert value.isfinite().all() and (value < 0.9 * rosenbrock(z)[0]).all()
    history = torch.stack(seen)
    assert history.isfinite().all() and (history[1:] <= history[:-1]).all()


# --- LatentMAP ---


def test_theorem():
    """E|xhat - x|^2 for a linear generator: the known mean, within four standard errors, and between the bounds."""
    for spectrum, mean in ((1 / torch.arange(1, 61.0).double(), 0.0848), (torch.ones(60).double(), 40.0)):
        flow = linear_flow(spectrum)
        torch.testing.assert_close(torch.linalg.svdvals(generator_matrix(flow)), spectrum.sort(descending=True).values)
        found = errors(flow, trials=400, batch=20)
        torch.testing.assert_close(found["LatentMAP"], found["exact"], rtol=1e-4, atol=1e-6)
        means = found["LatentMAP"].mean(1)
        assert abs(means.mean() - mean) < 4 * means.std() / len(means) ** 0.5
        lower, upper = bounds(spectrum)
        assert lower < means.mean() < upper


@pytest.mark.parametrize("penalty", ["norm", "squared"])
def test_gradient_of_the_objective(penalty):
    physics = dinv.physics.Inpainting(SIZE, mask=0.5)
    model = LatentMAP(image_prior(), lambda_reg=0.7, penalty=penalty)
    z = torch.randn(2, *SIZE, dtype=torch.float64)
    y, direction = physics(torch.rand_like(z)), torch.randn_like(z)
    value, grad = model.value_and_grad(z, y, physics)
    expected = central_difference(lambda: model.value_and_grad(z, y, physics)[0].sum(), z, direction)
    torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-6, atol=1e-6)
    length = z.flatten(1).norm(dim=1)
    reg = 0.7 * (length if penalty == "norm" else 0.5 * length**2)
    torch.testing.assert_close(value, model.data_fidelity(model.generate(z), y, physics) + reg)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", "adamax", "nadam", "rmsprop", "sgd"])
def test_map_of_a_gaussian(optimizer):
    """With the squared penalty and the noise's variance, lambda 1 gives the posterior mean."""
    sigma, y = 0.2, torch.rand(2, *SIZE, dtype=torch.float64)
    model = LatentMAP(
        Gaussian(), dinv.optim.L2(sigma=sigma), lambda_reg=1, penalty="squared", optimizer=optimizer, max_iter=500,
        early_stop=False, stepsize=0.05 if optimizer == "sgd" else None,
    )  # fmt: skip
    expected = 0.4 + 0.09 / (0.09 + sigma**2) * (y - 0.4)
    with torch.no_grad():
        x_net = model(y, dinv.physics.Denoising())
    assert not x_net.requires_grad
    torch.testing.assert_close(x_net, expected, rtol=0, atol=1e-2 if optimizer in ("rmsprop", "nadam") else 1e-3)


@pytest.mark.parametrize(
    "init", ["zero", "random", "pinv", torch.ones(1, *SIZE), lambda y, physics: torch.ones_like(y)]
)
def test_starts(init):
    physics, x = dinv.physics.Denoising(), torch.rand(2, *SIZE, dtype=torch.float64)
    prior = image_prior(0.05)
    state = torch.get_rng_state()
    model = LatentMAP(prior, init=init, init_std=0.1, max_iter=300)
    torch.testing.assert_close(model(x, physics), x, rtol=0, atol=1e-2)
    again = LatentMAP(prior, max_iter=300)(x, physics, init=init)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(again, x, rtol=0, atol=1e-2)


def test_metrics():
    physics, x = dinv.physics.Denoising(), torch.rand(3, *SIZE, dtype=torch.float64)
    model = LatentMAP(image_prior(0.05), max_iter=15)
    x_net, metrics = model(x, physics, x_gt=x, compute_metrics=True)
    assert set(metrics) == {"psnr", "cost", "residual"}
    for psnr, cost, residual in zip(*(metrics[name] for name in ("psnr", "cost", "residual"))):
        assert len(psnr) == len(cost) + 1 == len(residual) + 1
        assert cost == sorted(cost, reverse=True) and psnr[-1] > psnr[0] + 10
    torch.testing.assert_close(x_net, model(x, physics))
    final = dinv.metric.PSNR()(x_net, x)
    torch.testing.assert_close(torch.tensor([psnr[-1] for psnr in metrics["psnr"]]).to(final), final)
    _, without = model(x, physics, compute_metrics=True)
    assert without["psnr"] == [[], [], []]


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_generators_that_are_no_flow(optimizer):
    """The nearest image of the range, as least squares finds it."""
    generator, x = Narrow(), torch.rand(2, *SIZE, dtype=torch.float64)
    options = dict(optimizer=optimizer, max_iter=2000, thres_conv=1e-12)
    x_net = LatentMAP(generator, latent_shape=(3,), **options)(x, dinv.physics.Denoising())
    W, b = generator.map.weight.detach(), generator.map.bias.detach()
    z = torch.linalg.lstsq(W, (x.flatten(1) - b).T).solution.T
    torch.testing.assert_close(x_net, generator(z).detach(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="expected latent_shape"):
        LatentMAP(generator)(x, dinv.physics.Denoising())
    with pytest.raises(ValueError, match="inverse of G, which a Narrow does not have"):
        LatentMAP(generator, init="pinv")(x, dinv.physics.Denoising())


def test_one_bad_image_does_not_stop_the_others():
    """A data fidelity that is infinite for the first image unless it stays dark."""

    class Walled(dinv.optim.L2):
        def fn(self, x, y, physics, *args, **kwargs):
            value = super().fn(x, y, physics)
            wall = torch.where(x.amax((1, 2, 3)) > 0.6, math.inf, 1.0)
            return value * torch.where(torch.arange(len(x)) == 0, wall, torch.ones_like(wall))

    y = torch.full((2, *SIZE), 0.9, dtype=torch.float64)
    for optimizer in ("lbfgs", "adam"):
        model = LatentMAP(Gaussian(), Walled(), optimizer=optimizer, max_iter=500)
        x_net = model(y, dinv.physics.Denoising())
        assert 0.5 < x_net[0].max() <= 0.6
        torch.testing.assert_close(x_net[1], y[1], rtol=0, atol=1e-2)
    # a start in the wall goes back to zero; with no way out the image is named
    with pytest.warns(UserWarning, match=r"images \[0\] of the batch is not finite at their start"):
        assert LatentMAP(Gaussian(), Walled(), init=torch.ones(1, *SIZE))(y, dinv.physics.Denoising()).isfinite().all()
    with pytest.raises(ValueError, match=r"objective of images \[0\] of the batch"):
        LatentMAP(Gaussian(mean=0.7), Walled())(y, dinv.physics.Denoising())


def test_any_physics():
    """Complex measurements, a nonlinear operator, and measurements with a mask of their own for each image."""
    prior, x = image_prior(0.05), torch.rand(2, *SIZE, dtype=torch.float64)
    masks = (torch.rand(2, *SIZE) > 0.5).double()
    inpainting = dinv.physics.Inpainting(SIZE, mask=masks)
    square = dinv.physics.Physics(A=lambda x, **kwargs: x**2)
    fourier = dinv.physics.LinearPhysics(A=torch.fft.fft2, A_adjoint=lambda y: torch.fft.ifft2(y).real)
    for physics in (inpainting, square, fourier):
        y = physics(x)
        x_net = LatentMAP(prior, max_iter=60, init_std=0.1, init="random")(y, physics)
        assert (physics.A(x_net) - y).abs().max() < 0.05
    stack = dinv.physics.stack(inpainting, dinv.physics.Denoising())
    fidelity = dinv.optim.StackedPhysicsDataFidelity([dinv.optim.L2(), dinv.optim.L2()])
    torch.testing.assert_close(LatentMAP(prior, fidelity, max_iter=300)(stack.A(x), stack), x, rtol=0, atol=0.05)


def test_copies_pickles_and_state_dicts():
    model, physics, x = (
        LatentMAP(image_prior(0.05), max_iter=5),
        dinv.physics.Denoising(),
        torch.rand(1, *SIZE).double(),
    )
    expected = model(x, physics)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, physics), expected)
    other = LatentMAP(image_prior(0.2), max_iter=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, physics), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(penalty="l1"), "expected penalty to be one of 'norm', 'squared'; got 'l1'"),
        (dict(optimizer="newton"), "expected optimizer to be one of 'lbfgs', 'adam'"),
        (dict(init="ones"), "expected init to be one of 'zero', 'random', 'pinv'; got 'ones'"),
        (dict(stepsize=0.0), "expected a finite stepsize > 0; got 0.0"),
        (dict(init_std=-1.0), "expected a finite init_std > 0"),
        (dict(max_iter=0), "expected max_iter to be an integer >= 1"),
        (dict(lambda_reg=-1.0), "expected a finite lambda_reg >= 0; got -1.0"),
        (dict(lambda_reg=math.nan), "expected a finite lambda_reg"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        LatentMAP(Gaussian(), **options)


def test_refusals_in_the_call():
    y, physics = torch.rand(2, *SIZE).double(), dinv.physics.Denoising()
    with pytest.raises(TypeError, match=r"torch.nn.Module as flow or generator; got function"):
        LatentMAP(lambda z: z)
    with pytest.raises(ValueError, match=r"measurements of shape \(2, 1, 4, 8\) hold NaN"):
        LatentMAP(Gaussian())(y * math.nan, physics)
    with pytest.raises(ValueError, match=r"expected 1 or 2 initial latents; got shape \(3, 1, 4, 8\)"):
        LatentMAP(Gaussian())(y, physics, init=torch.zeros(3, *SIZE))
    with pytest.raises(ValueError, match=r"one for each of 2 images; got \(3,\)"):
        LatentMAP(Gaussian(), lambda_reg=torch.ones(3))(y, physics)
    with pytest.raises(ValueError, match=r"a data fidelity of shape \(2,\); got \(\)"):
        LatentMAP(Gaussian(), lambda x, y, physics: ((x - y) ** 2).mean())(y, physics)


def test_weights_of_patches_and_of_images_are_not_mixed_up():
    with pytest.raises(CheckpointError, match="gravel: expected weights that FlowPrior.save wrote"):
        FlowPrior(pretrained="gravel")
    for load in (lambda: PatchNR(pretrained="lfw"), lambda: PatchNR.from_checkpoint("lfw")):
        with pytest.raises(CheckpointError, match="lfw: expected weights of a flow on patches"):
            load()
