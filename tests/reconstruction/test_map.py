"""MAP: known minimisers by every solver, starts, units, batches, errors, and what deepinv asks of a Reconstructor."""

import copy
import itertools
import math
import pickle
import warnings

import deepinv as dinv
import pytest
import torch
from cases import make

from deepinv_flows import MAP, FlowPrior, PatchNR, console, image_flow, load_images
from deepinv_flows.reconstruction import algorithms, starts
from deepinv_flows.reconstruction.objective import DataTerm, Objective, frozen, is_smooth

L2 = dinv.optim.L2
Tikhonov = dinv.optim.Tikhonov


def images(batch=3, side=8, channels=1, seed=0):
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix_physics(m=40, side=6):
    A = torch.randn(m, side**2, dtype=torch.float64, generator=generator()) / m**0.5
    physics = dinv.physics.LinearPhysics(
        A=lambda x, **kwargs: x.flatten(1) @ A.T, A_adjoint=lambda y, **kwargs: (y @ A).view(-1, 1, side, side)
    )
    return physics, A


def patchnr(**options):
    return PatchNR(make("glow_silu", 9, spread=0.2), patch_size=3, **options)


class Bare(dinv.optim.Prior):
    """A prior of a user's, by its value alone."""

    def __init__(self, value):
        super().__init__(value)


SMOOTH = ("lbfgs", "nmapg", "ipiano", "adam")


@pytest.mark.parametrize("solver", SMOOTH)
def test_tikhonov_by_every_solver(solver):
    physics, A = matrix_physics()
    y = physics.A(images(side=6))
    model = MAP(Tikhonov(), lambda_reg=0.05, solver=solver, tol=0, max_iter=600, verbose=False)
    x = model(y, physics)
    normal = A.T @ A + 0.05 * torch.eye(36, dtype=A.dtype)
    expected = torch.linalg.solve(normal, A.T @ y.T).T.view_as(x)
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-3 if solver == "adam" else 1e-5)


@pytest.mark.parametrize("solver", ["auto", "nmapg", "ipiano", "adam"])
def test_a_constraint(solver):
    y = torch.randn(2, 1, 5, 5, dtype=torch.float64, generator=generator())
    physics = dinv.physics.Denoising()
    for constraint, bounds in (("nonnegative", (0, math.inf)), ((-0.3, 0.2), (-0.3, 0.2))):
        model = MAP(Tikhonov(), lambda_reg=0.5, constraint=constraint, solver=solver, tol=0, verbose=False)
        torch.testing.assert_close(model(y, physics), (y / 1.5).clamp(*bounds), rtol=0, atol=2e-3)


def test_priors_known_by_their_proximity_operators():
    y = torch.tensor([[[[2.0, -2.0, 0.5]]]])
    physics = dinv.physics.Denoising()
    model = MAP(dinv.optim.L1Prior(), lambda_reg=1.0, tol=0, verbose=False)
    torch.testing.assert_close(model(y, physics), torch.tensor([[[[1.0, -1.0, 0.0]]]]), rtol=0, atol=1e-4)
    assert model.chosen["solver"] == "nmapg"
    model = MAP(dinv.optim.L1Prior(), lambda_reg=1.0, constraint="nonnegative", tol=0, verbose=False)
    torch.testing.assert_close(model(y, physics), torch.tensor([[[[1.0, 0.0, 0.0]]]]), rtol=0, atol=1e-4)
    assert model.chosen["solver"] == "davis_yin"


def test_which_priors_are_smooth():
    assert all(map(is_smooth, [patchnr(), Tikhonov(), Bare(lambda x: x.square().flatten(1).sum(1))]))
    assert is_smooth(dinv.optim.prior.SmoothedTVPrior())
    assert not any(map(is_smooth, [dinv.optim.TVPrior(), dinv.optim.L1Prior(), dinv.optim.prior.L12Prior()]))


