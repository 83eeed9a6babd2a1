r"""
Train a denoiser of natural images on patches
=============================================

A PatchNR of noisy 8x8 patches, whose :class:`deepinv_flows.FlowDenoiser` takes grey images of any size. It learns the likelihood
of noisy patches, and then to make the error of the denoiser small, from a folder of images; for ``tests/benchmarks/bsd68.py``
from the 400 of the standard split. Every fortieth, from the 21st on, is held out to choose the best epoch.

Run ``python examples/train_natural.py --data FOLDER --sigma 25 --save-path runs --out natural.safetensors``. Two levels, as in
``--sigma 15 50``, train for all levels between them.
"""

import argparse
import json
import time
from pathlib import Path

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
parser.add_argument("--width", type=int, default=192, help="width of the networks")
parser.add_argument("--epochs", type=int, default=40, help="of the likelihood: of 200 batches of 2048 patches")
parser.add_argument("--score-epochs", type=int, default=10, help="of score matching afterwards, of 50 such batches")
parser.add_argument("--mixed-precision", default=False, help='"bf16" where the processor has such products')
args = parser.parse_args()

images = load_images(args.data, channels=1)
held_out = images[20::40]
learn = [x for k, x in enumerate(images) if k % 40 != 20]
levels = tuple(level / 255 for level in args.sigma)

start = time.time()
folder = None if args.save_path is None else Path(args.save_path)


def fitted(objective, **options):
    save_path = None if folder is None else folder / objective
    return fit_patchnr(
        learn, held_out, sigma=levels if len(levels) > 1 else levels[0], objective=objective, batch_size=2048,
        save_path=save_path, resume=save_path is not None, mixed_precision=args.mixed_precision, **options,
    )  # fmt: skip


sizes = dict(patch_size=args.patch_size, num_layers=5, sub_net_size=args.width)
prior = fitted("likelihood", epochs=args.epochs, steps_per_epoch=200, **sizes)
prior.save(args.out)
if args.score_epochs:
    prior = fitted("score", prior=prior, epochs=args.score_epochs, steps_per_epoch=50, lr=3e-4)
prior.save(args.out)
seconds = round(time.time() - start)

# %%
# The mean PSNR of the images held out, at the largest level.
denoiser, psnrs = FlowDenoiser(prior.requires_grad_(False)), []
for k, x in enumerate(held_out):
    y = x[None] + levels[-1] * torch.randn(x[None].shape, generator=torch.Generator().manual_seed(k))
    psnrs.append(float(dinv.metric.PSNR()(denoiser(y, levels[-1]).clamp(0, 1), x[None])))
print(json.dumps({"psnr": round(sum(psnrs) / len(psnrs), 3), "seconds": seconds, "threads": torch.get_num_threads()}))
