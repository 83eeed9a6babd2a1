"""Training of flows on images: results, resumption, refusals."""

import math

import FrEIA.modules as Fm
import numpy as np
import pytest
import torch
from cases import mlp

from deepinv_flows import BitsPerDim, FlowModel, PatchNR, fit_flow, fit_patchnr, image_flow


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
        # a prior that is passed is trained in place
        again = fit_patchnr(learn, prior=shorter, epochs=1, **{k: options[k] for k in list(options)[2:]})
        assert again is shorter


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


def test_a_range_of_255_is_noticed():
    with pytest.warns(UserWarning, match="is for images in"):
        fit_patchnr(255 * torch.rand(1, 1, 20, 20), patch_size=3, epochs=1, steps_per_epoch=1, verbose=False)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_of_any_precision(dtype):
    images = torch.rand(1, 1, 12, 12).to(dtype)
    options = dict(epochs=1, verbose=False, batch_size=8)
    prior = fit_patchnr(images, patch_size=3, sub_net_size=8, steps_per_epoch=2, **options)
    expected = dtype if dtype == torch.float64 else torch.float32
    assert all(p.dtype == expected and p.isfinite().all() for p in prior.parameters())
    flow = image_flow((1, 4, 4), 1, 1, 4).to(expected)
    fit_flow(flow, torch.rand(8, 1, 4, 4).to(dtype), **options)
    assert all(p.isfinite().all() for p in flow.parameters())
    with pytest.raises(
        TypeError, match=r"expected weights of float32 or float64 to train; got torch.float16 \(prior.float"
    ):
        fit_patchnr(images, prior=PatchNR(patch_size=3).half(), steps_per_epoch=2, **options)
    with pytest.raises(TypeError, match=r"got torch.bfloat16 \(flow.float"):
        fit_flow(image_flow((1, 4, 4), 1, 1, 4).bfloat16(), images[..., :4, :4], **options)


def test_sizes_beside_a_prior_are_refused():
    prior = PatchNR(patch_size=3, num_layers=1, sub_net_size=8)
    for sizes in (dict(patch_size=3), dict(patch_size=6), dict(num_layers=5), dict(sub_net_size=64)):
        with pytest.raises(
            ValueError, match=f"expected no sizes of a new prior beside prior, .* got .*{next(iter(sizes))}"
        ):
            fit_patchnr(torch.rand(1, 1, 9, 9), prior=prior, verbose=False, **sizes)
    with pytest.raises(ValueError, match="expected sub_net_size to be an integer >= 1; got 0"):
        fit_patchnr(torch.rand(1, 1, 9, 9), sub_net_size=0)


def test_the_range_of_the_images_is_learned(tmp_path):
    options = dict(epochs=1, steps_per_epoch=2, batch_size=8, verbose=False)
    prior = fit_patchnr([torch.rand(1, 9, 9), 0.5 * torch.rand(1, 9, 9) - 0.5], patch_size=3, sub_net_size=8, **options)
    low, high = prior.image_range
    assert -0.5 <= low < 0 and 0.5 < high < 1
    prior.save(tmp_path / "weights")
    assert PatchNR.from_checkpoint(tmp_path / "weights").image_range == (low, high)
    fit_patchnr(torch.full((1, 1, 9, 9), 3.0), prior=prior, **options)
    assert prior.image_range == (low, 3.0)


def test_options_of_the_trainer_pass_through(tmp_path):
    options = dict(epochs=2, steps_per_epoch=2, batch_size=8, verbose=False, patch_size=3, sub_net_size=8)
    images = torch.rand(1, 1, 9, 9)
    fit_patchnr(images, images, metrics=BitsPerDim(), save_path=tmp_path, ckp_interval=5, **options)
    raw = torch.load(next(tmp_path.glob("*/*/ckp_1.pth.tar")), weights_only=False)
    assert len(raw["eval_metrics"]["BitsPerDim"]) == 2
    flow = image_flow((1, 4, 4), 1, 1, 4)
    fit_flow(flow, torch.rand(8, 1, 4, 4), epochs=1, metrics=BitsPerDim(), grad_clip=1.0, verbose=False)
    for wrong in ("colour", "losses", "optimizer"):
        with pytest.raises(TypeError, match=f"does not set itself; got .*{wrong}"):
            fit_patchnr(images, **{wrong: 3}, **options)
        with pytest.raises(TypeError, match=f"does not set itself; got .*{wrong}"):
            fit_flow(flow, torch.rand(8, 1, 4, 4), **{wrong: 3})


def test_conditions_of_evaluation_images_are_asked_for():
    """Without them, those of the last training batch were used silently."""
    flow = image_flow((1, 8, 8), num_levels=2, num_steps=1, hidden=4, dims_c=[(1, 8, 8)])
    x, options = torch.rand(4, 1, 8, 8), dict(epochs=1, batch_size=4, verbose=False)
    with pytest.raises(ValueError, match="as many conditions of eval_images as of images, 1; got eval_c with 0"):
        fit_flow(flow, x, x, c=x, **options)
    with pytest.raises(ValueError, match="expected eval_images, whose conditions eval_c are; got None"):
        fit_flow(flow, x, c=x, eval_c=x, **options)
    fit_flow(flow, x, x[:2], c=x, eval_c=x[:2], **options)
