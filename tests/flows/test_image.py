"""Image flows: the contract, initialisation, conditions, behaviour far from the data, and training."""

import copy
import math
import pickle
import warnings

import pytest
import torch

from deepinv_flows import BitsPerDim, FlowDenoiser, FlowModel, FlowPrior, build_flow, fit_flow, image_flow
from deepinv_flows.flows import Given, nll

SIZES = dict(num_levels=2, num_steps=2, hidden=8, activation="silu")
FLOWS = {
    "allinone": lambda size, **k: image_flow(size, **SIZES, **k),
    "glow": lambda size, **k: image_flow(size, **SIZES, coupling="glow", **k),
    "checkerboard": lambda size, **k: image_flow(size, **SIZES, squeeze="checkerboard", **k),
    "one level": lambda size, **k: image_flow(size, **{**SIZES, "num_levels": 1}, **k),
}


def make(name, size=(1, 4, 8), dtype=torch.float64, spread=0.1, **options):
    """A flow with such large weights that none of its terms is negligible."""
    flow = FLOWS[name](size, **options).to(dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(spread * torch.randn_like(p))
    return flow


def smooth_images(n, size=(3, 16, 16)):
    return torch.nn.functional.avg_pool2d(torch.rand(n, size[0], size[1] + 4, size[2] + 4), 5, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FLOWS)
def test_inverse_and_log_det(name, channels):
    flow = make(name, (channels, 4, 8))
    x = torch.randn(3, channels, 4, 8, dtype=torch.float64)
    z, log_det = flow(x)
    back, log_det_back = flow(z, rev=True)
    assert z.shape == x.shape and log_det.shape == (3,)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-10, atol=1e-10)
    for x_i, log_det_i in zip(x, log_det):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x_i).view(x_i.numel(), -1)
        torch.testing.assert_close(log_det_i, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FLOWS)
def test_copies_and_pickles_after_a_forward_pass(name, dtype):
    flow, x = make(name, dtype=dtype), torch.randn(2, 1, 4, 8, dtype=dtype)
    flow.initialise(x)
    z, log_det = flow(x)
    (z.sum() + log_det.sum()).backward()
    rebuilt = build_flow(flow.config).to(dtype)
    rebuilt.load_state_dict(flow.state_dict())
    assert bool(rebuilt.initialised)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), rebuilt):
        assert all(torch.equal(a, b) for a, b in zip(other(x), (z, log_det)))