def test_value_and_gradient_are_those_of_the_terms():
    prior, x = patchnr(), images(2)
    for physics in (dinv.physics.Denoising(), dinv.physics.Physics(A=lambda x, **kwargs: x**2 + x)):
        y = physics.A(images(2, seed=1))
        weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
        objective = Objective(DataTerm(L2(0.5), y, physics), prior, weight, None, True)
        leaf = x.clone().requires_grad_()
        F = L2(0.5)(leaf, y, physics) + weight * prior(leaf)
        value, grad = objective.value_and_grad(x)
        torch.testing.assert_close(value, F.detach())
        torch.testing.assert_close(grad, torch.autograd.grad(F.sum(), leaf)[0])
        torch.testing.assert_close(objective.value(x), F.detach())


@pytest.mark.parametrize("solver", [*SMOOTH, "davis_yin"])
def test_never_above_the_start(solver):
    constraint = (0.1, 0.9) if solver == "davis_yin" else None
    prior, physics = patchnr(), dinv.physics.Denoising(dinv.physics.GaussianNoise(0.3, rng=generator()))
    y, init = physics(images(2)), images(2, seed=3)
    model = MAP(prior, lambda_reg=0.7, solver=solver, max_iter=1, constraint=constraint, verbose=False)
    x, metrics = model(y, physics, init=init, compute_metrics=True)
    weight = torch.full((2,), 0.7, dtype=torch.float64)
    objective = Objective(DataTerm(L2(), y, physics), prior, weight, model.constraint, True)
    _, least, _ = starts.least(objective, starts.candidates(y, physics, init))
    assert (objective.value(x) <= least).all()
    torch.testing.assert_close(objective.value(x), torch.tensor([c[-1] for c in metrics["cost"]], dtype=torch.float64))


def test_a_start_where_nothing_was_measured_is_near_a_constant():
    x = 0.5 + 0.01 * images(2)
    physics = dinv.physics.Inpainting((1, 8, 8), mask=torch.cat([torch.ones(4, 8), torch.zeros(4, 8)]).double()[None])
    for unit in (1e-6, 1.0, 1e6):
        start = starts.candidates(physics.A(unit * x), physics)["regularised A_dagger(y)"] / unit
        torch.testing.assert_close(start[:, :, :4], x[:, :, :4], rtol=1e-3, atol=0)
        torch.testing.assert_close(start[:, :, 4:], x[:, :, :4].mean((1, 2, 3), keepdim=True).expand(2, 1, 4, 8))


def test_each_image_takes_its_best_start():
    physics = dinv.physics.Blur(filter=torch.ones(1, 1, 3, 3, dtype=torch.float64) / 9, padding="circular")
    x = images(2)
    y = physics.A(x)
    init = torch.stack([x[0], x[1] + 10])
    model = MAP(Tikhonov(), lambda_reg=1e-9, max_iter=1, solver="nmapg", verbose=False)
    found = starts.candidates(y, physics, init)
    coarse = [f"regularised A_dagger(y) smoothed by {width:g}" for width in starts.WIDTHS]
    assert list(found) == ["A^T y", "regularised A_dagger(y)", "y", "init", *coarse]
    objective = Objective(DataTerm(L2(), y, physics), Tikhonov(), torch.full((2,), 1e-9), None, True)
    values = torch.stack([objective.value(start) for start in found.values()])
    _, value, names = starts.least(objective, found)
    torch.testing.assert_close(value, values.min(0).values)
    assert [names[k] for k in range(2)] == [list(found)[k] for k in values.argmin(0).tolist()]
    torch.testing.assert_close(model(y, physics, init=x), x, rtol=0, atol=1e-3)


def test_coarser_starts():
    """Constants stay as they are; a wave is damped as a Gaussian damps it, up to the ends of the kernel."""
    physics, sites = dinv.physics.Denoising(), torch.arange(64, dtype=torch.float64)
    flat = starts.candidates(torch.full((1, 3, 5, 4), 0.3, dtype=torch.float64), physics)
    wave = torch.cos(2 * torch.pi * sites / 16).expand(1, 1, 64, 64)
    waves = starts.candidates(wave, physics)
    for width in starts.WIDTHS:
        name = f"regularised A_dagger(y) smoothed by {width:g}"
        torch.testing.assert_close(flat[name], flat["y"], rtol=0.02, atol=0)
        damped = math.exp(-0.5 * (2 * torch.pi * width / 16) ** 2) * waves["regularised A_dagger(y)"]
        torch.testing.assert_close(waves[name][..., 16:48, 16:48], damped[..., 16:48, 16:48], rtol=0, atol=0.02)


