"""The proximity operator: known answers, descent for every gamma, and its derivatives."""

import pytest
import torch
from cases import central_difference, make
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinv_flows import PatchNR
from deepinv_flows.solvers.proximal import attach_implicit_gradient, gamma_like, minimise

TIGHT = {"tol_inter": 1e-14, "max_iter_inter": 400}


def energy(prior, u, x, gamma):
    with torch.no_grad():
        return gamma * prior(u) + 0.5 * ((u - x) ** 2).flatten(1).sum(1)


@given(
    curvature=st.floats(1e-3, 1e3),
    gamma=st.floats(1e-3, 1e3),
)
@settings(max_examples=50, deadline=None)
def test_quadratic_has_a_known_prox(curvature, gamma):
    x = torch.linspace(-1, 2, 12, dtype=torch.float64).view(2, 1, 2, 3).requires_grad_()
    gamma = torch.tensor(gamma, dtype=torch.float64, requires_grad=True)
    curvatures = curvature * torch.linspace(0.1, 1, 6, dtype=torch.float64).view(1, 1, 2, 3)

    def grad(u):
        return curvatures * u

    def value_and_grad(u):
        return 0.5 * (curvatures * u**2).flatten(1).sum(1), grad(u)

    g = gamma_like(gamma, x)
    u = minimise(value_and_grad, x.detach(), g.detach(), max_iter=300, tol=1e-14)
    u = attach_implicit_gradient(u, x, g, grad)
    expected = x / (1 + gamma * curvatures)
    torch.testing.assert_close(u, expected, rtol=1e-6, atol=1e-9)
    for a, b in zip(torch.autograd.grad(u.sum(), [x, gamma]), torch.autograd.grad(expected.sum(), [x, gamma])):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["glow", "glow_silu", "allinone", "nice"])
@pytest.mark.parametrize("gamma", [1e-3, 1e-1, 1.0, 10.0, 1e3])
def test_objective_never_rises(gamma, name, dtype):
    prior = PatchNR(make(name, 9, dtype), patch_size=3)
    x = torch.rand(2, 1, 9, 8, dtype=dtype)
    before = x.clone()
    with torch.no_grad():
        u = prior.prox(x, gamma=gamma)
    assert torch.equal(x, before) and u.isfinite().all()
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    start, end = energy(prior, x, x, gamma), energy(prior, u, x, gamma)
    assert (end <= start + slack * start.abs()).all()
    longer = energy(prior, prior.prox(x, gamma=gamma, max_iter_inter=500, tol_inter=1e-7).detach(), x, gamma)
    if gamma <= 1 and dtype == torch.float64:  # a good part of what can be gained is gained by default
        assert (start - end >= 0.9 * (start - longer) - slack * start.abs()).all()


def test_stationary_point_and_brute_force():
    prior = PatchNR(make("glow_silu", 9), patch_size=3)
    x = torch.rand(1, 1, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        u = prior.prox(x, gamma=2.0, **TIGHT)
        assert (u - x + 2.0 * prior.grad(u)).abs().max() < 1e-6
    v = x.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([v], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = (2.0 * prior(v) + 0.5 * ((v - x) ** 2).sum()).sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    assert energy(prior, u, x, 2.0) <= energy(prior, v.detach(), x, 2.0) + 1e-8


def test_one_gamma_a_sample_and_samples_do_not_mix():
    prior = PatchNR(make("glow_silu", 9), patch_size=3)
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        both = prior.prox(x, gamma=torch.tensor([0.5, 3.0]), **TIGHT)
        for i, gamma in enumerate((0.5, 3.0)):
            torch.testing.assert_close(
                both[i : i + 1], prior.prox(x[i : i + 1], gamma=gamma, **TIGHT), atol=1e-6, rtol=0
            )
        assert torch.equal(prior.prox(x, gamma=0.0), x)


@pytest.mark.parametrize("gamma", [-1.0, float("nan"), torch.ones(3)])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match="expected"):
        PatchNR(patch_size=3).prox(torch.rand(2, 1, 6, 6), gamma=gamma)


@pytest.mark.parametrize("pad", [False, "reflect"])
def test_derivatives_in_image_gamma_and_weights(pad):
    prior = PatchNR(make("glow_silu", 9), patch_size=3, pad=pad, chunk_size=25)
    weights = [p for p in prior.parameters() if p.requires_grad]
    x = torch.rand(2, 1, 6, 7, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    pull = torch.randn_like(x)

    def loss():
        return (prior.prox(x, gamma=gamma, **TIGHT) * pull).sum()

    gradients = torch.autograd.grad(loss(), [x, gamma, *weights])
    for variable, gradient in zip([x, gamma, *weights], gradients):
        direction = torch.randn_like(variable)
        difference, expected = central_difference(loss, variable, direction), (gradient * direction).sum()
        torch.testing.assert_close(expected, difference, rtol=2e-4, atol=1e-6)


def test_random_patches_are_the_same_throughout_one_prox():
    prior = PatchNR(make("glow_silu", 9), patch_size=3, n_patches=12)
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    twin = PatchNR(prior.normalizing_flow, patch_size=3, n_patches=12)
    with torch.no_grad():
        torch.testing.assert_close(prior.prox(x, **TIGHT), twin.prox(x, **TIGHT))
