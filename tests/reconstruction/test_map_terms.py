"""MAP off the beaten path: second priors, wavelets, complex images, what is saved, and what SURE cannot differentiate."""

import math

import deepinv as dinv
import pytest
import torch
from cases import make

from deepinv_flows import MAP, PatchNR

L2, Tikhonov, L1Prior = dinv.optim.L2, dinv.optim.Tikhonov, dinv.optim.L1Prior
WEIGHT = 0.05


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=2, side=8):
    return torch.randn(batch, 1, side, side, generator=generator(), dtype=torch.float64)


def soft(x, threshold):
    return x.sign() * (x.abs() - threshold).clamp_min(0)


def noisy(sigma=0.1):
    return dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma, rng=generator(1)))


class Sparse(dinv.optim.Prior):
    """A second prior that is neither 0 nor infinite."""

    def __init__(self):
        super().__init__()
        self.explicit_prior = True

    def fn(self, x, *args, **kwargs):
        return WEIGHT * x.abs().flatten(1).sum(1)

    def prox(self, x, *args, gamma=1.0, **kwargs):
        return soft(x, WEIGHT * gamma)


@pytest.mark.parametrize("solver", ["nmapg", "ipiano", "davis_yin", "auto"])
def test_a_second_prior(solver):
    y = images()
    model = MAP(Tikhonov(), lambda_reg=0.1, constraint=Sparse(), solver=solver, tol=0, max_iter=500, verbose=False)
    torch.testing.assert_close(model(y, dinv.physics.Denoising()), soft(y, WEIGHT) / 1.1, rtol=0, atol=1e-5)


def test_two_terms_known_by_their_proximity_operators():
    y = images()
    model = MAP(L1Prior(), lambda_reg=0.1, constraint=Sparse(), tol=0, max_iter=500, verbose=False)
    torch.testing.assert_close(model(y, dinv.physics.Denoising()), soft(y, 0.1 + WEIGHT), rtol=0, atol=1e-5)
    assert model.chosen["solver"] == "davis_yin"


def test_adam_refuses_a_second_prior():
    model = MAP(Tikhonov(), lambda_reg=0.1, constraint=Sparse(), solver="adam", verbose=False)
    with pytest.raises(ValueError, match="takes a constraint that is 0 or infinite; Sparse is a second prior"):
        model(images(), dinv.physics.Denoising())


@pytest.mark.parametrize("place", ["prior", "constraint"])
def test_wavelets(place):
    pytest.importorskip("ptwt")
    y, physics = images(side=16), dinv.physics.Denoising()
    wavelets = dinv.optim.WaveletPrior(wv="haar", level=2)
    if place == "prior":
        x = MAP(wavelets, lambda_reg=0.2, tol=0, max_iter=50, verbose=False)(y, physics)
        expected = wavelets.prox(y, gamma=torch.full((2,), 0.2).double(), ths=1.0)
    else:
        x = MAP(Tikhonov(), lambda_reg=0.0, constraint=wavelets, tol=0, max_iter=50, verbose=False)(y, physics)
        expected = wavelets.prox(y, gamma=torch.ones(2).double(), ths=1.0)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["auto", "nmapg", "ipiano", "adam"])
def test_complex_images(solver):
    physics = dinv.physics.RandomPhaseRetrieval(m=200, img_size=(1, 4, 4), rng=generator())
    x = torch.randn(2, 1, 4, 4, dtype=torch.complex64, generator=generator())
    y = physics(x)
    model = MAP(Tikhonov(), lambda_reg=1e-4, solver=solver, max_iter=20, verbose=False)
    x_net = model(y, physics)
    assert x_net.is_complex() and x_net.isfinite().all()
    start = physics.A_dagger(y)
    assert (L2()(x_net, y, physics) <= L2()(start, y, physics)).all()


