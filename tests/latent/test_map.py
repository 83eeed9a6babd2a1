"""LatentMAP: theory, starts, guards, units, every physics, independence of the images of a batch."""

import copy
import math
import pickle

import deepinv as dinv
import pytest
import torch
from cases import central_difference
from latent_cases import SIZE, Around, Gaussian, Narrow, image_prior
from latent_theorem import bounds, errors, generator_matrix, linear_flow
from physics_cases import ABSTRACT, ELSEWHERE, ONE_IMAGE_ONLY, PHYSICS, REFUSED, SIDE

from deepinv_flows import LatentMAP, PatchNR, glow_flow, image_flow
from deepinv_flows.latent.measurements import as_physics_takes


def test_theorem():
    """For a linear generator, E|xhat - x|^2 is the known mean within four standard errors, and lies between the bounds."""
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
    """With the squared penalty and the variance of the noise, lambda = 1 gives the posterior mean."""
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
def test_generators_that_are_not_flows(optimizer):
    """The result is the image in the range of the generator that least squares finds."""
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
    # a start of infinite objective is replaced by zero; if zero is infinite too, the error names the image
    with pytest.warns(UserWarning, match=r"images \[0\] of the batch is not finite at their start"):
        assert LatentMAP(Gaussian(), Walled(), init=torch.ones(1, *SIZE))(y, dinv.physics.Denoising()).isfinite().all()
    with pytest.raises(ValueError, match=r"objective of images \[0\] of the batch"):
        LatentMAP(Gaussian(mean=0.7), Walled())(y, dinv.physics.Denoising())


def test_any_physics():
    """Complex measurements, a nonlinear operator, and a mask for each image."""
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


@pytest.mark.parametrize("name", PHYSICS)
def test_every_physics_of_deepinv(name):
    channels, physics = PHYSICS[name][0], PHYSICS[name][1]()
    flow = image_flow((channels, SIDE, SIDE), 2, 1, 4, generator=torch.Generator().manual_seed(0))
    model = LatentMAP(flow, max_iter=60, init="random", init_std=0.1)
    z = 0.1 * torch.randn(1 if name in ONE_IMAGE_ONLY else 2, channels, SIDE, SIDE)
    y = physics.A(as_physics_takes(model.generate(z).detach(), physics))
    value_and_grad, start, _ = model.problem(y, physics)
    x_net = model(y, physics)
    end, _ = value_and_grad(model.images.encode(x_net))
    assert x_net.shape == z.shape and x_net.dtype == torch.float32
    assert (end < 0.5 * value_and_grad(start)[0]).all()  # phase retrieval has minima of its own


@pytest.mark.parametrize("name", REFUSED)
def test_physics_refused_by_name(name):
    channels, make = REFUSED[name]
    model = LatentMAP(image_flow((channels, SIDE, SIDE), 1, 1, 4))
    with pytest.raises(
        ValueError, match=rf"^{name} cannot measure the images of the generator, .* \(2, {channels}, 8, 8\)"
    ):
        model(torch.rand(2, channels, SIDE, SIDE), make())
    assert name in LatentMAP.__doc__


def test_no_physics_is_forgotten():
    classes = {
        name for name, c in vars(dinv.physics).items() if isinstance(c, type) and issubclass(c, dinv.physics.Physics)
    }
    assert classes == PHYSICS.keys() | REFUSED.keys() | ELSEWHERE | ABSTRACT


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", "adamax", "nadam", "rmsprop"])
@pytest.mark.parametrize(
    "of_measurements, of_objective", [(2.0**-20, 1.0), (2.0**20, 1.0), (1.0, 2.0**-40), (2.0**-15, 2.0**15)]
)
def test_units_do_not_matter(of_measurements, of_objective, optimizer):
    """Other units of y, A and f give the same images, also in single precision."""
    prior, x = image_prior(0.05, torch.float32), torch.rand(2, *SIZE)
    A = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))

    def recovered(unit, weight):
        def forward(x, **kwargs):
            return unit * x.flatten(1) @ A.T

        physics = dinv.physics.Physics(A=forward)
        fidelity = dinv.optim.L2(sigma=weight**-0.5)
        return LatentMAP(prior, fidelity, optimizer=optimizer, max_iter=25)(physics(x), physics), physics.A

    expected, A_x = recovered(1.0, 1.0)
    found, _ = recovered(of_measurements, of_objective)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if optimizer == "lbfgs":
        assert (A_x(found) - A_x(x)).norm() < 0.05 * A_x(x).norm()


