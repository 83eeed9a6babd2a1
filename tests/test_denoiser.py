"""A flow as a denoiser: exact for Gaussians, a gradient field, trained by the Trainer, at home in plug-and-play."""

import copy
import math
import pickle

import deepinv as dinv
import pytest
import torch
from cases import central_difference

from deepinv_flows import FlowDenoiser, FlowPrior, LatentMAP, fit_flow, image_flow

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

    def __init__(self):
        super().__init__()
        root = torch.linalg.cholesky(covariance() + SIGMA**2 * torch.eye(16).double())
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


def test_training_nears_the_least_error():
    images = gaussian_images(1500, torch.float32)
    x = images[:500].double()
    y = x + SIGMA * torch.randn(x.shape, generator=generator(5), dtype=x.dtype)
    least = float(((y.flatten(1) @ wiener().T - x.flatten(1)) ** 2).mean())
    flow = image_flow((1, 4, 4), 1, 4, 12, activation="silu", generator=generator())
    fit_flow(flow, images[500:], sigma=SIGMA, epochs=6, batch_size=32, lr=1e-2, augment=False, verbose=False)
    with torch.no_grad():
        error = float(((FlowDenoiser(FlowPrior(flow))(y.float(), SIGMA) - x) ** 2).mean())
    assert 0.99 * least < error < 1.05 * least


def test_interrupted_training_resumes(tmp_path):
    images, flow = gaussian_images(64, torch.float32), image_flow((1, 4, 4), 1, 2, 8, generator=generator())
    options = dict(sigma=SIGMA, verbose=False, save_path=tmp_path, resume=True)
    fit_flow(flow, images, images, epochs=2, **options)
    fit_flow(flow, images, images, epochs=3, **options)
    (last,) = (torch.load(path, weights_only=False) for path in tmp_path.glob("run_1/*/ckp_[0-9]*"))
    assert last["epoch"] == 2 and len(last["loss"]["SupLoss"]) == len(last["eval_loss"]["SupLoss"]) == 1


def test_plug_and_play_and_the_trainer_take_it():
    x = gaussian_images(2, torch.float32)
    flow = image_flow((1, 4, 4), 1, 2, 8, activation="silu", generator=generator())
    denoiser = FlowDenoiser(
        FlowPrior(fit_flow(flow, gaussian_images(256, torch.float32), sigma=0.2, epochs=4, verbose=False))
    )
    physics = dinv.physics.Inpainting((1, 4, 4), mask=(torch.rand(1, 4, 4, generator=generator()) > 0.3).float())
    model = dinv.optim.PGD(
        data_fidelity=dinv.optim.L2(), prior=dinv.optim.PnP(denoiser), stepsize=1.0, g_param=0.2, max_iter=30
    )
    y = physics(x)
    assert ((model(y, physics) - x) ** 2).mean() < ((y - x) ** 2).mean()
    reconstructor = dinv.models.ArtifactRemoval(denoiser, mode="direct")
    assert reconstructor(x, dinv.physics.Denoising(dinv.physics.GaussianNoise(0.2))).shape == x.shape


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


def test_what_else_is_refused():
    flow = small_flow()
    for prior, found in ((flow, "ImageFlow"), (FlowPrior(flow, per_dim=True), "per_dim=True")):
        with pytest.raises(TypeError, match=f"expected a FlowPrior in nats; got .*{found}"):
            FlowDenoiser(prior)
    with pytest.raises(ValueError, match="noise level sigma >= 0; got -1"):
        fit_flow(flow, gaussian_images(2), sigma=-1)
    with pytest.raises(ValueError, match="finite"):
        FlowDenoiser(FlowPrior(flow))(torch.full((1, 1, 4, 4), math.nan, dtype=torch.float64), SIGMA)


def test_latent_map_shares_the_flow():
    """The density that denoises is one to sample and to recover with."""
    flow, y = small_flow(), gaussian_images(1)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    assert torch.isfinite(LatentMAP(flow, dinv.optim.L2(sigma=0.1), max_iter=3)(y, physics)).all()
