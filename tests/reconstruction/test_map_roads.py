"""MAP by the roads of strangers: counts, stacks, blank and complex images, physics that are not linear, metrics with options."""

import deepinv as dinv
import pytest
import torch

from deepinv_flows import MAP, PatchNR
from deepinv_flows.reconstruction import tuning
from deepinv_flows.reconstruction.objective import data_term

L2, Tikhonov = dinv.optim.L2, dinv.optim.Tikhonov
SmoothedTV, Poisson = dinv.optim.prior.SmoothedTVPrior, dinv.optim.PoissonLikelihood
PSNR, Denoising = dinv.metric.PSNR, dinv.physics.Denoising


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(sigma=0.1, seed=3):
    return dinv.physics.GaussianNoise(sigma, rng=generator(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=generator(seed))


def smooth(side=20):
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    return (0.5 + 0.3 * torch.sin(6 * u + 3 * v))[None, None]


def each(model, y, physics):
    return torch.cat([model(one, physics) for one in y.split(1)])


def counts(gain=0.2):
    x = 0.1 + 0.8 * uniform(3, 1, 12, 16)
    x[1] *= 10
    physics = Denoising(dinv.physics.PoissonNoise(gain, rng=generator(1)))
    return physics(x).clamp_min(0.05), physics


# --- Poisson noise, whose data fidelity in deepinv mixes a batch, and has another gradient ---


@pytest.mark.parametrize("solver", ["lbfgs", "nmapg", "adam"])
def test_counts_of_a_batch_are_problems_of_their_own(solver):
    y, physics = counts()
    model = MAP(SmoothedTV(), Poisson(bkg=0.01), 0.3, solver=solver, max_iter=60, tol=0, verbose=False)
    torch.testing.assert_close(model(y, physics), each(model, y, physics), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("gain, denormalize", [(1.0, False), (0.2, True), (3.0, False)])
def test_values_and_gradients_of_counts_belong_together(gain, denormalize, stacked):
    y, physics = counts()
    fidelity = Poisson(gain, bkg=0.01, denormalize=denormalize)
    if stacked:
        physics = dinv.physics.StackedLinearPhysics([physics, physics])
        fidelity, y = dinv.optim.StackedPhysicsDataFidelity([fidelity, L2()]), dinv.utils.TensorList([y, y])
    term, x = data_term(fidelity, y, physics), (0.3 + uniform(3, 1, 12, 16, seed=1)).requires_grad_()
    (expected,) = torch.autograd.grad(term.value(x).sum(), x)
    value, grad = term.value_and_grad(x.detach())
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(value, term.value(x.detach()))
    if not stacked:
        one = fidelity(x[:1].detach(), y[:1], physics)
        torch.testing.assert_close(value[:1], one.reshape(1))


def test_the_minimum_for_counts_with_a_gain():
    """Without a prior it is the counts less their background."""
    y, physics = counts()
    fidelity = Poisson(gain=0.2, bkg=0.01)
    model = MAP(Tikhonov(), fidelity, 0.0, (1e-3, 100.0), tol=0, max_iter=300, verbose=False)
    torch.testing.assert_close(model(y, physics), (y - 0.2 * 0.01).clamp_min(1e-3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("constraint", [None, "nonnegative"])
def test_no_counts_where_nothing_is(constraint):
    """0 log 0 is 0: rays that miss the object, and pixels that are masked."""
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, 16)] * 2, indexing="ij")
    x = ((v**2 + u**2) < 0.5).float()[None, None] * (0.5 + 0.3 * u)
    noise = dinv.physics.PoissonNoise(0.02, rng=generator(3))
    tomography = dinv.physics.Tomography(angles=12, img_width=16, circle=True, noise_model=noise)
    masked = dinv.physics.Inpainting((1, 16, 16), mask=0.5, rng=generator(1), noise_model=noise)
    for physics in (tomography, masked, Denoising(noise)):
        y = physics(x)
        model = MAP(SmoothedTV(), Poisson(), 0.01, constraint, max_iter=50, verbose=False)
        x_net, metrics = model(y, physics, compute_metrics=True)
        assert torch.isfinite(x_net).all() and (y == 0).any()
        assert constraint is None or (x_net >= 0).all()
        assert metrics["cost"][0][-1] <= metrics["cost"][0][0]


# --- stacks ---


def test_l2_of_a_stack():
    x, physics = uniform(2, 1, 8, 8), Denoising(gaussian())
    stack = dinv.physics.StackedLinearPhysics([physics, Denoising(gaussian(seed=4))])
    y = stack(x)
    x_net = MAP(Tikhonov(), lambda_reg=0.5, tol=0, max_iter=60, verbose=False)(y, stack)
    torch.testing.assert_close(x_net, (y[0] + y[1]) / 2.5, rtol=0, atol=1e-6)
    three = dinv.optim.StackedPhysicsDataFidelity([L2(), L2(), L2()])
    with pytest.raises(ValueError, match="as many data fidelities and measurements as operators; got 3, 2 and 2"):
        MAP(Tikhonov(), three, 0.5, verbose=False)(y, stack)


# --- blank images ---


def test_a_blank_image_leaves_the_others_of_its_batch_alone():
    x, prior = smooth().repeat(2, 1, 1, 1), PatchNR(pretrained="gravel")
    physics = dinv.physics.Inpainting((1, 20, 20), mask=0.3, noise_model=gaussian(0.03), rng=generator(1))
    y = physics(x)
    y[0] = 0
    model = MAP(prior, lambda_reg=0.05, max_iter=40, verbose=False)
    together, alone = model(y, physics)[1:], model(y[1:], physics)
    assert (together - alone).norm() < 0.02 * alone.norm()
    unknown = MAP(prior, lambda_reg="discrepancy", max_iter=10, verbose=False)
    assert torch.isfinite(unknown(y, physics)).all()


# --- physics that are not linear ---


def test_phase_retrieval_of_a_batch():
    physics = dinv.physics.RandomPhaseRetrieval(m=400, img_size=(1, 8, 6), rng=generator(), noise_model=gaussian(0.05))
    y = physics(torch.randn(2, 1, 8, 6, dtype=torch.complex64, generator=generator(7)))
    model, state = MAP(Tikhonov(), lambda_reg=1e-4, max_iter=40, verbose=False), torch.get_rng_state()
    together = model(y, physics)
    torch.testing.assert_close(together, each(model, y, physics), rtol=1e-3, atol=1e-3)
    assert torch.equal(state, torch.get_rng_state())


class Squares(dinv.physics.Physics):
    def A(self, x, **kwargs):
        return torch.nn.functional.avg_pool2d(x, 2) ** 2


def test_a_tiny_start_is_not_taken_for_divergence():
    x = 0.5 + uniform(1, 1, 12, 12)
    init = torch.full_like(x, 1e-6)
    model = MAP(Tikhonov(), lambda_reg=1e-4, verbose=False)
    x_net = model(Squares()(x), Squares(), init=init)
    assert PSNR()(Squares()(x_net), Squares()(x)) > 30


def test_measurements_of_another_size_are_not_a_start():
    y = Squares()(uniform(1, 1, 12, 12))
    with pytest.raises(ValueError, match="pass init="):
        MAP(Tikhonov(), lambda_reg=1e-4, verbose=False)(y, Squares())


# --- complex images ---


@pytest.mark.parametrize("solver", ["auto", "nmapg", "ipiano", "adam"])
def test_complex_images_by_linear_physics(solver):
    y = torch.randn(2, 1, 8, 6, dtype=torch.complex128, generator=generator(1))
    model = MAP(Tikhonov(), lambda_reg=0.25, solver=solver, tol=0, max_iter=300, verbose=False)
    torch.testing.assert_close(
        model(y, Denoising(gaussian())), y / 1.25, rtol=0, atol=0.02 if solver == "adam" else 1e-5
    )


def test_the_weight_of_complex_images():
    y = torch.randn(2, 1, 8, 6, dtype=torch.complex128, generator=generator(1))
    model = MAP(Tikhonov(), lambda_reg="discrepancy", max_iter=30, verbose=False)
    assert torch.isfinite(model(y, Denoising(gaussian(0.3)))).all()
    with pytest.raises(ValueError, match="needs real images and measurements; got torch.complex128"):
        MAP(Tikhonov(), lambda_reg="sure", verbose=False)(y, Denoising(gaussian()))
    assert model.tune(y, Denoising(gaussian(0.3)), PSNR(complex_abs=True), max_seconds=20).tuned["score"] > 0


# --- what tune is given ---


def test_metrics_with_options():
    x, physics = uniform(2, 1, 12, 12), Denoising(gaussian())
    model = MAP(SmoothedTV(), lambda_reg=0.1, max_iter=30, verbose=False)
    best = model.tune(x, physics).lambda_reg
    as_a_loss = model.tune(x, physics, PSNR(train_loss=True))
    assert as_a_loss.lambda_reg == pytest.approx(best)
    with pytest.raises(ValueError, match="a real value for each of 2 images, so without a reduction"):
        model.tune(x, physics, PSNR(reduction="mean"))


def test_adam_is_not_stopped_early():
    """Its steps follow from the number of iterations, so that fewer are another search."""
    better_before = [[1.0, 3.0, 2.0], [1.0, 5.0, 4.0]]
    assert tuning._stop(better_before, 1.0, cut=False) == (2, 3.0)
    assert tuning._stop([[5.0, 3.0, 2.0]] * 2, 1.0) == (1, 3.0)  # after no iteration there is nothing to return


# --- priors, constraints and fidelities ---


def test_a_prior_with_values_in_a_column():
    class Column(dinv.optim.Prior):
        def __init__(self):
            super().__init__()
            self.explicit_prior = True

        def fn(self, x, *args, **kwargs):
            return 0.5 * x.square().flatten(1).sum(1, keepdim=True)

    y = uniform(2, 1, 8, 8)
    x_net = MAP(Column(), lambda_reg=0.25, tol=0, max_iter=60, verbose=False)(y, Denoising())
    torch.testing.assert_close(x_net, y / 1.25, rtol=0, atol=1e-6)


def test_what_has_no_value_or_gradient_is_refused():
    denoiser = dinv.optim.PnP(dinv.models.MedianFilter())
    with pytest.raises(TypeError, match="a prior with a value; got PnP"):
        MAP(Tikhonov(), constraint=denoiser)
    with pytest.raises(ValueError, match="a data fidelity with a gradient; got IndicatorL2"):
        MAP(Tikhonov(), dinv.optim.IndicatorL2(radius=1.0))
    model = MAP(Tikhonov(), lambda_reg=0.1, verbose=False)
    for wrong, match in (
        ("discrepency", "expected lambda_reg to be one of"),
        (-1.0, "expected a finite lambda_reg >= 0"),
    ):
        model.lambda_reg = wrong
        with pytest.raises(ValueError, match=match):
            model(uniform(1, 1, 8, 8), Denoising(gaussian()))


def test_a_search_that_ran_out_of_time_says_so(capsys):
    y = uniform(1, 1, 64, 64)
    model = MAP(SmoothedTV(), lambda_reg=0.1, max_seconds=1e-6)
    progress = model.solve(y, Denoising(), y.new_full((1,), 0.1), {"y": y})[1]
    assert progress.left == ", when the time was up: it had not converged, so try a larger max_seconds"
