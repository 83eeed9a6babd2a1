"""Condat-Vu: known answers."""

import deepinv as dinv
import pytest
import torch
from iterator_cases import (
    BEHIND_K,
    DENOISING,
    F64,
    K_NORM,
    L2,
    PHYSICS,
    PRIMAL_DUAL,
    TIKHONOV,
    K,
    N,
    Near,
    Y,
    iterates,
    random,
    ridge,
)

from deepinv_flows import (
    CondatVu,
)


def test_quadratic_behind_an_operator():
    x = CondatVu(L2, TIKHONOV, 0.3, **PRIMAL_DUAL, **BEHIND_K, max_iter=2000)(Y, PHYSICS)
    assert torch.allclose(x, ridge(0.3, K), rtol=0, atol=1e-8)


@pytest.mark.parametrize("g_first, weight", [(True, 1.0), (False, 0.3)])
def test_condat_vu_without_smooth_term_is_chambolle_pock(g_first, weight):
    # of |x - t|^2 / 2 + |Kx|_1, or of |Kx - t|^2 / 2 + weight |x|_1
    start = random(2, 1, 1, N)
    target = random(2, 1, 1, N if g_first else N - 1, seed=5)
    steps = {"stepsize": 0.4, "stepsize_dual": 0.9 / 0.4 / K_NORM, **BEHIND_K}
    steps["cost_fn"] = lambda x, *args: x.new_zeros(len(x))  # deepinv's is f(x) where this is f(Kx)
    init = (start, start, torch.zeros_like(start @ K.T))
    theirs = dinv.optim.PDCP(data_fidelity=L2, prior=dinv.optim.L1Prior(), lambda_reg=weight, g_first=g_first, **steps)
    if g_first:
        ours = CondatVu(None, dinv.optim.L1Prior(), weight, prior_2=Near(target), **steps)
    else:
        ours = CondatVu(None, Near(target), prior_2=dinv.optim.L1Prior(), lambda_reg_2=weight, **steps)
    ours, theirs = (iterates(model, target, DENOISING, 50, init=init) for model in (ours, theirs))
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_total_variation_moves_levels_inward():
    y = torch.tensor([0.0] * 3 + [1.0] * 5, dtype=F64).view(1, 1, 1, 8)

    def difference(x):
        return x[..., 1:] - x[..., :-1]

    def adjoint(u):
        return torch.nn.functional.pad(u, (1, 0)) - torch.nn.functional.pad(u, (0, 1))

    weight = 0.3
    model = CondatVu(L2, dinv.optim.L1Prior(), weight, 0.5, 0.3, K=difference, K_adjoint=adjoint, max_iter=3000)
    expected = torch.tensor([weight / 3] * 3 + [1 - weight / 5] * 5, dtype=F64).view_as(y)
    assert torch.allclose(model(y, DENOISING), expected, atol=1e-8)