def test_noise_is_left_from_a_coarser_start():
    """From there the minimum is lower than from the noisy image."""
    pytest.importorskip("skimage")
    prior = PatchNR(pretrained="gravel").requires_grad_(False)
    x = load_images("gravel")[0][None, :, 200:232, 200:232]
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1, rng=generator()))
    y = physics(x)
    model = MAP(prior, verbose=False)
    x_net = model(y, physics)
    assert "smoothed" in model.chosen["start"][0]
    weight, found = torch.tensor([model.chosen["lambda_reg"]]), starts.candidates(y, physics)
    with torch.no_grad():
        values = {name: model.solve(y, physics, weight, {name: start})[1].value for name, start in found.items()}
    assert values[model.chosen["start"][0]] <= values["y"] + 1e-3 * values["y"].abs()  # may be the same minimum
    assert dinv.metric.PSNR()(x_net, x) > dinv.metric.PSNR()(y, x) + 3


@pytest.mark.parametrize("solver", ["lbfgs", "nmapg", "ipiano", "adam"])
@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_units_of_images_and_objective_do_not_matter(solver, unit):
    """Images in another unit, and the objective times a number: the same steps, in that unit."""
    quadratic = Bare(lambda x: x.diff(dim=3).square().flatten(1).sum(1))
    physics, _ = matrix_physics()
    y = physics.A(images(side=6))
    options = dict(solver=solver, max_iter=15, tol=0, verbose=False)
    expected = MAP(quadratic, L2(), lambda_reg=0.1, **options)(y, physics)
    scaled = MAP(quadratic, L2(), lambda_reg=0.1, **options)(unit * y, physics)
    torch.testing.assert_close(scaled / unit, expected, rtol=1e-6, atol=1e-7)
    heavier = MAP(quadratic, L2(sigma=unit), lambda_reg=0.1 / unit**2, **options)(y, physics)
    torch.testing.assert_close(heavier, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", ["lbfgs", "nmapg"])
def test_a_batch_is_its_images(solver):
    prior, physics = patchnr(), dinv.physics.Denoising()
    y = images() + 0.1 * torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=generator())
    model = MAP(prior, lambda_reg=torch.tensor([0.1, 0.5, 2.0]), solver=solver, verbose=False)
    together = model(y, physics)
    for k, weight in enumerate((0.1, 0.5, 2.0)):
        alone = MAP(prior, lambda_reg=weight, solver=solver, verbose=False)(y[k : k + 1], physics)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-5, atol=1e-6)


def test_adam_on_grids_of_patches(monkeypatch):
    monkeypatch.setattr(algorithms, "LARGE", 100)
    prior, physics = patchnr(), dinv.physics.Denoising()
    y = images(1, side=16)
    everywhere = MAP(prior, lambda_reg=5.0, solver="lbfgs", tol=0, verbose=False)
    thinned = MAP(prior, lambda_reg=5.0, max_iter=300, verbose=False)
    x = everywhere(y, physics)
    weight = torch.full((1,), 5.0, dtype=y.dtype)
    objective = Objective(DataTerm(L2(), y, physics), prior, weight, None, True)
    start, least, reached = objective.value(y), objective.value(x), objective.value(thinned(y, physics))
    assert reached - least < 0.05 * (start - least)
    assert thinned.chosen["solver"] == "adam" and prior.n_patches == -1 and prior.subset == "uniform"


def test_the_users_prior_is_his():
    prior, physics = patchnr(), dinv.physics.Denoising()
    before = {name: (p, p.requires_grad, p.clone()) for name, p in prior.named_parameters()}
    state = torch.get_rng_state()
    MAP(prior, lambda_reg=0.5, max_iter=5, verbose=False)(images(), physics)
    assert torch.equal(state, torch.get_rng_state()) and prior.training
    for name, p in prior.named_parameters():
        same, asks, value = before[name]
        assert p is same and p.requires_grad == asks and torch.equal(p, value) and p.grad is None
    view = frozen(prior)
    assert not any(p.requires_grad for p in view.parameters()) and view.generator is prior.generator
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(prior.parameters(), view.parameters()))


