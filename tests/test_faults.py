"""What goes wrong is reported and breaks nothing else; what goes right goes the same way again."""

import contextlib
import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import deepinv as dinv
import pytest
import torch
from cases import make
from splitting_cases import Convolution, full_loss, inpainting, masks, rotations, run

from deepinv_flows import (
    NMAPG,
    CheckpointError,
    CondatVu,
    DavisYin,
    EquivariantSplittingLoss,
    FlowPrior,
    IPiano,
    LatentGD,
    LatentMAP,
    LearnedPrimalDual,
    PatchNR,
    fit_flow,
    fit_patchnr,
    image_flow,
    nmapg,
)

SIZE = (1, 8, 8)
L2, TIKHONOV = dinv.optim.L2(), dinv.optim.Tikhonov()


def patch_prior():
    return PatchNR(make("glow_silu", 9, torch.float32, spread=0.1), patch_size=3).requires_grad_(False)


def small_flow():
    return image_flow(SIZE, num_levels=2, num_steps=1, hidden=4, generator=torch.Generator()).requires_grad_(False)


def learned(max_iter, **kwargs):
    return LearnedPrimalDual(max_iter, nf=4, generator=torch.Generator(), **kwargs)


# --- NaN in the middle of a reconstruction ---


class Failing(dinv.optim.L2):
    """A data fidelity, seen through its gradient and proximity operator, that breaks down at iteration k."""

    def __init__(self, k, value=math.nan):
        super().__init__()
        self.k, self.value, self.it = k, value, None

    def _broken(self, result):
        return torch.where(torch.arange(len(result)).view(-1, *[1] * (result.ndim - 1)) == 1, self.value, result)

    def fn(self, *args, **kwargs):
        value = super().fn(*args, **kwargs)
        return self._broken(value) if self.it >= self.k else value

    def grad(self, *args, **kwargs):
        grad = super().grad(*args, **kwargs)
        return self._broken(grad) if self.it >= self.k else grad

    def prox(self, *args, **kwargs):
        prox = super().prox(*args, **kwargs)
        return self._broken(prox) if self.it >= self.k else prox


@contextlib.contextmanager
def counted(model, fidelity):
    """The fidelity knows the iteration of the model."""
    given = model.update_params_fn

    def update(it):
        fidelity.it = it
        return given(it)

    model.fixed_point.update_params_fn = update
    fidelity.it = -1
    yield


