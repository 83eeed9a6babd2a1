"""deepinv's documented builders, with correct costs, correct gradients, and deepinv's own examples."""

import inspect

import deepinv as dinv
import pytest
import torch
from cases import central_difference
from deepinv.models import PDNet_DualBlock, PDNet_PrimalBlock
from deepinv.optim.optim_iterators import CPIteration, PGDIteration, fStep, gStep

from deepinv_flows import DEQ_builder, IPianoIteration, PatchNR, unfolded_builder

F64 = torch.float64
L2 = dinv.optim.L2()
PHYSICS = dinv.physics.Denoising().double()


def images(seed=0):
    return torch.rand(2, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(seed))


def costs(model, y):
    _, metrics = model(y, PHYSICS, compute_metrics=True)
    return torch.tensor(metrics["cost"], dtype=F64)


@pytest.mark.parametrize("builder, theirs", [(unfolded_builder, "unfolded_builder"), (DEQ_builder, "DEQ_builder")])
def test_signatures_are_deepinvs(builder, theirs):
    expected = inspect.signature(getattr(dinv.unfolded, theirs)).parameters
    assert [n for n in inspect.signature(builder).parameters if n in expected] == list(expected)


@pytest.mark.parametrize(
    "name", ["PGD", "GD", "HQS", "ADMM", "DRS", "FISTA", "NMAPG", "IPiano", "DavisYin", "CondatVu"]
)
@pytest.mark.parametrize(
    "weight", [2, 0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.2, 0.7]).view(2, 1, 1, 1)]
)
def test_cost_of_each_sample(name, weight):
    y, prior = images(), dinv.optim.Tikhonov()
    params = {"lambda": weight, "stepsize": 0.2}
    trained = ["lambda"] if torch.is_tensor(weight) else []
    model = unfolded_builder(name, dict(params), L2, prior, max_iter=3, trainable_params=trained).double()
    found, x = costs(model, y), model(y, PHYSICS)
    weights = torch.as_tensor(weight).double().flatten()
    expected = 0.5 * (x - y).flatten(1).pow(2).sum(1) + weights * 0.5 * x.flatten(1).pow(2).sum(1)
    assert torch.allclose(found[:, -1], expected, rtol=1e-5)  # weights that are trained were float32


def test_cost_behind_an_operator():
    y, K = images(), torch.flip
    params = {"K": lambda x: 2 * K(x, (3,)), "K_adjoint": lambda u: 2 * K(u, (3,)), "lambda": 0.3, "stepsize": 0.2}
    init = (y, y, torch.zeros_like(y))
    for name in ("CP", "PDCP"):
        model = unfolded_builder(name, params, L2, dinv.optim.L1Prior(), max_iter=3, g_first=True, trainable_params=[])
        x, metrics = model(y, PHYSICS, init=init, compute_metrics=True)
        expected = 0.5 * (x - y).flatten(1).pow(2).sum(1) + 0.6 * x.flatten(1).abs().sum(1)
        assert torch.allclose(torch.tensor(metrics["cost"], dtype=F64)[:, -1], expected)


