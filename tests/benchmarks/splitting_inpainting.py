"""
Self-supervised inpainting with 30% of the pixels kept: what equivariance pays.

    python tests/benchmarks/splitting_inpainting.py --data DIR [--quick] [--cache FILE]

One small network, 32x32 crops of a material, one mask for all of them (the setting of arXiv 2510.00929), a fixed budget, three
seeds; trained by each loss, tested by the same code on 32 crops of another image. ``equivariance`` is the PSNR in dB of
T_g R(y, A T_g) against R(y, A) over the eight rotations and flips, R being the reconstructor of unsplit measurements (99 is
exact). The noisy variant has Gaussian noise of standard deviation 0.1. ``--cache`` keeps the finished runs, to go on later.
The last line is one JSON object.
"""

import argparse
import json
import math
import time
import warnings
from itertools import pairwise
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
from common import check_disjoint, versions
from deepinv.physics.generator import BernoulliSplittingMaskGenerator
from deepinv.transform import Reflect, Rotate
from PIL import Image
from torch import nn

from deepinv_flows import EquivariantSplittingLoss

SIZE, NOISE = (1, 32, 32), 0.1


class Network(dinv.models.Reconstructor):
    """Three scales of residual convolutions on A^T y beside A^T A 1: what was seen, and where."""

    def __init__(self, widths=(12, 32, 128)):
        super().__init__()
        self.head = nn.Conv2d(2, widths[0], 3, padding=1)
        self.before = nn.ModuleList(Residual(w) for w in widths)
        self.after = nn.ModuleList(Residual(w) for w in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.tail = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, y, physics, **kwargs):
        x = physics.A_adjoint(y)
        seen = physics.A_adjoint(physics.A(torch.ones_like(x)))
        return x + self.tail(self.scale(self.head(torch.cat([x, seen], 1)), 0))

    def scale(self, h, level):
        h = self.before[level](h)
        if level < len(self.down):
            h = h + self.up[level](self.scale(self.down[level](h), level + 1))
            h = self.after[level](h)
        return h


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, h):
        return h + self.layers(h)


def rotations_and_flips(full=False):
    return Rotate(n_trans=4 if full else 1, multiples=90, positive=True) * Reflect(n_trans=2 if full else 1, dim=[-1])


def losses(method):
    """The losses of one method; generators are made anew, so that methods of one seed draw alike."""
    generator = BernoulliSplittingMaskGenerator(SIZE, split_ratio=0.9)
    mc, mse = dinv.loss.MCLoss(), dinv.metric.MSE()
    equivariant = dict(
        mask_generator=generator, transform=rotations_and_flips(), eval_transform=rotations_and_flips(full=True)
    )
    noise_model = dinv.physics.GaussianNoise(NOISE)
    return {
        "supervised": lambda: [dinv.loss.SupLoss(metric=mse)],
        "MC": lambda: [mc],
        "EI": lambda: [mc, dinv.loss.EILoss(rotations_and_flips(), apply_noise=False)],
        "splitting": lambda: [dinv.loss.SplittingLoss(mask_generator=generator)],
        "ours, no motions": lambda: [EquivariantSplittingLoss(mask_generator=generator)],
        "deepinv ES": lambda: [dinv.loss.EquivariantSplittingLoss(**equivariant)],
        "ours": lambda: [EquivariantSplittingLoss(**equivariant)],
        "ours, R2R": lambda: [
            EquivariantSplittingLoss(
                **equivariant, consistency_loss=dinv.loss.R2RLoss(noise_model=noise_model, eval_n_samples=1)
            )
        ],
        "ours, SURE": lambda: [
            EquivariantSplittingLoss(**equivariant, consistency_loss=dinv.loss.SureGaussianLoss(NOISE))
        ],
    }[method]()


CLEAN = ["supervised", "MC", "EI", "splitting", "ours, no motions", "deepinv ES", "ours"]
NOISY = ["supervised", "MC", "ours, R2R", "ours, SURE"]


def reconstruct(model, y, physics):
    takes = isinstance(model, dinv.loss.SplittingLoss.SplittingModel)
    return model(y, physics, update_parameters=True) if takes else model(y, physics)


