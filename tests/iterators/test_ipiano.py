"""iPiano: its rate, its line search, Anderson acceleration."""

import deepinv as dinv
import pytest
import torch
from iterator_cases import F64, L2, LIPSCHITZ, PHYSICS, STEP, TIKHONOV, A, Y, iterates, ridge

from deepinv_flows import (
    IPiano,
)


def test_ipiano_rate_on_a_quadratic():
    # the slowest root of the recursion x+ = (1 + mu - alpha e) x - mu x-, over the eigenvalues e
    inertia = 0.6
    step = 1.9 * (1 - inertia) / LIPSCHITZ
    roots = [
        abs(root)
        for e in torch.linalg.eigvalsh(A.T @ A)
        for root in torch.linalg.eigvals(torch.tensor([[1 + inertia - step * e, -inertia], [1, 0]], dtype=F64))
    ]
    x = iterates(IPiano(L2, None, stepsize=step, inertia=inertia), Y, PHYSICS, 400)
    error = (x - ridge(0.0)).flatten(1).norm(dim=1)
    rate = float((error[300] / error[100]) ** (1 / 200))
    assert rate == pytest.approx(float(max(roots)), rel=2e-3)


def test_ipiano_backtracks_to_the_longest_admissible_step():
    model = IPiano(L2, TIKHONOV, 0.3, 100.0, 0.4, max_iter=600)
    assert torch.allclose(model(Y, PHYSICS), ridge(0.3), atol=1e-8)
    assert (model.fixed_point.iterator.shortest <= 2 * 0.6 / float(torch.linalg.eigvalsh(A.T @ A)[0])).all()


def test_anderson_acceleration_of_ipiano():
    config = dinv.optim.AndersonAccelerationConfig(history_size=5, beta=1.0, eps=1e-10)
    model = IPiano(L2, TIKHONOV, 0.3, STEP, 0.0, max_iter=40, anderson_acceleration=config)
    plain = IPiano(L2, TIKHONOV, 0.3, STEP, 0.0, max_iter=40)
    error, plain_error = ((m(Y, PHYSICS) - ridge(0.3)).norm() for m in (model, plain))
    assert error < 0.1 * plain_error
