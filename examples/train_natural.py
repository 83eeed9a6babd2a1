r"""
Train a prior of natural images on patches, or a denoiser
=========================================================

From a folder of grey images; for ``tests/benchmarks/bsd68.py`` the 400 of the standard split. Every fortieth, from the 21st on,
is held out to choose the best epoch. With ``--sigma`` a PatchNR of noisy patches, whose :class:`deepinv_flows.FlowDenoiser` takes
images of any size: it learns the likelihood of noisy patches, and then to make the error of the denoiser small. With little
noise, as ``--sigma 6 --smooth``, it is a prior for :class:`deepinv_flows.MAP`, and for
:func:`deepinv_flows.fit_bilevel` to begin from. With ``--sigma 0`` it learns the likelihood of clean patches.

Run ``python examples/train_natural.py --data FOLDER --sigma 25 --save-path runs --out natural.safetensors``. Two levels, as in
``--sigma 15 50``, train for all levels between them. ``--prior FILE`` goes on from a denoiser by score matching alone.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import deepinv as dinv
import torch

from deepinv_flows import FlowDenoiser, PatchNR, fit_patchnr, glow_flow, load_images

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder of grey images")
parser.add_argument(
    "--sigma", type=float, nargs="+", default=[25.0], help="noise in grey levels: one level, or the ends of a range"
)
parser.add_argument("--out", default="natural.safetensors", help="file to write")
parser.add_argument("--save-path", default=None, help="folder for checkpoints, to resume an interrupted training")
parser.add_argument(
    "--prior", help="file of a denoiser of this level, or its shipped name, to go on from by score matching"
)
parser.add_argument("--patch-size", type=int, default=8)
parser.add_argument("--layers", type=int, default=5, help="coupling blocks")
parser.add_argument("--width", type=int, default=192, help="width of their networks")
parser.add_argument("--smooth", action="store_true", help="SiLU in place of ReLU, as with --sigma 0")
parser.add_argument("--batch-size", type=int, default=2048, help="patches")
parser.add_argument("--epochs", type=int, default=40, help="of the likelihood")
parser.add_argument("--steps", type=int, default=200, help="batches in such an epoch")
parser.add_argument("--score-epochs", type=int, default=10, help="of score matching afterwards")
parser.add_argument("--score-steps", type=int, default=50, help="batches in such an epoch")
parser.add_argument("--score-batch-size", type=int, help="patches; as many as before if not given")
parser.add_argument("--half", action="store_true", help="keep the networks in half precision, in half of the bytes")
parser.add_argument("--device", default="cpu")
parser.add_argument("--mixed-precision", default=False, help='"bf16" where the processor has such products')
args = parser.parse_args()
if args.prior and max(args.sigma) == 0:
    parser.error("--prior goes on by score matching, which needs a noise level --sigma > 0")

images = load_images(args.data, channels=1)
held_out = images[20::40]
learn = [x for k, x in enumerate(images) if k % 40 != 20]
levels = tuple(level / 255 for level in args.sigma)

start = time.time()
folder = None if args.save_path is None else Path(args.save_path)


def fitted(objective, **options):
    save_path = None if folder is None else folder / (objective or "clean")
    return fit_patchnr(
        learn, held_out, sigma=levels if len(levels) > 1 else levels[0], objective=objective, save_path=save_path,
        resume=save_path is not None, device=args.device, mixed_precision=args.mixed_precision, **options,
    )  # fmt: skip


def save(prior):
    kept = copy.deepcopy(prior)
    for name, p in kept.named_parameters():
        if args.half and "subnet" in name:
            p.data = p.data.half()
    kept.save(args.out)


noisy = levels[-1] > 0
sizes = dict(num_layers=args.layers, sub_net_size=args.width)
if noisy and not args.smooth:
    new = dict(patch_size=args.patch_size, **sizes)
else:  # for fit_bilevel
    flow = glow_flow(args.patch_size**2, **sizes, permute=True, activation="silu", generator=torch.Generator())
    new = dict(prior=PatchNR(flow, patch_size=args.patch_size))
if args.prior:
    prior = PatchNR.from_checkpoint(args.prior)
else:
    prior = fitted(
        "likelihood" if noisy else None, batch_size=args.batch_size, epochs=args.epochs, steps_per_epoch=args.steps,
        **new,
    )  # fmt: skip
    save(prior)
if noisy and args.score_epochs:
    prior = fitted(
        "score", prior=prior, epochs=args.score_epochs, steps_per_epoch=args.score_steps, lr=3e-4,
        batch_size=args.score_batch_size or args.batch_size,
    )  # fmt: skip
save(prior)
seconds = round(time.time() - start)


# %%
# The mean PSNR of the images held out, at the largest level, by what the file holds.
def mean_psnr(prior):
    denoiser, found = FlowDenoiser(prior.requires_grad_(False)), []
    for k, x in enumerate(held_out):
        noise = torch.randn(x[None].shape, generator=torch.Generator().manual_seed(k))
        estimate = denoiser((x[None] + levels[-1] * noise).to(args.device), levels[-1]).cpu()
        found.append(float(dinv.metric.PSNR()(estimate.clamp(0, 1), x[None])))
    return round(sum(found) / len(found), 3)


result = {"psnr": mean_psnr(PatchNR.from_checkpoint(args.out).to(args.device))} if noisy else {}
print(json.dumps({**result, "sigma": args.sigma, "seconds": seconds, "device": args.device}))
