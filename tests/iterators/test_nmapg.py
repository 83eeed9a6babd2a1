"""NMAPG: known answers, restarts, starts of infinite energy, complex images."""

import deepinv as dinv
import pytest
import torch
from iterator_cases import DENOISING, F64, L2, PHYSICS, STEP, TIKHONOV, Weighted, Y, iterates, random, track

from deepinv_flows import NMAPG, nmapg


def double_well(x):
    return ((x**2 - 1) ** 2).flatten(1).sum(1)


def test_nmapg_on_a_double_well():
    start = torch.tensor([-30.0, -1.7, -0.9, -1e-3, 1e-3, 0.4, 1.0, 5.0], dtype=F64)[:, None]
    x = nmapg(double_well, start, max_iter=200, tol=1e-10)
    assert torch.allclose(x.abs(), torch.ones_like(x), atol=1e-8)


def test_nmapg_without_memory_is_monotone():
    energies = []
    x = random(4, 10)
    nmapg(
        double_well, 3 * x, dinv.optim.L1Prior(), eta=0.0, max_iter=60, tol=0, callback=lambda x, F: energies.append(F)
    )
    energies = torch.stack(energies)
    assert (energies[1:] <= energies[:-1] * (1 + 1e-13)).all() and (energies[-1] < energies[0]).all()


def test_nmapg_steps_do_not_depend_on_the_scale_of_the_energy():
    x = random(4, 10)
    one = nmapg(double_well, x, max_iter=7)
    thousand = nmapg(lambda u: 1024 * double_well(u), x, stepsize=1 / 1024, max_iter=7)
    assert torch.allclose(one, thousand, rtol=1e-9)


def plain(values):
    return torch.tensor(values, dtype=F64).view(1, 1, 1, -1)


def objective(x, weight=0.5, y=(1.0, -1.0)):
    return 0.5 * (x - plain(y)).pow(2).sum() + weight * x.abs().sum()


@pytest.mark.parametrize("schedule", ["lambda", "prior", "data_fidelity", "g_param"])
@pytest.mark.parametrize("g_first", [False, True])
def test_a_change_of_the_objective_starts_the_history_anew(schedule, g_first):
    weak, strong = 0.01, 2.0
    early, late = [weak] * 5, [strong] * 45
    options = {"data_fidelity": L2, "prior": TIKHONOV, "lambda_reg": strong, "g_first": g_first}
    if schedule == "lambda":
        options["lambda_reg"] = early + late
    elif schedule == "prior":
        options["prior"] = [Weighted(w / strong) for w in early + late]
    elif schedule == "data_fidelity":
        options["data_fidelity"] = [dinv.optim.L2(sigma=0.1)] * 5 + [L2] * 45
    else:
        options |= {"prior": Weighted(1.0), "g_param": [3.0] * 5 + [0.0] * 45}
    y = plain([1.0, -1.0])
    x, cost = track(NMAPG(max_iter=50, **options), y, DENOISING)
    assert torch.allclose(x, y / 3, atol=1e-6)
    assert cost[0, -1] == pytest.approx(float(0.5 * (x - y).pow(2).sum() + x.pow(2).sum()), rel=1e-12)


def test_continuation_of_the_issue():
    y = plain([1.0, -1.0])
    x, cost = track(NMAPG(L2, dinv.optim.L1Prior(), [0.01] * 5 + [0.5] * 45, max_iter=50), y, DENOISING)
    assert torch.allclose(x, y / 2, atol=1e-6) and cost[0, -1] == pytest.approx(0.75)


class Inside(dinv.optim.Prior):
    """The indicator of the non-negative images."""

    def __init__(self):
        super().__init__()
        self.explicit_prior = True

    def fn(self, x, *args, **kwargs):
        return torch.where((x < 0).flatten(1).any(1), torch.inf, 0.0).to(x)

    def prox(self, x, *args, **kwargs):
        return x.clamp(min=0)


@pytest.mark.parametrize("stepsize", [1.0, 100.0, 1e-3])
def test_a_start_of_infinite_energy(stepsize):
    # |Ax - y|^2 / 2 over x >= 0; A^T y has negative entries
    x, cost = track(NMAPG(L2, Inside(), stepsize=stepsize, max_iter=400))
    assert (PHYSICS.A_adjoint(Y) < 0).any() and (x >= 0).all()
    expected = iterates(dinv.optim.PGD(L2, Inside(), stepsize=STEP), Y, PHYSICS, 3000)[-1]
    assert torch.allclose(x, expected, atol=1e-6) and torch.isfinite(cost).all()

    start = torch.tensor([[-200.0], [5.0]], dtype=F64)
    x = nmapg(lambda u: (50 * (u - 3) ** 2).sum(1), start, Inside(), stepsize=stepsize, tol=1e-9)
    assert torch.allclose(x, torch.full_like(x, 3.0), atol=1e-6)


def test_only_an_accepted_step_ends_the_search():
    config = dinv.optim.BacktrackingConfig()  # shortens a step to 0.12 of its length at most
    x = torch.tensor([[2.0], [0.5]], dtype=F64)
    energies = []
    found = nmapg(
        lambda u: (1e6 * (u - 1) ** 2).sum(1), x, backtracking=config, callback=lambda x, F: energies.append((x, F))
    )
    assert torch.allclose(found, torch.ones_like(found), atol=1e-4)
    for x, F in energies:
        assert torch.allclose(F, 1e6 * (x - 1).pow(2).sum(1), rtol=1e-9)


