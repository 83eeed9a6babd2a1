"""Five problems with three starts each, on photographs of gravel that the shipped flow never saw, for ``solvers.py --starts``."""

import deepinv as dinv
import skimage.data
import torch
from deepinv.physics.functional import gaussian_blur

from deepinv_flows import PatchNR

NOISE = {"deblurring": 0.01, "superresolution": 0.01, "ct": 0.05, "inpainting": 0.01, "denoising": 0.1}
STRENGTH = 0.2  # of the prior, in units of noise^2 H W / p^2


class PerChannel(dinv.optim.Prior):
    """The mean of a prior of grey images over the channels of a colour image."""

    def __init__(self, prior: PatchNR):
        super().__init__()
        self.explicit_prior, self.prior, self.patch_size = True, prior, prior.patch_size

    def _grey(self, x):
        return x.reshape(-1, 1, *x.shape[2:])

    def fn(self, x, *args, **kwargs):
        return self.prior(self._grey(x)).view(x.shape[0], -1).mean(1)

    def grad(self, x, *args, **kwargs):
        return self.prior.grad(self._grey(x)).view_as(x) / x.shape[1]


def _physics(name: str, size: tuple[int, int, int]):
    noise = dinv.physics.GaussianNoise(NOISE[name], rng=torch.Generator().manual_seed(0))
    if name == "deblurring":
        return dinv.physics.Blur(filter=gaussian_blur(sigma=(1.5, 1.5)), padding="valid", noise_model=noise)
    if name == "superresolution":
        kernel = gaussian_blur(sigma=(2.0, 2.0))
        return dinv.physics.Downsampling(size, filter=kernel, factor=4, padding="circular", noise_model=noise)
    if name == "ct":
        return dinv.physics.Tomography(angles=20, img_width=size[-1], noise_model=noise, normalize=False)
    if name == "inpainting":
        mask = (torch.rand(size, generator=torch.Generator().manual_seed(1)) > 0.6).float()
        return dinv.physics.Inpainting(size, mask=mask, noise_model=noise)
    return dinv.physics.Denoising(noise)


def problem(name: str, side: int):
    """
    One of :data:`NOISE`.

    :return: physics, measurements, prior, its strength, and starts by name: the default A^T y; an implausible image, uniform
        noise; and a guess in the domain of the images.
    """
    channels = 3 if name == "deblurring" else 1
    gravel = torch.from_numpy(skimage.data.gravel()).float() / 255
    x = torch.stack([gravel[300 : 300 + side, k * side : (k + 1) * side] for k in range(channels)])[None]
    physics, prior = _physics(name, x.shape[1:]), PatchNR(pretrained="gravel").requires_grad_(False)
    prior = prior if channels == 1 else PerChannel(prior)
    y = physics(x)
    if name in ("deblurring", "superresolution"):
        guess = torch.nn.functional.interpolate(y, x.shape[2:], mode="bicubic")
    else:
        guess = physics.A_dagger(y)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    lambda_reg = STRENGTH * NOISE[name] ** 2 * channels * side**2 / prior.patch_size**2
    return physics, y, prior, lambda_reg, {"A^T y": physics.A_adjoint(y), "noise": noise, "guess": guess}
