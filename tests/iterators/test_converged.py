"""Samples that have converged are frozen and not evaluated again, whatever the physics holds for each sample."""

import deepinv as dinv
import pytest
import torch
from deepinv.utils import TensorList
from iterator_cases import DENOISING, F64, L2, Near, Weighted, build, random, track

from deepinv_flows import NMAPG
from deepinv_flows.iterators.converged import cut

B, SIDE = 3, 5
X = random(B, 1, SIDE, SIDE).abs()
MASKS = (random(B, 1, SIDE, SIDE, seed=1) > -0.3).double()
KERNELS = random(B, 1, 3, 3, seed=2).abs()


def scaled(factors):
    """A physics whose factors lie where nothing finds them."""
    return dinv.physics.LinearPhysics(A=lambda x, **kwargs: factors * x, A_adjoint=lambda y, **kwargs: factors * y)


FACTORS = torch.linspace(0.5, 2.0, B, dtype=F64).view(-1, 1, 1, 1)
PHYSICS = {
    "one kernel": lambda rows: dinv.physics.BlurFFT((1, SIDE, SIDE), filter=KERNELS[:1]),
    "a mask each": lambda rows: dinv.physics.Inpainting((1, SIDE, SIDE), mask=MASKS[rows]),
    "a kernel each": lambda rows: dinv.physics.BlurFFT((1, SIDE, SIDE), filter=KERNELS[rows]),
    "hidden": lambda rows: scaled(FACTORS[rows]),
}


class Counting(Weighted):
    """Whose value counts the samples."""

    def __init__(self, weight=1.0):
        super().__init__(weight)
        self.sizes = []

    def fn(self, x, *args, **kwargs):
        self.sizes.append(len(x))
        return super().fn(x, *args, **kwargs)


@pytest.mark.parametrize("crit_conv", ["residual", "cost"])
@pytest.mark.parametrize(
    "name, g_first", [(name, first) for name in PHYSICS for first in (False, True) if name != "hidden" or not first]
)
def test_each_sample_stops_as_if_alone(name, g_first, crit_conv):
    weights = torch.tensor([1.0, 0.03, 0.3], dtype=F64)
    options = {"max_iter": 100, "early_stop": True, "thres_conv": 1e-4, "crit_conv": crit_conv, "g_first": g_first}
    physics = PHYSICS[name](slice(None)).double()
    y, prior = physics(X), Counting()
    x, cost = track(NMAPG(L2, prior, weights, **options), y, physics)
    ends = []
    for i in range(B):
        rows = slice(i, i + 1)
        model = NMAPG(L2, Weighted(), float(weights[i]), **options)
        alone, costs = track(model, y[rows], PHYSICS[name](rows).double())
        ends.append(costs.shape[1])
        assert torch.allclose(x[rows], alone, rtol=1e-5, atol=1e-8), i
        assert cost[i, -1] == pytest.approx(float(costs[0, -1]), rel=1e-9)
    assert cost.shape[1] == max(ends) < 100
    # what cannot be cut is evaluated whole
    if name == "hidden":
        assert set(prior.sizes) == {B}
    elif "kernel" in name:
        assert prior.sizes[-1] < B


def test_a_prior_with_an_entry_for_each_sample_is_evaluated_whole():
    y = X.clone()
    x = NMAPG(L2, Near(y.flip(0)), max_iter=50, early_stop=True)(y, DENOISING)
    assert torch.allclose(x, (y + y.flip(0)) / 2, atol=1e-4)


def test_when_the_objective_changes_all_samples_go_on():
    early, late = [0.01] * 30, [0.5] * 30
    x = NMAPG(L2, dinv.optim.L1Prior(), early + late, max_iter=60, early_stop=True, thres_conv=1e-9)(X, DENOISING)
    small = NMAPG(L2, dinv.optim.L1Prior(), [0.01] * 60, max_iter=60, early_stop=True)(X, DENOISING)
    assert torch.allclose(small, (X - 0.01).clamp(min=0), atol=1e-6)
    # all samples had converged before the change, which ends the search
    assert torch.allclose(x, (X - 0.01).clamp(min=0), atol=1e-6)


def test_without_early_stop_all_iterations_are_run():
    prior = Counting()
    NMAPG(L2, prior, max_iter=20)(X, DENOISING)
    assert set(prior.sizes) == {B}


def test_class_and_deepinvs_builder_freeze_alike():
    options = {"max_iter": 300, "early_stop": True, "thres_conv": 1e-8, "g_first": True}
    found = [build("NMAPG", way, **options)(X, DENOISING) for way in ("class", "instance", "name")]
    assert torch.equal(found[1], found[2]) and torch.allclose(found[0], found[1], rtol=1e-6)


def test_stacked_measurements_are_cut():
    physics = dinv.physics.stack(PHYSICS["a mask each"](slice(None)), PHYSICS["one kernel"](slice(None))).double()
    rows = torch.tensor([0, 2])
    part, y = cut(physics, rows, B), physics(X)
    assert isinstance(y, TensorList)
    for a, b in zip(part(X[rows]), cut(y, rows, B)):
        assert torch.equal(a, b)
    # the user's physics is as it was
    assert len(physics.physics_list[0].mask) == B


def test_generators_and_weights_are_shared_by_what_is_cut():
    model = torch.nn.Linear(2, B)
    model.source = torch.Generator()
    part = cut(model, torch.tensor([0]), B)
    assert part.weight is model.weight and part.source is model.source and part is not model
