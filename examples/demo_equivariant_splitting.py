r"""
Learning to inpaint without ground truth
========================================

A small camera takes pictures of coins. 70% of its pixels are dead, always the same ones, so nobody has seen a coin whole.
Splitting the measurements teaches a network to predict some of the living pixels from the others. It teaches nothing about the
dead ones, and their pattern stays in the pictures. But a coin that is turned is still a coin, and its picture, turned, meets
living pixels where dead ones were: :class:`deepinv_flows.EquivariantSplittingLoss` uses both.

The photograph *coins* (public domain) comes with scikit-image: its upper part is measured for training, its lower part for the
test.
"""

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import skimage.data
import torch
from deepinv.physics.generator import BernoulliSplittingMaskGenerator
from deepinv.transform import Reflect, Rotate
from torch import nn

from deepinv_flows import EquivariantSplittingLoss

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
EPOCHS, NUMBER = (1, 64) if SHORT else (12, 1000)
SIZE = (1, 24, 24)
start = time.perf_counter()

# %%
# The measurements: crops under one mask. The ground truth is only looked at in the end.

coins = torch.from_numpy(skimage.data.coins()).float()[None] / 255
coins = nn.functional.avg_pool2d(coins, 2)
source = torch.Generator().manual_seed(0)


def crops(image, number):
    corners = [torch.randint(0, side - SIZE[-1] + 1, (number,), generator=source) for side in image.shape[1:]]
    return torch.stack([image[:, i : i + SIZE[1], j : j + SIZE[2]] for i, j in zip(*corners)])


x_train, x_test = crops(coins[:, :97], NUMBER), crops(coins[:, 97:], 12)
mask = BernoulliSplittingMaskGenerator(SIZE, 0.3, rng=source).step(1)["mask"]
physics = dinv.physics.Inpainting(SIZE, mask=mask)
y_train, y_test = physics(x_train), physics(x_test)

# %%
# The network: three scales of convolutions on :math:`A^\top y` and :math:`A^\top A 1`, what was seen and where.


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, h):
        return h + self.layers(h)


class Network(dinv.models.Reconstructor):
    def __init__(self, widths=(16, 32, 96)):
        super().__init__()
        self.head, self.tail = nn.Conv2d(2, widths[0], 3, padding=1), nn.Conv2d(widths[0], 1, 3, padding=1)
        self.before = nn.ModuleList(Residual(w) for w in widths)
        self.after = nn.ModuleList(Residual(w) for w in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))

    def forward(self, y, physics, **kwargs):
        x = physics.A_adjoint(y)
        seen = physics.A_adjoint(physics.A(torch.ones_like(x)))
        return x + self.tail(self.scale(self.head(torch.cat([x, seen], 1)), 0))

    def scale(self, h, level):
        h = self.before[level](h)
        if level < len(self.down):
            h = self.after[level](h + self.up[level](self.scale(self.down[level](h), level + 1)))
        return h


# %%
# Three losses, each given to deepinv's Trainer. Plain splitting asks for the pixels it hides and leaves those it sees to the
# network. Without motions both are asked for, but never a dead one. With motions the network meets the mask turned and mirrored
# as well. In training one random motion is drawn a step; in evaluation the reconstructor averages over all eight rotations and
# flips and five splits.

motions = Rotate(multiples=90, positive=True) * Reflect(dim=[-1])
group = Rotate(n_trans=4, multiples=90, positive=True) * Reflect(n_trans=2, dim=[-1])


def splits():
    return BernoulliSplittingMaskGenerator(SIZE, split_ratio=0.9)


losses = {
    "plain splitting": dinv.loss.SplittingLoss(mask_generator=splits()),
    "without motions": EquivariantSplittingLoss(mask_generator=splits()),
    "equivariant splitting": EquivariantSplittingLoss(mask_generator=splits(), transform=motions, eval_transform=group),
}


def train(loss):
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    measurements = [{"x": torch.tensor(float("nan")), "y": y} for y in y_train]  # deepinv's sign for "no ground truth"
    trainer = dinv.Trainer(
        model,
        physics,
        optimizer,
        torch.utils.data.DataLoader(measurements, batch_size=8, shuffle=True),
        epochs=EPOCHS,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        losses=loss,
        metrics=None,
        grad_clip=1.0,
        check_grad=True,
        save_path=None,
        device="cpu",
        verbose=False,
    )
    return trainer.train().eval()


# %%
# The test.

psnr, ssim = dinv.metric.PSNR(), dinv.metric.SSIM()
pictures = {"measurement": y_test}
for name, loss in losses.items():
    began = time.perf_counter()
    model = train(loss)
    with torch.no_grad():
        pictures[name] = model(y_test, physics).clamp(0, 1)
    print(f"{name}: {time.perf_counter() - began:.1f} s")
pictures["ground truth"] = x_test
figures = {
    name: {"psnr": round(float(psnr(x, x_test).mean()), 2), "ssim": round(float(ssim(x, x_test).mean()), 3)}
    for name, x in pictures.items()
    if name != "ground truth"
}

# %%
# What it looks like: two crops, and below each what is wrong in it, on one scale for all. Plain splitting leaves the living
# pixels to the network, and they stand out in white. Without motions the errors of the flat areas are scattered over the dead
# pixels; equivariant splitting has few.

figure, axes = plt.subplots(4, len(pictures), figsize=(10, 8.3), layout="constrained")
for column, (name, x) in zip(axes.T, pictures.items()):
    scores = f"\n{figures[name]['psnr']:.2f} dB, SSIM {figures[name]['ssim']:.3f}" if name in figures else ""
    column[0].set_title(name + scores, fontsize=10)
    for k, (picture, wrong) in enumerate(column.reshape(2, 2)):
        picture.imshow(x[2 * k, 0], cmap="gray", vmin=0, vmax=0.9)
        if name in losses:
            error = wrong.imshow((x - x_test)[2 * k, 0].abs(), cmap="magma", vmin=0, vmax=0.3)
for axis in axes.flat:
    axis.set_axis_off()
figure.colorbar(error, cax=axes[1, -1].inset_axes([0.2, 0.05, 0.12, 0.9]), label="absolute error", extend="max")
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "equivariant_splitting.png", dpi=160)
print("figure:", OUTPUT / "equivariant_splitting.png")
print(json.dumps({**figures, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/equivariant_splitting.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/equivariant_splitting.png'
