"""PatchNR as a deepinv prior: deepinv's optimizers and samplers, deepinv's defects, errors at the boundary."""

import copy
import pickle

import deepinv as dinv
import FrEIA.modules as Fm
import pytest
import torch
from cases import ANY, central_difference, make, mlp

from deepinv_flows import PatchNR, glow_flow


@pytest.fixture
def prior():
    """A smooth flow on 3x3 patches with moderate weights."""
    return PatchNR(make("glow_silu", 9, torch.float32, spread=0.1), patch_size=3)


@pytest.fixture
def problem():
    x = torch.rand(2, 1, 12, 9)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.05, rng=torch.Generator().manual_seed(0)))
    return x, physics, physics(x)


def theirs_and_ours(patch_size=3, channels=1):
    theirs = dinv.optim.PatchNR(patch_size=patch_size, channels=channels, num_layers=2, sub_net_size=16)
    ours = PatchNR(patch_size=patch_size, channels=channels, num_layers=2, sub_net_size=16)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# --- the same numbers ---


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_as_deepinv(channels):
    theirs, ours = theirs_and_ours(channels=channels)
    for x in (torch.randn(2, 7, 9 * channels), torch.randn(2, 7, channels, 3, 3)):
        torch.testing.assert_close(ours(x), theirs(x))
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(ours.grad(x), torch.autograd.grad(theirs(leaf).sum(), leaf)[0])


def test_same_seed_same_weights():
    torch.manual_seed(5)
    theirs = dinv.optim.PatchNR(patch_size=3, channels=3)
    torch.manual_seed(5)
    ours = PatchNR(patch_size=3, channels=3)
    x = torch.randn(1, 4, 27)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", [False, True])
def test_image_is_patchprior_of_deepinv(pad):
    theirs, ours = theirs_and_ours()
    x = torch.rand(2, 1, 10, 8)
    expected = dinv.optim.PatchPrior(theirs, patch_size=3, pad=pad)(x)
    torch.testing.assert_close(PatchNR(ours.normalizing_flow, patch_size=3, pad=pad)(x), expected)
    torch.testing.assert_close(dinv.optim.PatchPrior(ours, patch_size=3, pad=pad)(x), expected)


def test_deepinvs_own_test():
    """``test_patch_priors`` of deepinv/tests/test_optim.py, for our class."""
    x = torch.rand(2, 1, 12, 12)
    patchnr = PatchNR(channels=x.shape[1], device="cpu")
    image_prior = dinv.optim.PatchPrior(patchnr, n_patches=-1)
    x_noisy = x + 0.1 * torch.randn_like(x)
    image = x_noisy.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([image], lr=0.01)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = 10 * ((image - x_noisy) ** 2).sum() + image_prior(image).sum()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]


# --- deepinv's optimizers ---

