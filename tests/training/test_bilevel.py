"""Bilevel training: its gradients against differences, results, resumption, refusals."""

import math

import deepinv as dinv
import numpy as np
import pytest
import torch
from cases import central_difference, make

from deepinv_flows import MAP, PatchNR, fit_bilevel
from deepinv_flows.training import runs
from deepinv_flows.training.inner import Inner
from deepinv_flows.training.measuring import Measured

SIZE = (1, 8, 8)
X = torch.nn.functional.avg_pool2d(
    torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 5, 1
)
NOISE = dinv.physics.GaussianNoise(0.1)
PHYSICS = {
    "denoising": lambda: dinv.physics.Denoising(NOISE),
    "blur": lambda: dinv.physics.Blur(
        torch.tensor([[[[0.05, 0.1, 0.05], [0.1, 0.4, 0.1], [0.05, 0.1, 0.05]]]], dtype=torch.float64),
        padding="circular",
        noise_model=NOISE,
    ),
    "inpainting": lambda: dinv.physics.Inpainting(
        SIZE, mask=torch.ones(SIZE, dtype=torch.float64).index_fill(2, torch.tensor([3]), 0), noise_model=NOISE
    ),
}


def small(dtype=torch.float64) -> PatchNR:
    return PatchNR(make("glow_silu", 9, dtype), patch_size=3)


def inner_model(**options) -> Inner:
    model = MAP(small(), lambda_reg=1.0, solver="lbfgs", max_iter=300, tol=0.0, verbose=False)
    return Inner(model, 0.05, SIZE[1:], linear_iter=200, linear_tol=1e-12, **options).double()


def measured(physics, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return physics(x)


@pytest.mark.parametrize("name", PHYSICS)
def test_outer_gradients_are_those_of_differences(name):
    x, physics, inner = X[..., :8, :8], PHYSICS[name](), inner_model()
    y = measured(physics, x)

    def loss():
        return ((inner(y, physics) - x) ** 2).sum()

    loss().backward()
    assert inner.watched["gradient"][-1] < 1e-6 and inner.watched["linear"][-1] < 1e-7
    generator = torch.Generator().manual_seed(1)
    slopes = {"lambda": (inner.log_lambda, torch.ones_like(inner.log_lambda), inner.log_lambda.grad)}
    flat = torch.nn.utils.parameters_to_vector([p.grad for p in inner.prior.parameters()])
    direction = torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
    slopes["theta"] = (Together(inner.prior), direction, flat)
    for at, (variable, along, grad) in slopes.items():
        expected = float(central_difference(loss, variable, along, 1e-3))
        assert float((grad * along).sum()) == pytest.approx(expected, rel=1e-3), at


class Together:
    """All weights of a module as the one variable that is moved along a direction."""

    def __init__(self, module):
        self.weights = list(module.parameters())

    def add_(self, step):
        for p, part in zip(self.weights, step.split([p.numel() for p in self.weights])):
            p.add_(part.view_as(p))

    def sub_(self, step):
        self.add_(-step)


def test_without_the_jacobian_the_direction_is_alike():
    x, physics = X[..., :8, :8], PHYSICS["denoising"]()
    y, grads = measured(physics, x), []
    for jacobian_free in (False, True):
        inner = inner_model(jacobian_free=jacobian_free)
        ((inner(y, physics) - x) ** 2).sum().backward()
        grads.append(torch.nn.utils.parameters_to_vector([p.grad for p in inner.parameters()]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.5


def test_units_do_not_matter():
    """The same problem in small units: measurements by an operator of norm 1e-6."""

    class Small(dinv.physics.LinearPhysics):
        def A(self, x, **kwargs):
            return 1e-6 * x

        def A_adjoint(self, y, **kwargs):
            return 1e-6 * y

    x, grads = X[..., :8, :8], []
    for physics, unit in ((dinv.physics.Denoising(), 1.0), (Small(), 1e-6)):
        inner = inner_model()
        inner.log_lambda.data += 2 * math.log(unit)
        y = unit * (x + 0.1 * torch.sin(100 * x))
        ((inner(y, physics) - x) ** 2).sum().backward()
        grads.append(torch.nn.utils.parameters_to_vector([p.grad for p in inner.parameters()]))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-4 * float(grads[0].abs().max()))


OPTIONS = dict(epochs=3, steps_per_epoch=3, batch_size=2, verbose=False)


def trained(path=None, dtype=torch.float64, physics=None, images=X, prior=None, **options):
    prior = small(dtype) if prior is None else prior
    physics = PHYSICS["denoising"]() if physics is None else physics
    return fit_bilevel(prior, images.to(dtype), physics, save_path=path, **{**OPTIONS, **options})


@pytest.mark.parametrize("jacobian_free", [False, True])
def test_reconstructions_become_better(jacobian_free):
    physics = PHYSICS["denoising"]()
    y = measured(physics, X)
    before = MAP(small(), lambda_reg=0.5, tol=1e-3, verbose=False)
    options = dict(epochs=4, lr=2e-2, lr_lambda=0.2, jacobian_free=jacobian_free)
    after = trained(lambda_reg=0.5, crop=8, eval_images=X, **options)
    assert after.lambda_reg != 0.5
    error = [float(((model(y, physics) - X) ** 2).mean()) for model in (before, after)]
    assert error[1] < 0.7 * error[0]


def test_the_model_is_a_map_that_files_hold(tmp_path):
    physics = PHYSICS["denoising"]()
    model = trained(dtype=torch.float32, crop=6)
    assert model.tuned["gradient"] < 0.05 and model.tuned["linear"] < 0.1
    model.save(tmp_path / "map")
    again = MAP.from_checkpoint(tmp_path / "map", verbose=False)
    y = measured(physics, X.float())
    assert torch.equal(model(y, physics), again(y, physics)) and again.tuned == model.tuned


def test_patches_weigh_the_same_in_crops_and_in_whole_images():
    inner = inner_model()
    whole = inner.weight(torch.zeros(1, *SIZE)) / (6 * 6)
    assert torch.allclose(inner.weight(torch.zeros(3, 1, 5, 4)), whole.expand(3) * (3 * 2))


class Stop(Exception):
    pass


@pytest.mark.parametrize("held_out", [False, True])
def test_resumed_is_uninterrupted(held_out, tmp_path, monkeypatch):
    options = {"eval_images": X} if held_out else {}
    expected = trained(tmp_path / "whole", **options)
    save = runs._Trainer.save_model

    def stopping(self, filename, epoch, state=None):
        save(self, filename, epoch, state)
        if epoch == 1 and filename != "ckp_best.pth.tar":
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(runs._Trainer, "save_model", stopping)
        with pytest.raises(Stop):
            trained(tmp_path / "broken", **options)
    found = trained(tmp_path / "broken", resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), expected.state_dict().values()))
    assert found.lambda_reg == expected.lambda_reg and found.tuned == expected.tuned
    assert trained(tmp_path / "broken", resume=True, **options).tuned == expected.tuned  # it had ended
    checkpoint = torch.load(runs._newest(runs._runs(tmp_path / "broken")), weights_only=False)
    assert checkpoint["watched"].keys() == {"gradient", "linear"}


