"""Gradient descent on latents: known answers and starts."""

import deepinv as dinv
import pytest
import torch
import zuko
from iterator_cases import F64, L2, PHYSICS, STEP, TIKHONOV, A, Decoder, N, Y, random

from deepinv_flows import (
    LatentGD,
    glow_flow,
    unfolded_builder,
)


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


def test_flows_of_other_conventions_are_generators():
    torch.manual_seed(0)
    nice = zuko.flows.NICE(N, transforms=2, hidden_features=[8]).double()
    y, physics = random(2, N), dinv.physics.Denoising()
    assert torch.allclose(
        LatentGD(nice, stepsize=1e-12, max_iter=1)(y, physics), nice().transform.inv(0 * y), atol=1e-8
    )
    parallel = torch.nn.DataParallel(image_flow())
    assert torch.equal(
        LatentGD(parallel, L2, max_iter=2)(Y, PHYSICS), LatentGD(image_flow(), L2, max_iter=2)(Y, PHYSICS)
    )
