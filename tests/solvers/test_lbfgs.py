"""L-BFGS and first-order descent on a batch: minima, independent samples, objectives that are not finite everywhere, units."""

import math

import pytest
import torch

from deepinv_flows.solvers import first_order, lbfgs


def rosenbrock(z):
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = (100 * (leaf[:, 1:] - leaf[:, :-1] ** 2) ** 2 + (1 - leaf[:, :-1]) ** 2).sum(1)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def with_holes(value_and_grad, limit):
    """Values and gradients that are NaN for samples with an entry above ``limit``."""

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
