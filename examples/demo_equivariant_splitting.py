r"""
Learning to inpaint without ground truth
========================================

A camera with 70% dead pixels, always the same ones, takes pictures of grass. Nobody has seen one whole. Splitting the
measurements teaches a network to predict some of the pixels from the others, but says nothing about the dead ones; that grass
turned or shifted is grass still does. :class:`deepinv_flows.EquivariantSplittingLoss` uses both.

The photograph *grass* (CC0) comes with scikit-image: its upper half is measured for training, its lower half for the test.
"""

import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib
import skimage.data
import torch
from deepinv.physics.generator import BernoulliSplittingMaskGenerator
from deepinv.transform import Reflect, Rotate, Shift

from deepinv_flows import EquivariantSplittingLoss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
OUTPUT = Path(__file__).parent / ("output/short" if SHORT else "output")
EPOCHS = 1 if SHORT else 8
SIZE = (1, 64, 64)
start = time.perf_counter()

# %%
# The measurements: 128 crops under one mask. The ground truth is only looked at in the end.

grass = torch.from_numpy(skimage.data.grass()).float()[None] / 255
source = torch.Generator().manual_seed(0)


def crops(image, number):
    corners = [torch.randint(0, side - SIZE[-1] + 1, (number,), generator=source) for side in image.shape[1:]]
    return torch.stack([image[:, i : i + SIZE[1], j : j + SIZE[2]] for i, j in zip(*corners)])


mask = BernoulliSplittingMaskGenerator(SIZE, 0.3, rng=source).step(1)["mask"]
physics = dinv.physics.Inpainting(SIZE, mask=mask)
x_train, x_test = crops(grass[:, :256], 128), crops(grass[:, 256:], 12)
y_train, y_test = physics(x_train), physics(x_test)

# %%
# Three losses, each given to deepinv's Trainer. Plain splitting asks for the pixels it hides and leaves those it sees to the
# network; consistency asks for these as well; and with motions the network meets the mask in every position. In training one
# random motion is drawn a step; in evaluation the reconstructor averages over all eight rotations and flips and five splits.

splits = BernoulliSplittingMaskGenerator(SIZE, split_ratio=0.7)
motions = Shift() * Rotate(multiples=90, positive=True) * Reflect(dim=[-1])
group = Rotate(n_trans=4, multiples=90, positive=True) * Reflect(n_trans=2, dim=[-1])
losses = {
    "plain splitting": dinv.loss.SplittingLoss(mask_generator=splits),
    "with consistency": EquivariantSplittingLoss(mask_generator=splits),
    "equivariant splitting": EquivariantSplittingLoss(mask_generator=splits, transform=motions, eval_transform=group),
}


def train(loss):
    torch.manual_seed(0)
    network = dinv.models.DnCNN(1, 1, depth=7, nf=24, pretrained=None)
    model = dinv.models.ArtifactRemoval(network, mode="adjoint")
    measurements = [{"x": torch.tensor(float("nan")), "y": y} for y in y_train]  # deepinv's sign for "no ground truth"
    trainer = dinv.Trainer(
        model,
        physics,
        torch.optim.Adam(model.parameters(), 2e-3),
        torch.utils.data.DataLoader(measurements, batch_size=4, shuffle=True),
        epochs=EPOCHS,
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
# What it looks like.

figure, axes = plt.subplots(2, len(pictures), figsize=(3.2 * len(pictures), 6.8))
for column, (name, x) in zip(axes.T, pictures.items()):
    scores = f"\n{figures[name]['psnr']:.2f} dB, SSIM {figures[name]['ssim']:.3f}" if name in figures else ""
    column[0].set_title(name + scores)
    for axis, image in zip(column, x):
        axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
figure.tight_layout()
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "equivariant_splitting.png", dpi=110)
print("figure:", OUTPUT / "equivariant_splitting.png")
print(json.dumps({**figures, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/equivariant_splitting.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/equivariant_splitting.png'