def test_a_new_flow_is_linear():
    flow = image_flow((3, 8, 8), **SIZES).double()
    x, y = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(flow(x + 2 * y)[0], flow(x)[0] + 2 * flow(y)[0])


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_initialisation_standardises_every_channel(name, conditional):
    flow = make(name, (3, 16, 16), spread=0.05, dims_c=[(1, 16, 16)] if conditional else [])
    x = 5 + 0.01 * torch.randn(64, 3, 16, 16, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    c = [x[:, :1]] if conditional else None
    seen = []
    for level in flow.levels:
        for block in level:
            if hasattr(block, "initialise"):
                block.register_forward_hook(lambda module, args, out: seen.append(out[0][0]))
    flow.initialise(x, c)
    seen.clear()
    flow(x, c)
    assert len(seen) == len([b for level in flow.levels for b in level if hasattr(b, "initialise")])
    for out in seen:
        var, mean = torch.var_mean(out, dim=(0, 2, 3))
        assert mean.abs().max() < 2e-2  # exactly 0 before the rotation; glow's affine maps exactly
        # up to the thousandth by which every direction is taken to vary, next to details that vary little more
        torch.testing.assert_close(var.mean(), torch.ones(()).double(), rtol=3e-3, atol=0)


def test_initialisation_of_constant_images_is_finite():
    flow = image_flow((1, 8, 8), **SIZES)
    flow.initialise(torch.full((4, 1, 8, 8), 0.5))
    assert all(bool(p.isfinite().all()) for p in flow.parameters())


@pytest.mark.filterwarnings("ignore:level")
@pytest.mark.parametrize(
    "levels, size", [(1, (3, 8, 8)), (2, (1, 8, 8)), (3, (3, 8, 8)), (4, (1, 16, 16)), (5, (1, 32, 32))]
)
@pytest.mark.parametrize("coupling", ["allinone", "glow"])
def test_initialisation_by_any_number_of_images(coupling, levels, size):
    """The initialised flow gives unseen images a higher likelihood than a new one does, and it is invertible."""
    held_out = smooth_images(20, size)

    def new():
        return image_flow(size, levels, 1, 4, coupling, generator=torch.Generator().manual_seed(0))

    none = nll(new(), held_out).mean()
    for n in (1, 2, 12, 40, 300):
        flow = new()
        flow.initialise(smooth_images(n, size))
        z, log_det = flow(held_out)
        assert z.isfinite().all() and log_det.isfinite().all()
        assert (flow(z, rev=True)[0] - held_out).abs().max() < 1e-5
        assert nll(flow, held_out).mean() < none - 1.5 * math.prod(size)


def test_initialisation_with_few_images_for_a_level_warns():
    flow = image_flow((3, 8, 8), 3, 1, 4)
    with pytest.warns(
        UserWarning, match="level 2 has 24 channels of 2 x 2 pixels, and 40 images are few to set its scales"
    ):
        flow.initialise(smooth_images(40, (3, 8, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.initialise(smooth_images(480, (3, 8, 8)))
    with pytest.raises(ValueError, match="at least one image to initialise a flow with; got none"):
        flow.initialise(torch.rand(0, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:level")
@pytest.mark.parametrize("coupling", ["allinone", "glow"])
@pytest.mark.parametrize("levels", [1, 3])
def test_initialisation_by_images_that_do_not_vary_in_some_directions(coupling, levels):
    """A black channel, and grey images in colour: unseen images that do vary there keep finite likelihoods and an inverse."""
    unseen = smooth_images(4, (3, 8, 8))
    grey = smooth_images(300, (1, 8, 8)).expand(-1, 3, -1, -1)
    black = smooth_images(300, (3, 8, 8)) * torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1)
    for images in (grey, black):
        flow = image_flow((3, 8, 8), levels, 8, 16, coupling, generator=torch.Generator().manual_seed(0))
        flow.initialise(images)
        z, log_det = flow(images)
        assert z.square().mean() < 2 and (flow(z, rev=True)[0] - images).abs().max() < 1e-4
        seen = images[:4] + 0.01 * torch.randn(4, 3, 8, 8)
        for x, bound in ((seen, 1e5), (unseen, 1e7)):  # a thousand deviations, squared
            z, log_det = flow(x)
            assert (0.5 * z.square().flatten(1).mean(1) - log_det / x[0].numel()).max() < bound
            assert (flow(z, rev=True)[0] - x).abs().max() < 1e-3


def test_initialisation_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="expected finite images to initialise a flow with"):
        image_flow((1, 8, 8), **SIZES).initialise(torch.full((2, 1, 8, 8), torch.nan))


@pytest.mark.filterwarnings("ignore:level")
@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
def test_initialisation_in_any_unit(unit):
    x, held_out = smooth_images(20, (1, 8, 8)), smooth_images(5, (1, 8, 8))
    flows = [image_flow((1, 8, 8), 2, 1, 4, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for flow, scale in zip(flows, (1.0, unit)):
        flow.initialise(scale * x)
    torch.testing.assert_close(flows[1](unit * held_out)[0], flows[0](held_out)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FLOWS)
def test_levels_of_latents(name):
    flow, x = make(name, (3, 8, 16)), torch.rand(2, 3, 8, 16, dtype=torch.float64)
    z, _ = flow(x)
    levels = flow.to_levels(z)
    expected = [(2, 12, 4, 8)] if name == "one level" else [(2, 6, 4, 8), (2, 24, 2, 4)]
    assert [level.shape for level in levels] == expected
    assert torch.equal(flow.from_levels(levels), z)
    mixed = flow.from_levels([level.flip(0) for level in levels[:1]] + levels[1:])
    assert flow(mixed, rev=True)[0].isfinite().all()
    with pytest.raises(ValueError, match=rf"expected latents of {len(levels)} levels, N x .*; got"):
        flow.from_levels([levels[0], levels[0]])


@pytest.mark.parametrize("name", ["allinone", "glow"])
def test_given_conditions_it_is_a_flow(name):
    flow = make(name, (1, 4, 8), dims_c=[(2, 4, 8)])
    x, c = torch.randn(3, 1, 4, 8, dtype=torch.float64), torch.randn(1, 2, 4, 8, dtype=torch.float64)
    given = Given(flow, c)
    z, log_det = given(x)
    for expected in (flow(x, c=c.expand(3, -1, -1, -1)), flow(x, c=[c.expand(3, -1, -1, -1)])):
        assert all(torch.equal(a, b) for a, b in zip((z, log_det), expected))
    torch.testing.assert_close(given(z, rev=True)[0], x)
    torch.testing.assert_close(nll(given, x), nll(flow, x, c=c.expand(3, -1, -1, -1)))
    assert given.img_size == (1, 4, 8) and not any(key.startswith("c0") for key in given.state_dict())
    with pytest.raises(TypeError, match="flow that takes conditions c; Linear does not"):
        Given(torch.nn.Linear(2, 2), c)
    with pytest.raises(TypeError, match=r"condition of torch.float64, as the flow's weights; got torch.float32"):
        flow(x, c=c.float().expand(3, -1, -1, -1))


@pytest.mark.parametrize("name", ["allinone", "glow"])
def test_conditions(name):
    flow = make(name, (1, 4, 8), dims_c=[(2, 4, 8), (1, 4, 8)])
    x = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    c = [torch.randn(2, 2, 4, 8, dtype=torch.float64), torch.randn(2, 1, 4, 8, dtype=torch.float64)]
    z, log_det = flow(x, c=c)
    torch.testing.assert_close(flow(z, c=c, rev=True)[0], x)
    for k in (0, 1):
        other = [part + (i == k) for i, part in enumerate(c)]
        assert not torch.allclose(flow(x, c=other)[0], z)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, c=c)[0][0], x)[..., 0, :, :, :].reshape(32, 32)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet)
    with pytest.raises(ValueError, match="expected 2 conditions"):
        flow(x)
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(2, 2, 4, 8\); got \(1, 2, 4, 8\)"):
        flow(x, c=[c[0][:1], c[1]])


@pytest.mark.parametrize("name", FLOWS)
def test_memory_efficient_gradients_are_the_same(name):
    flow = make(name, (1, 8, 8), dtype=torch.float32, spread=0.1)
    z = torch.randn(2, 1, 8, 8, requires_grad=True)
    grads = []
    for flow.memory_efficient in (False, True):
        x, log_det = flow(z, rev=True)
        loss = (x**2).sum() + (x[..., 1:] * x[..., :-1]).sum() + log_det.sum()
        grads.append(torch.autograd.grad(loss, [z, *flow.parameters()]))
    for plain, rebuilt in zip(*grads):
        torch.testing.assert_close(rebuilt, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["allinone", "glow"])
def test_after_training(name, tmp_path):
    """The trained flow fits better and is invertible up to rounding, and latents ten times too long give finite images."""
    x, held_out = smooth_images(128), smooth_images(32)
    flow = FLOWS[name]((3, 16, 16), generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    fit_flow(flow, x, held_out, epochs=8, batch_size=8, save_path=tmp_path, verbose=False)
    assert torch.equal(state, torch.get_rng_state())
    bits = BitsPerDim()(FlowModel(flow)(held_out), held_out).mean()
    start = FLOWS[name]((3, 16, 16), generator=torch.Generator().manual_seed(0))
    start.initialise(x)
    assert bits < BitsPerDim()(FlowModel(start)(held_out), held_out).mean() - 0.05
    z, _ = flow(held_out)
    assert 0.8 < z.std() < 1.2
    assert (flow(z, rev=True)[0] - held_out).abs().max() < 1e-4
    for factor in (1, 3, 10):
        assert bool(flow(factor * torch.randn(16, 3, 16, 16), rev=True)[0].isfinite().all())
        assert bool(flow(factor * torch.randn(16, 3, 16, 16))[0].isfinite().all())
    precise = copy.deepcopy(flow).double()
    wide = held_out.double()
    assert (precise(precise(wide)[0], rev=True)[0] - wide).abs().max() < 1e-10


def test_training_resumes(tmp_path):
    x, options = smooth_images(32, (1, 8, 8)), dict(num_levels=1, num_steps=1, hidden=4)
    flow = image_flow((1, 8, 8), **options)
    fit_flow(flow, x, epochs=2, save_path=tmp_path, verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run_0"]
    resumed = fit_flow(image_flow((1, 8, 8), **options), x, epochs=2, save_path=tmp_path, resume=True, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), resumed.parameters()))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: image_flow((3, 60, 64)), r"divisible by 2\*\*num_levels = 8; got 60 x 64, .* 64 x 64"),
        (lambda: image_flow((3, 3, 33)), r"got 3 x 33, .* 8 x 32"),
        (lambda: image_flow((64, 64)), r"expected img_size \(C, H, W\); got \(64, 64\)"),
        (lambda: image_flow((1, 8, 8), hidden=0), "expected hidden to be an integer >= 1; got 0"),
        (lambda: image_flow((1, 8, 8), coupling="nice"), "expected coupling to be one of 'allinone', 'glow'; got 'nice'"),
        (lambda: image_flow((1, 8, 8), squeeze="db2"), "expected squeeze to be one of"),
        (lambda: image_flow((1, 8, 8), affine_clamping=0), "expected affine_clamping > 0"),
        (lambda: image_flow((1, 8, 8), dims_c=[(1, 4, 4)]), r"expected conditions of sizes \(C', 8, 8\); got \(1, 4, 4\)"),
        (lambda: image_flow((1, 8, 8))(torch.rand(1, 1, 16, 16)), r"shape \(N, 1, 8, 8\); got \(1, 1, 16, 16\)"),
        (lambda: fit_flow(image_flow((1, 8, 8)), [torch.rand(1, 8, 8), torch.rand(1, 8, 9)]), "images of one size"),
        (lambda: fit_flow(image_flow((1, 8, 8)).requires_grad_(False), torch.rand(2, 1, 8, 8)), "frozen"),
        (lambda: fit_flow(image_flow((1, 8, 8)), torch.rand(2, 1, 8, 8) * math.nan), "finite floating-point"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_randomness():
    state = torch.get_rng_state()
    flows = [image_flow((1, 8, 8), **SIZES, generator=torch.Generator().manual_seed(k)) for k in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    x = torch.rand(1, 1, 8, 8)
    a, b, c = (flow(x)[0] for flow in flows)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_training_of_conditional_flows(sigma):
    """Images of +-0.1 whose signs are the condition become known by it, if conditions are mirrored together with their images."""
    c, held_c = torch.randn(96, 1, 8, 8).sign(), torch.randn(16, 1, 8, 8).sign()
    x, held_out = 0.1 * c + 0.02 * torch.randn_like(c), 0.1 * held_c + 0.02 * torch.randn_like(held_c)
    options = dict(num_levels=1, num_steps=2, hidden=8, activation="silu")
    fitted = {}
    for dims in ([], [(1, 8, 8)]):
        flow = image_flow((1, 8, 8), **options, dims_c=dims, generator=torch.Generator().manual_seed(0))
        conditions = dict(c=c, eval_c=[held_c]) if dims else {}
        fit_flow(flow, x, held_out, **conditions, epochs=10, batch_size=8, lr=1e-2, sigma=sigma, verbose=False)
        prior = FlowPrior(flow, per_dim=True)
        given = {"c": held_c} if dims else {}
        y = held_out + sigma * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            denoised = FlowDenoiser(prior)(y, sigma, **given)
            fitted[len(dims)] = float(((denoised - held_out) ** 2).mean() if sigma else prior(held_out, **given).mean())
    assert fitted[1] < fitted[0] * 0.8 if sigma else fitted[1] < fitted[0] - 0.1, fitted
    with pytest.raises(ValueError, match=r"a condition for each of 96 images; got shape \(16, 1, 8, 8\)"):
        fit_flow(flow, x, c=held_c)
    with pytest.raises(TypeError, match="expected conditions as tensors; got float"):
        fit_flow(flow, x, c=[0.5])
    with pytest.raises(ValueError, match="expected 1 conditions, .* got 0"):
        fit_flow(flow, x, verbose=False)


@pytest.mark.parametrize("coupling", ["allinone", "glow"])
def test_under_autocast_states_and_log_determinants_keep_their_precision(coupling):
    flow = image_flow((3, 16, 16), 2, 2, 8, coupling, generator=torch.Generator().manual_seed(0))
    x = torch.rand(4, 3, 16, 16)
    flow.initialise(x)

    def found():
        with torch.autocast("cpu", torch.bfloat16):
            return flow(x)

    torch.testing.assert_close(found(), flow(x))  # a new flow's networks are zero
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    z, log_det = found()
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(log_det, flow(x)[1], rtol=2e-3, atol=0.5)


def test_another_dtype_is_refused_and_derivatives_can_be_batched():
    flow = image_flow((1, 4, 4), 1, 1, 4, generator=torch.Generator())
    x = torch.rand(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="Double"):
        flow(x.double())
    jacobian = torch.func.jacfwd(lambda u: flow(u)[0])(x).view(16, 16)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], flow(x)[1][0])
    assert flow.to("meta")(x.to("meta"))[0].shape == x.shape
