r"""
Train a PatchNR further, for the reconstructions that it gives: the row ``bilevel`` of ``bsd68.py``.

    python tests/benchmarks/train_bilevel.py --data DIR --prior FILE --sigma 25 --out FILE [--minutes 5] [--device cuda]

Trains on ``DIR/bsd/train400`` without the ten images held out, by ``fit_bilevel`` on crops, from the weights of ``--prior`` (a
file of ``PatchNR.save``, or shipped) and the lambda that ``MAP.tune`` finds on images held out. Images are mirrored at their
borders, whose pixels lie in few patches otherwise. How many steps fit into ``--minutes`` is measured first; the cosine of the
learning rate ends there. Writes a ``MAP.save``; prints the PSNR of ``MAP`` on the images held out, and one JSON object last.
"""

import argparse
import copy
import functools
import json
import time
from pathlib import Path

import deepinv as dinv
import torch
from arena import device_name, divided, on_device
from bsd68 import by_model, mean_psnr
from common import check_disjoint
from torch import Tensor

from deepinv_flows import MAP, PatchNR, fit_bilevel, load_images

EPOCHS = 10


def middle(x: Tensor, side: int) -> Tensor:
    """The central piece (C, s, s) of an image, of ``side`` pixels or as many as there are, in steps of 4."""
    height, width = (min(side, n // 4 * 4) for n in x.shape[1:])
    top, left = ((n - size) // 2 // 4 * 4 for n, size in zip(x.shape[1:], (height, width)))
    return x[:, top : top + height, left : left + width]


def train_bilevel(
    prior: PatchNR,
    images: list[Tensor],
    held_out: list[Tensor],
    physics: dinv.physics.Physics,
    sigma: float,
    *,
    minutes: float,
    crop: int,
    batch_size: int,
    device: str,
    lr: float = 1e-3,
    **options,
) -> MAP:
    """
    The model that :func:`deepinv_flows.fit_bilevel` trains in about as many minutes.

    :param PatchNR prior: where to begin; it is trained in place.
    :param list images, held_out: images (C, H, W) to train on, and others of one size to choose lambda and the best epoch.
    :param float sigma: noise, of ``L2(sigma=sigma)``.
    :param options: of ``fit_bilevel``.
    """
    physics, fidelity = physics.to(device), dinv.optim.L2(sigma=sigma)
    on_device(prior.requires_grad_(True), device)
    tuned = MAP(prior, fidelity, verbose=False).tune(torch.stack(held_out).to(device), physics)
    first = float(tuned.weight_for(images[0][None].to(device)))
    print(f"lambda_reg {first:.4g}, PSNR of the pieces held out {tuned.tuned['score']:.2f}", flush=True)

    def fitted(prior, epochs, steps, **shown):
        return fit_bilevel(
            prior, images, physics, held_out, data_fidelity=fidelity, lambda_reg=first, crop=crop, epochs=epochs,
            steps_per_epoch=steps, batch_size=batch_size, lr=lr, device=device, **{**options, **shown},
        )  # fmt: skip

    seconds = []
    for steps in (1, 1, 3):  # the first is slower
        start = time.perf_counter()
        fitted(copy.deepcopy(prior), 1, steps, verbose=False, save_path=None, resume=False)
        seconds.append(time.perf_counter() - start)
    step = max(seconds[2] - seconds[1], 1e-3) / 2
    rest = max(seconds[1] - step, 0.0)  # of an epoch, most of it the evaluation
    left = 0.7 * (60 * minutes - sum(seconds))  # minimisations take longer as the prior learns
    steps = max(1, int((left / EPOCHS - rest) / step))
    print(f"{EPOCHS} epochs of {steps} steps of {step:.2f} s, and {rest:.1f} s to evaluate", flush=True)
    return fitted(prior, EPOCHS, steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prior", required=True, help="file of PatchNR.save, or shipped weights")
    parser.add_argument("--sigma", type=float, default=25.0, help="noise in grey levels")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--crop", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--tol", type=float, default=1e-2, help="of the minimisations")
    parser.add_argument("--linear-iter", type=int, default=12, help="steps of MINRES")
    parser.add_argument("--jacobian-free", action="store_true")
    parser.add_argument("--tf32", action="store_true", help="allow matrix products with 10-bit mantissas on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-path", help="folder for checkpoints")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    sigma, images = args.sigma / 255, load_images(args.data / "bsd" / "train400", channels=1)
    learn, held_out = divided(images)
    check_disjoint({"train": torch.stack(learn), "val": torch.stack(held_out)})
    prior = PatchNR.from_checkpoint(args.prior, pad=True)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma)).to(args.device)
    start = time.perf_counter()
    model = train_bilevel(
        prior, learn, [middle(x, 64) for x in held_out[::2]], physics, sigma, minutes=args.minutes, crop=args.crop,
        batch_size=args.batch_size, device=args.device, lr=args.lr, jacobian_free=args.jacobian_free, tol=args.tol,
        linear_iter=args.linear_iter, save_path=args.save_path,
    )  # fmt: skip
    model.verbose = False
    model.save(args.out)
    method, whole = functools.partial(by_model, model=model), [x[None] for x in held_out]
    result = {"sigma": args.sigma, "psnr": mean_psnr(method, whole, args.device, sigma, 0)}
    result |= {"seconds": round(time.perf_counter() - start), "device": device_name(args.device), **model.tuned}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