def test_the_cost_is_that_of_the_iterate_after_refused_steps():
    stiff = dinv.optim.L2(sigma=1e-4)
    model = NMAPG(stiff, TIKHONOV, backtracking=dinv.optim.BacktrackingConfig(max_iter=2), max_iter=12)
    x, cost = track(model)
    for k, x in enumerate(iterates(model, Y, PHYSICS, 12)):
        expected = stiff(x, Y, PHYSICS) + TIKHONOV(x)
        assert torch.allclose(cost[:, k], expected, rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scaling_the_objective_changes_nothing(scale):
    x = random(4, 10)
    config = {"max_iter": 40, "tol": 0}
    found = nmapg(lambda u: scale * double_well(u), x, Weighted(0.1 * scale), stepsize=1 / scale, **config)
    assert torch.allclose(found, nmapg(double_well, x, Weighted(0.1), **config), rtol=1e-6)


class Ridge(dinv.optim.Prior):
    """Half the weighted squared norm, of real and complex images."""

    def __init__(self, weight):
        super().__init__()
        self.explicit_prior, self.weight = True, weight

    def fn(self, x, *args, **kwargs):
        return 0.5 * self.weight * x.abs().pow(2).flatten(1).sum(1)

    def prox(self, x, *args, gamma=1.0, **kwargs):
        return x / (1 + gamma * self.weight)


def test_complex_images():
    # |Mx - y|^2 / 2 + 0.3 |x|^2 / 2 with complex M
    M = torch.complex(random(4, 4), random(4, 4, seed=1))
    y = torch.complex(random(3, 4, seed=2), random(3, 4, seed=3))
    expected = torch.linalg.solve(M.mH @ M + 0.3 * torch.eye(4), (y @ M.conj()).T).T

    def energy(x):
        return 0.5 * (x @ M.T - y).abs().pow(2).sum(1)

    x = nmapg(energy, torch.zeros_like(y), Ridge(0.3), max_iter=500, tol=1e-10)
    assert torch.allclose(x, expected, atol=1e-6)
    as_real = nmapg(
        lambda u: energy(torch.view_as_complex(u.view(3, 4, 2))),
        torch.zeros(3, 8, dtype=F64),
        Ridge(0.3),
        max_iter=7,
    )
    same = nmapg(energy, torch.zeros_like(y), Ridge(0.3), max_iter=7)
    assert torch.allclose(torch.view_as_real(same).flatten(1), as_real, rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 1.0},
        {"eta": -0.1},
        {"stepsize": 0.0},
        {"stepsize": float("nan")},
        {"stepsize": torch.tensor([1.0, -1.0])},
        {"backtracking": dinv.optim.BacktrackingConfig(eta=1.5)},
        {"prior": dinv.optim.PnP(lambda x, sigma: x)},
        {"stepsize": torch.ones(3)},
        {"max_iter": 0},
        {"max_iter": 2.5},
        {"tol": -1.0},
        {"tol": float("nan")},
    ],
)
def test_nmapg_refuses_what_the_class_refuses(options):
    with pytest.raises(ValueError, match="got"):
        nmapg(double_well, random(2, 3), **options)


@pytest.mark.parametrize(
    "x, options, error, message",
    [
        (torch.ones(2, 3, dtype=torch.long), {}, TypeError, "double precision; got a tensor of torch.int64"),
        (torch.ones(2, 3, dtype=torch.bfloat16), {}, TypeError, "double precision; got a tensor of torch.bfloat16"),
        ([1.0], {}, TypeError, r"got \[1.0\]"),
        (torch.ones(2), {}, ValueError, r"expected a batch \(B, ...\); got shape \(2,\)"),
        (torch.ones(2, 3), {"data": torch.ones(2, 3)}, TypeError, "expected data to be a list of tensors"),
        (torch.ones(2, 3), {"data": [torch.ones(3)]}, ValueError, r"each of 2 samples; got shape \(3,\)"),
    ],
)
def test_nmapg_refuses_other_starts_and_data(x, options, error, message):
    with pytest.raises(error, match=message):
        nmapg(double_well, x, **options)


def test_nmapg_needs_autograd():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        nmapg(double_well, torch.ones(2, 3))


def test_each_sample_as_if_alone_and_with_its_own_step():
    x, steps = 3 * random(3, 4), torch.tensor([1.0, 0.1, 10.0], dtype=F64)
    together = nmapg(double_well, x, stepsize=steps, max_iter=30)
    for i in range(3):
        alone = nmapg(double_well, x[i : i + 1], stepsize=float(steps[i]), max_iter=30)
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-9)


def test_samples_that_have_converged_cost_nothing():
    target = random(3, 4, seed=7)
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 40.0, 300.0, 2.0], [1.0, 2.0, 3.0, 4.0]], dtype=F64)
    evaluated = []

    def energy(x, target, weights):
        evaluated.append(len(x))
        return 0.5 * (weights * (x - target) ** 2).sum(1) + 0.1 * double_well(x)

    x = nmapg(energy, 0 * target, data=(target, weights), max_iter=300, tol=1e-8)
    assert evaluated[0] == 3 and evaluated[-1] == 1
    frozen = nmapg(lambda u: energy(u, target, weights), 0 * target, max_iter=300, tol=1e-8)
    assert torch.equal(x, frozen)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = nmapg(energy, 0 * target[rows], data=(target[rows], weights[rows]), max_iter=300, tol=1e-8)
        assert torch.allclose(x[rows], alone, rtol=1e-9)
