r"""
Unfolding NMAPG
===============

Eight iterations of :class:`deepinv_flows.NMAPG` become a network of sixteen numbers: a step and a regularisation parameter for
each, trained by deepinv's ``Trainer`` on small pieces of photographs, to deblur. The rivals are the same iterations untrained,
and the algorithm run to convergence with total variation, tuned on the training images.

The photographs are scikit-image's; *camera* is the test, seen by none.
"""

import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import skimage.data
import torch

from deepinv_flows import NMAPG

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
EPOCHS, SIDE = (1, 32) if SHORT else (8, 48)
start = time.perf_counter()
torch.manual_seed(0)

# %%
# The data: pieces of six photographs to learn from, one of *camera* for the test. The physics is deepinv's: a Gaussian blur and
# 3% noise, drawn anew each time an image is shown.


def photograph(name):
    return torch.from_numpy(getattr(skimage.data, name)()).float()[None] / 255


def pieces(names, n):
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(n):
        image = photograph(names[k % len(names)])
        top, left = (int(torch.randint(size - SIDE, (), generator=generator)) for size in image.shape[1:])
        found.append(image[:, top : top + SIDE, left : left + SIDE])
    return torch.stack(found)


train = pieces(["coins", "brick", "grass", "gravel", "moon", "text"], 40 if SHORT else 160)
test = photograph("camera")[None, :, 96:224, 176:304]


def make_physics(x, seed):
    noise = dinv.physics.GaussianNoise(0.03, rng=torch.Generator().manual_seed(seed))
    kernel = dinv.physics.functional.gaussian_blur(sigma=(1.0, 1.0))
    return dinv.physics.BlurFFT(x.shape[1:], filter=kernel, noise_model=noise)


# %%
# The network. With ``unfold=True`` the steps are the given ones and trainable, as are the regularisation parameters. With
# ``g_first=True`` the prior, a smoothed total variation, enters by its gradient, and the L2 data fidelity by its proximity
# operator, exact in Fourier space.

max_iter = 8
psnr = dinv.metric.PSNR()


def unfolded():
    return NMAPG(
        data_fidelity=dinv.optim.L2(),
        prior=dinv.optim.SmoothedTVPrior(eps=0.05),
        lambda_reg=[0.01] * max_iter,
        stepsize=[1.0] * max_iter,
        max_iter=max_iter,
        g_first=True,
        unfold=True,
        trainable_params=["stepsize", "lambda"],
    )


# %%
# The training is deepinv's. A regularisation parameter is a hundred times smaller than a step, and so is its learning rate.

model = unfolded()
optimizer = torch.optim.Adam(
    [
        {"params": list(model.init_params_algo["stepsize"]), "lr": 3e-2},
        {"params": list(model.init_params_algo["lambda"]), "lr": 3e-4},
    ]
)
trainer = dinv.Trainer(
    model=model,
    physics=make_physics(train, seed=0),
    optimizer=optimizer,
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
    epochs=EPOCHS,
    train_dataloader=torch.utils.data.DataLoader(train, batch_size=8, shuffle=True),
    losses=dinv.loss.SupLoss(metric=dinv.metric.MSE()),
    online_measurements=True,
    save_path=None,
    show_progress_bar=False,
    verbose=not SHORT,
)
model = trainer.train()

# %%
# The algorithm run to convergence, its regularisation parameter tuned on training pieces.


def classical(lambda_reg):
    return NMAPG(dinv.optim.L2(), dinv.optim.TVPrior(n_it_max=20), lambda_reg, max_iter=10 if SHORT else 40)


physics = make_physics(train, seed=1)
y = physics(train[:6])
scores = {v: float(psnr(classical(v)(y, physics), train[:6]).mean()) for v in (0.003, 0.006, 0.01, 0.02, 0.04)}
lambda_reg = max(scores, key=scores.get)
print("total variation, PSNR on training pieces:", {v: round(score, 2) for v, score in scores.items()})

# %%
# The test, iteration by iteration.

physics = make_physics(test, seed=2)
y = physics(test)
images, progress = {"measurement": y}, {}
with torch.no_grad():
    for name, way in (("untrained", unfolded()), ("converged TV", classical(lambda_reg)), ("trained", model)):
        images[name], metrics = way(y, physics, x_gt=test, compute_metrics=True)
        progress[name] = metrics["psnr"][0]
figures = {name: round(float(psnr(x.clamp(0, 1), test)), 2) for name, x in images.items()}
learnt = {name: [round(float(p), 5) for p in model.init_params_algo[name]] for name in ("stepsize", "lambda")}

# %%
# What it looks like: the images, the way there, and the sixteen numbers.

figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
for axis, (name, x) in zip(axes.flat, {**images, "ground truth": test}.items()):
    axis.imshow(x[0, 0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
    axis.set_title(f"{name}\n{figures[name]:.2f} dB" if name in figures else name)
    axis.set_axis_off()
for name, values in progress.items():
    axes[1, 1].plot(values, label=name)
axes[1, 1].set(xlabel="iteration", title="PSNR (dB)")
axes[1, 1].legend(fontsize=9)
for axis, (name, values) in zip(axes[1, 2:], learnt.items()):
    axis.axhline({"stepsize": 1.0, "lambda": 0.01}[name], color="tab:blue", label="untrained")
    axis.plot(range(1, max_iter + 1), values, "o-", color="tab:green", label="trained")
    axis.set(xlabel="iteration", title=name)
axes[1, 2].legend(fontsize=9)
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "unfolded_nmapg.png", dpi=160)
print("figure:", OUTPUT / "unfolded_nmapg.png")
print(json.dumps({"psnr": figures, **learnt, "seconds": round(time.perf_counter() - start, 1)}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/unfolded_nmapg.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/unfolded_nmapg.png'
