"""A flow as a denoiser: exact for Gaussians, a gradient field, trained by the Trainer, at home in plug-and-play."""

import copy
import math
import pickle

import deepinv as dinv
import numpy as np
import pytest
import torch
from cases import central_difference

from deepinv_flows import CheckpointError, FlowDenoiser, FlowPrior, LatentMAP, fit_flow, image_flow
from deepinv_flows.training import initialised
from deepinv_flows.training.samples import ImageSamples

SIGMA = 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(side=4):
    """Of images (1, side, side) whose pixels at distance r are correlated by exp(-r / 2)."""
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    return torch.exp(-torch.cdist(at, at) / 2)


def gaussian_images(n, dtype=torch.float64):
    root = torch.linalg.cholesky(covariance())
    return (torch.randn(n, 16, generator=generator(), dtype=torch.float64) @ root.T).view(n, 1, 4, 4).to(dtype)


def wiener():
    """The posterior mean of these images, as a matrix."""
    C = covariance()
    return C @ torch.linalg.inv(C + SIGMA**2 * torch.eye(16, dtype=C.dtype))


class Whitening(torch.nn.Module):
    """The exact flow of these images under noise."""

    def __init__(self, sigma=SIGMA):
        super().__init__()
        root = torch.linalg.cholesky(covariance() + sigma**2 * torch.eye(16).double())
        self.inverse_root = torch.nn.Parameter(torch.linalg.inv(root))

    def forward(self, x, rev=False):
        matrix = torch.linalg.inv(self.inverse_root) if rev else self.inverse_root
        return (x.flatten(1) @ matrix.T).view_as(x), torch.linalg.slogdet(matrix)[1].expand(len(x))


def small_flow(activation="silu", seed=0):
    flow = image_flow((1, 4, 4), 1, 3, 12, activation=activation, generator=generator(seed)).double()
    with torch.no_grad():
        for p in flow.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator(seed + 1), dtype=p.dtype))
    return flow


def test_posterior_mean_of_a_gaussian():
    y = gaussian_images(5) + SIGMA
    expected = (y.flatten(1) @ wiener().T).view_as(y)
    torch.testing.assert_close(FlowDenoiser(FlowPrior(Whitening()))(y, SIGMA), expected, rtol=1e-10, atol=1e-10)


def test_one_level_an_image():
    denoiser, y = FlowDenoiser(FlowPrior(small_flow())), gaussian_images(3)
    levels = torch.tensor([0.1, 0.0, 0.4])
    together = denoiser(y, levels)
    apart = torch.cat([denoiser(image[None], float(level)) for image, level in zip(y, levels)])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)  # levels in float32
    assert torch.equal(together[1], y[1])


@pytest.mark.parametrize("sigma", [0.1, [0.1, 0.3], np.array([0.1, 0.3])], ids=str)
def test_double_precision_is_kept(sigma):
    """0.1 is not a number of single precision."""
    denoiser, y = FlowDenoiser(FlowPrior(small_flow())), gaussian_images(2)
    levels = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(y, sigma), y - levels**2 * denoiser.prior.grad(y), rtol=1e-15, atol=1e-15)


def test_it_is_a_gradient_field():
    denoiser, y = FlowDenoiser(FlowPrior(small_flow())), gaussian_images(1)
    jacobian = torch.autograd.functional.jacobian(lambda y: denoiser(y, SIGMA), y).view(16, 16)
    torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-9, atol=1e-9)


def test_derivative_in_the_weights():
    flow, x = small_flow(), gaussian_images(4)
    denoiser, y = FlowDenoiser(FlowPrior(flow)), gaussian_images(4) + 0.3
    weights = [p for p in flow.parameters() if p.requires_grad]

    def loss():
        return ((denoiser(y, SIGMA) - x) ** 2).mean()

    grads = torch.autograd.grad(loss(), weights, allow_unused=True)
    for p, grad in list(zip(weights, grads))[::5]:
        direction = torch.randn(p.shape, generator=generator(2), dtype=p.dtype)
        slope = 0.0 if grad is None else float((grad * direction).sum())
        assert math.isclose(slope, float(central_difference(loss, p, direction)), rel_tol=1e-5, abs_tol=1e-8)


def noisy_pairs(n):
    x = gaussian_images(n)
    return x, x + SIGMA * torch.randn(x.shape, generator=generator(5), dtype=x.dtype)


def error(flow, x, y):
    with torch.no_grad():
        return float(((FlowDenoiser(FlowPrior(flow))(y.float(), SIGMA) - x) ** 2).mean())


