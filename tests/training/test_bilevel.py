"""Bilevel training: its gradients against differences, results, resumption, refusals."""

import copy
import math

import deepinv as dinv
import numpy as np
import pytest
import torch
from cases import central_difference, make

from deepinv_flows import MAP, PatchNR, fit_bilevel
from deepinv_flows.training.inner import Inner

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
    for name, p in inner.named_parameters():
        if name != "log_lambda" and p.ndim < 2:
            continue  # one direction for each matrix, and lambda
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        expected = float(central_difference(loss, p, direction, 1e-3))
        assert float((p.grad * direction).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-7), name