def test_sure_is_refused_where_it_cannot_differentiate():
    class Detached(Tikhonov):
        def grad(self, x, *args, **kwargs):
            return x.detach()

    y = images()
    for prior, constraint, message in (
        (L1Prior(), None, "needs a prior known by its gradient; got L1Prior"),
        (Tikhonov(), (0, 1), "needs an objective without a constraint; got Box"),
        (Tikhonov(), Sparse(), "needs an objective without a constraint; got Sparse"),
        (Detached(), None, "needs a prior whose gradient has a graph; that of Detached has none"),
    ):
        model = MAP(prior, lambda_reg="sure", constraint=constraint, verbose=False)
        with pytest.raises(ValueError, match=message):
            model(y, noisy())


@pytest.mark.parametrize("way", ["sure", "discrepancy"])
def test_a_search_does_not_depend_on_the_batch(way):
    prior = PatchNR(make("glow_silu", 9, spread=0.2), patch_size=3)
    y, model = 0.3 * images(2, 10), MAP(prior, lambda_reg=way, max_iter=30, verbose=False)
    together = model(y, noisy())
    weights = model.chosen["lambda_reg"]
    alone = model(y[1:], noisy())
    assert math.isclose(model.chosen["lambda_reg"], float(weights[1]), rel_tol=1e-6)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["lbfgs", "nmapg", "ipiano", "adam"])
def test_a_prior_that_becomes_nan_on_the_way(solver):
    class Broken(Tikhonov):
        def fn(self, x, *args, **kwargs):
            value = super().fn(x)
            return torch.where(value < 0.7 * start, torch.nan, value)

    y, physics = images(), dinv.physics.Denoising()
    start = Tikhonov()(y)
    with pytest.raises(ValueError, match="is NaN beside the iterate|is not finite any more|is NaN at iteration"):
        MAP(Broken(), lambda_reg=5.0, solver=solver, max_iter=100, tol=0, verbose=False)(y, physics)


def test_what_is_saved_comes_back_or_is_replaced(tmp_path):
    path = tmp_path / "map.safetensors"
    prior = PatchNR(patch_size=3, num_layers=1, sub_net_size=8)
    weights = torch.tensor([0.1, 0.2])
    MAP(prior, lambda_reg=weights, constraint=(0, 1), max_iter=7, max_seconds=3.0, verbose=False).save(path)
    model = MAP.from_checkpoint(path)
    torch.testing.assert_close(model.lambda_reg, weights)
    assert (model.max_iter, model.max_seconds, model.constraint.high) == (7, 3.0, 1.0)
    model = MAP.from_checkpoint(path, max_iter=None, max_seconds=None, constraint=None)
    assert (model.max_iter, model.max_seconds, model.constraint) == (None, None, None)


def test_a_weight_that_is_set_after_tuning_is_taken_as_it_is():
    model = MAP(PatchNR(patch_size=3, num_layers=1, sub_net_size=8), max_iter=3, verbose=False)
    model.tune(torch.rand(1, 1, 12, 12), noisy())
    y = torch.rand(1, 1, 24, 24)
    grown = 22**2 / 10**2
    assert float(model.weight_for(y)) == pytest.approx(model.lambda_reg * grown) and "tuned" in repr(model)
    model.lambda_reg = 0.5
    assert float(model.weight_for(y)) == 0.5 and "tuned" not in repr(model)
    model(y, noisy())
    assert model.chosen["by"] == "given"


def test_an_early_stop_does_not_outlive_its_tuning(monkeypatch):
    from deepinv_flows.reconstruction import tuning

    model, clean = MAP(Tikhonov(), lambda_reg=1.0, tol=0, max_iter=30, verbose=False), images(1)
    with monkeypatch.context() as early:
        early.setattr(tuning, "_stop", lambda histories, sign, cut: (3, 20.0))
        assert model.tune(clean, noisy()).max_iter == 3
        model.lambda_reg = 0.5  # set by hand since
    assert model.tune(clean, noisy()).max_iter == 30
    with pytest.raises(TypeError, match="expected a metric of deepinv's.*; got MSELoss"):
        model.tune(clean, noisy(), torch.nn.MSELoss())
