"""Problems with known answers, and each of our algorithms as class, by instance and by name, for the tests of the iterators."""

import copy

import deepinv as dinv
import torch
from deepinv.models import PDNet_DualBlock, PDNet_PrimalBlock

from deepinv_flows import (
    NMAPG,
    CondatVu,
    CondatVuIteration,
    DavisYin,
    DavisYinIteration,
    IPiano,
    IPianoIteration,
    LatentGD,
    LatentGDIteration,
    NMAPGIteration,
    registered,
    unfolded_builder,
)

F64 = torch.float64


N = 6


class Weighted(dinv.optim.Prior):
    """Half a weighted sum of squared distances to the level ``g_param``, with a learnable weight."""

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
    """Half the squared distance to y, as a prior."""

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


def iterates(model, y, physics, n, **kwargs):
    """The first n estimates."""
    found = []
    model.max_iter = model.fixed_point.max_iter = n
    keep = model.fixed_point.update_metrics_fn
    model.fixed_point.update_metrics_fn = lambda metrics, X_prev, X, **kw: found.append(X["est"][0]) or metrics
    model(y, physics, compute_metrics=True, **kwargs)
    model.fixed_point.update_metrics_fn = keep
    return torch.stack(found)


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
