"""Rough edges: flows that almost satisfy the contract, replaced methods, images in other units, and costs of evaluation."""

import copy
import types
import warnings

import deepinv as dinv
import pytest
import torch
from cases import UNKNOWN, make, reference_nll
from torch import nn

from deepinv_flows import PatchNR, Reversed, glow_flow
from deepinv_flows.patchnr import potential
from deepinv_flows.patchnr.fused import workspace
from deepinv_flows.patchnr.fused.recognise import steps_of
from deepinv_flows.patchnr.patches import PatchIndex


def image(*size):
    return torch.rand(size or (2, 1, 6, 7), dtype=torch.float64)


def smooth(**options):
    return PatchNR(make("glow_silu", 9, spread=0.1), patch_size=3, **options)


# --- flows that almost satisfy the contract ---


class Brought(nn.Module):
    """A flow without its inverse, which returns a list, with the log-determinants as a column."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        z, log_det = self.flow(x)
        return [z, log_det[:, None]]


def test_a_density_without_an_inverse():
    flow = make("glow_silu", 9)
    prior, x = PatchNR(Brought(flow), patch_size=3), image()
    torch.testing.assert_close(prior(x), reference_nll(flow, x, 3))
    torch.testing.assert_close(prior.grad(x), PatchNR(flow, patch_size=3).grad(x))
    for density in (prior, PatchNR(Reversed(Reversed(flow).flow), patch_size=3)):
        assert density(x).isfinite().all()
    with pytest.raises(TypeError, match=r"Brought.forward does not take rev: it gives densities only"):
        prior.sample(2)
    with pytest.raises(ValueError, match=r"does not take rev"):
        PatchNR(Reversed(Brought(flow)), patch_size=3)


def test_layers_that_mix_patches_are_refused():
    def network(i, o):
        return nn.Sequential(nn.Linear(i, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, o))

    flow = make("prelu", 9)
    flow.module.subnet1, flow.module.subnet2 = network(4, 10).double(), network(5, 8).double()
    prior, x = PatchNR(flow, patch_size=3), image()
    statistics = flow.module.subnet1[1].running_mean.clone()
    for method in (prior, prior.grad, prior.prox, prior.nll_map):
        with pytest.raises(ValueError, match=r"BatchNorm1d \('module.subnet1.1'\) in training mode .* call .eval\(\)"):
            method(x)
    assert torch.equal(flow.module.subnet1[1].running_mean, statistics)
    prior.eval()
    torch.testing.assert_close(prior(x), reference_nll(flow, x, 3))
    flow.module.subnet2[1] = nn.BatchNorm1d(8, track_running_stats=False).double().eval()
    with pytest.raises(ValueError, match="does not keep running statistics"):
        prior(x)


def on_a_block(flow, monkeypatch):
    flow[1]._coupling1 = types.MethodType(lambda self, x1, u2, rev=False: (x1, 0.0), flow[1])


def on_a_class(flow, monkeypatch):
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))


def on_a_freia_class(flow, monkeypatch):
    kind = type(flow[1])
    monkeypatch.setattr(kind, "_coupling2", lambda self, x2, u1, rev=False: (x2, 0.0))


@pytest.mark.parametrize("change", [on_a_block, on_a_class, on_a_freia_class])
def test_changed_methods_are_seen(change, monkeypatch):
    flow, x = make("glow_silu", 9), image()
    prior = PatchNR(flow, patch_size=3)
    before = prior(x)
    change(flow, monkeypatch)
    assert steps_of(flow) is None
    torch.testing.assert_close(prior(x), reference_nll(flow, x, 3))
    assert not torch.allclose(prior(x), before)


# --- what it can be asked for ---


def test_it_is_a_patchnr_of_deepinv():
    assert isinstance(PatchNR(num_layers=1), dinv.optim.PatchNR) and isinstance(PatchNR(num_layers=1), dinv.optim.Prior)


def test_it_prints_what_it_is():
    assert "patch_size=3, channels=1, pad='reflect', n_patches=4, stride=1" in repr(smooth(pad=True, n_patches=4))


def test_whole_priors_pickled_before_still_work():
    prior, x = smooth(n_patches=4), image()
    state = {
        k: v for k, v in vars(prior).items() if k not in ("image_range", "sigma_range", "_draws", "_asked", "_warned")
    }
    old = PatchNR.__new__(PatchNR)
    old.__setstate__(copy.deepcopy(state))
    assert torch.equal(old(x), prior(x)) and old.image_range is None


@pytest.mark.parametrize("options", [{}, {"pad": True}, {"n_patches": 4, "stride": 2}], ids=str)
@pytest.mark.parametrize("name", ["glow_silu", *UNKNOWN])
def test_map_of_values(name, options):
    prior, x = PatchNR(make(name, 9), patch_size=3, **options), image().requires_grad_()
    found = prior.nll_map(x)
    margin = 4 if options.get("pad") else 0
    assert found.shape == (2, 4 + margin, 5 + margin)
    whole = PatchNR(prior.normalizing_flow, patch_size=3, pad=options.get("pad", False))
    torch.testing.assert_close(found.mean((1, 2)), whole(x))
    torch.testing.assert_close(torch.autograd.grad(found.mean((1, 2)).sum(), x)[0], whole.grad(x))
    if not margin:
        torch.testing.assert_close(found[1, 2, 3], prior(x[1:, :, 2:5, 3:6].reshape(1, 1, 9))[0, 0])


@pytest.mark.parametrize("gamma", [0.3, torch.tensor([0.1, 0.7], dtype=torch.float64)], ids=["one", "each"])
def test_prox_of_patches_is_that_of_images_of_a_patch(gamma):
    prior, patches = smooth(), image(2, 5, 1, 3, 3)
    found = prior.prox(patches, gamma=gamma)
    assert found.shape == patches.shape
    for k, row in enumerate(patches):
        own = gamma if isinstance(gamma, float) else gamma[k]
        torch.testing.assert_close(found[k], prior.prox(row, gamma=own), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prior.prox(patches.flatten(2), gamma=gamma), found.flatten(2))


def test_images_in_another_unit_are_told_once():
    prior, x = smooth(), image()
    prior(1e9 * x)  # the range of the training images is not known
    prior.image_range = (0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior(2 * x - 0.5), prior.grad(x)
    with pytest.warns(UserWarning, match=r"expected images in about \[0, 1\], .* got values in \[[0-9.]+, 9"):
        prior(1e3 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior(1e3 * x), prior.grad(-1e3 * x)


# --- what it costs ---


@pytest.fixture
def sweeps(monkeypatch):
    """For each sweep over the patches, whether it computes gradients in the image and in the weights."""
    found, plain = [], potential.patch_sums

    def counted(steps, x, index, chunk, dtype, image, weights, scale):
        found.append((image, weights))
        return plain(steps, x, index, chunk, dtype, image, weights, scale)

    monkeypatch.setattr(potential, "patch_sums", counted)
    return found


VALUE, IMAGE, ALL = (False, False), (True, False), (True, True)


def test_nothing_is_computed_that_is_not_asked_for(sweeps):
    prior, x = smooth(), image()
    weights = [p for p in prior.parameters() if p.requires_grad]

    def done(call):
        sweeps.clear()
        call()
        return list(sweeps)

    assert done(lambda: prior(x)) == [VALUE]
    with torch.no_grad():
        assert done(lambda: prior.grad(x)) == [IMAGE]
    leaf = x.clone().requires_grad_()
    for create_graph in (False, True):
        assert done(lambda c=create_graph: torch.autograd.grad(prior(leaf).sum(), leaf, create_graph=c)) == [IMAGE]
    plain = dinv.optim.PatchPrior(prior, patch_size=3)
    assert done(lambda: plain.grad(x.clone())) == [IMAGE]
    # once a backward pass has asked for the weights, the next forward pass computes all together
    assert done(lambda: torch.autograd.grad(prior(leaf).sum(), [leaf, *weights])) == [IMAGE, ALL]
    assert done(lambda: torch.autograd.grad(prior(leaf).sum(), [leaf, *weights])) == [ALL]
    assert done(lambda: torch.autograd.grad(prior(x).mean(), weights)) == [ALL]
    # one sweep for the batch, of images that do not count alike too
    factors = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert done(lambda: torch.autograd.grad((prior(x) * factors).sum(), weights)) == [ALL, ALL]
    assert done(lambda: torch.autograd.grad((prior(x) * factors).sum(), weights)) == [VALUE, ALL]
    assert done(lambda: prior(x)) == [VALUE]
    prior.requires_grad_(False)
    assert done(lambda: prior(leaf).sum().backward()) == [IMAGE]


def test_few_patches_are_left_to_autograd(sweeps, monkeypatch):
    monkeypatch.setattr(potential, "FEW", 41)
    prior, x = smooth(), image()  # of 40 patches
    with torch.no_grad():
        few = prior(x), prior.grad(x)
        assert not sweeps
        monkeypatch.setattr(potential, "FEW", 40)
        torch.testing.assert_close((prior(x), prior.grad(x)), few)
        assert sweeps == [VALUE, IMAGE]


def test_large_buffers_do_not_stay(monkeypatch):
    prior, x = smooth().requires_grad_(False), image()
    vars(workspace._kept).clear()  # what other tests left
    expected = prior.grad(x)
    assert 0 < workspace._kept.space.nbytes <= workspace.KEPT
    monkeypatch.setattr(workspace, "KEPT", workspace._kept.space.nbytes - 1)
    for _ in range(2):
        assert torch.equal(prior.grad(x), expected)
        assert not hasattr(workspace._kept, "space")


def test_the_number_of_threads_is_kept_when_two_threads_call_at_once():
    import threading

    prior, x = PatchNR(glow_flow(9, 2, 16), patch_size=3).requires_grad_(False), torch.rand(1, 1, 60, 60)
    torch.set_num_threads(3)
    try:
        threads = [threading.Thread(target=lambda: [prior.grad(x) for _ in range(5)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        prior.grad(x)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_an_index_of_single_patches_counts_them_one_by_one():
    index = PatchIndex((5, 9, 1, 1), 1)
    assert index.per_image == 1 and len(index) == 5


def test_padding_may_be_set_later():
    prior, x = smooth(), image()
    padded = [smooth(pad=pad) for pad in (True, "reflect")]
    for other in padded:
        other.load_state_dict(prior.state_dict())
    prior.pad = True
    for other in padded:
        torch.testing.assert_close(prior(x), other(x))
        torch.testing.assert_close(prior.grad(x), other.grad(x))
    prior.pad = "mirror"
    with pytest.raises(ValueError, match="expected pad to be one of False, True, 'constant'"):
        prior(x)
