r"""
How sure is the reconstruction?
===============================

A PatchNR is a density, so it tells not only the most likely image but how much less likely others are. Langevin sampling
(deepinv's ``SKRockIterator``) draws images that fit the measurements: their mean is the reconstruction, their standard deviation
its error bar. A photograph of gravel is measured with noise, and with fewer and fewer pixels from left to right. The error bars
should grow from left to right (and at the border, where fewer patches hold a pixel), and be right: of all intervals said to hold
the true grey level with a probability of 90%, 90% should.

The photograph is scikit-image's *gravel* (CC0). The shipped weights were trained on its rows 0 to 191; in rows 192 to 255 the one
number of the posterior is tuned; rows 256 to 511 are the test.
"""

import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import skimage.data
import torch
from deepinv.sampling import BaseSampling, SKRockIterator

from deepinv_flows import PatchNR

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
SIDE, SAMPLES = (16, 20) if SHORT else (48, 100)
NOISE = 0.05
start = time.perf_counter()

# %%
# The measurement: of the pixels of a column all are seen on the left, a tenth on the right.

gravel = torch.from_numpy(skimage.data.gravel()).float()[None, None] / 255
held_out = gravel[..., 200 : 200 + SIDE // 2, 100 : 100 + SIDE]
test = gravel[..., 330 : 330 + SIDE, 250 : 250 + SIDE]


def make_physics(x, seed):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(x.shape[1:], generator=rng) < torch.linspace(1, 0.1, x.shape[-1])
    noise = dinv.physics.GaussianNoise(NOISE, rng=rng)
    return dinv.physics.Inpainting(x.shape[1:], mask=mask.float(), noise_model=noise)


# %%
# The posterior is :math:`\exp(-\|Ax - y\|^2 / (2 \sigma^2) - \alpha g(x))`, with alpha in units of H W / p^2
# (see the docstring of PatchNR).
# Samples of several alphas, or several chains of one, are a batch. Each starts from the measurement, its gaps filled by its mean.
# Every second patch in each direction is enough, at a quarter of the time.

prior = PatchNR(pretrained="gravel", stride=2).requires_grad_(False)


def sample(y, physics, strengths, seed):
    mask, n = physics.mask, len(strengths)
    height, width = y.shape[2:]
    alpha = torch.tensor(strengths).view(n, 1, 1, 1) * height * width / prior.patch_size**2
    parameters = {"step_size": 0.01, "alpha": alpha, "inner_iter": 15, "eta": 0.05, "sigma": 0.0}
    sampler = BaseSampling(
        SKRockIterator(parameters, clip=(-0.5, 1.5)),
        dinv.optim.L2(sigma=NOISE),
        prior,
        max_iter=SAMPLES + SAMPLES // 2,
        burnin_ratio=1 / 3,
        thinning=1,
        history_size=True,
    )
    x_init = torch.where(mask > 0, y, y.sum() / mask.sum())
    sampler.sample(y.expand(n, -1, -1, -1), physics, x_init=x_init.repeat(n, 1, 1, 1), seed=seed)
    return torch.stack([state["x"] for state in sampler.get_chain()[1:]])  # the first is the start


# %%
# The strength is tuned where the flow was not trained: that one whose mean and standard deviation make the truth likeliest.

psnr = dinv.metric.PSNR()
STRENGTHS = [0.4, 0.6, 0.8, 1.0]


def surprise(samples, x):
    """Negative logarithm of the normal density with the samples' mean and variance, a mean over pixels."""
    return (((samples.mean(0) - x) ** 2 / samples.var(0) + samples.var(0).log()) / 2).mean((1, 2, 3))


def inside(samples, x, level):
    """Which pixels of x lie in the central interval that holds this part of the samples."""
    tail = (1 - level) / 2
    low, high = torch.quantile(samples, torch.tensor([tail, 1 - tail]), dim=0)
    return ((x >= low) & (x <= high)).float()


physics = make_physics(held_out, seed=0)
samples = sample(physics(held_out), physics, STRENGTHS, seed=0)
scores = surprise(samples, held_out)
strength = STRENGTHS[int(scores.argmin())]
for k, value in enumerate(STRENGTHS):
    found = samples[:, k : k + 1]
    quality = float(psnr(found.mean(0), held_out))
    covered = float(inside(found, held_out, 0.9).mean())
    print(f"strength {value}: surprise {scores[k]:.2f}, mean of {quality:.2f} dB, {covered:.0%} in the 90% intervals")

# %%
# The test: two chains, whose samples are put together.

physics = make_physics(test, seed=1)
y = physics(test)
chains = sample(y, physics, [strength, strength], seed=1)
samples = chains.flatten(0, 1)[:, None]
mean, std = samples.mean(0), samples.std(0)
error = (mean - test).abs()
levels = [0.1, 0.3, 0.5, 0.7, 0.9, 0.95]
coverage = {level: round(float(inside(samples, test, level).mean()), 3) for level in levels}
apart = float((chains[:, 0].mean(0) - chains[:, 1].mean(0)).square().mean().sqrt())
print(f"root mean square difference of the two chains' means: {apart:.3f}, mean standard deviation {std.mean():.3f}")

# pixels in eight groups of equal number, by their standard deviation
groups = std.flatten().argsort().chunk(8)
said = [float(std.flatten()[group].square().mean().sqrt()) for group in groups]
found = [float(error.flatten()[group].square().mean().sqrt()) for group in groups]
figures = {"psnr": round(float(psnr(mean.clamp(0, 1), test)), 2), "strength": strength, "coverage": coverage}

# %%
# What it looks like: the images above; below one sample, the error, and what the error bars are worth.

figure, axes = plt.subplots(2, 4, figsize=(10, 5.2), layout="constrained")
gray, hot = {"cmap": "gray", "vmin": 0, "vmax": 1}, {"cmap": "magma", "vmin": 0, "vmax": float(std.quantile(0.99))}
panels = {
    "ground truth": (test, gray),
    "measurement": (y, gray),
    f"mean of samples\n{figures['psnr']:.2f} dB": (mean, gray),
    "their standard\ndeviation": (std, hot),
    "one sample": (samples[-1], gray),
    "error of the mean": (error, hot),
}
for axis, (title, (image, colours)) in zip(axes.flat, panels.items()):
    shown = axis.imshow(image[0, 0].clamp(0, 1), **colours)
    axis.set_title(title, fontsize=11)
    axis.set_axis_off()
    if colours is hot:
        figure.colorbar(shown, ax=axis, shrink=0.8)
ideal = {"color": "0.7", "linestyle": "--", "zorder": 0}
axes[1, 2].plot([0, 1], [0, 1], **ideal)
axes[1, 2].plot(levels, list(coverage.values()), "o-")
axes[1, 2].set(
    xlabel="probability of the interval", ylabel="part of the pixels inside", title="calibration", aspect="equal"
)
axes[1, 3].plot([0, max(said)], [0, max(said)], **ideal)
axes[1, 3].plot(said, found, "o-")
axes[1, 3].set(xlabel="standard deviation", ylabel="root mean square error", title="error and error bar")
for axis in axes[1, 2:]:
    axis.title.set_fontsize(11)
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "patchnr_uncertainty.png", dpi=160)
print("figure:", OUTPUT / "patchnr_uncertainty.png")
print(json.dumps({**figures, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/patchnr_uncertainty.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/patchnr_uncertainty.png'