def test_wrapped_flows_are_flows():
    physics, x = dinv.physics.Denoising(), torch.rand(2, *SIZE, dtype=torch.float64)
    flow = image_prior(0.05).normalizing_flow
    expected = LatentMAP(flow, max_iter=20)(x, physics)
    for wrapped in (torch.nn.DataParallel(flow), torch.compile(flow, backend="eager")):
        torch.testing.assert_close(LatentMAP(wrapped, max_iter=20)(x, physics), expected)


def test_conditional_flows():
    """Conditions as tensors, by a function of y and physics, and in the call. The condition is the mean of the image."""
    y, physics = torch.rand(2, *SIZE, dtype=torch.float64), dinv.physics.Denoising()
    c = torch.rand_like(y)
    options = dict(lambda_reg=1, penalty="squared", latent_shape=SIZE)
    for conditions, mean in ((c, c), ([c], c), (lambda y, physics: physics.A_adjoint(y) ** 2, y**2)):
        model = LatentMAP(Around(), c=conditions, **options)
        torch.testing.assert_close(model(y, physics), (y + mean) / 2, rtol=0, atol=1e-5)
    model = LatentMAP(Around(), **options)
    torch.testing.assert_close(model(y, physics, c=c), (y + c) / 2, rtol=0, atol=1e-5)
    flow = image_flow(SIZE, 2, 1, 4, dims_c=[SIZE]).double()
    assert LatentMAP(flow, c=c, init="pinv", max_iter=3)(y, physics).isfinite().all()
    with pytest.raises(ValueError, match="expected 1 conditions"):
        LatentMAP(flow)(y, physics)


def test_says_what_it_is():
    text = repr(LatentMAP(Gaussian(), penalty="squared", lambda_reg=0.5))
    assert "lambda_reg=0.5, penalty='squared', optimizer='lbfgs'" in text and "init='zero'" in text


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


class ByReverse(torch.nn.Module):
    def forward(self, x, reverse=False):
        return x, torch.zeros(len(x))


@pytest.mark.parametrize(
    "flow, message",
    [
        (lambda: PatchNR(patch_size=3), "expected a flow on whole images; got a PatchNR, whose flow is on patches"),
        (ByReverse, r"called as flow\(x, rev=False\), or a generator; ByReverse.forward takes reverse="),
        (lambda: torch.compile(ByReverse(), backend="eager"), "ByReverse.forward takes reverse="),
        (lambda: 3, "expected a torch.nn.Module as flow or generator; got int"),
    ],
)  # fmt: skip
def test_flows_refused(flow, message):
    with pytest.raises(TypeError, match=message):
        LatentMAP(flow())


@pytest.mark.parametrize(
    "y, error, message",
    [
        (torch.rand(2, *SIZE), TypeError, "measurements of torch.float64, as the flow's weights; got torch.float32"),
        (torch.rand(2, *SIZE).to(torch.complex64), TypeError, "of torch.float64, .* got torch.complex64"),
        (torch.ones(2, *SIZE, dtype=torch.uint8), TypeError, "floating-point measurements; got torch.uint8"),
        ([[0.5]], TypeError, "expected measurements as a tensor; got list"),
        (torch.rand(0, *SIZE).double(), ValueError, r"batch of measurements that is not empty; got shape \(0, 1, 4, 8\)"),
        (torch.rand(2, 3, 4, 8).double(), ValueError,
         r"measurements of shape \(2, 1, 4, 8\), as Denoising makes of images \(2, 1, 4, 8\); got \(2, 3, 4, 8\)"),
    ],
)  # fmt: skip
def test_measurements_refused(y, error, message):
    with pytest.raises(error, match=message):
        LatentMAP(image_prior())(y, dinv.physics.Denoising())


def test_more_refusals_in_the_call():
    y, physics = torch.rand(2, *SIZE).double(), dinv.physics.Denoising()
    with pytest.raises(TypeError, match="expected init to be a name, a tensor or a function; got ndarray"):
        LatentMAP(Gaussian())(y, physics, init=y.numpy())
    with pytest.raises(TypeError, match="expected init to return a tensor of latents; got ndarray"):
        LatentMAP(Gaussian())(y, physics, init=lambda y, physics: y.numpy())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="gradient of LatentMAP needs autograd"):
        LatentMAP(Gaussian())(y, physics)
    square = dinv.physics.Physics(A=lambda x, **kwargs: x**2)
    with pytest.raises(
        ValueError, match="expected latent_shape, since Gaussian does not know the size of its images and Physics"
    ):
        LatentMAP(Gaussian())(y, square)
    vectors = LatentMAP(glow_flow(32, 1, 8).double())
    with pytest.raises(ValueError, match=r"as Denoising makes of images \(2, 32\); got \(2, 1, 4, 8\)"):
        vectors(y, physics)


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
