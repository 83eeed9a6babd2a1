r"""
One flow for two kinds of images
================================

A flow that is told what it looks at: one conditional flow learns the density of faces and that of other images, from 80 of
each. Its condition is an image of ones (a face) or of zeros (another image). Two things follow from it without further training:
what an unseen image shows, by Bayes' rule, and recoveries from few measurements under either condition.

The images are scikit-image's ``lfw_subset``, 24x24: 0 to 79 of each kind are learned, 80 to 89 choose the epoch and the strength
of the recovery, 90 to 99 are the test.
"""

import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import skimage.data
import torch

from deepinv_flows import FlowPrior, LatentMAP, fit_flow, image_flow

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
SHAPE, MEASUREMENTS = (1, 24, 24), 192
EPOCHS, ITERATIONS = (2, 5) if SHORT else (40, 100)
start = time.perf_counter()

images = torch.from_numpy(skimage.data.lfw_subset()).float()[:, None, :24, :24]
kinds = {"face": images[:100], "other": images[100:]}
psnr = dinv.metric.PSNR()

# %%
# A condition is an image, here one number at each pixel. ``dims_c`` announces it to the flow.


def told(kind, n):
    return torch.full((n, *SHAPE), float(kind == "face"))


def part(first, last):
    x = torch.cat([x[first:last] for x in kinds.values()])
    return x, torch.cat([told(kind, last - first) for kind in kinds])


(learn, c), (held_out, eval_c) = part(0, 80), part(80, 90)
flow = image_flow(SHAPE, 2, 6, 32, dims_c=[SHAPE], generator=torch.Generator().manual_seed(0))
fit_flow(flow, learn, held_out, c=c, eval_c=eval_c, epochs=EPOCHS, batch_size=16)
prior = FlowPrior(flow.requires_grad_(False))

# %%
# What does an unseen image show? With both kinds equally likely beforehand, Bayes' rule compares the two densities.

right, margins = 0, {}
for kind, x in kinds.items():
    x = x[90:]
    nats = {k: prior(x, c=told(k, len(x))) for k in kinds}
    margins[kind] = (nats["other"] - nats["face"]).tolist()  # log-odds of a face
    right += sum((margin > 0) == (kind == "face") for margin in margins[kind])
total = sum(len(values) for values in margins.values())
print(f"{right} of {total} unseen images are named rightly")

# %%
# Recovery from a third as many random measurements as pixels, told the truth and told the contrary.


def sensing(seed):
    noise = dinv.physics.GaussianNoise(0.005, rng=torch.Generator().manual_seed(seed))
    return dinv.physics.CompressedSensing(MEASUREMENTS, SHAPE, noise_model=noise, rng=torch.Generator().manual_seed(0))


def recover(x, kind, strength, seed):
    physics = sensing(seed)
    options = dict(penalty="squared", max_iter=ITERATIONS, verbose=False)
    return LatentMAP(prior, dinv.optim.L2(0.005), strength, **options)(physics(x), physics, c=told(kind, len(x))).clamp(
        0, 1
    )


faces = kinds["face"]
scores = {s: float(psnr(recover(faces[80:90], "face", s, 0), faces[80:90]).mean()) for s in (0.3, 1.0, 3.0)}
strength = max(scores, key=lambda s: (round(scores[s], 2), s))  # of equals, the strongest
print("PSNR on held-out faces:", {s: round(value, 2) for s, value in scores.items()})
found = {k: recover(faces[90:], k, strength, 1) for k in kinds}
figures = {f"told {k}": round(float(psnr(x, faces[90:]).mean()), 2) for k, x in found.items()}
print("PSNR of unseen faces:", figures)

# %%
# Above unseen faces and their recoveries; below the log-odds of each unseen image.

figure = plt.figure(figsize=(9, 7), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=[1.6, 1])
axes = above.subplots(3, 8)
for row, x in zip(axes, (faces[90:], *found.values())):
    for axis, image in zip(row, x):
        axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([]), axis.set_yticks([])
for axis, name in zip(axes[:, 0], ("truth", *figures)):
    axis.set_ylabel(name, fontsize=9)
axis = below.subplots()
for k, (kind, values) in enumerate(margins.items()):
    axis.plot(values, [k] * len(values), "o", label=kind)
axis.axvline(0, color="gray", linewidth=0.8)
axis.set_yticks([0, 1], list(margins))
axis.set_ylim(-0.6, 1.6)
axis.set_xlabel("log-odds of a face, in nats")
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "conditional_flow.png", dpi=160)
print("figure:", OUTPUT / "conditional_flow.png")
figures |= {"named rightly": right, "of": total, "seconds": round(time.perf_counter() - start, 1)}
print(json.dumps({**figures, "threads": torch.get_num_threads()}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/conditional_flow.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/conditional_flow.png'
