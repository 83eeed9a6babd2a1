"""Training by deepinv's Trainer: known entropies, evaluation, early stopping, interruption and resumption."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import deepinv as dinv
import FrEIA.modules as Fm
import numpy as np
import pytest
import torch
from cases import make, mlp

from deepinv_flows import BitsPerDim, FlowModel, FlowNLL, PatchNR, allinone_flow, fit_patchnr, glow_flow
from deepinv_flows.training.runs import _newest
from deepinv_flows.training.samples import PatchSamples


def samples(x):
    return torch.utils.data.StackDataset(x=x, y=x)  # of a list Trainer's check formats every number, twice


def trainer(model, x, **options):
    loader = torch.utils.data.DataLoader(samples(x), batch_size=256, shuffle=True)
    defaults = dict(
        losses=FlowNLL(), metrics=None, compute_train_metrics=False, save_path=None, device="cpu", verbose=False
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return dinv.Trainer(model, dinv.physics.Denoising(), optimizer, loader, **{**defaults, **options})


def test_nll_is_the_density(tmp_path):
    flow = make("glow", 6)
    x = torch.randn(7, 6, dtype=torch.float64)
    z, log_det = flow(x)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(FlowModel(flow, dequantise=0)(x), -normal.log_prob(z).sum(1) - log_det)


def test_density_integrates_to_one():
    flow = make("glow_silu", 2, spread=0.2)
    grid = torch.cartesian_prod(*[torch.linspace(-12, 12, 601, dtype=torch.float64)] * 2)
    with torch.no_grad():
        mass = (-FlowModel(flow, dequantise=0)(grid)).exp().sum() * (24 / 600) ** 2
    assert abs(mass - 1) < 1e-3


def test_known_correlated_gaussian_is_learned():
    """Within 0.01 nats a dimension of the entropy, on samples not trained on."""
    dim = 4
    mixing = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.5, 0, 0], [-0.3, 0.4, 0.7, 0], [0.5, 0.5, 0.5, 0.2]])
    entropy = 0.5 * dim * (1 + math.log(2 * math.pi)) + torch.linalg.slogdet(mixing).logabsdet.item()
    x, fresh = (torch.randn(n, dim) @ mixing.T for n in (20_000, 100_000))
    model = FlowModel(glow_flow(dim, 3, 32, activation="silu"), dequantise=0)
    for lr in (3e-3, 1e-3, 1e-4):
        training = trainer(model, x, epochs=5)
        training.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        training.train()
    with torch.no_grad():
        excess = (model(fresh).mean().item() - entropy) / dim
        exact = -torch.distributions.MultivariateNormal(torch.zeros(dim), mixing @ mixing.T).log_prob(fresh).mean()
    assert abs((exact - entropy) / dim) < 0.005
    assert abs(excess) < 0.01


def test_allinone_trains_and_reports_bits():
    x = torch.rand(512, 4)
    model = FlowModel(allinone_flow(4, 3, 16, permute_soft=True))
    options = dict(metrics=BitsPerDim(), eval_dataloader=torch.utils.data.DataLoader(samples(x), 128), epochs=3)
    training = trainer(model, x, **options)
    training.train()
    history = training.eval_metrics_history["BitsPerDim"]
    assert len(history) == 3 and history[-1] < history[0]
    # uniform on [0, 1]: no less than log2(255) bits
    assert history[-1] > math.log2(255) - 0.1


def test_bits_per_dim_of_a_known_density():
    flow = glow_flow(4, 1, 4)
    with torch.no_grad():
        for p in flow.parameters():
            if p.requires_grad:
                p.zero_()
    x = torch.zeros(3, 4)
    bits = BitsPerDim(bin_width=0.25)(FlowModel(flow, 0)(x), x)
    torch.testing.assert_close(bits, torch.full((3,), 0.5 * math.log2(2 * math.pi) + 2))


def test_loss_refuses_images():
    with pytest.raises(ValueError, match=r"negative log-likelihoods of a FlowModel; got shape \(2, 1, 4, 4\)"):
        FlowNLL()(torch.rand(2, 1, 4, 4))


def test_dequantisation_noise_is_uniform_and_centred():
    seen = []
    model = FlowModel(glow_flow(2, 1, 4), dequantise=0.5)
    model.flow.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    state = torch.get_rng_state()
    model(torch.ones(10_000, 2))
    assert torch.equal(state, torch.get_rng_state())
    noise = seen[0] - 1
    assert noise.min() >= -0.25 and noise.max() <= 0.25
    assert abs(noise.mean()) < 0.005 and abs(noise.var() - 0.25 / 12) < 0.001


def test_mixed_precision():
    x = torch.randn(512, 4)
    with pytest.warns(UserWarning):
        training = trainer(FlowModel(glow_flow(4, 2, 16), 0), x, epochs=2, mixed_precision="bfloat16")
    assert FlowNLL()(training.train()(x)).isfinite().all()


# --- patches ---


@pytest.mark.parametrize("augment", [False, True])
def test_samples_are_the_patches(augment):
    images = [torch.rand(2, 5, 7), torch.rand(2, 4, 4)]
    data = PatchSamples(images, 3, augment=augment)
    expected = [p for im in images for p in torch.nn.functional.unfold(im[None], 3)[0].T]
    assert len(data) == len(expected) == 19
    batch = data.__getitems__(list(range(19)))["x"]
    for got, patch in zip(batch, expected):
        if augment:
            square = patch.view(2, 3, 3)
            turned = [torch.rot90(s, k, (1, 2)).reshape(-1) for s in (square, square.flip(2)) for k in range(4)]
            assert any(torch.equal(got, t) for t in turned)
        else:
            assert torch.equal(got, patch)


def test_fit_patchnr_learns_and_keeps_the_best_epoch(tmp_path):
    smooth = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 70, 70), 5, 1)
    learn, held_out = smooth[..., :48, :], smooth[..., 48:, :]
    options = dict(patch_size=4, sub_net_size=32, steps_per_epoch=40, batch_size=128, verbose=False)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    prior = fit_patchnr(learn, held_out, epochs=4, save_path=tmp_path, **options)
    assert torch.equal(state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()
    assert isinstance(prior, PatchNR)
    noise = torch.rand_like(held_out)
    with torch.no_grad():
        assert prior(held_out) < prior(noise) - 10
        shorter = fit_patchnr(learn, held_out, epochs=1, **options)
        assert prior(held_out) < shorter(held_out)
        # prior-of-its-own is trained in place
        again = fit_patchnr(learn, prior=shorter, epochs=1, **{k: options[k] for k in list(options)[2:]})
        assert again is shorter


def test_early_stopping(tmp_path):
    options = dict(patch_size=3, sub_net_size=64, epochs=60, steps_per_epoch=30, batch_size=64, augment=False)
    fit_patchnr(
        torch.rand(1, 1, 8, 8),
        torch.rand(1, 1, 30, 30),
        early_stop=2,
        save_path=tmp_path,
        verbose=False,
        lr=3e-3,
        **options,
    )
    epochs = [int(p.name.split("_")[1].split(".")[0]) for p in tmp_path.glob("*/*/ckp_[0-9]*")]
    assert max(epochs) < 59


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "at least one image"),
        ([torch.rand(1, 8, 8), torch.rand(3, 8, 8)], r"one number of channels.*got shape \(3, 8, 8\)"),
        (torch.rand(1, 1, 4, 9), "at least 6 x 6 pixels"),
        (torch.rand(8, 8), r"got a tensor of shape \(8, 8\)"),
        (torch.rand(5, 64, 64), r"Grey images .* as images\[:, None\]"),
        (torch.ones(1, 1, 9, 9, dtype=torch.uint8), "finite floating-point images; got torch.uint8"),
        (torch.full((1, 1, 9, 9), math.nan), "finite floating-point"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        fit_patchnr(images, epochs=1, verbose=False)


def test_prior_and_images_must_fit():
    images = torch.rand(1, 1, 9, 9)
    with pytest.raises(ValueError, match="frozen"):
        fit_patchnr(images, prior=PatchNR(patch_size=3).requires_grad_(False))
    with pytest.raises(
        ValueError, match=r"expected 3 channels \(patch dimension 27\); got image of shape \(1, 1, 9, 9\)"
    ):
        fit_patchnr(images, prior=PatchNR(patch_size=3, channels=3))
    with pytest.raises(TypeError, match=r"expected dtype torch.float32.*got torch.float64"):
        fit_patchnr(images, images.double(), patch_size=3)
    with pytest.raises(ValueError, match="one number of channels"):
        fit_patchnr([images[0], torch.rand(3, 9, 9)], patch_size=3)


def test_runs_in_one_folder_do_not_mix(tmp_path):
    options = dict(patch_size=3, sub_net_size=8, steps_per_epoch=20, batch_size=64, verbose=False, save_path=tmp_path)
    image, other = torch.rand(1, 1, 20, 20), torch.zeros(1, 1, 20, 20)
    first = fit_patchnr(image, image, epochs=4, **options)
    second = fit_patchnr(image, image, epochs=1, **options)
    third = fit_patchnr(other, other, epochs=2, num_layers=2, **options)
    with torch.no_grad():
        assert first(image) < second(image) < third(image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_0", "run_1", "run_2"]


def test_resuming_another_architecture_names_the_file(tmp_path):
    options = dict(patch_size=3, epochs=1, steps_per_epoch=2, verbose=False, save_path=tmp_path)
    fit_patchnr(torch.rand(1, 1, 20, 20), sub_net_size=8, **options)
    with pytest.raises(ValueError, match="ckp_0.pth.tar: .*expected shape"):
        fit_patchnr(torch.rand(1, 1, 20, 20), sub_net_size=16, resume=True, **options)


def test_a_range_of_255_is_noticed():
    with pytest.warns(UserWarning, match="is for images in"):
        fit_patchnr(255 * torch.rand(1, 1, 20, 20), patch_size=3, epochs=1, steps_per_epoch=1, verbose=False)


@pytest.mark.parametrize("held_out", [True, False])
def test_divergence_is_reported(held_out):
    image = 1e3 * torch.rand(1, 1, 12, 12)
    options = dict(patch_size=3, sub_net_size=8, epochs=3, steps_per_epoch=20, batch_size=32, verbose=False)
    with pytest.raises(ValueError, match="diverged"):
        fit_patchnr(image, image if held_out else None, lr=1e30, **options)


def test_models_adapt_flows_and_refuse_bad_samples():
    block = Fm.GLOWCouplingBlock([(4,)], subnet_constructor=mlp)
    prior = PatchNR(patch_size=2, num_layers=1)
    for flow in (block, prior):
        assert FlowModel(flow)(torch.rand(3, 4)).shape == (3,)
    for x in (torch.full((3, 4), math.nan), torch.ones(3, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"finite floating-point samples; got .* of shape \(3, 4\)"):
            FlowModel(block)(x)
    with pytest.raises(ValueError, match="log-likelihoods of a FlowModel"):
        BitsPerDim()(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="expected epochs to be an integer >= 1; got 0"):
        fit_patchnr(torch.rand(1, 1, 9, 9), epochs=0)
    with pytest.raises(TypeError, match=r"images as tensors .* got ndarray"):
        fit_patchnr([np.ones((1, 9, 9))])


TRAIN = """
    import torch
    from deepinv_flows import fit_patchnr
    torch.set_num_threads(1)
    x = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 70, 70, generator=torch.Generator().manual_seed(0)), 5, 1)
    prior = fit_patchnr(
        x, x, patch_size=3, sub_net_size=16, epochs={epochs}, steps_per_epoch={steps}, batch_size=128, save_path={path!r},
        resume=True, verbose=False)
    print(float(prior(x).detach()))
