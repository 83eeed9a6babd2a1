"""Consistency losses and the values that they estimate, for the splitting tests and the bias benchmark."""

import deepinv as dinv
import torch
from deepinv.loss import R2RLoss, SureGaussianLoss, SurePGLoss, SurePoissonLoss
from deepinv.physics.generator import BernoulliSplittingMaskGenerator, PhysicsGenerator
from deepinv.transform import Reflect, Rotate

from deepinv_flows import EquivariantSplittingLoss

SIZE, SIGMA, GAIN, ALPHA = (1, 6, 6), 0.3, 0.1, 0.3
DRAWS = 4000


class Linear(dinv.models.Reconstructor):
    """A dense linear map of A^T y, with a bias."""

    def __init__(self, size=SIZE, seed=0, dtype=torch.float32):
        super().__init__()
        source, n = torch.Generator().manual_seed(seed), torch.Size(size).numel()
        weight = torch.eye(n) * 0.7 + 0.1 * torch.randn(n, n, generator=source)
        self.weight = torch.nn.Parameter(weight.to(dtype))
        self.bias = torch.nn.Parameter(torch.rand(n, generator=source).to(dtype))

    def forward(self, y, physics, **kwargs):
        x = physics.A_adjoint(y)
        return (x.flatten(1) @ self.weight.T + self.bias).view_as(x)


def masks(size=SIZE, ratio=0.7, **kwargs):
    return BernoulliSplittingMaskGenerator(size, ratio, **kwargs)


def inpainting(noise=None, size=SIZE, kept=0.8):
    mask = torch.rand(1, *size, generator=torch.Generator().manual_seed(5)).lt(kept).float()
    return dinv.physics.Inpainting(size, mask=mask, noise_model=noise)


class Convolution(dinv.models.Reconstructor):
    def __init__(self, channels=1):
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, y, physics, **kwargs):
        x = physics.A_adjoint(y)
        if x.ndim == 4:
            return self.layer(x)
        return self.layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class FixedMasks(PhysicsGenerator):
    """A generator of given masks, one after another."""

    def __init__(self, *masks):
        super().__init__()
        self.queue = [m.float() for m in masks]

    def step(self, batch_size=1, input_mask=None, **kwargs):
        self.queue = self.queue[1:] + self.queue[:1]
        return {"mask": self.queue[-1].expand(batch_size, *self.queue[-1].shape[1:]).clone()}


def rotations(full=False):
    return Rotate(n_trans=4 if full else 1, multiples=90, positive=True) * Reflect(n_trans=2 if full else 1, dim=[-1])


def adapted(loss, model=None):
    return loss.adapt_model(Linear() if model is None else model)


def run(loss, model, y, physics, **kwargs):
    return loss(x_net=model(y, physics, update_parameters=True), y=y, physics=physics, model=model, **kwargs)


def full_loss(**kwargs):
    return EquivariantSplittingLoss(
        mask_generator=masks(), transform=rotations(), eval_transform=rotations(full=True), **kwargs
    )


def biased(values):
    """Whether the mean of values (draws,) is more than 3 standard errors from zero."""
    return abs(values.mean()) > 3 * values.std() / len(values) ** 0.5


def gaussian():
    return dinv.physics.GaussianNoise(SIGMA)


def poisson():
    return dinv.physics.PoissonNoise(GAIN)


def gamma():
    return dinv.physics.GammaNoise(10.0)


def poisson_gaussian():
    return dinv.physics.PoissonGaussianNoise(sigma=SIGMA, gain=GAIN)


# tau is large, since the reconstructor is linear and divergences by differences then exact
CONSISTENCY = {
    "sure": (gaussian, lambda: SureGaussianLoss(SIGMA, tau=0.5)),
    "unsure": (gaussian, lambda: SureGaussianLoss(SIGMA, tau=0.5, unsure=True, step_size=0.0)),
    "poisson": (poisson, lambda: SurePoissonLoss(GAIN, tau=0.5)),
    "pg": (poisson_gaussian, lambda: SurePGLoss(SIGMA, GAIN, tau1=0.5, tau2=0.5, second_derivative=True)),
    "pg_unsure": (poisson_gaussian, lambda: SurePGLoss(SIGMA, GAIN, tau1=0.5, unsure=True, step_size=(0.0, 0.0))),
    "r2r": (gaussian, lambda: R2RLoss(alpha=ALPHA, eval_n_samples=1)),
    "r2r_poisson": (poisson, lambda: R2RLoss(alpha=ALPHA, eval_n_samples=1)),
    "r2r_gamma": (gamma, lambda: R2RLoss(alpha=ALPHA, eval_n_samples=1)),
}


def variance(noise, x):
    of_x = {poisson: GAIN * x, poisson_gaussian: GAIN * x + SIGMA**2, gamma: x**2 / 10.0}
    return of_x.get(noise, SIGMA**2 + 0 * x)


def losses_and_truths(loss_class, name, x, transform=None, evaluate=False, draws=DRAWS, **options):
    """The loss and the supervised value that it estimates in theory, (draws,) each, with a noise and a mask for each draw."""
    noise, make = CONSISTENCY[name]
    consistency = make()
    loss = loss_class(mask_generator=masks(), consistency_loss=consistency, transform=transform, **options)
    model, physics = loss.adapt_model(Linear()), inpainting(noise(), kept=1.0 if noise is gamma else 0.8)
    model.train(not evaluate)
    y = physics(x.expand(draws, *SIZE))
    x_net = model(y, physics, update_parameters=True)
    value = loss(x_net=x_net, y=y, physics=physics, model=model)
    splits = model.get_splits() if loss_class is EquivariantSplittingLoss else None
    truth = 0.0
    for k, mask in enumerate(model.get_masks()):
        first = mask * physics.mask
        estimate = x_net if splits is None or splits[k].x_net is None else splits[k].x_net
        r2r_factor = 1 / ALPHA if isinstance(consistency, R2RLoss) else 0.0
        for part, noisy in ((first, r2r_factor), (physics.mask - first, 1.0)):
            expected = (estimate - x) ** 2 + noisy * variance(noise, x)
            truth = truth + (part * expected).flatten(1).sum(1) / part.flatten(1).sum(1) / len(model.get_masks())
    return value.detach(), truth.detach()
