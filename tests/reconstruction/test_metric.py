"""The metric of a search: exact for diagonal Hessians, flat where the diagonal tells nothing, the same in every batch."""

import deepinv as dinv
import pytest
import torch
from deepinv.physics.functional import gaussian_blur

from deepinv_flows import MAP
from deepinv_flows.reconstruction.metric import metric
from deepinv_flows.reconstruction.objective import DataTerm, Objective

F64 = torch.float64
L2 = dinv.optim.L2()


def random(*shape, seed=0):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Explicit(dinv.optim.Prior):
    def __init__(self):
        super().__init__()
        self.explicit_prior = True


def objective(physics, x, weight=0.1, data_fidelity=L2):
    prior = dinv.optim.Tikhonov()
    return Objective(DataTerm(data_fidelity, physics(x), physics), prior, x.new_full((len(x),), weight), None, True)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_known_diagonal(scale):
    x = scale * random(2, 1, 8, 8)
    mask = (random(2, 1, 8, 8, seed=1) > 0.5).double()
    r = metric(objective(dinv.physics.Inpainting((1, 8, 8), mask=mask), x), x)
    expected = (mask + 0.1).rsqrt()
    ratio = r / expected
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), rtol=1e-6)


def test_a_blur_has_the_same_curvature_everywhere():
    x = random(1, 1, 16, 16)
    physics = dinv.physics.BlurFFT((1, 16, 16), filter=gaussian_blur(sigma=(2.0, 2.0)).double())
    r = metric(objective(physics, x, weight=1e-3), x)
    assert r.max() / r.min() < 1.3


def test_no_image_depends_on_the_others_of_its_batch():
    x = random(3, 1, 8, 8)
    mask = (random(3, 1, 8, 8, seed=1) > 0.5).double() + 0.2 * random(3, 1, 8, 8, seed=2)
    together = metric(objective(dinv.physics.Inpainting((1, 8, 8), mask=mask), x), x)
    for i in range(3):
        alone = metric(objective(dinv.physics.Inpainting((1, 8, 8), mask=mask[i : i + 1]), x[i : i + 1]), x[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-9)


def test_finite_where_the_gradient_beside_x_is_not():
    class Edge(Explicit):
        def fn(self, x, *args, **kwargs):
            return torch.log(x).flatten(1).sum(1)

    x = torch.full((1, 1, 4, 4), 1e-300, dtype=F64)
    whole = Objective(DataTerm(L2, x, dinv.physics.Denoising()), Edge(), x.new_ones(1), None, True)
    assert torch.isfinite(metric(whole, x)).all() and torch.isfinite(metric(whole, 0 * x)).all()


@pytest.mark.parametrize(
    "solver, constraint",
    [("lbfgs", None), *((solver, c) for solver in ("nmapg", "ipiano") for c in (None, "nonnegative", (-1.0, 2.0)))],
)
def test_stiff_inpainting_takes_fewer_iterations_than_its_condition_number_suggests(solver, constraint):
    """Every algorithm that may; in the metric of the image ``"nmapg"`` and ``"ipiano"`` stood still with a constraint too."""
    # |Mx - y|^2 / 2 + 1e-4 |Dx|^2 / 2: curvatures 1 where observed, 1e-4 elsewhere
    x = random(1, 1, 24, 24)
    physics = dinv.physics.Inpainting((1, 24, 24), mask=(random(1, 1, 24, 24, seed=1) > 0.7).double())

    class Differences(Explicit):
        def fn(self, x, *args, **kwargs):
            return 0.5 * (x.diff(dim=2).pow(2).flatten(1).sum(1) + x.diff(dim=3).pow(2).flatten(1).sum(1))

    options = dict(solver=solver, constraint=constraint, tol=1e-6, max_iter=400, verbose=False)
    model = MAP(Differences(), lambda_reg=1e-4, **options)
    found = model(physics(x), physics)
    exact = MAP(Differences(), lambda_reg=1e-4, tol=0, max_iter=400, verbose=False)(physics(x), physics)
    assert (found - exact).norm() < 1e-3 * exact.norm()
    assert model.chosen["iterations"] < (120 if solver == "lbfgs" else 300)
