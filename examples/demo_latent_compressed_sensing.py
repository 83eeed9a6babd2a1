r"""
Recovery in the latent space of a flow
======================================

A small invertible flow that has seen 80 faces denoises faces and recovers them from few random measurements. It can represent any
image, so it also recovers images that are no faces; total variation and wavelets have no idea of either.

The images are scikit-image's ``lfw_subset``: 100 faces and 100 other cut-outs, grey, here 24x24. The shipped weights were trained
on faces 0 to 79 (``train_lfw.py``); faces 80 to 89 tune each method; the test is on faces and others that nothing has seen.
"""

import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib
import skimage.data
import torch
import torch.nn.functional as F

from deepinv_flows import FlowPrior, LatentMAP

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
OUTPUT = Path(__file__).parent / ("output/short" if SHORT else "output")
ITERATIONS = 20 if SHORT else 100
SHOWN = 4 if SHORT else 10
start = time.perf_counter()

images = torch.from_numpy(skimage.data.lfw_subset()).float()[:, None, :24, :24]
held_out, faces, others = images[80:90], images[90:100][:SHOWN], images[190:200][:SHOWN]
prior = FlowPrior(pretrained="lfw").requires_grad_(False)
psnr = dinv.metric.PSNR()

# %%
# What the flow believes in: samples, at a temperature of 0.7. And the number of bits it needs for a pixel of each kind of image.

samples = prior.sample(SHOWN, std=0.7, generator=torch.Generator().manual_seed(0))
for name, x in (("faces", faces), ("others", others)):
    bits = prior(x) / x[0].numel() / torch.log(torch.tensor(2.0)) + torch.log2(torch.tensor(255.0))
    print(f"{name}: {bits.mean():.2f} bits per dimension")

# %%
# Two problems, both deepinv's: noise of standard deviation 0.1, and 192 random measurements of 576 pixels.


def denoising(seed):
    return dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1, rng=torch.Generator().manual_seed(seed)))


def sensing(seed, m=192):
    noise = dinv.physics.GaussianNoise(0.005, rng=torch.Generator().manual_seed(seed))
    rng = torch.Generator().manual_seed(0)
    return dinv.physics.CompressedSensing(m=m, img_size=(1, 24, 24), noise_model=noise, rng=rng)


# %%
# Three methods, with one number to tune each. The flow's is the weight of the penalty on the latent.


def by_prior(prior):
    def reconstruct(y, physics, strength):
        shape = (1, 24, 24)
        norm = (
            1.0
            if isinstance(physics, dinv.physics.Denoising)
            else float(physics.compute_sqnorm(torch.ones(1, *shape), verbose=False))
        )
        model = dinv.optim.FISTA(
            data_fidelity=dinv.optim.L2(), prior=prior, lambda_reg=strength, stepsize=0.99 / norm, max_iter=ITERATIONS,
            early_stop=False,
        )  # fmt: skip
        return model(y, physics)

    return reconstruct


def by_flow(y, physics, strength):
    sigma = physics.noise_model.sigma
    model = LatentMAP(
        prior, dinv.optim.L2(sigma=float(sigma)), lambda_reg=strength, penalty="squared", max_iter=ITERATIONS
    )
    return model(y, physics)


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
    "total variation": (
        by_prior(dinv.optim.TVPrior(n_it_max=20)),
        {"denoising": [0.03, 0.06, 0.1], "sensing": [0.03, 0.1, 0.2]},
    ),
    "wavelets": (by_prior(HaarPrior()), {"denoising": [0.06, 0.1, 0.15], "sensing": [0.01, 0.03, 0.1]}),
    "flow": (by_flow, {"denoising": [1.0, 2.0, 4.0, 8.0], "sensing": [0.1, 1.0, 3.0]}),
}  # fmt: skip

# %%
# Tune on the held-out faces, show the grid; then the test, on faces and on images that are none.

figures, pictures = {}, {}
for problem, make_physics in (("denoising", denoising), ("sensing", sensing)):
    for name, (method, grids) in METHODS.items():
        physics = make_physics(seed=0)
        y = physics(held_out)
        scores = {
            value: float(psnr(method(y, physics, value).clamp(0, 1), held_out).mean()) for value in grids[problem]
        }
        chosen = max(scores, key=scores.get)
        print(f"{problem}, {name}, PSNR on held-out faces:", {k: round(v, 2) for k, v in scores.items()})
        for kind, x in (("faces", faces), ("others", others)):
            physics = make_physics(seed=1)
            x_net = method(physics(x), physics, chosen).clamp(0, 1)
            figures[f"{problem}, {kind}, {name}"] = round(float(psnr(x_net, x).mean()), 2)
            pictures[problem, kind, name] = x_net

# %%
# What it looks like: rows are the truth and the three methods, on three images of each kind.

rows = ["truth", *METHODS]
figure, axes = plt.subplots(len(rows) + 1, 12, figsize=(13, 6.2))
for column in range(12):
    problem, kind = (("denoising", "sensing")[column // 6], ("faces", "others")[column // 3 % 2])
    k = column % 3
    shown = [faces if kind == "faces" else others, *(pictures[problem, kind, name] for name in METHODS)]
    for axis, x in zip(axes[:, column], [*shown, samples]):
        axis.imshow(x[(k if x is not samples else column % len(samples)), 0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([]), axis.set_yticks([])
    if k == 1:
        best = {name: figures[f"{problem}, {kind}, {name}"] for name in METHODS}
        axes[0, column].set_title(
            f"{problem}, {kind}\n" + " / ".join(f"{v:.1f}" for v in best.values()) + " dB", fontsize=8
        )
for axis, name in zip(axes[:, 0], [*rows, "samples"]):
    axis.set_ylabel(name, fontsize=8)
figure.tight_layout()
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "latent_compressed_sensing.png", dpi=110)
print("figure:", OUTPUT / "latent_compressed_sensing.png")
print(json.dumps({**figures, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))