@pytest.mark.parametrize("name", ["PGD", "GD", "HQS", "ADMM", "DRS", "NMAPG"])
def test_gradients_are_those_of_finite_differences(name):
    y, prior = images(), dinv.optim.SmoothedTVPrior() if name == "GD" else dinv.optim.Tikhonov()
    params = {"lambda": [0.3, 0.2, 0.1], "stepsize": [0.02, 0.03, 0.02]}
    model = unfolded_builder(name, params, L2, prior, max_iter=3).double()
    probe = images(1)

    def loss():
        return (probe * model(y, PHYSICS)).sum()

    loss().backward()
    for p in model.parameters():
        expected = central_difference(loss, p.data, torch.ones_like(p), 1e-6)
        assert float(p.grad) == pytest.approx(float(expected), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", ["CP", "PDCP"])
@pytest.mark.parametrize("g_first", [True, False])
def test_chambolle_pock_reaches_the_minimiser_from_its_own_start(name, g_first):
    y, K = images(), torch.rand(5, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    params = {"lambda": 4.0, "stepsize": 0.5, "stepsize_dual": 0.3}
    if g_first:  # |x - y|^2 / 2 + 4 |Kx|^2 / 2, K of other sizes
        params |= {"K": lambda x: x @ K.T, "K_adjoint": lambda u: u @ K, "stepsize": 0.2}
        expected = torch.linalg.solve(torch.eye(8, dtype=F64) + 4 * K.T @ K, y.mT).mT
    else:
        expected = y / 5
    model = unfolded_builder(name, params, L2, dinv.optim.Tikhonov(), 2000, [], g_first=g_first)
    with torch.no_grad():
        assert torch.allclose(model(y, PHYSICS), expected, atol=1e-6)


def test_has_cost_is_the_users():
    y, denoiser = images(), dinv.optim.PnP(lambda x, sigma: 0.9 * x)

    def total(x, *args):
        return x.flatten(1).sum(1)

    for name in ("PGD", "NMAPG"):
        x, metrics = unfolded_builder(name, None, L2, denoiser, cost_fn=total)(y, PHYSICS, compute_metrics=True)
        assert torch.allclose(torch.tensor(metrics["cost"], dtype=F64)[:, -1], total(x).detach())
        model = unfolded_builder(name, None, L2, dinv.optim.Tikhonov(), has_cost=False)
        assert "cost" not in model(y, PHYSICS, compute_metrics=True)[1]
        with pytest.raises(ValueError, match="got has_cost=False"):
            unfolded_builder(name, None, L2, has_cost=False, crit_conv="cost")


class Scaled(dinv.optim.Prior):
    """A quadratic whose weight is learned."""

    def __init__(self):
        super().__init__()
        self.explicit_prior = True
        self.weight = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))

    def fn(self, x, *args, **kwargs):
        return 0.5 * self.weight * x.flatten(1).pow(2).sum(1)

    def grad(self, x, *args, **kwargs):
        return self.weight * x

    def prox(self, x, *args, gamma=1.0, **kwargs):
        return x / (1 + gamma * self.weight)


@pytest.mark.parametrize("name", ["PGD", "GD", "HQS"])
@pytest.mark.parametrize("weight", [1, 0.5, torch.tensor(0.5)])
@pytest.mark.parametrize("crit_conv", ["residual", "cost"])
def test_deep_equilibrium_gradient(name, weight, crit_conv):
    y, probe, grads = images(), images(1), {}
    for builder, max_iter in ((unfolded_builder, 200), (DEQ_builder, 300)):
        prior = Scaled()
        params = {"lambda": weight, "stepsize": 0.4}
        options = {"max_iter": max_iter, "trainable_params": ["lambda"], "crit_conv": crit_conv}
        model = builder(name, params, data_fidelity=L2, prior=prior, **options).double()
        (probe * model(y, PHYSICS)).sum().backward()
        (weight_grad,) = (p.grad for n, p in model.named_parameters() if "lambda" in n)
        grads[builder] = (float(prior.weight.grad), float(weight_grad))
    assert grads[DEQ_builder] == pytest.approx(grads[unfolded_builder], rel=0.01)


@pytest.mark.parametrize("builder, theirs", [(unfolded_builder, "BaseUnfold"), (DEQ_builder, "BaseDEQ")])
def test_state_dicts_of_deepinv(builder, theirs):
    params = {"lambda": 0.3, "stepsize": [0.1, 0.2, 0.3]}
    theirs = getattr(dinv.unfolded, theirs)(PGDIteration(), dict(params), L2, Scaled(), max_iter=3)
    state = {n: v + 0.01 for n, v in theirs.state_dict().items()}
    ours = builder("PGD", params, data_fidelity=L2, prior=Scaled(), max_iter=3)
    ours.load_state_dict(state)
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, state[n]) for n, v in theirs.state_dict().items())


def test_the_documented_example_of_unfolded_builder():
    model = unfolded_builder(
        iteration="PGD",
        data_fidelity=dinv.optim.data_fidelity.L2(),
        prior=dinv.optim.PnP(dinv.models.DnCNN(in_channels=1, out_channels=1, pretrained=None)),
        params_algo={"stepsize": 1.0, "g_param": 1.0},
        trainable_params=["stepsize", "g_param"],
    )
    x = torch.randn(1, 1, 16, 16)
    physics = dinv.physics.Denoising()
    x_hat = model(physics(x), physics)
    x_hat.sum().backward()
    assert {n.split(".")[1] for n, p in model.named_parameters() if "params_algo" in n and p.grad is not None} == {
        "stepsize"
    }


