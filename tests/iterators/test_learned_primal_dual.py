"""Learned primal-dual: the paper's recursion."""

import copy

import deepinv as dinv
import pytest
import torch
from iterator_cases import PHYSICS, A, N, Y, blocks, matrix_physics, random

from deepinv_flows import (
    LearnedPrimalDual,
    LearnedPrimalDualIteration,
    registered,
    unfolded_builder,
)


def test_learned_primal_dual_with_zeroed_blocks_is_its_start():
    model = LearnedPrimalDual(max_iter=3, nf=4).double()
    for block in (*model.params_algo["primal_blocks"], *model.params_algo["dual_blocks"]):
        torch.nn.init.zeros_(block.out_conv.weight)
        torch.nn.init.zeros_(block.out_conv.bias)
    assert torch.equal(model(Y, PHYSICS), PHYSICS.A_adjoint(Y))
    start = random(2, 1, 1, N, seed=8)
    assert torch.equal(model(Y, PHYSICS, init=start), start)


def test_learned_primal_dual_is_the_papers_recursion():
    params = blocks(2)
    model = LearnedPrimalDual(2, **params)
    primal = PHYSICS.A_adjoint(Y).repeat(1, 5, 1, 1)
    dual = torch.zeros_like(Y).repeat(1, 5, 1, 1)
    for update_primal, update_dual in zip(params["primal_blocks"], params["dual_blocks"]):
        dual = update_dual(dual, PHYSICS.A(primal[:, 1:2]), Y)
        primal = update_primal(primal, PHYSICS.A_adjoint(dual[:, :1]))
    x = model(Y, PHYSICS)
    assert torch.allclose(x, primal[:, :1], rtol=1e-12)
    for iteration in ("LearnedPrimalDual", LearnedPrimalDualIteration()):
        way = unfolded_builder(iteration, params, max_iter=2)
        assert torch.equal(way(Y, PHYSICS), x)
        assert sum(p.numel() for p in way.parameters()) >= sum(p.numel() for p in model.parameters())
    with registered():
        assert torch.equal(dinv.optim.optim_builder("LearnedPrimalDual", 2, dict(params))(Y, PHYSICS), x)
    assert torch.equal(copy.deepcopy(model)(Y, PHYSICS), x)
    x.sum().backward()
    assert all(p.grad is not None for b in params.values() for block in b for p in block.parameters())


def test_learned_primal_dual_joins_stacked_measurements():
    physics = matrix_physics(A[:3]), matrix_physics(A[3:])
    y = dinv.utils.TensorList([Y[..., :3], Y[..., 3:]])
    model = LearnedPrimalDual(2, measurement_channels=2, nf=4, generator=torch.Generator().manual_seed(0)).double()
    x = model(y, dinv.physics.StackedLinearPhysics(list(physics)))
    assert x.shape == Y.shape
    with pytest.raises(ValueError, match="of one size"):
        uneven = dinv.physics.StackedLinearPhysics([matrix_physics(A[:2]), matrix_physics(A[2:])])
        model(dinv.utils.TensorList([Y[..., :2], Y[..., 2:]]), uneven)