ALGORITHMS = {
    "GD": (dinv.optim.GD, {"stepsize": 0.05}),
    "PGD": (dinv.optim.PGD, {"stepsize": 0.5}),
    "FISTA": (dinv.optim.FISTA, {"stepsize": 0.5}),
    "HQS": (dinv.optim.HQS, {"stepsize": 0.5}),
    "ADMM": (dinv.optim.ADMM, {"stepsize": 0.5}),
    "DRS": (dinv.optim.DRS, {"stepsize": 0.5}),
    "PDCP": (dinv.optim.PDCP, {"stepsize": 0.5, "stepsize_dual": 0.5}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_classes_lower_a_finite_cost(name, prior, problem):
    x, physics, y = problem
    algorithm, steps = ALGORITHMS[name]
    model = algorithm(
        data_fidelity=dinv.optim.L2(), prior=prior, lambda_reg=0.02, max_iter=40, early_stop=False, **steps
    )
    x_net, metrics = model(y, physics, x_gt=x, compute_metrics=True)
    assert x_net.shape == x.shape and x_net.isfinite().all() and not x_net.requires_grad
    for cost in metrics["cost"]:
        assert torch.tensor(cost).isfinite().all() and cost[-1] < cost[0]
    with torch.no_grad():
        objective = [0.5 * ((u - y) ** 2).flatten(1).sum(1) + 0.02 * prior(u) for u in (y, x_net)]
    assert (objective[1] < objective[0]).all()


@pytest.mark.parametrize("name", ["GD", "PGD", "HQS", "ADMM", "DRS"])
def test_optim_builder(name, prior, problem):
    _, physics, y = problem
    params = {"lambda": 0.02, "g_param": 0.05, **ALGORITHMS[name][1]}
    model = dinv.optim.optim_builder(
        name, data_fidelity=dinv.optim.L2(), prior=prior, params_algo=params, max_iter=20, early_stop=False
    )
    _, metrics = model(y, physics, compute_metrics=True)
    assert all(cost[-1] < cost[0] for cost in metrics["cost"])


@pytest.mark.parametrize("name", ["GD", "PGD", "HQS", "ADMM", "DRS"])
def test_unfolded_gradients_against_finite_differences(name, problem):
    prior = PatchNR(make("glow_silu", 9, spread=0.1), patch_size=3, chunk_size=50)
    x, physics, y = (t.double() if torch.is_tensor(t) else t for t in problem)
    kwargs = {k: [v] * 2 for k, v in ALGORITHMS[name][1].items()}
    model = ALGORITHMS[name][0](
        data_fidelity=dinv.optim.L2(),
        prior=prior,
        lambda_reg=[0.1] * 2,
        max_iter=2,
        unfold=True,
        trainable_params=["lambda_reg", "stepsize"],
        **kwargs,
    ).double()
    unwrapped = prior.prox
    prior.prox = lambda *args, **kwargs: unwrapped(*args, **kwargs, tol_inter=1e-13, max_iter_inter=300)

    def loss():
        return ((model(y, physics) - x) ** 2).sum()

    variables = [*model.params_algo["lambda"], *model.params_algo["stepsize"]]
    variables += [p for p in prior.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), variables)
    for variable, gradient in zip(variables, gradients):
        direction = torch.randn_like(variable)
        difference = central_difference(loss, variable, direction)
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("jacobian_free", [True, False])
@pytest.mark.parametrize("name", ["GD", "PGD", "HQS"])
def test_deq_trains(name, jacobian_free, prior, problem):
    x, physics, y = problem
    model = ALGORITHMS[name][0](
        data_fidelity=dinv.optim.L2(),
        prior=prior,
        lambda_reg=0.05,
        max_iter=20,
        unfold=True,
        DEQ=dinv.optim.DEQConfig(jacobian_free=jacobian_free),
        trainable_params=["lambda_reg"],
        **ALGORITHMS[name][1],
    )
    loss = ((model(y, physics) - x) ** 2).sum()
    loss.backward()
    assert model.params_algo["lambda"][0].grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters() if p.requires_grad)


def test_langevin_of_a_gaussian_posterior(problem):
    """The prior is a known Gaussian, so that the posterior mean and variance are known."""
    _, _, y = problem
    flow = glow_flow(2, 1, 4)
    with torch.no_grad():
        for p in flow.parameters():
            if p.requires_grad:
                p.zero_()
    # one pixel a patch and channel: g is the mean over pixels of |x|^2 / 2
    prior = PatchNR(flow, patch_size=1, channels=2)
    y = torch.full((1, 2, 12, 12), 0.8)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.5))
    sampler = dinv.sampling.sampling_builder(
        "ULA",
        data_fidelity=dinv.optim.L2(sigma=0.5),
        prior=prior,
        params_algo={"step_size": 0.01, "alpha": 144.0, "sigma": 0.0},
        max_iter=2000,
        burnin_ratio=0.1,
        thinning=2,
        clip=(-20.0, 20.0),
    )
    mean, var = sampler.sample(y, physics, seed=0)
    # precision 1/0.25 + 1 = 5
    assert abs(mean.mean() - 0.8 * 4 / 5) < 0.03
    assert abs(var.mean() - 1 / 5) < 0.03


