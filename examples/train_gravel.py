r"""
Train the shipped weights ``gravel``
====================================

The flow behind ``PatchNR(pretrained="gravel")`` is trained on the top half of scikit-image's photograph *gravel* (CC0): rows 0
to 191 are learned from, rows 192 to 255 are held out to choose the best epoch and to tune reconstructions. The bottom
half, rows 256 to 511, is never seen; ``demo_patchnr_superresolution.py`` reconstructs it.

Run ``python examples/train_gravel.py --out gravel.safetensors``; the card beside the shipped file has the figures.
"""

import argparse
import json
import time

import skimage.data
import torch

from deepinv_flows import PatchNR, fit_patchnr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default="gravel.safetensors", help="file to write")
parser.add_argument("--save-path", default=None, help="folder for checkpoints, to resume an interrupted training")
parser.add_argument("--width", type=int, default=128, help="width of the networks")
parser.add_argument("--epochs", type=int, default=80, help="epochs of 250 batches of 1024 patches")
args = parser.parse_args()

# %%
# Data: 8-bit grey levels as multiples of 1/255; the training adds uniform noise of that width.
gravel = torch.from_numpy(skimage.data.gravel()).float()[None] / 255
learn, held_out = gravel[:, :192], gravel[:, 192:256]

# %%
# Training: three lines.
start = time.time()
checkpoints = {"save_path": args.save_path, "resume": args.save_path is not None}
prior = fit_patchnr(
    [learn],
    [held_out],
    sub_net_size=args.width,
    epochs=args.epochs,
    steps_per_epoch=250,
    dequantise=1 / 255,
    **checkpoints,
)
prior.save(args.out)

# %%
# Mean negative log-likelihood of a patch, in nats without the constant, where it learned and where it did not.
prior = PatchNR.from_checkpoint(args.out)
with torch.no_grad():
    nll = {name: round(float(prior(image[None])), 3) for name, image in (("learn", learn), ("held_out", held_out))}
print(json.dumps({"nll": nll, "seconds": round(time.time() - start), "threads": torch.get_num_threads()}))
