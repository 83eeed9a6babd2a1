"""Davis-Yin: known answers, and the algorithms that it becomes without one of its terms."""

import deepinv as dinv
import pytest
import torch
from iterator_cases import DENOISING, F64, L2, PHYSICS, STEP, N, Near, NonNegative, Y, iterates, random

from deepinv_flows import (
    CondatVu,
    DavisYin,
    IPiano,
)


@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_davis_yin_without_data_is_drs(beta):
    y = random(2, 1, 1, N)
    drs = dinv.optim.DRS(L2, dinv.optim.L1Prior(), lambda_reg=0.4, stepsize=0.8, beta=beta)
    ours = DavisYin(None, dinv.optim.L1Prior(), 0.4, 0.8, beta, prior_2=Near(y))
    assert torch.allclose(iterates(ours, y, DENOISING, 30), iterates(drs, y, DENOISING, 30), rtol=1e-12, atol=1e-13)


def test_without_second_prior_davis_yin_is_pgd():
    pgd = dinv.optim.PGD(L2, dinv.optim.L1Prior(), lambda_reg=0.4, stepsize=STEP)
    for ours in (DavisYin(L2, dinv.optim.L1Prior(), 0.4, STEP), IPiano(L2, dinv.optim.L1Prior(), 0.4, STEP, 0.0)):
        assert torch.allclose(iterates(ours, Y, PHYSICS, 30), iterates(pgd, Y, PHYSICS, 30), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "make",
    [
        lambda p, c, w: DavisYin(L2, p, w, 1.0, prior_2=c),
        lambda p, c, w: DavisYin(L2, c, stepsize=1.0, prior_2=p, lambda_reg_2=w),
        lambda p, c, w: CondatVu(L2, p, w, 0.9, 0.5, prior_2=c, max_iter=400),
        lambda p, c, w: CondatVu(L2, c, stepsize=0.9, stepsize_dual=0.5, prior_2=p, lambda_reg_2=w, max_iter=400),
    ],
)
def test_non_negative_lasso(make):
    y, weight = random(2, 1, 5, 5), torch.tensor([0.3, 0.6], dtype=F64).view(2, 1, 1, 1)
    x = make(dinv.optim.L1Prior(), NonNegative(), weight)(y, DENOISING)
    assert torch.allclose(x, (y - weight).clamp(min=0), atol=1e-9)
