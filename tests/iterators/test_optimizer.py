"""Properties of every algorithm: known answers, batches, gradients, DEQ, copies, and class against builder."""

import copy
import functools
import pickle

import deepinv as dinv
import pytest
import skimage.data
import torch
from cases import central_difference
from iterator_cases import (
    ALGORITHMS,
    F64,
    L2,
    LIPSCHITZ,
    PHYSICS,
    STEP,
    TIKHONOV,
    A,
    Decoder,
    N,
    NonNegative,
    Weighted,
    Y,
    build,
    matrix_physics,
    random,
    ridge,
    track,
)

from deepinv_flows import (
    NMAPG,
    CondatVu,
    DavisYin,
    DEQ_builder,
    IPiano,
    LatentGD,
    LearnedPrimalDual,
    unfolded_builder,
)

# of the quadratic |Ax - y|^2 / 2 + 0.3 |x|^2 / 2
QUADRATIC = {
    "condat_vu": lambda **kw: CondatVu(L2, TIKHONOV, 0.3, STEP, 0.5 * (1 / STEP - LIPSCHITZ / 2), **kw),
    "condat_vu_second": lambda **kw: CondatVu(L2, prior_2=TIKHONOV, lambda_reg_2=0.3, stepsize=STEP, **kw),
    "davis_yin": lambda **kw: DavisYin(L2, TIKHONOV, 0.3, STEP, **kw),
    "davis_yin_three": lambda **kw: DavisYin(L2, TIKHONOV, 0.1, STEP, prior_2=TIKHONOV, lambda_reg_2=0.2, **kw),
    "davis_yin_swapped": lambda **kw: DavisYin(
        L2, TIKHONOV, 0.1, 2.0, prior_2=TIKHONOV, lambda_reg_2=0.2, g_first=True, **kw
    ),
    "nmapg": lambda **kw: NMAPG(L2, TIKHONOV, 0.3, STEP, **kw),
    "nmapg_swapped": lambda **kw: NMAPG(L2, TIKHONOV, 0.3, 1.0, g_first=True, **kw),
    "ipiano": lambda **kw: IPiano(L2, TIKHONOV, 0.3, STEP, 0.4, **kw),
    "ipiano_swapped": lambda **kw: IPiano(L2, TIKHONOV, 0.3, 1.0, 0.4, g_first=True, **kw),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_quadratic(name):
    x = QUADRATIC[name](max_iter=1000)(Y, PHYSICS)
    assert torch.allclose(x, ridge(0.3), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_class_and_builders_agree(name):
    x, cost = track(build(name, "class"))
    assert cost.shape == (2, 5)
    for way in ("instance", "name"):
        other = track(build(name, way))
        assert torch.equal(x, other[0]) and torch.equal(cost, other[1])
    x, cost = track(build(name, "class", unfold=True, trainable_params=["stepsize", "lambda"]))
    for way in ("unfolded instance", "unfolded name"):
        other = track(build(name, way))
        assert torch.equal(x, other[0]) and torch.equal(cost, other[1])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_sample_as_if_alone(name):
    weights = torch.tensor([0.2, 0.7], dtype=F64).view(2, 1, 1, 1)
    x, cost = track(build(name, "class", max_iter=8))
    for i in range(2):
        x_i, cost_i = track(build(name, "class", max_iter=8), Y[i : i + 1])
        assert torch.allclose(x[i : i + 1], x_i, rtol=1e-10, atol=1e-12)
        assert torch.allclose(cost[i], cost_i[0], rtol=1e-10)
    model = build(name, "class", max_iter=8)
    model.init_params_algo["lambda"] = [weights]
    x, cost = track(model)
    for i in range(2):
        model.init_params_algo["lambda"] = [float(weights[i])]
        x_i, cost_i = track(model, Y[i : i + 1])
        assert torch.allclose(x[i : i + 1], x_i, rtol=1e-10, atol=1e-12)
        assert torch.allclose(cost[i], cost_i[0], rtol=1e-10)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unfolded_gradients(name):
    *_, more = ALGORITHMS[name]
    model = build(name, "class", max_iter=4, unfold=True, g_param=0.4).double()
    probe = random(2, 1, 1, N, seed=9)

    def loss():
        return (probe * model(Y, PHYSICS)).sum()

    model.zero_grad()
    loss().backward()
    trained = {n: p for n, p in model.named_parameters() if "params_algo" in n or n.startswith("prior.")}
    assert {"stepsize", "lambda", "g_param", *more} <= {n.split(".")[1] for n in trained}
    for n, p in trained.items():
        expected = central_difference(loss, p.data, torch.ones_like(p), 1e-6)
        assert float(p.grad.sum()) == pytest.approx(float(expected), rel=1e-5, abs=1e-8), n
    with torch.no_grad():  # in evaluation too the steps are the given ones
        x = model(Y, PHYSICS)
    assert torch.equal(x, model(Y, PHYSICS))


@pytest.mark.parametrize("name", ["NMAPG", "IPiano", "DavisYin", "PGD"])
@pytest.mark.parametrize("g_first", [False, True])
def test_deep_equilibrium_gradient_is_that_of_many_unfolded_steps(name, g_first):
    start = STEP if name not in ("NMAPG", "IPiano") else 50.0  # to be shortened by the search
    if g_first:
        start = 0.9 if name not in ("NMAPG", "IPiano") else 50.0
    probe, grads, found = random(2, 1, 1, N, seed=9), {}, {}
    for way in ("unfold", "DEQ"):
        prior = Weighted(0.8)
        step = min(start, 0.9 if g_first else STEP) if way == "unfold" else start
        params = {"lambda": 0.5, "stepsize": step, "inertia": 0.3}
        common = dict(params_algo=params, data_fidelity=L2, prior=prior, g_first=g_first, trainable_params=["lambda"])
        if way == "unfold":
            model = unfolded_builder(name, max_iter=200, **common)
        else:
            model = DEQ_builder(name, max_iter=400, max_iter_backward=400, thres_conv=1e-8, **common)
        x = model(Y, PHYSICS)
        (probe * x).sum().backward()
        found[way], grads[way] = x.detach(), (prior.weight.grad, next(iter(model.init_params_algo["lambda"])).grad)
    assert torch.allclose(found["DEQ"], found["unfold"], rtol=1e-4, atol=1e-6)
    for deq, unfolded in zip(grads["DEQ"], grads["unfold"]):
        assert float(deq) == pytest.approx(float(unfolded), rel=0.01)


REFUSED = [
    (CondatVu, {"DEQ": True}),
    (CondatVu, {"anderson_acceleration": True}),
    (CondatVu, {"backtracking": True}),
    (CondatVu, {"K": lambda x: x}),
    (CondatVu, {"stepsize_dual": 0.0}),
    (DavisYin, {"DEQ": True, "prior_2": TIKHONOV}),
    (DavisYin, {"anderson_acceleration": True}),
    (DavisYin, {"backtracking": dinv.optim.BacktrackingConfig()}),
    (NMAPG, {"anderson_acceleration": True}),
    (NMAPG, {"backtracking": True, "unfold": True}),
    (NMAPG, {"eta": 1.0}),
    (NMAPG, {"stepsize": -1.0}),
    (NMAPG, {"lambda_reg": float("nan")}),
    (NMAPG, {"unfold": True, "trainable_params": ["stepsizes"]}),
    (NMAPG, {"unfold": True, "trainable_params": ["g_param"]}),
    (IPiano, {"inertia": 1.0}),
    (IPiano, {"backtracking": dinv.optim.BacktrackingConfig(eta=1.5)}),
    (lambda **kw: LatentGD(Decoder(), **kw), {"DEQ": True}),
    (lambda **kw: LatentGD(Decoder(), **kw), {"anderson_acceleration": True}),
    (LearnedPrimalDual, {"DEQ": True}),
    (LearnedPrimalDual, {"unfold": False}),
    (lambda **kw: unfolded_builder("CondatVu", **kw), {"anderson_acceleration": True}),
    (lambda **kw: DEQ_builder("LatentGD", {"generator": Decoder()}, **kw), {}),
    (lambda **kw: DEQ_builder("ADMM", **kw), {}),
    (lambda **kw: unfolded_builder("Nesterov", **kw), {}),
]


@pytest.mark.parametrize("make, options", REFUSED)
def test_refused_when_made(make, options):
    with pytest.raises(ValueError, match="got"):
        make(**options)


def test_a_line_search_needs_values():
    class Denoiser(dinv.optim.Prior):
        def prox(self, x, *args, **kwargs):
            return 0.9 * x

    with pytest.raises(ValueError, match="needs the value"):
        NMAPG(L2, Denoiser())(Y, PHYSICS)
    assert NMAPG(L2, Denoiser(), stepsize=STEP, unfold=True)(Y, PHYSICS).shape == Y.shape
    assert IPiano(L2, Denoiser(), stepsize=STEP)(Y, PHYSICS).shape == Y.shape


def test_backtracking_as_a_parameter_is_the_argument():
    for kind in (NMAPG, IPiano):
        by_argument = kind(L2, TIKHONOV, 0.3, STEP, backtracking=False, max_iter=7)(Y, PHYSICS)
        by_parameter = kind(L2, TIKHONOV, 0.3, STEP, params_algo={"backtracking": False}, max_iter=7)(Y, PHYSICS)
        assert torch.equal(by_argument, by_parameter)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("unfold", [False, True])
def test_copies_pickles_and_state_dicts(name, unfold):
    model = build(name, "class", unfold=unfold).double()
    x = model(Y, PHYSICS)
    assert all(
        torch.equal(copied(Y, PHYSICS), x) for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    )
    if unfold:
        other = build(name, "class", unfold=True, prior=Weighted(3.0)).double()
        assert not torch.equal(other(Y, PHYSICS), x)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(Y, PHYSICS), x)
        operands = {"DavisYin": "prior_2", "LatentGD": "generator"}
        assert name not in operands or any(operands[name] in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n != "LatentGD"])