def train(method, x, y, physics, seed, steps, batch=8):
    torch.manual_seed(seed)
    model = Network()
    functions = losses(method)
    for loss in functions:
        model = loss.adapt_model(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(x) // batch) == 0:
            order = torch.randperm(len(x))
        index, order = order[:batch], order[batch:]
        x_net = reconstruct(model, y[index], physics)
        total = sum(
            loss(x=x[index], x_net=x_net, y=y[index], physics=physics, model=model).mean() for loss in functions
        )
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def evaluate(model, x, y, physics):
    x_net = model(y, physics).clamp(0, 1)
    inner = model.model if isinstance(model, dinv.loss.SplittingLoss.SplittingModel) else model
    transform = rotations_and_flips(full=True)
    straight, errors = inner(y, physics), []
    for g in transform.iterate_params(transform.get_params(x)):
        turned = dinv.physics.VirtualLinearPhysics(physics=physics, transform=transform, g_params=g)
        errors.append((transform.transform(inner(y, turned), **g) - straight).pow(2).mean())
    error = max(float(torch.stack(errors).mean()), 10**-9.9)
    psnr, ssim = dinv.metric.PSNR()(x_net, x), dinv.metric.SSIM()(x_net, x)
    return {"psnr": float(psnr.mean()), "ssim": float(ssim.mean()), "equivariance": -10 * math.log10(error)}


def crops(data, name, number):
    image = torch.from_numpy(np.asarray(Image.open(data / "material" / f"{name}.png"), dtype=np.float32)) / 255
    source, side = torch.Generator().manual_seed(0), SIZE[-1]
    corners = torch.randint(0, len(image) - side + 1, (number, 2), generator=source)
    return torch.stack([image[i : i + side, j : j + side] for i, j in corners])[:, None]


def run(variant, method, seed, steps, data):
    x_train, x_test = crops(data, "learn", 1000), crops(data, "test", 32)
    check_disjoint({"train": x_train, "test": x_test})
    source = torch.Generator().manual_seed(1000 + seed)
    mask = BernoulliSplittingMaskGenerator(SIZE, 0.3, rng=source).step(1, input_mask=torch.ones(1, *SIZE))["mask"]
    noise = dinv.physics.GaussianNoise(NOISE if variant == "noisy" else 0.0, rng=source)
    physics = dinv.physics.Inpainting(SIZE, mask=mask, noise_model=noise)
    y_train, y_test = physics(x_train), physics(x_test)
    start = time.process_time()
    model = train(method, x_train, y_train, physics, seed, steps)
    seconds = time.process_time() - start
    return evaluate(model, x_test, y_test, physics) | {"seconds": seconds}


def summary(values):
    return {
        "mean": round(float(np.mean(values)), 3),
        "se": round(float(np.std(values, ddof=1) / len(values) ** 0.5), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="80 steps, two seeds")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    steps, seeds = (80, 2) if args.quick else (args.steps, 3)
    results = json.loads(args.cache.read_text()) if args.cache and args.cache.exists() else {}
    runs = [(v, m, s) for v, methods in (("clean", CLEAN), ("noisy", NOISY)) for s in range(seeds) for m in methods]
    for variant, method, seed in runs:
        key = f"{variant}/{method}/{seed}/{steps}"
        if key not in results:
            results[key] = run(variant, method, seed, steps, args.data)
            print(key, {k: round(v, 4) for k, v in results[key].items()}, flush=True)
            if args.cache:
                args.cache.write_text(json.dumps(results))
    table = {}
    for variant, methods in (("clean", CLEAN), ("noisy", NOISY)):
        print(f"\n{variant:<24}{'PSNR':>16}{'SSIM':>16}{'equivariance':>18}{'CPU s':>9}")
        for method in methods:
            of = [results[f"{variant}/{method}/{s}/{steps}"] for s in range(seeds)]
            row = table[f"{variant}, {method}"] = {k: summary([r[k] for r in of]) for k in of[0]}
            cells = "".join(f"{row[k]['mean']:>10.3f}±{row[k]['se']:.3f}" for k in ("psnr", "ssim", "equivariance"))
            print(f"{method:<24}{cells}{row['seconds']['mean']:>9.0f}")
    minutes = sum(r["seconds"] for r in results.values()) / 60
    weights = sum(p.numel() for p in Network().parameters())
    figures = {"steps": steps, "seeds": seeds, "weights": weights, "training_cpu_minutes": round(minutes, 1)}
    paired = {
        f"ours - {m}": summary(
            [
                results[f"clean/ours/{s}/{steps}"]["psnr"] - results[f"clean/{m}/{s}/{steps}"]["psnr"]
                for s in range(seeds)
            ]
        )
        for m in CLEAN[:-1]
    }
    print(json.dumps({**table, "paired_psnr": paired, **figures, "versions": versions()}))


if __name__ == "__main__":
    main()