COMMON = dict(lambda_reg=0.05, stepsize=0.3, early_stop=False)
OPTIMIZERS = {
    "condat_vu": lambda f, n: CondatVu(f, TIKHONOV, max_iter=n, stepsize_dual=0.5, **COMMON),
    "davis_yin": lambda f, n: DavisYin(f, TIKHONOV, max_iter=n, **COMMON),
    "davis_yin_swapped": lambda f, n: DavisYin(f, patch_prior(), max_iter=n, g_first=True, **COMMON),
    "nmapg": lambda f, n: NMAPG(f, TIKHONOV, max_iter=n, **COMMON),
    "nmapg_swapped": lambda f, n: NMAPG(f, patch_prior(), max_iter=n, g_first=True, **COMMON),
    "nmapg_fixed": lambda f, n: NMAPG(f, TIKHONOV, max_iter=n, backtracking=False, **COMMON),
    "ipiano": lambda f, n: IPiano(f, TIKHONOV, max_iter=n, **COMMON),
    "ipiano_swapped": lambda f, n: IPiano(f, patch_prior(), max_iter=n, g_first=True, **COMMON),
    "latent_gd": lambda f, n: LatentGD(small_flow(), f, TIKHONOV, max_iter=n, **COMMON),
    "latent_gd_search": lambda f, n: LatentGD(small_flow(), f, TIKHONOV, max_iter=n, backtracking=True, **COMMON),
    "deepinv_gd": lambda f, n: dinv.optim.GD(data_fidelity=f, prior=patch_prior(), max_iter=n, **COMMON),
    "deepinv_pgd": lambda f, n: dinv.optim.PGD(data_fidelity=f, prior=patch_prior(), max_iter=n, **COMMON),
    "deepinv_pgd_swapped": lambda f, n: dinv.optim.PGD(
        data_fidelity=f, prior=patch_prior(), max_iter=n, g_first=True, **COMMON
    ),
    "deepinv_admm": lambda f, n: dinv.optim.ADMM(data_fidelity=f, prior=patch_prior(), max_iter=n, **COMMON),
    "deepinv_drs": lambda f, n: dinv.optim.DRS(data_fidelity=f, prior=patch_prior(), max_iter=n, **COMMON),
    "deepinv_hqs": lambda f, n: dinv.optim.HQS(data_fidelity=f, prior=patch_prior(), max_iter=n, **COMMON),
    "deepinv_fista": lambda f, n: dinv.optim.FISTA(data_fidelity=f, prior=patch_prior(), max_iter=n, **COMMON),
    "deepinv_gd_image_flow": lambda f, n: dinv.optim.GD(
        data_fidelity=f, prior=FlowPrior(small_flow()), max_iter=n, lambda_reg=1e-3, stepsize=0.3, early_stop=False
    ),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k", [0, 2, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_not_a_number_is_reported_with_the_iteration(name, k, value):
    fidelity = Failing(k, value)
    model = OPTIMIZERS[name](fidelity, 5)
    with counted(model, fidelity), pytest.raises(ValueError, match=rf"at iteration {k}\b"):
        model(torch.rand(2, *SIZE), dinv.physics.Denoising())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_faults_the_same_models_finish(name):
    fidelity = Failing(99)
    model = OPTIMIZERS[name](fidelity, 5)
    with counted(model, fidelity):
        assert model(torch.rand(2, *SIZE), dinv.physics.Denoising()).isfinite().all()


def test_a_diverging_network_is_reported():
    model = learned(3)
    with torch.no_grad():
        next(iter(model.params_algo["primal_blocks"][1].parameters())).fill_(math.inf)
    with pytest.raises(ValueError, match="the iterate holds NaN or infinite entries at iteration 1"):
        model(torch.rand(1, *SIZE), dinv.physics.Denoising())


class BreaksDown(dinv.physics.Denoising):
    """A physics that returns NaN for the second image from the n-th evaluation on."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def A(self, x, **kwargs):
        self.left -= 1
        x = super().A(x, **kwargs)
        return torch.cat([x[:1], x[1:] * math.nan]) if self.left < 0 else x


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", "sgd"])
def test_latent_map_reports_too(optimizer):
    y = torch.rand(2, *SIZE)
    model = LatentMAP(small_flow(), optimizer=optimizer, max_iter=30, early_stop=False)
    for evaluations in (4, 15):
        with pytest.raises(
            ValueError, match=r"images \[1\] of the batch is not finite any more at iteration \d+"
        ) as error:
            model(y, BreaksDown(evaluations))
        assert 0 < int(str(error.value).split()[-1]) <= evaluations
    assert model(y, BreaksDown(10**6)).isfinite().all()


def test_exploding_gradients_are_reported():
    class Explodes(dinv.optim.Prior):
        explicit_prior = True

        def fn(self, x, *args, **kwargs):
            return x.pow(8).flatten(1).sum(1)

    for kind in (DavisYin, CondatVu, IPiano):
        options = {"backtracking": False} if kind is IPiano else {}
        explodes = dict(prior_2=Explodes()) if kind is CondatVu else {}
        with pytest.raises(ValueError, match=r"NaN.*at iteration [0-9]"):
            fidelity = dinv.optim.L2() if kind is CondatVu else Walking()
            kind(fidelity, TIKHONOV, stepsize=1e4, max_iter=40, early_stop=False, **options, **explodes)(
                torch.full((1, *SIZE), 3.0), dinv.physics.Denoising()
            )


class Walking(dinv.optim.L2):
    def grad(self, x, y, physics, *args, **kwargs):
        return -(x**5)


def test_prox_where_the_density_is_not_finite():
    x = torch.full((1, *SIZE), 1e30)
    for prior in (patch_prior(), FlowPrior(small_flow())):
        with pytest.raises(ValueError, match="not finite where its prox begins"):
            prior.prox(x)


def test_nmapg_function_reports_and_stays_in_the_domain():
    def barrier(x):
        return (x - x.log()).sum(1)  # NaN below 0, least at 1

    start = torch.tensor([[0.01], [30.0]], dtype=torch.float64)
    torch.testing.assert_close(nmapg(barrier, start), torch.ones_like(start), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="NaN at iteration 0"):
        nmapg(barrier, -start)
    calls = []

    def breaks(x):
        calls.append(None)
        return barrier(x) * (math.nan if len(calls) > 9 else 1)

    with pytest.raises(ValueError, match=r"NaN.* at iteration [1-9]"):
        nmapg(breaks, start)


# --- killed while writing ---

KILLED = """
    import os, signal, sys, torch
    from deepinv_flows import fit_flow, fit_patchnr, image_flow

    torch.set_num_threads(1)
    save, saves = torch.save, []

    def dies_half_way(state, path):
        save(state, path)
        saves.append(path)
        if len(saves) == {n}:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dies_half_way
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = dict(epochs=60, batch_size=4, save_path={path!r}, verbose=False)
    if {patches}:
        fit_patchnr(x, x, patch_size=3, sub_net_size=8, steps_per_epoch=2, **options)
    else:
        fit_flow(image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4), x, x, **options)