def test_training_nears_the_least_error():
    x, y = noisy_pairs(4500)
    least = float(((y[:500].flatten(1) @ wiener().T - x[:500].flatten(1)) ** 2).mean())
    flow = image_flow((1, 4, 4), 1, 2, 8, activation="silu", generator=generator())
    initialised(flow, x[500:].float(), sigma=SIGMA)
    start = error(flow, x[:500], y[:500])
    fit_flow(flow, x[500:].float(), sigma=SIGMA, epochs=2, batch_size=32, lr=1e-2, augment=False, verbose=False)
    assert 0.99 * least < error(flow, x[:500], y[:500]) < least + 0.7 * (start - least)


def test_images_of_any_unit_train_alike():
    x, y = noisy_pairs(200)

    def trained(unit):
        flow = image_flow((1, 4, 4), 1, 2, 8, activation="silu", generator=generator()).double()
        fit_flow(flow, unit * x, sigma=unit * SIGMA, epochs=2, verbose=False)
        with torch.no_grad():
            return FlowDenoiser(FlowPrior(flow))(unit * y, unit * SIGMA) / unit

    torch.testing.assert_close(trained(1e-3), trained(1.0), rtol=1e-4, atol=1e-4)


def test_interrupted_training_resumes(tmp_path):
    images, flow = gaussian_images(64, torch.float32), image_flow((1, 4, 4), 1, 2, 8, generator=generator())
    options = dict(verbose=False, save_path=tmp_path, resume=True)
    fit_flow(flow, images, images, sigma=SIGMA, epochs=2, **options)
    fit_flow(flow, images, images, sigma=SIGMA, epochs=3, **options)
    (last,) = (torch.load(path, weights_only=False) for path in tmp_path.glob("run_1/*/ckp_[0-9]*"))
    assert last["epoch"] == 2 and len(last["loss"]["ScoreMatching"]) == len(last["eval_loss"]["ScoreMatching"]) == 1
    with pytest.raises(CheckpointError, match=r"expected weights of a flow {'sigma': 0.1}; found .* {'sigma': 0.5}"):
        fit_flow(flow, images, images, sigma=0.1, epochs=4, **options)
    with pytest.raises(CheckpointError, match="missing tensors"):
        fit_flow(flow, images, images, epochs=4, **options)


def test_evaluation_is_the_same_at_each_epoch(tmp_path):
    images, flow = gaussian_images(8, torch.float32), image_flow((1, 4, 4), 1, 1, 8, generator=generator())
    fit_flow(flow, images, images, sigma=SIGMA, epochs=3, lr=1e-30, verbose=False, save_path=tmp_path)
    (last,) = (torch.load(path, weights_only=False) for path in tmp_path.glob("run_0/*/ckp_2.pth.tar"))
    losses = last["eval_loss"]["ScoreMatching"]
    assert len(losses) == 3 and max(losses) - min(losses) < 1e-6


def test_half_of_the_images_are_mirrored_whatever_the_batch():
    x = torch.arange(4.0).expand(400, 1, 4, 4)
    for size in (1, 8):
        samples = ImageSamples(x, augment=True)
        batches = [samples.__getitems__(list(range(size)))["x"] for _ in range(400 // size)]
        mirrored = sum(int((batch[:, 0, 0, 0] == 3).sum()) for batch in batches)
        assert abs(mirrored - 200) < 5 * 10


def test_plug_and_play_converges_to_its_fixed_point():
    denoiser, mask = FlowDenoiser(FlowPrior(Whitening())), torch.tensor([1.0, 0.0, 1.0, 1.0]).double().expand(1, 4, 4)
    physics, fidelity = dinv.physics.Inpainting((1, 4, 4), mask=mask), dinv.optim.L2()
    y = physics(gaussian_images(3))
    model = dinv.optim.PGD(
        data_fidelity=fidelity,
        prior=dinv.optim.PnP(denoiser),
        stepsize=0.8,
        g_param=SIGMA,
        max_iter=300,
        early_stop=False,
    )
    x = model(y, physics).detach()
    expected = (x - 0.8 * fidelity.grad(x, y, physics)).flatten(1) @ wiener().T
    torch.testing.assert_close(x, expected.view_as(x), rtol=1e-6, atol=1e-6)


def test_a_trainer_of_the_users_own_takes_it():
    x = gaussian_images(16, torch.float32)
    flow = image_flow((1, 4, 4), 1, 2, 8, activation="silu", generator=generator())
    model = dinv.models.ArtifactRemoval(FlowDenoiser(FlowPrior(flow)), mode="direct")
    before = copy.deepcopy(flow.state_dict())
    dinv.Trainer(
        model, dinv.physics.Denoising(dinv.physics.GaussianNoise(0.2)), torch.optim.Adam(model.parameters()),
        torch.utils.data.DataLoader([{"x": image} for image in x], batch_size=8), epochs=1, online_measurements=True,
        losses=dinv.loss.SupLoss(), save_path=None, device="cpu", verbose=False,
    ).train()  # fmt: skip
    assert any(not torch.equal(value, before[key]) for key, value in flow.state_dict().items())


def test_copies_and_dtypes():
    denoiser, y = FlowDenoiser(FlowPrior(small_flow())), gaussian_images(2)
    expected = denoiser(y, SIGMA)
    for other in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert torch.equal(other(y, SIGMA), expected)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(y, SIGMA), expected.detach(), rtol=1e-12, atol=1e-12)
    assert denoiser.float()(y.float(), SIGMA).dtype == torch.float32


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf, torch.tensor([0.1, -0.1])], ids=str)
def test_levels_refused(sigma):
    with pytest.raises(ValueError, match="expected a finite sigma >= 0; got"):
        FlowDenoiser(FlowPrior(small_flow()))(gaussian_images(2), sigma)
    with pytest.raises(ValueError, match="noise level sigma >= 0; got"):
        fit_flow(small_flow(), gaussian_images(2), sigma=sigma)


