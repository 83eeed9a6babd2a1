r"""
Learned primal-dual tomography
==============================

Adler and Oktem's learned primal-dual reconstruction is one class, :class:`deepinv_flows.LearnedPrimalDual`, trained by deepinv's
``Trainer``: here on random ellipses seen from 30 directions out of 120 degrees, with noise. A third of the directions is missing,
and with it every edge along them. The rivals are filtered back-projection and total variation by
:class:`deepinv_flows.CondatVu`, tuned on training phantoms. The tests are unseen phantoms of the training's kind, and Shepp and
Logan's, which is not.
"""

import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import skimage.data
import skimage.transform
import torch

from deepinv_flows import CondatVu, LearnedPrimalDual

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
SIDE, N_TRAIN, EPOCHS = (32, 16, 1) if SHORT else (64, 360, 8)
start = time.perf_counter()
torch.manual_seed(0)

# %%
# Phantoms: sums of random ellipses.


def phantoms(n, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-1, 1, SIDE)
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    images = torch.zeros(n, 1, SIDE, SIDE)
    for image in images:
        for _ in range(6):
            x, y, a, b, angle, value = torch.rand(6, generator=generator)
            cos, sin = torch.cos(3.14 * angle), torch.sin(3.14 * angle)
            du, dv = u - 1.1 * x + 0.55, v - 1.1 * y + 0.55
            along, across = cos * du + sin * dv, cos * dv - sin * du
            inside = (along / (0.1 + 0.35 * a)) ** 2 + (across / (0.1 + 0.35 * b)) ** 2 < 1
            image[0][inside] += 0.5 * value
    return images.clamp(max=1)


train, unseen = phantoms(N_TRAIN, seed=0), phantoms(4, seed=1)
shepp_logan = torch.from_numpy(
    skimage.transform.resize(skimage.data.shepp_logan_phantom(), (SIDE, SIDE), anti_aliasing=True)
)
shepp_logan = shepp_logan.float()[None, None]


def make_physics(seed):
    noise = dinv.physics.GaussianNoise(0.02, rng=torch.Generator().manual_seed(seed))
    angles = torch.linspace(30, 150, 30)
    return dinv.physics.Tomography(angles, img_width=SIDE, circle=False, normalize=True, noise_model=noise)


# %%
# The network: five iterations on five images and five sinograms, started from filtered back-projection (``fbp``: deepinv's
# ``A_dagger`` is the least-squares solution, a hundred times slower and full of noise). Its training is deepinv's.


def filtered_back_projection(y, physics):
    return physics.fbp(y)


physics = make_physics(seed=0)
model = LearnedPrimalDual(max_iter=5, nf=16, custom_init=filtered_back_projection)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
trainer = dinv.Trainer(
    model=model,
    physics=physics,
    optimizer=optimizer,
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
    epochs=EPOCHS,
    train_dataloader=torch.utils.data.DataLoader(train, batch_size=2, shuffle=True),
    losses=dinv.loss.SupLoss(metric=dinv.metric.MSE()),
    online_measurements=True,
    grad_clip=1.0,
    check_grad=True,  # deepinv 0.5.0 clips only when it also checks
    save_path=None,
    show_progress_bar=False,
    verbose=not SHORT,
)
model = trainer.train()

# %%
# The classical solver: total variation, whose differences are the operator K of Condat and Vu's algorithm.

psnr = dinv.metric.PSNR()
TV = dinv.models.TVDenoiser


def total_variation(y, physics, lambda_reg):
    solver = CondatVu(
        dinv.optim.L2(),
        dinv.optim.L12Prior(l2_axis=-1),
        lambda_reg,
        stepsize=0.9,
        stepsize_dual=0.06,
        K=TV.nabla,
        K_adjoint=TV.nabla_adjoint,
        max_iter=20 if SHORT else 200,
    )
    return solver(y, physics, init=physics.fbp(y))


physics = make_physics(seed=1)
y = physics(train[:4])
scores = {v: float(psnr(total_variation(y, physics, v), train[:4]).mean()) for v in (0.001, 0.002, 0.004, 0.008, 0.016)}
lambda_reg = max(scores, key=scores.get)
print("total variation, PSNR on training phantoms:", {v: round(score, 2) for v, score in scores.items()})

# %%
# The test.

figures, rows = {}, {}
for name, x in (("unseen phantoms", unseen), ("Shepp-Logan", shepp_logan)):
    y = physics(x)
    with torch.no_grad():
        rows[name] = {
            "filtered back-projection": physics.fbp(y),
            "total variation": total_variation(y, physics, lambda_reg),
            "learned primal-dual": model(y, physics),
        }
    figures[name] = {way: round(float(psnr(image.clamp(0, 1), x).mean()), 2) for way, image in rows[name].items()}
    rows[name]["ground truth"] = x

# %%
# What it looks like: an image of each kind, and below it what is wrong in it, on one scale for all.

figure, axes = plt.subplots(4, 4, figsize=(10, 10.6), layout="constrained")
for pictures, errors, (name, images) in zip(axes[::2], axes[1::2], rows.items()):
    truth = images["ground truth"]
    for picture, wrong, (way, image) in zip(pictures, errors, images.items()):
        picture.imshow(image[0, 0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        picture.set_title(f"{way}\n{figures[name][way]:.2f} dB" if way in figures[name] else name)
        if way in figures[name]:
            error = wrong.imshow((image.clamp(0, 1) - truth)[0, 0].abs(), cmap="magma", vmin=0, vmax=0.4)
    # the error of the truth is zero: its place is for the scale
    figure.colorbar(error, cax=errors[-1].inset_axes([0.2, 0.05, 0.12, 0.9]), label="absolute error", extend="max")
for axis in axes.flat:
    axis.set_axis_off()
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "learned_primal_dual.png", dpi=160)
print("figure:", OUTPUT / "learned_primal_dual.png")
print(json.dumps({"psnr": figures, "seconds": round(time.perf_counter() - start, 1)}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/learned_primal_dual.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/learned_primal_dual.png'