"""


@pytest.mark.parametrize("patches", [True, False])
def test_killed_while_a_checkpoint_is_written(patches, tmp_path):
    code = textwrap.dedent(KILLED.format(n=12, path=str(tmp_path), patches=patches))
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == -signal.SIGKILL
    checkpoints = list(tmp_path.glob("run_0/*/*.pth.tar"))
    epochs = {path.name: torch.load(path, weights_only=False)["epoch"] for path in checkpoints}  # each is whole
    (part,) = tmp_path.glob("run_0/*/*.part")
    writing = part.name.removesuffix(".part")
    reached = max(epochs.values())
    # what was being written is of the epoch after the newest, or the second file of the same
    assert "ckp_best.pth.tar" in epochs and (
        writing in ("ckp_best.pth.tar", f"ckp_{reached + 1}.pth.tar", f"ckp_{reached}.pth.tar")
    )
    assert reached >= 4
    numbers = [int(name[4:].split(".")[0]) for name in epochs if name != "ckp_best.pth.tar"]
    assert patches or all(number % 3 == 0 or number == max(numbers) for number in numbers)
    x = torch.rand(8, *SIZE, generator=torch.Generator().manual_seed(0))
    options = dict(epochs=reached + 2, batch_size=4, save_path=tmp_path, resume=True, verbose=False)
    if patches:
        fit_patchnr(x, x, patch_size=3, sub_net_size=8, steps_per_epoch=2, **options)
    else:
        fit_flow(image_flow(SIZE, num_levels=2, num_steps=1, hidden=4), x, x, **options)
    assert [path.name for path in tmp_path.glob("run_1/*/ckp_[0-9]*")] == [f"ckp_{reached + 1}.pth.tar"]


@pytest.mark.parametrize("kind, raised", [(KeyboardInterrupt, KeyboardInterrupt), (OSError, CheckpointError)])
def test_an_interrupted_save_leaves_the_good_file(kind, raised, tmp_path, monkeypatch):
    def half(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise kind("while writing")

    for first, second in [(patch_prior(), patch_prior()), (FlowPrior(small_flow()), FlowPrior(small_flow()))]:
        path = tmp_path / "weights.safetensors"
        first.save(path)
        good = path.read_bytes()
        with monkeypatch.context() as patch, pytest.raises(raised):
            patch.setattr(Path, "write_bytes", half)
            second.save(path)
        assert path.read_bytes() == good and os.listdir(tmp_path) == [path.name]


# --- soak ---


def resident() -> float:
    """MB"""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def grows(work, n=300, warm=30) -> tuple[int, float]:
    """Tensors and MB that n calls leave behind."""
    for _ in range(warm):
        work()
    before, memory = tensors(), resident()
    for _ in range(n):
        work()
    return tensors() - before, resident() - memory


def reconstructions():
    y, physics = torch.rand(1, *SIZE), dinv.physics.Denoising()
    common = dict(data_fidelity=L2, max_iter=2, lambda_reg=0.05, stepsize=0.3)
    prior, flow = patch_prior(), small_flow()
    models = [
        dinv.optim.GD(prior=prior, **common),
        dinv.optim.PGD(prior=prior, **common),
        NMAPG(prior=prior, g_first=True, **common),
        LatentMAP(flow, max_iter=2),
        LatentGD(flow, prior=TIKHONOV, **common),
    ]
    turns = iter(range(10**6))
    return lambda: models[next(turns) % len(models)](y, physics)


def adaptations():
    y, physics, loss = torch.rand(1, *SIZE), inpainting(size=SIZE), full_loss()
    loss = EquivariantSplittingLoss(mask_generator=masks(SIZE), transform=rotations())

    def work():
        model = loss.adapt_model(Convolution())
        run(loss, model, y, physics).mean().backward()

    return work


@pytest.mark.parametrize("make", [reconstructions, adaptations])
def test_three_hundred_in_a_row_leave_nothing_behind(make):
    left, memory = grows(make())
    assert left <= 0 and memory < 8


# --- the same again, bit for bit ---


def train_patches():
    x = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    prior = fit_patchnr(x, x, patch_size=3, sub_net_size=8, epochs=2, steps_per_epoch=4, batch_size=64, verbose=False)
    return torch.cat([p.detach().flatten() for p in prior.parameters() if p.requires_grad])


def train_images():
    x = torch.rand(16, *SIZE, generator=torch.Generator().manual_seed(1))
    flow = image_flow(SIZE, num_levels=2, num_steps=1, hidden=4, generator=torch.Generator().manual_seed(2))
    fit_flow(flow, x, x, epochs=2, batch_size=4, verbose=False)
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


def reconstruct():
    y = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    prior = PatchNR(make("glow_silu", 9, torch.float32), patch_size=3, n_patches=400).requires_grad_(False)
    common = dict(data_fidelity=L2, prior=prior, lambda_reg=0.1, stepsize=0.3, max_iter=4)
    models = dinv.optim.GD(**common), NMAPG(g_first=True, **common), dinv.optim.PGD(**common)
    return torch.stack([model(y, dinv.physics.Denoising()) for model in models])


def split():
    loss = EquivariantSplittingLoss(mask_generator=masks(rng=torch.Generator().manual_seed(4)), transform=None)
    model = loss.adapt_model(Convolution())
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(torch.rand(p.shape, generator=torch.Generator().manual_seed(k)))
    value = run(loss, model, torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)), inpainting())
    value.mean().backward()
    return torch.cat([value.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])


def latent(optimizer):
    y = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1))
    flow = make_image_flow()
    return LatentMAP(flow, init="random", optimizer=optimizer, max_iter=10)(
        y, dinv.physics.Inpainting(SIZE, mask=torch.ones(SIZE).tril())
    )


def make_image_flow():
    flow = small_flow()
    for k, p in enumerate(flow.parameters()):
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    return flow


REPEATED = {
    "fit_patchnr": train_patches,
    "fit_flow": train_images,
    "reconstruction": reconstruct,
    "splitting": split,
    "latent_lbfgs": lambda: latent("lbfgs"),
    "latent_adam": lambda: latent("adam"),
}


# the patches are shared out to threads
@pytest.mark.parametrize("name, threads", [*((name, 1) for name in REPEATED), ("reconstruction", 2)])
def test_same_seed_same_bits(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(5)
        first = REPEATED[name]()
        torch.manual_seed(6)  # nor does the global stream matter
        torch.rand(3)
        again = REPEATED[name]()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, again)