@pytest.mark.parametrize("jacobian_free", [False, True])
@pytest.mark.parametrize("anderson", [False, True])
def test_the_documented_example_of_deq_builder(jacobian_free, anderson):
    prior = dinv.optim.PnP(dinv.models.DnCNN(in_channels=1, out_channels=1, depth=3, nf=8, pretrained=None))
    model = DEQ_builder(
        iteration="PGD",
        params_algo={"stepsize": 1.0, "g_param": 0.03, "lambda": 1.0},
        trainable_params=["stepsize", "g_param"],
        data_fidelity=L2,
        max_iter=20,
        prior=prior,
        anderson_acceleration=anderson,
        anderson_acceleration_backward=anderson,
        history_size_backward=3,
        max_iter_backward=20,
        jacobian_free=jacobian_free,
    )
    y = torch.rand(2, 1, 16, 16)
    model(y, dinv.physics.Denoising()).sum().backward()
    assert all(p.grad is not None for p in prior.parameters())


def test_learned_primal_dual_as_deepinv_writes_it():
    class Iteration(CPIteration):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.g_step, self.f_step = Primal(**kwargs), Dual(**kwargs)

    class Dual(fStep):
        def forward(self, x, w, cur_data_fidelity, y, *args):
            return cur_data_fidelity.prox(x, w, y)

    class Primal(gStep):
        def forward(self, x, w, cur_prior, *args):
            return cur_prior.prox(x, w)

    class LearnedPrior(dinv.optim.Prior):
        def __init__(self):
            super().__init__()
            self.model = PDNet_PrimalBlock(nf=4)

        def prox(self, x, w):
            return self.model(x, w[:, 0:1])

    class LearnedFidelity(dinv.optim.DataFidelity):
        def __init__(self):
            super().__init__()
            self.model = PDNet_DualBlock(nf=4)

        def prox(self, x, w, y):
            return self.model(x, w[:, 1:2], y)

    def start(y, physics):
        x0 = physics.A_dagger(y).repeat(1, 5, 1, 1)
        return {"est": (x0, x0, torch.zeros_like(y).repeat(1, 5, 1, 1))}

    physics = dinv.physics.Denoising()
    arguments = dict(
        params_algo={"K": physics.A, "K_adjoint": physics.A_adjoint, "beta": 0.0},
        data_fidelity=[LearnedFidelity() for _ in range(3)],
        prior=[LearnedPrior() for _ in range(3)],
        max_iter=3,
        custom_init=start,
        get_output=lambda X: X["est"][0][:, 1].unsqueeze(1),
    )
    y = torch.rand(2, 1, 8, 8)
    theirs = dinv.unfolded.unfolded_builder(Iteration(), **{**arguments, "params_algo": dict(arguments["params_algo"])})
    ours = unfolded_builder(Iteration(), **arguments)
    x = ours(y, physics)
    assert torch.equal(x, theirs(y, physics))
    x.sum().backward()
    used = [p for n, p in ours.named_parameters() if n.startswith(("prior", "data_fidelity"))]
    assert used and all(p.grad is not None for p in used)


def test_patchnr_trains_unfolded():
    prior = PatchNR(patch_size=3, num_layers=1, sub_net_size=8)
    model = unfolded_builder("NMAPG", {"stepsize": 0.1, "lambda": 0.1}, L2, prior, max_iter=3, g_first=True)
    y = torch.rand(2, 1, 8, 8)
    model(y, dinv.physics.Denoising()).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_options_beside_an_iteration_that_lacks_them_are_refused():
    """They were ignored: ``g_first=True`` left the roles of data fidelity and prior as they were."""

    def cost(*args):
        return torch.zeros(2)

    for build in (unfolded_builder, DEQ_builder):
        for option, message in ({"g_first": True}, "g_first=True"), ({"cost_fn": cost}, "cost_fn"):
            with pytest.raises(ValueError, match=f"expected IPianoIteration.*{message}"):
                build(IPianoIteration(), {"stepsize": 0.5}, L2, dinv.optim.Tikhonov(), **option)
            built = build(IPianoIteration(**option), {"stepsize": 0.5}, L2, dinv.optim.Tikhonov(), **option)
            assert built(images(), PHYSICS).shape == (2, 1, 8, 8)
