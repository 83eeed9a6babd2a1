r"""
Superresolution with a PatchNR
==============================

A normalizing flow that has seen the patches of half a photograph reconstructs the other half, blurred, subsampled by 4 and
noisy, better than bicubic interpolation and total variation do.

The photograph is *gravel* (CC0), which scikit-image brings along. The shipped weights were trained on its rows 0 to 191
(``train_gravel.py``); rows 192 to 255 tune each method; rows 256 to 511 are the test.
"""

import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import skimage.data
import torch

from deepinv_flows import PatchNR

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
ITERATIONS = 20 if SHORT else 100
NOISE = 0.01
start = time.perf_counter()

# %%
# The physics is deepinv's: a Gaussian blur of 2 pixels, every fourth pixel kept, 1% noise.

gravel = torch.from_numpy(skimage.data.gravel()).float()[None, None] / 255
held_out, test = gravel[..., 192:256, :], gravel[..., 256:, :]


def make_physics(x, seed):
    kernel = dinv.physics.functional.gaussian_blur(sigma=(2.0, 2.0))
    noise = dinv.physics.GaussianNoise(NOISE, rng=torch.Generator().manual_seed(seed))
    return dinv.physics.Downsampling(x.shape[1:], filter=kernel, factor=4, padding="circular", noise_model=noise)


# %%
# Three methods. The blur is centred on the pixels that are kept, so bicubic interpolation has to put pixel k of y at
# pixel 4k of x, not in the middle of a 4x4 block.


def bicubic(y, physics, x_size):
    rows, cols = (torch.arange(n) / 4 / (m - 1) * 2 - 1 for n, m in zip(x_size, y.shape[2:]))
    grid = torch.stack(torch.meshgrid(rows, cols, indexing="ij")[::-1], -1)[None]
    return torch.nn.functional.grid_sample(y, grid, mode="bicubic", padding_mode="border", align_corners=True)


def total_variation(y, physics, x_init, lambda_reg):
    model = dinv.optim.FISTA(
        data_fidelity=dinv.optim.L2(),
        prior=dinv.optim.TVPrior(n_it_max=20),
        lambda_reg=lambda_reg,
        stepsize=0.99 / float(physics.compute_sqnorm(x_init, verbose=False)),
        max_iter=ITERATIONS,
        early_stop=False,
    )
    return model(y, physics, init=(x_init, x_init))


def patchnr(y, physics, x_init, strength):
    """Adam on |Ax - y|^2 / 2 + lambda g(x), with lambda in units of noise^2 H W / p^2 (see the docstring of PatchNR)."""
    height, width = x_init.shape[2:]
    prior = PatchNR(pretrained="gravel", n_patches=height * width // 4).requires_grad_(False)
    lambda_reg = strength * NOISE**2 * height * width / prior.patch_size**2
    data_fidelity = dinv.optim.L2()
    x = x_init.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)
    for _ in range(ITERATIONS):
        optimizer.zero_grad()
        loss = data_fidelity(x, y, physics) + lambda_reg * prior(x)
        loss.sum().backward()
        optimizer.step()
        schedule.step()
    return x.detach()


# %%
# Each is tuned where the flow was not trained, and the whole grid is shown.

psnr, ssim = dinv.metric.PSNR(), dinv.metric.SSIM()
physics = make_physics(held_out, seed=0)
y = physics(held_out)
x_init = bicubic(y, physics, held_out.shape[2:])
chosen = {}
for method, grid in (
    (total_variation, [0.00001, 0.00003, 0.0001, 0.0003, 0.001]),
    (patchnr, [0.02, 0.05, 0.1, 0.2, 0.4]),
):
    scores = {value: float(psnr(method(y, physics, x_init, value).clamp(0, 1), held_out)) for value in grid}
    chosen[method] = max(scores, key=scores.get)
    print(f"{method.__name__}, PSNR on the held-out rows:", {k: round(v, 2) for k, v in scores.items()})

# %%
# The test.

physics = make_physics(test, seed=1)
y = physics(test)
x_init = bicubic(y, physics, test.shape[2:])
reconstructions = {"bicubic": x_init}
for method, value in chosen.items():
    began = time.perf_counter()
    reconstructions[method.__name__] = method(y, physics, x_init, value)
    print(f"{method.__name__}: {time.perf_counter() - began:.1f} s")
figures = {
    name: {"psnr": round(float(psnr(x.clamp(0, 1), test)), 2), "ssim": round(float(ssim(x.clamp(0, 1), test)), 4)}
    for name, x in reconstructions.items()
}

# %%
# What it looks like: the whole test image above, a detail below.

titles = {"bicubic": "bicubic", "total_variation": "total variation", "patchnr": "PatchNR"}
panels = {"measurement": torch.nn.functional.interpolate(y, scale_factor=4, mode="nearest")}
panels |= {
    f"{titles[n]}\n{figures[n]['psnr']:.2f} dB, SSIM {figures[n]['ssim']:.3f}": x for n, x in reconstructions.items()
}
panels["ground truth"] = test
top, left, side = 96, 208, 96
figure, axes = plt.subplots(2, len(panels), figsize=(3.2 * len(panels), 5.2), gridspec_kw={"height_ratios": [1, 2]})
for (whole, detail), (title, x) in zip(axes.T, panels.items()):
    x = x[0, 0].clamp(0, 1)
    gray = {"cmap": "gray", "vmin": 0, "vmax": 1}
    whole.imshow(x, **gray)
    whole.add_patch(plt.Rectangle((left, top), side, side, fill=False, color="orange"))
    detail.imshow(x[top : top + side, left : left + side], **gray)
    whole.set_title(title)
    for axis in (whole, detail):
        axis.set_axis_off()
figure.tight_layout()
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "patchnr_superresolution.png", dpi=110)
print("figure:", OUTPUT / "patchnr_superresolution.png")
print(json.dumps({**figures, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/patchnr_superresolution.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/patchnr_superresolution.png'