# --- what deepinv 0.5.0 gets wrong ---


def test_image_is_never_misread():
    theirs, ours = theirs_and_ours()
    image = torch.rand(2, 1, 20, 20)
    with pytest.raises(RuntimeError):
        theirs(image)
    assert ours(image).shape == (2,)
    small = torch.rand(2, 1, 3, 3)
    assert theirs(small).shape == (2, 1)  # read as one patch
    assert ours(small).shape == (2,)


def test_is_explicit():
    theirs, ours = theirs_and_ours()
    assert not theirs.explicit_prior
    assert ours.explicit_prior


def test_non_contiguous_patches_and_images():
    theirs, ours = theirs_and_ours()
    patches = torch.rand(9, 5, 2).permute(2, 1, 0)
    with pytest.raises(RuntimeError, match="view"):
        theirs(patches)
    assert torch.equal(ours(patches), ours(patches.contiguous()))
    image = torch.rand(2, 9, 8, 1).permute(0, 3, 2, 1)
    assert torch.equal(ours(image), ours(image.contiguous()))
    assert torch.equal(ours.grad(image), ours.grad(image.contiguous()))


@pytest.mark.parametrize("options", [{}, {"n_patches": 4}], ids=str)
def test_the_users_random_stream_stands_still(options):
    theirs, ours = theirs_and_ours()
    x = torch.rand(1, 1, 8, 8)
    state = torch.get_rng_state()
    dinv.optim.PatchPrior(theirs, patch_size=3)(x)
    assert not torch.equal(state, torch.get_rng_state())
    state = torch.get_rng_state()
    ours = PatchNR(ours.normalizing_flow, patch_size=3, **options)
    ours(x), ours.grad(x), ours.prox(x), ours.sample(3)
    assert torch.equal(state, torch.get_rng_state())