"""


def run(path, epochs=6, steps=60):
    code = textwrap.dedent(TRAIN.format(path=str(path), epochs=epochs, steps=steps))
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed(tmp_path):
    whole = run(tmp_path / "whole")
    expected = float(whole.communicate()[0])
    broken = run(tmp_path / "broken", steps=60)
    deadline = time.time() + 120
    while not list(tmp_path.glob("broken/*/*/ckp_2.pth.tar")) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(broken.pid, signal.SIGKILL)
    broken.wait()
    newest = _newest([tmp_path / "broken" / "run_0"])
    reached = torch.load(newest, weights_only=False)["epoch"]
    assert 1 <= reached < 5
    # a checkpoint cut short by the kill is passed over
    (newest.parent / "ckp_99.pth.tar").write_bytes(newest.read_bytes()[:1000])
    resumed = float(run(tmp_path / "broken").communicate()[0])
    runs = sorted((tmp_path / "broken").iterdir())
    assert [path.name for path in runs] == ["run_0", "run_1"]
    last = next(runs[1].iterdir())
    again = [int(p.name.split("_")[1].split(".")[0]) for p in last.glob("ckp_[0-9]*")]
    assert min(again) == reached + 1 and max(again) == 5  # no finished epoch is repeated
    state = torch.load(last / f"ckp_{max(again)}.pth.tar", weights_only=False)["optimizer"]["state"]
    assert state[0]["step"] == 6 * 60  # the optimizer went on counting
    assert abs(resumed - expected) < 0.05 * abs(expected)