def test_the_rest_of_the_world_stays_as_it_was():
    prior = small()
    first = next(prior.parameters()).requires_grad_(False)
    kept, flags = first.clone(), [p.requires_grad for p in prior.parameters()]
    source = torch.Generator().manual_seed(3)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1, rng=source))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), source.get_state()
    model = trained(prior=prior, physics=physics)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert physics.noise_model.rng is source and torch.equal(states[2], source.get_state())
    assert model.prior is prior and [p.requires_grad for p in prior.parameters()] == flags
    assert torch.equal(first, kept)


@pytest.mark.parametrize("rng", [None, torch.Generator().manual_seed(0)])
def test_noise_is_drawn_anew(rng):
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1, rng=rng))
    generator = torch.Generator()
    for source, same in ((generator, False), (None, True)):
        samples = Measured(lambda numbers: X[numbers], 2, physics, torch.device("cpu"), source)
        assert torch.equal(samples[0]["y"], samples[0]["y"]) == same


def test_minimisations_that_end_too_soon_are_noticed():
    with pytest.warns(UserWarning, match=r"relative gradient of at most 0.05; got .* raise max_iter"):
        trained(max_iter=1)


def test_physics_without_noise_and_images_of_several_sizes():
    physics, images = dinv.physics.Denoising(dinv.physics.noise.ZeroNoise()), [*X, X[0, :, :7, :6]]
    options = dict(eval_images=images, epochs=1, steps_per_epoch=1)
    model = fit_bilevel(small(), images, physics, lambda_reg=0.05, crop=6, verbose=False, **options)
    assert model(X, physics).shape == X.shape
    with pytest.raises(ValueError, match=r"expected Gaussian or Poisson noise .* got ZeroNoise"):
        fit_bilevel(small(), images, physics, crop=6, verbose=False)


NAN = torch.full((1, 1, 9, 9), math.nan)
REFUSED = {
    "nan": (dict(images=NAN), ValueError, "expected finite floating-point images"),
    "channels": (dict(images=torch.rand(1, 3, 9, 9)), ValueError, "expected 1 channels .* got image of shape"),
    "sizes": (dict(eval_images=torch.rand(1, 1, 2, 9)), ValueError, r"at least 3 x 3 pixels; got shape \(1, 2, 9\)"),
    "small": (dict(crop=9), ValueError, r"at least 9 x 9 pixels; got shape \(1, 8, 8\)"),
    "crop": (dict(crop=2), ValueError, "expected crop >= 3, the size of a patch; got 2"),
    "frozen": (dict(prior=small().requires_grad_(False)), ValueError, "weights of the prior are frozen"),
    "lambda": (dict(lambda_reg=math.inf), ValueError, "expected a finite lambda_reg > 0; got inf"),
    "zero": (dict(lambda_reg=0.0), ValueError, "expected a finite lambda_reg > 0; got 0.0"),
    "sure": (dict(lambda_reg="sure"), TypeError, "expected lambda_reg to be a number or \"rule\"; got 'sure'"),
    "option": (dict(mixed_precision=True), TypeError, "does not set itself; got .*mixed_precision"),
    "patches": (dict(prior=PatchNR(patch_size=3, n_patches=5).double()), ValueError, "n_patches=-1.* got 5"),
    "early": (dict(early_stop=1), ValueError, "expected eval_images beside early_stop=1, .*; got None"),
    "prior": (dict(prior=dinv.optim.TVPrior()), TypeError, "expected a PatchNR; got TVPrior"),
    "physics": (
        dict(crop=6, physics=PHYSICS["inpainting"]()),
        ValueError,
        r"images of shape \(1, 6, 6\), .* got Inpainting",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_both_sides(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        trained(**options)


def test_images_have_the_dtype_of_the_weights():
    with pytest.raises(TypeError, match=r"expected dtype torch.float64.*got torch.float32"):
        trained(prior=small(), images=X.float(), dtype=torch.float32)


def test_a_prior_of_images_divided_by_their_level_is_refused():
    prior = small()
    prior.sigma_range = (0.1, 0.2)
    with pytest.raises(ValueError, match=r"images divided by their noise level, of sigma_range \(0.1, 0.2\)"):
        trained(prior=prior)
