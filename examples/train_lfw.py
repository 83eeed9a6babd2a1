r"""
Train the shipped weights ``lfw``
=================================

The flow behind ``FlowPrior(pretrained="lfw")`` is trained on 80 of the 100 faces of scikit-image's ``lfw_subset``, without their
last row and column (24x24, grey). Faces 80 to 89 choose the epoch and tune reconstructions; faces 90 to 99 and the 100
images that are not faces are never seen; ``demo_latent_compressed_sensing.py`` recovers some of them.

Run ``python examples/train_lfw.py --out lfw.safetensors``; the card beside the shipped file has the figures.
"""

import argparse
import json
import time

import skimage.data
import torch

from deepinv_flows import BitsPerDim, FlowModel, FlowPrior, fit_flow, image_flow

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default="lfw.safetensors", help="file to write")
parser.add_argument("--save-path", default=None, help="folder for checkpoints, to resume an interrupted training")
parser.add_argument("--epochs", type=int, default=60, help="times that each face is shown")
args = parser.parse_args()

# %%
# Data: the file holds 8-bit grey levels averaged over pixels; noise of one grey level makes them continuous.
faces = torch.from_numpy(skimage.data.lfw_subset()[:100]).float()[:, None, :24, :24]
learn, held_out, test = faces[:80], faces[80:90], faces[90:]

# %%
# Training.
start = time.time()
flow = image_flow((1, 24, 24), num_levels=2, num_steps=6, hidden=32, generator=torch.Generator().manual_seed(0))
checkpoints = {"save_path": args.save_path, "resume": args.save_path is not None}
fit_flow(flow, learn, held_out, epochs=args.epochs, batch_size=8, **checkpoints)
FlowPrior(flow).save(args.out)

# %%
# Bits per dimension, where it learned and where it did not.
model, bits = FlowModel(FlowPrior(pretrained=args.out)), BitsPerDim()
with torch.no_grad():
    figures = {
        n: round(float(bits(model(x), x).mean()), 3) for n, x in dict(learn=learn, held_out=held_out, test=test).items()
    }
print(json.dumps({"bits_per_dim": figures, "seconds": round(time.time() - start), "threads": torch.get_num_threads()}))