def test_what_else_is_refused():
    flow, x = small_flow(), gaussian_images(2)
    denoiser = FlowDenoiser(FlowPrior(flow))
    with pytest.raises(TypeError, match="expected a FlowPrior or a PatchNR; got ImageFlow"):
        FlowDenoiser(flow)
    for sigma in (None, "0.1"):
        with pytest.raises(TypeError, match="expected sigma to be a number, or one for each image; got"):
            denoiser(x, sigma)
    with pytest.raises(ValueError, match=r"one for each of 2 images; got \(3,\)"):
        denoiser(x, torch.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        denoiser(torch.full((1, 1, 4, 4), math.nan, dtype=torch.float64), SIGMA)
    with pytest.raises(TypeError, match=r"floating-point tensor; got torch.uint8"):
        denoiser((255 * x).byte(), SIGMA)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"torch.inference_mode rules out: use torch.no_grad"),
    ):
        denoiser(x, SIGMA)
    with pytest.raises(ValueError, match="compile=False with sigma"):
        fit_flow(flow, x, sigma=0.1, compile=True)
    for images, held_out in ((x.float(), None), (x, x.float())):
        with pytest.raises(TypeError, match="expected dtype torch.float64"):
            fit_flow(flow, images, held_out, sigma=0.1)
    with pytest.raises(ValueError, match="expected 1 channels"):
        fit_flow(flow, x, x.expand(-1, 3, -1, -1), sigma=0.1)


def test_levels_of_other_kinds():
    denoiser, x = FlowDenoiser(FlowPrior(small_flow(), per_dim=True)), gaussian_images(2)
    expected = FlowDenoiser(FlowPrior(small_flow()))(x, 0.5)
    for sigma in (np.float32(0.5), np.array([0.5, 0.5]), [0.5, 0.5], torch.tensor(0.5), torch.full((2, 1, 1, 1), 0.5)):
        torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-12, atol=1e-12)


def test_latent_map_shares_the_flow():
    """The density that denoises is one to sample and to recover with."""
    flow, y = small_flow(), gaussian_images(1)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    assert torch.isfinite(LatentMAP(flow, dinv.optim.L2(sigma=0.1), max_iter=3)(y, physics)).all()


def test_a_flow_on_images_knows_its_level(tmp_path):
    flow = image_flow((1, 8, 8), 2, 1, 4, activation="silu", generator=torch.Generator())
    x = torch.rand(8, 1, 8, 8)
    fit_flow(flow, x, sigma=0.1, epochs=1, verbose=False)
    prior = FlowPrior(flow)
    prior.save(tmp_path / "flow.safetensors")
    for known in (prior, copy.deepcopy(prior), FlowPrior(pretrained=tmp_path / "flow.safetensors")):
        assert known.sigma_range == (0.1, 0.1)
        assert FlowDenoiser(known)(x, 0.1).isfinite().all()
        with pytest.raises(ValueError, match="expected sigma = 0.1, for which the prior was trained; got 0.2"):
            FlowDenoiser(known)(x, 0.2)
    fit_flow(flow, x, epochs=1, verbose=False)  # a density of clean images now
    assert prior.sigma_range is None
    fit_flow(prior, x, sigma=0.2, epochs=1, verbose=False)
    assert prior.sigma_range == (0.2, 0.2)


def test_a_conditional_flow_knows_its_level_at_fixed_conditions():
    x = torch.rand(8, 1, 8, 8)
    flow = image_flow((1, 8, 8), 2, 1, 4, activation="silu", dims_c=[(1, 8, 8)], generator=torch.Generator())
    fit_flow(flow, x, c=x, sigma=0.1, epochs=1, verbose=False)
    given = FlowDenoiser(FlowPrior(flow).given(x))
    assert given(x, 0.1).isfinite().all()
    with pytest.raises(ValueError, match="expected sigma = 0.1, for which the prior was trained"):
        given(x, 0.5)
