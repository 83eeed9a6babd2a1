"""What the tables of the arena are made with: rows that runs share, EPLL's prior, the material's operator."""

import math

import deepinv as dinv
import torch
import torch.nn.functional as F
from arena import MixturePrior, Rows, expectation_maximisation
from material_methods import make_physics


def test_rows_of_several_runs_make_one_table(tmp_path):
    path, key = tmp_path / "rows.jsonl", {"level": 25, "method": "map", "of": "a 1"}
    assert Rows(path).find(key) is None
    Rows(path).add(key, {"psnr": 1.0})
    Rows(path).add({**key, "of": "b 2"}, {"psnr": 2.0})
    with path.open("a") as file:
        file.write('{"key": {"lev')  # a run that was stopped
    Rows(path).add(key, {"psnr": 3.0})
    assert Rows(path).find(key) == {"psnr": 3.0} and Rows(path).find({**key, "level": 15}) is None


def test_the_mixture_is_the_one_that_deepinv_knows():
    generator = torch.Generator().manual_seed(0)
    weights, means, covs = expectation_maximisation(torch.rand(300, 9, generator=generator), 3, generator, 5, True)
    prior = MixturePrior(weights, means, covs, 3, chunk=7).double()
    theirs = dinv.optim.utils.GaussianMixtureModel(3, 9).double()
    theirs.mu.data = means.double()
    theirs.set_cov(covs)
    theirs.set_weights(weights)
    x = torch.rand(2, 1, 5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    expected = torch.stack([theirs(patches.T).mean() for patches in F.unfold(x, 3)]) - 4.5 * math.log(2 * math.pi)
    torch.testing.assert_close(prior(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(prior.fn, x)


def test_the_operator_has_its_adjoint():
    physics, generator = make_physics(48), torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 48, 48, generator=generator), torch.rand(2, 1, 12, 12, generator=generator)
    torch.testing.assert_close((physics.A(x) * y).sum(), (physics.A_adjoint(y) * x).sum())
