r"""
Recovery in the latent space of a flow
======================================

A small invertible flow that has seen 80 faces recovers faces from few random measurements, better than total variation and
wavelets, which know what images are like but nothing of faces. Yet it can represent any image, so it recovers others too: here
flat pieces of walls and clothes, on which total variation is at home and one to two decibels ahead. (Where every pixel is seen,
the flow gains little on faces either: in denoising at 10% it stays half a decibel behind total variation.)

The images are scikit-image's ``lfw_subset``: 100 faces and 100 other cut-outs, grey, here 24x24. The shipped weights were trained
on faces 0 to 79 (``train_lfw.py``); faces 80 to 89 tune each method; the test is on faces and others that nothing has seen.
"""

import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import skimage.data
import torch
import torch.nn.functional as F

from deepinv_flows import FlowPrior, LatentMAP

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
SHAPE = (1, 24, 24)
ITERATIONS, N_TEST = (20, 4) if SHORT else (100, 10)
MEASUREMENTS = [192] if SHORT else [96, 192, 384]
start = time.perf_counter()

images = torch.from_numpy(skimage.data.lfw_subset()).float()[:, None, :24, :24]
held_out, faces, others = images[80:90], images[90:100][:N_TEST], images[190:200][:N_TEST]
prior = FlowPrior(pretrained="lfw").requires_grad_(False)
psnr = dinv.metric.PSNR()

# %%
# What the flow believes in: the number of bits it needs for a pixel of each kind of image.

for name, x in (("faces", faces), ("others", others)):
    bits = prior(x) / x[0].numel() / torch.log(torch.tensor(2.0)) + torch.log2(torch.tensor(255.0))
    print(f"{name}: {bits.mean():.2f} bits per dimension")

# %%
# The problem is deepinv's: m random measurements of 576 pixels, with little noise.


def sensing(m, seed):
    noise = dinv.physics.GaussianNoise(0.005, rng=torch.Generator().manual_seed(seed))
    return dinv.physics.CompressedSensing(m, SHAPE, noise_model=noise, rng=torch.Generator().manual_seed(0))


# %%
# Three methods, with one number to tune each: the flow's is the weight of the penalty on the latent, the others' that of the
# prior, divided by the number of measurements.


def by_prior(prior):
    def reconstruct(y, physics, strength):
        norm = float(physics.compute_sqnorm(torch.ones(1, *SHAPE), max_iter=1000, verbose=False))
        model = dinv.optim.FISTA(
            data_fidelity=dinv.optim.L2(),
            prior=prior,
            lambda_reg=strength / y.shape[-1],
            stepsize=0.99 / norm,
            max_iter=5 * ITERATIONS,
            early_stop=False,
        )
        return model(y, physics)

    return reconstruct


def by_flow(y, physics, strength):
    sigma = float(physics.noise_model.sigma)
    options = dict(penalty="squared", max_iter=ITERATIONS, verbose=False)
    return LatentMAP(prior, dinv.optim.L2(sigma), strength, **options)(y, physics)


class HaarPrior(dinv.optim.Prior):
    """The l1 norm of Haar coefficients on three scales."""

    explicit_prior = True

    def prox(self, x, *args, gamma=1.0, **kwargs):
        kernel = 0.5 * torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1.0]]).view(4, 1, 2, 2)
        details = []
        for _ in range(3):
            x, *rest = F.conv2d(x, kernel, stride=2).split([1, 3], 1)
            details.append(F.softshrink(rest[0], float(gamma)))
        for detail in reversed(details):
            x = F.conv_transpose2d(torch.cat([x, detail], 1), kernel, stride=2)
        return x

    def fn(self, x, *args, **kwargs):
        return x.new_zeros(len(x))


METHODS = {
    "total variation": (by_prior(dinv.optim.TVPrior(n_it_max=20)), [2.0, 4.0, 6.0, 12.0]),
    "wavelets": (by_prior(HaarPrior()), [0.6, 2.0, 6.0, 20.0]),
    "flow": (by_flow, [0.1, 1.0, 3.0]),
}

# %%
# Tune on the held-out faces, show the grid; then the test, on faces and on images that are not faces.

figures, pictures = {}, {}
for m in MEASUREMENTS:
    for name, (method, grid) in METHODS.items():
        physics = sensing(m, seed=0)
        y = physics(held_out)
        scores = {value: float(psnr(method(y, physics, value).clamp(0, 1), held_out).mean()) for value in grid}
        chosen = max(scores, key=scores.get)
        print(f"{m} measurements, {name}, PSNR on held-out faces:", {k: round(v, 2) for k, v in scores.items()})
        physics = sensing(m, seed=1)
        for kind, x in (("faces", faces), ("others", others)):
            x_net = method(physics(x), physics, chosen).clamp(0, 1)
            figures.setdefault(kind, {}).setdefault(name, []).append(round(float(psnr(x_net, x).mean()), 2))
            pictures[m, kind, name] = x_net

# %%
# What it looks like: above faces and others from a third of the measurements, below the decibels for each number of them.

m = 192
figure = plt.figure(figsize=(10, 8.5), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=[1.35, 1])
axes = above.subplots(len(METHODS) + 1, 8)
for k, column in enumerate(axes.T):
    kind, truth = ("faces", faces) if k < 4 else ("others", others)
    for axis, x in zip(column, [truth, *(pictures[m, kind, name] for name in METHODS)]):
        axis.imshow(x[k % 4, 0], cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([]), axis.set_yticks([])
for axis, name in zip(axes[:, 0], ["truth", *METHODS]):
    axis.set_ylabel(name, fontsize=9)
above.suptitle(f"{m} measurements of 576 pixels")
for axis, kind in zip(below.subplots(1, 2, sharey=True), figures):
    for name, values in figures[kind].items():
        axis.plot(MEASUREMENTS, values, "o-", label=name)
    axis.set_xticks(MEASUREMENTS)
    axis.set_xlabel("measurements")
    axis.set_ylabel("PSNR (dB)")
    axis.set_title("unseen faces" if kind == "faces" else "images that are not faces")
    axis.legend()
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "latent_compressed_sensing.png", dpi=160)
print("figure:", OUTPUT / "latent_compressed_sensing.png")
figures["measurements"] = MEASUREMENTS
print(json.dumps({**figures, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/latent_compressed_sensing.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/latent_compressed_sensing.png'
