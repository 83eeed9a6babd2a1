r"""
Train a denoiser of natural images on patches
=============================================

A PatchNR of noisy 8x8 patches, whose :class:`deepinv_flows.FlowDenoiser` takes grey images of any size. It learns from a folder
of images; for ``tests/benchmarks/bsd68.py`` from the 400 of the standard split. Every fortieth, from the 21st on, is held out to
choose the best epoch.

Run ``python examples/train_natural.py --data FOLDER --sigma 25 --save-path runs --out natural.safetensors``. Two levels, as in
``--sigma 15 50``, train for all levels between them.
"""

import argparse
import json
import time

import deepinv as dinv
import torch

from deepinv_flows import FlowDenoiser, fit_patchnr, load_images

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder of grey images")
parser.add_argument(
    "--sigma", type=float, nargs="+", default=[25.0], help="noise in grey levels: one level, or the ends of a range"
)
parser.add_argument("--out", default="natural.safetensors", help="file to write")
parser.add_argument("--save-path", default=None, help="folder for checkpoints, to resume an interrupted training")
parser.add_argument("--patch-size", type=int, default=8)
parser.add_argument("--width", type=int, default=128, help="width of the networks")
parser.add_argument("--epochs", type=int, default=100, help="epochs of 250 batches of 1024 patches")
args = parser.parse_args()

images = load_images(args.data, channels=1)
held_out = images[20::40]
learn = [x for k, x in enumerate(images) if k % 40 != 20]
levels = tuple(level / 255 for level in args.sigma)

start = time.time()
prior = fit_patchnr(
    learn, held_out, sigma=levels if len(levels) > 1 else levels[0], patch_size=args.patch_size, num_layers=5,
    sub_net_size=args.width, epochs=args.epochs, steps_per_epoch=250, batch_size=1024, save_path=args.save_path,
    resume=args.save_path is not None,
)  # fmt: skip
prior.save(args.out)
seconds = round(time.time() - start)

# %%
# The mean PSNR of the images held out, at the largest level.
denoiser, psnrs = FlowDenoiser(prior.requires_grad_(False)), []
for k, x in enumerate(held_out):
    y = x[None] + levels[-1] * torch.randn(x[None].shape, generator=torch.Generator().manual_seed(k))
    psnrs.append(float(dinv.metric.PSNR()(denoiser(y, levels[-1]).clamp(0, 1), x[None])))
print(json.dumps({"psnr": round(sum(psnrs) / len(psnrs), 3), "seconds": seconds, "threads": torch.get_num_threads()}))
