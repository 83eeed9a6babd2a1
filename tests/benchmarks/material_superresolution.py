r"""
The PatchNR paper's superresolution of a material, with our PatchNR.

    python tests/benchmarks/material_superresolution.py --data DIR [--checkpoint FILE]

Protocol (Altekrueger et al. 2023, section 4.2): y = S x + 0.01 n, S a 16x16 Gaussian kernel of standard deviation 2, circular
at the bottom and right ends, stride 4. ``DIR/material`` holds ``learn.png``, ``val.png``, ``test.png`` and the paper's own
``published_reconstruction.png``. Trains on ``learn.png`` (evaluated on ``val.png``) unless a checkpoint is given, and
reconstructs ``test.png``; ``--image val.png --lambda-reg A B C`` is how lambda_reg was chosen. The last line is one JSON object.
"""

import argparse
import json
import math
import time
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
import torch.nn.functional as F
from common import check_disjoint
from PIL import Image

from deepinv_flows import PatchNR, fit_patchnr
from deepinv_flows.patchnr import potential

NOISE = 0.01


def load(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32) / 255)[None, None]


def make_physics(side: int) -> dinv.physics.LinearPhysics:
    line = torch.exp(-((torch.arange(16) - 7.5) ** 2) / (2 * 2.0**2))
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur_and_subsample(x, **kwargs):
        return F.conv2d(F.pad(x, (0, 12, 0, 12), mode="circular"), kernel, stride=4)

    noise = dinv.physics.GaussianNoise(NOISE, rng=torch.Generator().manual_seed(0))
    return dinv.physics.LinearPhysics(A=blur_and_subsample, img_size=(1, side, side), noise_model=noise)


def bicubic(y: torch.Tensor) -> torch.Tensor:
    """Bicubic interpolation, shifted to where the kernel's centre puts the pixels."""
    return torch.roll(F.interpolate(y, scale_factor=4, mode="bicubic"), (6, 6), (2, 3))


def reconstruct(prior, y, physics, lambda_reg, iterations, step) -> torch.Tensor:
    """Adam on sum((Sx - y)^2) + lambda_reg * prior(x), as the paper's, with a cosine for its step."""
    x = bicubic(y).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=step)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.01 + 0.99 * math.cos(math.pi * i / iterations / 2) ** 2
    )
    for _ in range(iterations):
        optimizer.zero_grad()
        (((physics.A(x) - y) ** 2).sum() + lambda_reg * prior(x).sum()).backward()
        optimizer.step()
        schedule.step()
    return x.detach()


def figures(x_net: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    x_net = x_net.clamp(0, 1)
    crop = (Ellipsis, slice(40, -40), slice(40, -40))
    psnr, ssim = dinv.metric.PSNR(), dinv.metric.SSIM()
    return {
        "psnr": round(float(psnr(x_net, x)), 3),
        "psnr_crop40": round(float(psnr(x_net[crop], x[crop])), 3),
        "ssim": round(float(ssim(x_net, x)), 4),
    }


def train(folder: Path, args) -> tuple[PatchNR, float]:
    start = time.perf_counter()
    learn, val = load(folder / "learn.png"), load(folder / "val.png")
    check_disjoint({"learn.png": learn, "val.png": val, "test.png": load(folder / "test.png")}, learned="learn.png")
    sizes = dict(
        num_layers=args.layers,
        sub_net_size=args.width,
        epochs=args.epochs,
        steps_per_epoch=250,
        dequantise=args.dequantise,
    )
    prior = fit_patchnr(learn, val, **sizes, save_path=args.save_path, resume=args.save_path is not None)
    if args.out:
        prior.save(args.out)
    return prior, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", help="weights to load instead of training")
    parser.add_argument("--out", help="where to save the trained weights")
    parser.add_argument("--save-path", help="folder for training checkpoints; an interrupted training resumes from it")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=24, help="epochs of 250 batches of 1024 patches")
    parser.add_argument("--dequantise", type=float, default=4 / 255, help="width of the noise added in training")
    parser.add_argument("--image", default="test.png")
    parser.add_argument("--lambda-reg", type=float, nargs="+", default=[0.2], help="for the whole image")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--step", type=float, default=0.03)
    parser.add_argument("--n-patches", type=int, default=22_000, help="random patches an iteration")
    parser.add_argument("--subset", default="grid", choices=("uniform", "grid"), help="how they are drawn")
    parser.add_argument("--precision", choices=("bfloat16",), help="of matrix products, emulated if need be")
    parser.add_argument("--crop", type=int, help="side of a central piece to reconstruct instead, for tuning")
    args = parser.parse_args()

    folder = args.data / "material"
    prior, seconds_training = (
        (PatchNR.from_checkpoint(args.checkpoint), None) if args.checkpoint else train(folder, args)
    )
    prior.requires_grad_(False)
    prior.n_patches, prior.subset = args.n_patches, args.subset
    if args.precision:  # PatchNR itself would not: without the hardware it is slower than float32
        potential._product_dtype = lambda x, precision: getattr(torch, args.precision)
    x = load(folder / args.image)
    share = 1.0 if args.crop is None else (args.crop / x.shape[-1]) ** 2  # the data term is a sum, the prior a mean
    if args.crop:
        start = (x.shape[-1] - args.crop) // 2
        x = x[..., start : start + args.crop, start : start + args.crop]
    physics = make_physics(x.shape[-1])
    y = physics(x)
    print("bicubic", figures(F.interpolate(y, scale_factor=4, mode="bicubic"), x))
    print("bicubic, shift-corrected", figures(bicubic(y), x))
    for lambda_reg in args.lambda_reg:
        start = time.perf_counter()
        x_net = reconstruct(prior, y, physics, lambda_reg * share, args.iterations, args.step)
        result = {"lambda_reg": lambda_reg, **figures(x_net, x), "seconds": round(time.perf_counter() - start, 1)}
        print("PatchNR", result, flush=True)
    if args.image == "test.png" and not args.crop:
        published = figures(load(folder / "published_reconstruction.png"), x)
        result |= {f"published_{key}": value for key, value in published.items()}
    result["seconds_reconstruction"] = result.pop("seconds")
    result |= {"seconds_training": seconds_training, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