def test_prox_does_not_diverge():
    theirs, ours = (p.double() for p in theirs_and_ours())
    with torch.no_grad():
        for a, b in zip(theirs.parameters(), (p for p in ours.parameters() if p.requires_grad)):
            a.mul_(4), b.mul_(4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    bad = dinv.optim.PatchPrior(theirs, patch_size=3).prox(x, gamma=100.0).detach()
    good = ours.prox(x, gamma=100.0).detach()

    def objective(u):
        return float((100.0 * ours(u) + 0.5 * ((u - x) ** 2).sum()).detach())

    assert bad.isnan().any()
    assert objective(good) < objective(x)


def test_grad_leaves_its_argument_and_keeps_no_graph():
    theirs, ours = theirs_and_ours()
    x = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        graph = dinv.optim.PatchPrior(theirs, patch_size=3).grad(x)
    assert x.requires_grad and graph.requires_grad
    x = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        plain = ours.grad(x)
    assert not x.requires_grad and not plain.requires_grad
    ours.requires_grad_(False)
    assert not ours.grad(x).requires_grad
    assert ours.grad(x.requires_grad_()).requires_grad


def test_nan_is_refused():
    theirs, ours = theirs_and_ours()
    patches = torch.full((1, 2, 9), float("nan"))
    assert theirs(patches).isnan().all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        ours(patches)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of entries of the largest floating-point tensor that an operation returns (buffers are views of bytes)."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_is_bounded(frozen):
    theirs, ours = theirs_and_ours()
    ours.chunk_size = 256
    if frozen:
        ours.requires_grad_(False)
    x = torch.rand(1, 1, 64, 64)
    ours(x.clone().requires_grad_()).sum().backward()  # makes the buffers, which are kept
    with LargestTensor() as seen:
        ours(x.clone().requires_grad_()).sum().backward()
    assert seen.entries <= 256 * 17  # a hidden layer of one chunk with its row of ones
    with LargestTensor() as seen:
        dinv.optim.PatchPrior(theirs, patch_size=3)(x.clone().requires_grad_()).sum().backward()
    assert seen.entries >= 62 * 62 * 16  # a hidden layer of all patches


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_is_named(device):
    if device == "cpu":
        assert PatchNR(patch_size=3, device=device)(torch.rand(1, 1, 5, 5)).device.type == "cpu"
    else:
        with pytest.raises(ValueError, match="expected a tensor on cpu, as the flow's weights; got one on meta"):
            PatchNR(patch_size=3)(torch.rand(1, 1, 5, 5, device=device))


# --- errors at the boundary ---

BAD_INPUTS = {
    "channels": (
        torch.rand(1, 1, 64, 64),
        ValueError,
        r"expected 3 channels \(patch dimension 27\); got image of shape \(1, 1, 64, 64\). Patches .* \(B, n, 3, 3, 3\)",
    ),
    "too small": (torch.rand(1, 3, 2, 9), ValueError, r"at least 3 x 3 pixels.*got shape \(1, 3, 2, 9\)"),
    "patch dimension": (torch.rand(1, 5, 26), ValueError, r"expected patches \(B, n, 27\).*got shape \(1, 5, 26\)"),
    "patch shape": (torch.rand(1, 5, 3, 3, 4), ValueError, r"\(B, n, 3, 3, 3\); got shape \(1, 5, 3, 3, 4\)"),
    "dimensions": (torch.rand(3, 9), ValueError, r"expected images \(B, 3, H, W\).*got shape \(3, 9\)"),
    "integers": (torch.ones(1, 3, 9, 9, dtype=torch.uint8), TypeError, "real floating-point tensor; got torch.uint8"),
    "complex": (torch.ones(1, 3, 9, 9, dtype=torch.complex64), TypeError, "got torch.complex64"),
    "float64": (torch.rand(1, 3, 9, 9, dtype=torch.float64), TypeError, r"expected dtype torch.float32.*torch.float64"),
    "nan": (torch.full((1, 3, 9, 9), float("nan")), ValueError, r"\(1, 3, 9, 9\) holds NaN"),
    "inf": (torch.full((1, 3, 9, 9), float("inf")), ValueError, "infinite"),
    "empty batch": (torch.rand(0, 3, 9, 9), ValueError, r"non-empty batch; got shape \(0, 3, 9, 9\)"),
    "no tensor": ([1.0], TypeError, "expected a tensor; got list"),
}


@pytest.mark.parametrize("method", ["fn", "grad", "prox"])
@pytest.mark.parametrize("fault", BAD_INPUTS)
def test_bad_inputs(fault, method):
    x, error, message = BAD_INPUTS[fault]
    with pytest.raises(error, match=message):
        getattr(PatchNR(patch_size=3, channels=3, num_layers=1), method)(x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_patches": 0}, "expected n_patches to be an integer >= 1; got 0"),
        ({"n_patches": -2}, "n_patches"),
        ({"subset": "random"}, "expected subset to be one of 'uniform', 'grid'; got 'random'"),
        ({"precision": "float16"}, "expected precision to be one of None, 'bfloat16'; got 'float16'"),
        ({"patch_size": 0}, "expected patch_size to be an integer >= 1; got 0"),
        ({"channels": 1.5}, "expected channels to be an integer >= 1; got 1.5"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"stride": 7}, "expected stride <= patch_size = 6, so that every pixel is in a patch; got 7"),
        (
            {"pad": "mirror"},
            "expected pad to be one of False, True, 'constant', 'reflect', 'replicate', 'circular'; got 'mirror'",
        ),
        ({"patch_size": 1}, "expected dim >= 2; got 1"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PatchNR(**options)


def test_flow_of_another_dimension():
    with pytest.raises(
        ValueError, match=r"flow on patches of dimension 27 \(patch_size 3, channels 3\); the one given"
    ):
        PatchNR(glow_flow(36), patch_size=3, channels=3)


def test_inference_mode_is_named():
    prior = PatchNR(patch_size=3, num_layers=1)
    with torch.inference_mode():
        x = torch.rand(1, 1, 6, 6)
        assert prior(x).isfinite().all()
        for method in (prior.grad, prior.prox):
            with pytest.raises(RuntimeError, match="use torch.no_grad"):
                method(x)


def test_flows_that_initialise_themselves_are_not_touched_by_the_constructor():
    flow = make("freia_sequence", 9, torch.float32)
    flow.append(Fm.ActNorm)
    prior = PatchNR(flow, patch_size=3)
    patches = torch.randn(1, 50, 9)
    assert prior(patches).isfinite().all()


def test_dropout_gradients_are_those_of_the_value():
    """A chunk is recomputed with the random numbers of its first evaluation."""
    flow = glow_flow(9, 1, 16).double()
    for block in (flow[1].subnet1, flow[1].subnet2):
        block.append(torch.nn.Dropout(0.5))
    x = torch.rand(1, 1, 9, 9, dtype=torch.float64)
    prior = PatchNR(flow, patch_size=3, chunk_size=10)
    weight = next(p for p in prior.parameters() if p.requires_grad)
    direction = torch.randn_like(weight)

    def value():
        torch.manual_seed(4)
        return prior(x).sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    difference = central_difference(value, weight, direction, step=1e-6)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-7)


# --- options ---


@pytest.mark.parametrize("name", ANY)
def test_any_flow(name):
    prior = PatchNR(make(name, 9), patch_size=3)
    x = torch.rand(2, 1, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        assert prior(x).isfinite().all() and prior.grad(x).isfinite().all()
    patches = prior.sample(4)
    assert patches.shape == (4, 1, 3, 3) and patches.isfinite().all()


def test_bare_freia_block():
    block = Fm.GLOWCouplingBlock([(9,)], subnet_constructor=mlp)
    with pytest.raises((IndexError, AttributeError)):
        dinv.optim.PatchNR(block, patch_size=3)(torch.rand(1, 2, 9))
    assert PatchNR(block, patch_size=3)(torch.rand(1, 2, 9)).shape == (1, 2)


@pytest.mark.parametrize("options", [{}, {"n_patches": 5}, {"pad": True, "stride": 2}], ids=str)
def test_copies(options):
    prior = PatchNR(patch_size=3, num_layers=1, **options)
    x = torch.rand(1, 1, 9, 9)
    prior(x)
    twins = copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))
    expected = prior(x)
    for twin in twins:
        assert torch.equal(twin(x), expected)


