"""What the tables of the arena are made with: rows that runs share, EPLL's prior, the material's operator."""

import argparse
import math

import deepinv as dinv
import torch
import torch.nn.functional as F
from arena import MixturePrior, Rows, expectation_maximisation, fingerprint, mean_and_error
from faces_recovery import compare
from material_methods import make_physics

from deepinv_flows.weights import shipped


def test_rows_of_several_runs_make_one_table(tmp_path):
    path, key = tmp_path / "rows.jsonl", {"level": 25, "method": "map", "of": "a 1"}
    assert Rows(path).find(key) is None
    Rows(path).add(key, {"psnr": 1.0})
    Rows(path).add({**key, "of": "b 2"}, {"psnr": 2.0})
    with path.open("a") as file:
        file.write('{"key": {"lev')  # a run that was stopped
    Rows(path).add(key, {"psnr": 3.0})
    assert Rows(path).find(key) == {"psnr": 3.0} and Rows(path).find({**key, "level": 15}) is None


def test_rows_of_other_options_are_not_taken(tmp_path):
    options = dict(device="cpu", side=8, images=2, tuning_images=2, iterations=1, patch_iterations=1, widenings=0)
    args = argparse.Namespace(
        **options, posterior_iterations=1, flow=None, patch=None, denoisers=[], patch_denoisers=[], merge=False
    )
    x, kept = torch.rand(2, 1, 8, 8), Rows(tmp_path / "rows.jsonl")

    def found(error, **changed):
        def problem(x, seed):
            return dinv.physics.Denoising(), x, 0.1

        methods = {"shift": (lambda physics, y, sigma, strength: y + error * (y < 0.5), [0])}
        given = argparse.Namespace(**vars(args) | changed)
        return compare("title", problem, methods, x, x, {}, given, kept)["shift"]["psnr"]

    assert found(0.1) == found(0.2) > found(0.2, iterations=2) > found(0.4, side=16)


def test_weights_are_told_apart(tmp_path):
    for k, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes([k]))
    assert fingerprint(tmp_path / "a" / "weights") != fingerprint(tmp_path / "b" / "weights")
    assert fingerprint("gravel") == fingerprint(shipped()["gravel"])


def test_the_error_is_that_of_a_mean():
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, 1 / 3**0.5) and mean_and_error([1.0]) == (1.0, 0.0)


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