def test_outputs_starts_and_stops(name):
    model = build(name, "class", max_iter=400, early_stop=True, thres_conv=1e-4, get_output=lambda X: -X["est"][0])
    x, metrics = model(Y, PHYSICS, compute_metrics=True, x_gt=Y)
    assert 3 < len(metrics["cost"][0]) < 400 and len(metrics["psnr"][0]) == len(metrics["cost"][0]) + 1
    flipped = build(name, "class", max_iter=400, early_stop=True, thres_conv=1e-4)
    assert torch.equal(flipped(Y, PHYSICS), -x)
    start = random(2, 1, 1, N, seed=8)
    by_argument = build(name, "class", max_iter=2)(Y, PHYSICS, init=start)
    by_class = build(name, "class", max_iter=2, custom_init=lambda y, physics: start)(Y, PHYSICS)
    assert torch.equal(by_argument, by_class) and not torch.equal(
        by_class, build(name, "class", max_iter=2)(Y, PHYSICS)
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stacked_measurements(name):
    half = matrix_physics(A[: N // 2]), matrix_physics(A[N // 2 :])
    stacked = dinv.physics.StackedLinearPhysics(list(half))
    y = dinv.utils.TensorList([Y[..., : N // 2], Y[..., N // 2 :]])
    both = dinv.optim.StackedPhysicsDataFidelity([L2, L2])
    x, cost = track(build(name, "class", data_fidelity=both), y, stacked)
    expected = track(build(name, "class"))
    assert torch.allclose(x, expected[0], rtol=1e-10) and torch.allclose(cost, expected[1], rtol=1e-10)


SIDE = 24


DCT = torch.cos(torch.pi / SIDE * torch.outer(torch.arange(SIDE), torch.arange(SIDE) + 0.5)).double()


DCT /= DCT.norm(dim=1, keepdim=True)


def dct(x):
    return DCT @ x @ DCT.T


def inverse_dct(u):
    return DCT.T @ u @ DCT


class SparseDCT(dinv.optim.L1Prior):
    def fn(self, x, *args, **kwargs):
        return super().fn(dct(x))

    def prox(self, x, *args, gamma=1.0, **kwargs):
        return inverse_dct(super().prox(dct(x), gamma=gamma))


def test_real_inpainting_reaches_the_minimiser():
    image = torch.from_numpy(skimage.data.gravel()[:SIDE, :SIDE] / 255)[None, None]
    mask = (torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) > 0.4).double()
    physics = dinv.physics.Inpainting((1, SIDE, SIDE), mask=mask).double()
    y, prior, weight = physics(image), SparseDCT(), 0.05

    def cost(x):
        return float(L2(x, y, physics) + weight * prior(x))

    least = cost(dinv.optim.PGD(L2, prior, lambda_reg=weight, stepsize=1.0, max_iter=3000)(y, physics))
    K = {"K": dct, "K_adjoint": inverse_dct}
    for model in (
        CondatVu(L2, dinv.optim.L1Prior(), weight, 1.0, 0.5, **K, max_iter=1500),
        DavisYin(L2, prior, weight, 1.0, prior_2=NonNegative(), max_iter=1500),
        NMAPG(L2, prior, weight, max_iter=300),
        IPiano(L2, prior, weight, 1.0, 0.4, max_iter=1000),
    ):
        assert cost(model(y, physics)) <= least * (1 + 1e-6), type(model).__name__


HALVES = {
    "nmapg": (lambda **kw: NMAPG(L2, **kw), {}),
    "nmapg_swapped": (lambda **kw: NMAPG(L2, g_first=True, **kw), {}),
    "nmapg_fixed": (lambda **kw: NMAPG(L2, stepsize=0.5 * STEP, backtracking=False, **kw), {}),
    "nmapg_unfolded": (lambda **kw: NMAPG(L2, stepsize=0.5 * STEP, unfold=True, trainable_params=[], **kw), {}),
    "ipiano": (lambda **kw: IPiano(L2, inertia=0.3, **kw), {}),
    "ipiano_swapped": (lambda **kw: IPiano(L2, inertia=0.3, g_first=True, **kw), {}),
    "davis_yin": (lambda **kw: DavisYin(L2, stepsize=0.5 * STEP, **kw), {}),
    "condat_vu": (lambda **kw: CondatVu(L2, stepsize=0.5 * STEP, stepsize_dual=0.5 * LIPSCHITZ, **kw), {}),
}


@pytest.mark.parametrize("early", [0.001, 10.0])
@pytest.mark.parametrize("changing", ["lambda_reg", "prior", "g_param", "data_fidelity"])
@pytest.mark.parametrize("name", HALVES)
def test_when_the_objective_changes_half_way_the_last_one_is_minimised(name, changing, early):
    make, options = HALVES[name]
    n, late = 400 if name.startswith(("nmapg", "ipiano")) and name != "nmapg_unfolded" else 1200, 0.3
    options = {"lambda_reg": late, "prior": TIKHONOV, "max_iter": n, **options}
    if changing == "lambda_reg":
        options["lambda_reg"] = [early] * (n // 2) + [late] * (n // 2)
    elif changing == "prior":
        options["prior"] = [Weighted(early / late)] * (n // 2) + [Weighted()] * (n // 2)
    elif changing == "g_param":
        options |= {"prior": Weighted(), "g_param": [early] * (n // 2) + [0.0] * (n // 2)}
    else:
        options["data_fidelity"] = [dinv.optim.L2(sigma=1.1)] * (n // 2) + [L2] * (n // 2)
        make = functools.partial(_with_data_fidelity, name)
    with torch.no_grad():
        x, cost = track(make(**options).double())
    assert torch.allclose(x, ridge(late), atol=1e-6)
    assert torch.allclose(cost[:, -1], L2(x, Y, PHYSICS) + late * TIKHONOV(x), rtol=1e-9)


def _with_data_fidelity(name, data_fidelity, **options):
    model = HALVES[name][0](**options)
    model.data_fidelity = torch.nn.ModuleList(data_fidelity)
    return model


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["nmapg", "ipiano"])
def test_scaling_the_objective_changes_nothing(name, scale):
    kinds = {"nmapg": NMAPG, "ipiano": IPiano}

    def model(scale):
        return kinds[name](
            dinv.optim.L2(sigma=scale**-0.5), Weighted(0.3 * scale), stepsize=5.0 / scale, max_iter=30
        ).double()

    assert torch.allclose(model(scale)(Y, PHYSICS), model(1.0)(Y, PHYSICS), rtol=1e-6)


def test_latent_descent_after_a_change_of_the_objective():
    G = torch.linalg.qr(random(N, 3))[0]
    AG = A @ G
    z = torch.linalg.solve(AG.T @ AG + 0.3 * torch.eye(3, dtype=F64), AG.T @ Y[:, 0, 0].T).T

    def generator(z):
        return (z @ G.T)[:, None, None]

    weights = [1e4] * 20 + [0.3] * 480
    model = LatentGD(generator, L2, TIKHONOV, weights, 10.0, latent_shape=(3,), max_iter=500, backtracking=True)
    assert torch.allclose(model(Y, PHYSICS), generator(z), atol=1e-8)


class Ridge(dinv.optim.Prior):
    """Half the weighted squared norm, of real and complex images."""

    def __init__(self):
        super().__init__()
        self.explicit_prior = True

    def fn(self, x, *args, **kwargs):
        return 0.5 * x.abs().pow(2).flatten(1).sum(1)

    def grad(self, x, *args, **kwargs):
        return x

    def prox(self, x, *args, gamma=1.0, **kwargs):
        return x / (1 + gamma)


@pytest.mark.parametrize("name", HALVES)
def test_complex_images(name):
    y = torch.complex(random(3, 1, 4, 4), random(3, 1, 4, 4, seed=1))
    model = HALVES[name][0](prior=Ridge(), lambda_reg=0.5, max_iter=1500)
    with torch.no_grad():
        x, metrics = model(y, dinv.physics.Denoising(), compute_metrics=True)
    assert torch.allclose(x, y / 1.5, atol=1e-6)
    expected = 0.5 * (x - y).abs().pow(2).flatten(1).sum(1) + 0.25 * x.abs().pow(2).flatten(1).sum(1)
    assert torch.allclose(torch.tensor(metrics["cost"], dtype=F64)[:, -1], expected)


def test_phase_retrieval_descends():
    physics = dinv.physics.RandomPhaseRetrieval(m=80, img_size=(1, 4, 4), dtype=torch.complex64)
    truth = torch.complex(*torch.randn(2, 2, 1, 4, 4).unbind(0))
    y = physics(truth)
    start = truth + 0.3 * torch.complex(*torch.randn(2, 2, 1, 4, 4).unbind(0))
    for kind in (NMAPG, IPiano):
        model = kind(dinv.optim.AmplitudeLoss(), None, max_iter=200)
        _, metrics = model(y, physics, init=(start, start), compute_metrics=True)
        cost = torch.tensor(metrics["cost"])
        assert (cost[:, -1] < 1e-3 * cost[:, 0]).all()