def test_samples_follow_the_flow():
    """Latents of samples are standard normal, and a generator makes them reproducible."""
    prior = PatchNR(make("glow_permuted", 9), patch_size=3)
    patches = prior.sample(4000, generator=torch.Generator().manual_seed(3))
    z, _ = prior.normalizing_flow(patches.flatten(1))
    assert z.mean(0).abs().max() < 4 / 4000**0.5
    assert (z.var(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5
    assert torch.equal(patches, prior.sample(4000, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(prior.sample(2), prior.sample(2))


def test_batch_is_its_images():
    prior = PatchNR(patch_size=3, channels=2, num_layers=2, sub_net_size=16, chunk_size=20)
    x = torch.rand(3, 2, 6, 11)
    torch.testing.assert_close(prior(x), torch.cat([prior(image[None]) for image in x]))
    torch.testing.assert_close(prior.grad(x), torch.cat([prior.grad(image[None]) for image in x]))


def test_float64_and_autocast():
    prior = PatchNR(patch_size=3, num_layers=2)
    x = torch.rand(1, 1, 20, 20)
    exact = copy.deepcopy(prior).double()(x.double())
    torch.testing.assert_close(prior(x).double(), exact, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(prior).bfloat16()(x.bfloat16())
    torch.testing.assert_close(half.double(), exact, rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prior(x).double(), exact, rtol=1e-2, atol=1e-2)


def test_deepinvs_keywords_are_accepted(prior, problem):
    _, _, y = problem
    assert torch.equal(prior(y, 0.05, reduce=False), prior(y))
    assert torch.equal(prior.grad(y, 0.05), prior.grad(y))
    assert torch.equal(prior.prox(y, 0.05, gamma=0.3), prior.prox(y, gamma=0.3))