def test_other_physics():
    """Nonlinear, stacked, and of another shape than the image."""
    x = images(2)
    square = dinv.physics.Physics(A=lambda x, **kwargs: x**2)
    model = MAP(Tikhonov(), lambda_reg=1e-6, tol=0, max_iter=100, verbose=False)
    torch.testing.assert_close(model(square.A(x), square, init=0.5 * torch.ones_like(x)), x, rtol=0, atol=2e-2)
    masks = [torch.zeros(1, 8, 8, dtype=torch.float64) for _ in range(2)]
    masks[0][:, :5], masks[1][:, 5:] = 1, 1
    stacked = dinv.physics.stack(*[dinv.physics.Inpainting((1, 8, 8), mask=mask) for mask in masks])
    fidelity = dinv.optim.data_fidelity.StackedPhysicsDataFidelity([L2(), L2()])
    model = MAP(Tikhonov(), fidelity, lambda_reg=1.0, tol=0, verbose=False)
    torch.testing.assert_close(model(stacked(x), stacked), x / 2, rtol=0, atol=1e-5)


def test_flow_prior_and_dtypes():
    prior = FlowPrior(image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4))
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    y = images(2).float()
    for dtype in (torch.float32, torch.float64):
        x = MAP(prior.to(dtype), max_iter=5, verbose=False)(y.to(dtype), physics)
        assert x.dtype == dtype and x.isfinite().all()
    with pytest.raises(TypeError, match=r"expected dtype torch.float64, as the flow's weights; got torch.float32"):
        MAP(prior, max_iter=5, verbose=False)(y, physics)


def test_metrics_and_stopping(capsys, monkeypatch):
    monkeypatch.setattr(console, "LONG", 0.0)
    prior, physics = patchnr(), dinv.physics.Denoising()
    x = images()
    y = x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=generator())
    model = MAP(prior, lambda_reg=0.5)
    x_net, metrics = model(y, physics, x_gt=x, compute_metrics=True)
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and said.out.startswith("MAP: lbfgs from")
    assert "lambda_reg 0.5 (given)" in said.out
    n = model.chosen["iterations"]
    assert n < 200 and all(len(cost) == n for cost in metrics["cost"])
    assert all(len(values) == n + 1 for values in metrics["psnr"])
    torch.testing.assert_close([p[-1] for p in metrics["psnr"]], dinv.metric.PSNR()(x_net, x).tolist())
    assert all(a >= b for cost in metrics["cost"] for a, b in itertools.pairwise(cost))
    quiet = MAP(prior, lambda_reg=0.5, verbose=False, max_seconds=1e-9)
    quiet(y, physics)
    assert quiet.chosen["iterations"] == 1 and capsys.readouterr() == ("", "")


def test_in_deepinvs_test(tmp_path):
    x = images(4).float()
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1, rng=generator()))
    data = torch.utils.data.DataLoader([{"x": image, "y": physics(image[None])[0]} for image in x], batch_size=2)
    model = MAP(patchnr().float(), max_iter=3, verbose=False)
    found = dinv.test(
        model, data, physics, metrics=dinv.metric.PSNR(), device="cpu", verbose=False, compare_no_learning=False
    )
    assert math.isfinite(found["PSNR"])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        y = physics(x)
        torch.testing.assert_close(again(y, physics), model(y, physics))


@pytest.mark.parametrize("solver", ["lbfgs", "nmapg", "ipiano", "adam"])
def test_priors_that_are_not_finite(solver):
    physics, y = dinv.physics.Denoising(), images()
    options = dict(lambda_reg=1.0, solver=solver, verbose=False)
    with pytest.raises(
        ValueError, match=r"objective of images \[0, 1, 2\] of the batch, or its gradient, is not finite"
    ):
        MAP(Bare(lambda x: x.flatten(1).sum(1) * math.nan), **options)(y, physics)

    if solver == "adam":  # whose steps are bounded
        return

    def falling(x):
        return -(x**4).flatten(1).sum(1)

    with pytest.raises(ValueError, match="falls without bound|is not finite|hold NaN|holds NaN|is NaN"):
        MAP(Bare(falling), max_iter=20000, tol=0, **{**options, "lambda_reg": 100.0})(y, physics)


