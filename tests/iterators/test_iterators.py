"""Known answers of the iterations, their gradients, DEQ, and class against builder."""

import copy
import pickle

import deepinv as dinv
import pytest
import skimage.data
import torch
from cases import central_difference
from deepinv.models import PDNet_DualBlock, PDNet_PrimalBlock

from deepinv_flows import (
    NMAPG,
    CondatVu,
    CondatVuIteration,
    DavisYin,
    DavisYinIteration,
    DEQ_builder,
    IPiano,
    IPianoIteration,
    LatentGD,
    LatentGDIteration,
    LearnedPrimalDual,
    LearnedPrimalDualIteration,
    NMAPGIteration,
    glow_flow,
    nmapg,
    registered,
    unfolded_builder,
)

F64 = torch.float64
N = 6


class Weighted(dinv.optim.Prior):
    """Half a weighted sum of squared distances to the level ``g_param``, the weight learnable."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.explicit_prior = True
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=F64))

    def fn(self, x, level=None, **kwargs):
        return 0.5 * self.weight * (x - (0 if level is None else level)).flatten(1).pow(2).sum(1)

    def grad(self, x, level=None, **kwargs):
        return self.weight * (x - (0 if level is None else level))

    def prox(self, x, level=None, *, gamma=1.0, **kwargs):
        return (x + gamma * self.weight * (0 if level is None else level)) / (1 + gamma * self.weight)


class NonNegative(dinv.optim.Prior):
    def __init__(self):
        super().__init__()
        self.explicit_prior = True

    def fn(self, x, *args, **kwargs):
        return x.new_zeros(x.shape[0])

    def prox(self, x, *args, **kwargs):
        return x.clamp(min=0)


class Near(dinv.optim.Prior):
    """What L2 is on the identity, as a prior."""

    def __init__(self, y):
        super().__init__()
        self.explicit_prior = True
        self.y = y

    def fn(self, x, *args, **kwargs):
        return 0.5 * (x - self.y).flatten(1).pow(2).sum(1)

    def prox(self, x, *args, gamma=1.0, **kwargs):
        return (x + gamma * self.y) / (1 + gamma)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def matrix_physics(A):
    class Matrix(dinv.physics.LinearPhysics):
        def A(self, x, **kwargs):
            return x @ A.T

        def A_adjoint(self, y, **kwargs):
            return y @ A

        def prox_l2(self, z, y, gamma, **kwargs):
            gamma = torch.as_tensor(gamma, dtype=F64).reshape(-1, 1, 1)
            system = gamma * (A.T @ A) + torch.eye(len(A.T), dtype=F64)
            return torch.linalg.solve(system, (gamma[..., None] * (y @ A) + z).transpose(-1, -2)[:, 0]).transpose(
                -1, -2
            )[:, None]

    return Matrix()


A = torch.eye(N, dtype=F64) + 0.3 * random(N, N)
K = random(N - 1, N, seed=1)
PHYSICS = matrix_physics(A)
Y = random(2, 1, 1, N, seed=2)
LIPSCHITZ = float(torch.linalg.matrix_norm(A, 2) ** 2)
K_NORM = float(torch.linalg.matrix_norm(K, 2) ** 2)
STEP = 0.9 / LIPSCHITZ
TIKHONOV = dinv.optim.Tikhonov()
L2 = dinv.optim.L2()
DENOISING = dinv.physics.Denoising().double()


def ridge(weight, K=None):
    regulariser = torch.eye(N, dtype=F64) if K is None else K.T @ K
    return torch.linalg.solve(A.T @ A + weight * regulariser, (Y @ A)[:, 0, 0].T).T[:, None, None]


def apply_K(x):
    return x @ K.T


def apply_K_adjoint(u):
    return u @ K


BEHIND_K = {"K": apply_K, "K_adjoint": apply_K_adjoint}
PRIMAL_DUAL = {"stepsize": 1 / (0.5 * LIPSCHITZ + K_NORM), "stepsize_dual": 1.0}
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


def iterates(model, y, physics, n, **kwargs):
    """The first n estimates."""
    found = []
    model.max_iter = model.fixed_point.max_iter = n
    keep = model.fixed_point.update_metrics_fn
    model.fixed_point.update_metrics_fn = lambda metrics, X_prev, X, **kw: found.append(X["est"][0]) or metrics
    model(y, physics, compute_metrics=True, **kwargs)
    model.fixed_point.update_metrics_fn = keep
    return torch.stack(found)


@pytest.mark.parametrize("name", QUADRATIC)
def test_quadratic(name):
    x = QUADRATIC[name](max_iter=1000)(Y, PHYSICS)
    assert torch.allclose(x, ridge(0.3), rtol=0, atol=1e-8)


def test_quadratic_behind_an_operator():
    x = CondatVu(L2, TIKHONOV, 0.3, **PRIMAL_DUAL, **BEHIND_K, max_iter=2000)(Y, PHYSICS)
    assert torch.allclose(x, ridge(0.3, K), rtol=0, atol=1e-8)


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


def test_ipiano_rate_on_a_quadratic():
    # the slowest root of the recursion x+ = (1 + mu - alpha e) x - mu x-, over the eigenvalues e
    inertia = 0.6
    step = 1.9 * (1 - inertia) / LIPSCHITZ
    roots = [
        abs(root)
        for e in torch.linalg.eigvalsh(A.T @ A)
        for root in torch.linalg.eigvals(torch.tensor([[1 + inertia - step * e, -inertia], [1, 0]], dtype=F64))
    ]
    x = iterates(IPiano(L2, None, stepsize=step, inertia=inertia), Y, PHYSICS, 400)
    error = (x - ridge(0.0)).flatten(1).norm(dim=1)
    rate = float((error[300] / error[100]) ** (1 / 200))
    assert rate == pytest.approx(float(max(roots)), rel=2e-3)


def test_ipiano_backtracks_to_the_longest_admissible_step():
    model = IPiano(L2, TIKHONOV, 0.3, 100.0, 0.4, max_iter=600)
    assert torch.allclose(model(Y, PHYSICS), ridge(0.3), atol=1e-8)
    assert (model.fixed_point.iterator.shortest <= 2 * 0.6 / float(torch.linalg.eigvalsh(A.T @ A)[0])).all()


def double_well(x):
    return ((x**2 - 1) ** 2).flatten(1).sum(1)


def test_nmapg_on_a_double_well():
    start = torch.tensor([-30.0, -1.7, -0.9, -1e-3, 1e-3, 0.4, 1.0, 5.0], dtype=F64)[:, None]
    x = nmapg(double_well, start, max_iter=200, tol=1e-10)
    assert torch.allclose(x.abs(), torch.ones_like(x), atol=1e-8)


def test_nmapg_without_memory_is_monotone():
    energies = []
    x = random(4, 10)
    nmapg(
        double_well, 3 * x, dinv.optim.L1Prior(), eta=0.0, max_iter=60, tol=0, callback=lambda x, F: energies.append(F)
    )
    energies = torch.stack(energies)
    assert (energies[1:] <= energies[:-1] * (1 + 1e-13)).all() and (energies[-1] < energies[0]).all()


def test_nmapg_steps_do_not_depend_on_the_scale_of_the_energy():
    x = random(4, 10)
    one = nmapg(double_well, x, max_iter=7)
    thousand = nmapg(lambda u: 1024 * double_well(u), x, stepsize=1 / 1024, max_iter=7)
    assert torch.allclose(one, thousand, rtol=1e-9)


# every algorithm, with operands as a class takes them; images are (B, 1, 1, N)
def blocks(n):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "primal_blocks": [PDNet_PrimalBlock(nf=4).double() for _ in range(n)],
            "dual_blocks": [PDNet_DualBlock(nf=4).double() for _ in range(n)],
        }


MIXING = random(3, N, seed=4)


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(MIXING.clone())

    def forward(self, z):
        return ((z + 0.1 * z**2) @ self.weight)[:, None, None]


STEPS = {"stepsize": 0.3 * STEP, "lambda": 0.3}
ALGORITHMS = {
    "CondatVu": (
        CondatVu,
        CondatVuIteration,
        STEPS | {"stepsize_dual": 0.7, "beta": 0.9} | BEHIND_K,
        ["stepsize_dual", "beta"],
    ),
    "DavisYin": (
        DavisYin,
        DavisYinIteration,
        STEPS | {"beta": 0.9, "prior_2": Weighted(), "lambda_2": 0.2, "g_param_2": 0.6},
        ["beta", "lambda_2", "g_param_2"],
    ),
    "NMAPG": (NMAPG, NMAPGIteration, STEPS, []),
    "IPiano": (IPiano, IPianoIteration, STEPS | {"inertia": 0.4}, ["inertia"]),
    "LatentGD": (LatentGD, LatentGDIteration, STEPS | {"generator": Decoder(), "latent_shape": [(3,)]}, []),
}


def build(name, way, max_iter=5, **kwargs):
    """The same model as a class, by an instance, and by name."""
    kind, iteration, params, _ = ALGORITHMS[name]
    params = copy.deepcopy(params)
    kwargs = {"data_fidelity": L2, "prior": Weighted(0.8), **kwargs}
    if way == "class":
        own = {"generator": params.pop("generator")} if "generator" in params else {}
        return kind(**own, params_algo=params, max_iter=max_iter, **kwargs)
    if way == "instance":
        return dinv.optim.optim_builder(iteration(), max_iter, params, **kwargs)
    if way == "name":
        with registered():
            return dinv.optim.optim_builder(name, max_iter, params, **kwargs)
    trained = kwargs.pop("trainable_params", ("lambda", "stepsize"))
    what = name if way == "unfolded name" else iteration()
    return unfolded_builder(what, params, max_iter=max_iter, trainable_params=trained, **kwargs)


def track(model, y=Y, physics=PHYSICS, **kwargs):
    x, metrics = model(y, physics, compute_metrics=True, **kwargs)
    return x.detach(), torch.tensor(metrics["cost"], dtype=F64)


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


def test_anderson_acceleration_of_ipiano():
    config = dinv.optim.AndersonAccelerationConfig(history_size=5, beta=1.0, eps=1e-10)
    model = IPiano(L2, TIKHONOV, 0.3, STEP, 0.0, max_iter=40, anderson_acceleration=config)
    plain = IPiano(L2, TIKHONOV, 0.3, STEP, 0.0, max_iter=40)
    error, plain_error = ((m(Y, PHYSICS) - ridge(0.3)).norm() for m in (model, plain))
    assert error < 0.1 * plain_error


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stacked_measurements(name):
    half = matrix_physics(A[: N // 2]), matrix_physics(A[N // 2 :])
    stacked = dinv.physics.StackedLinearPhysics(list(half))
    y = dinv.utils.TensorList([Y[..., : N // 2], Y[..., N // 2 :]])
    both = dinv.optim.StackedPhysicsDataFidelity([L2, L2])
    x, cost = track(build(name, "class", data_fidelity=both), y, stacked)
    expected = track(build(name, "class"))
    assert torch.allclose(x, expected[0], rtol=1e-10) and torch.allclose(cost, expected[1], rtol=1e-10)


def test_latent_gradient_descent_on_a_linear_generator_is_ridge():
    # G^T G = I: |A G z - y|^2 / 2 + 0.3 |z|^2 / 2
    G = torch.linalg.qr(random(N, 3))[0]
    AG = A @ G
    z = torch.linalg.solve(AG.T @ AG + 0.3 * torch.eye(3, dtype=F64), AG.T @ Y[:, 0, 0].T).T

    def generator(z):
        return (z @ G.T)[:, None, None]

    for options in ({"stepsize": STEP}, {"stepsize": 100.0, "backtracking": True}):
        model = LatentGD(generator, L2, TIKHONOV, 0.3, latent_shape=(3,), max_iter=500, **options)
        assert torch.allclose(model(Y, PHYSICS), generator(z), atol=1e-8)


def image_flow():
    """An invertible generator of images (B, 1, 1, N) from latents (B, N)."""

    class ImageFlow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = glow_flow(N, 2, 16, generator=torch.Generator().manual_seed(0)).double()

        def forward(self, x, rev=False):
            if rev:
                x, log_det = self.flow(x, rev=True)
                return x.view(-1, 1, 1, N), log_det
            return self.flow(x.flatten(1))

    return ImageFlow()


def test_starts_of_latent_gradient_descent():
    flow, image, latent = image_flow(), random(2, 1, 1, N, seed=3), random(2, 3, seed=3)
    nearly_nothing = {"data_fidelity": L2, "stepsize": 1e-12, "max_iter": 1}
    with torch.no_grad():
        zero = flow(torch.zeros(2, N, dtype=F64), rev=True)[0]
    by_name = unfolded_builder("LatentGD", {"generator": flow, "stepsize": 1e-12}, L2, max_iter=1)
    for model in (LatentGD(flow, **nearly_nothing), by_name):
        assert torch.allclose(model(Y, PHYSICS), zero, atol=1e-8)
        assert torch.allclose(model(Y, PHYSICS, init=image), image, atol=1e-8)
        assert torch.allclose(model(Y, PHYSICS, init=image[:, 0, 0]), flow(image[:, 0, 0], rev=True)[0], atol=1e-8)
        with pytest.raises(ValueError, match=r"latent \(2, 6\) or an image \(2, 1, 1, 6\); got shape \(2, 3\)"):
            model(Y, PHYSICS, init=latent)
    decoder = Decoder()
    for shape in (None, (3,)):
        model = LatentGD(decoder, latent_shape=shape, **nearly_nothing)
        assert torch.allclose(model(Y, PHYSICS, init=latent), decoder(latent), atol=1e-8)
        with pytest.raises(ValueError, match="not invertible"):
            model(Y, PHYSICS, init=image)
    assert torch.allclose(model(Y, PHYSICS), decoder(0 * latent), atol=1e-8)
    with pytest.raises(ValueError, match="expected latent_shape"):
        LatentGD(decoder, **nearly_nothing)(Y, PHYSICS)


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