def test_what_is_refused():
    prior, y, physics = patchnr(), images(), dinv.physics.Denoising()
    with pytest.raises(TypeError, match="expected a deepinv.optim.Prior; got Linear"):
        MAP(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected a prior with a value .*; got PnP"):
        MAP(dinv.optim.PnP(dinv.models.MedianFilter()))
    with pytest.raises(ValueError, match="expected solver to be one of 'auto', 'lbfgs'"):
        MAP(prior, solver="newton")
    with pytest.raises(ValueError, match="expected lambda_reg to be one of 'rule', 'discrepancy', 'sure'; got 'best'"):
        MAP(prior, lambda_reg="best")
    for weight in (-1.0, math.nan, torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="expected a finite lambda_reg >= 0; got"):
            MAP(prior, lambda_reg=weight)
    with pytest.raises(TypeError, match="expected lambda_reg to be a number"):
        MAP(prior, lambda_reg=None)
    with pytest.raises(ValueError, match="expected bounds low < high; got 1.0 and 0.0"):
        MAP(prior, constraint=(1, 0))
    with pytest.raises(TypeError, match='expected constraint to be "nonnegative", bounds'):
        MAP(prior, constraint=3)
    with pytest.raises(ValueError, match="expected one lambda_reg, or one for each of 3 images; got 2"):
        MAP(prior, lambda_reg=torch.ones(2), verbose=False)(y, physics)
    with pytest.raises(ValueError, match=r"the measurements of shape \(3, 1, 8, 8\) hold NaN"):
        MAP(prior, lambda_reg=1.0)(y * math.nan, physics)
    with pytest.raises(ValueError, match=r"expected an initial image of shape \(3, 1, 8, 8\); got \(2, 1, 8, 8\)"):
        MAP(prior, lambda_reg=1.0, verbose=False)(y, physics, init=y[:2])
    with pytest.raises(ValueError, match="solver='lbfgs' takes at most 0 terms known by their proximity operators"):
        MAP(prior, lambda_reg=1.0, solver="lbfgs", constraint=(0, 1), verbose=False)(y, physics)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        MAP(prior, lambda_reg=1.0, verbose=False)(y, physics)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x_true'"):
        MAP(prior, lambda_reg=1.0, verbose=False)(y, physics, x_true=y)


def test_a_start_of_zero():
    y, physics = torch.zeros(2, 1, 8, 8, dtype=torch.float64), dinv.physics.Denoising()
    for solver in SMOOTH:
        model = MAP(Bare(lambda x: (x - 1).square().flatten(1).sum(1)), lambda_reg=1.0, solver=solver, verbose=False)
        torch.testing.assert_close(model(y, physics), torch.full_like(y, 2 / 3), rtol=0, atol=2e-2)


def test_only_a_result_outside_the_range_of_the_training_images_is_warned_of():
    """A start may be far outside: the inverse of a blur, for one."""
    prior = PatchNR(patch_size=3, num_layers=1, sub_net_size=8)
    prior.image_range = (0.0, 1.0)
    physics, x = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1)), images(1).float().clamp(0, 1)
    model = MAP(prior, max_iter=3, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, physics, init=100 * x)
    with pytest.warns(UserWarning, match="expected images in about"):
        model(255 * x, physics)


def test_a_search_that_max_iter_ends_says_so(capsys, monkeypatch):
    monkeypatch.setattr(console, "LONG", 0.0)
    physics, y = dinv.physics.Denoising(), images(1)
    for max_iter, said in ((3, True), (200, False)):
        MAP(patchnr(), lambda_reg=0.7, max_iter=max_iter, tol=1e-6 if said else 1e-2)(y, physics)
        assert ("had not converged" in capsys.readouterr().out) == said


@pytest.mark.parametrize("solver, longest", [("ipiano", 500), ("adam", 200)])
def test_the_bound_on_iterations_is_that_of_the_algorithm(solver, longest):
    """The step of Adam falls to its end; the others go on until they have converged."""
    y, physics = torch.rand(1, 1, 4, 4), dinv.physics.Denoising()
    for given, expected in ((None, longest), (30, 30)):
        model = MAP(Tikhonov(), lambda_reg=1.0, solver=solver, max_iter=given, tol=0, verbose=False)
        model(y, physics)
        assert model.chosen["iterations"] == expected
