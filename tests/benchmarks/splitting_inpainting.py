"""
Self-supervised inpainting with 30% of the pixels kept: what equivariance pays.

    python tests/benchmarks/splitting_inpainting.py --data DIR [--steps 3000] [--quick] [--cache FILE]

One small network, 32x32 crops of a material, one mask for all of them (the setting of arXiv 2510.00929), a fixed number of steps,
three seeds; trained by each loss, tested by the same code on 32 crops of another image. ``equivariance`` is the PSNR in dB of
T_g R(y, A T_g) against R(y, A) over the eight rotations and flips, where R is the reconstructor of unsplit measurements (99 is
exact). The noisy variant has Gaussian noise of standard deviation 0.1. ``--cache`` appends each finished run to a file of JSON
lines, and runs that it holds are not repeated. The last line is one JSON object.
"""

import argparse
import json
import math
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
from common import versions
from deepinv.physics.generator import BernoulliSplittingMaskGenerator
from deepinv.transform import Reflect, Rotate
from PIL import Image
from torch import nn

from deepinv_flows import EquivariantSplittingLoss

SIZE, NOISE = (1, 32, 32), 0.1


class Network(dinv.models.Reconstructor):
    """Three scales of residual convolutions on A^T y beside A^T A 1: what was seen, and where."""

    def __init__(self, inputs=2, outputs=1, widths=(12, 32, 128)):
        super().__init__()
        self.head = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.before = nn.ModuleList(Residual(w) for w in widths)
        self.after = nn.ModuleList(Residual(w) for w in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.tail = nn.Conv2d(widths[0], outputs, 3, padding=1)

    def forward(self, y, physics, **kwargs):
        x = physics.A_adjoint(y)
        seen = physics.A_adjoint(physics.A(torch.ones_like(x)))
        return x + self.residual(torch.cat([x, seen], 1))

    def residual(self, h):
        return self.tail(self.scale(self.head(h), 0))

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


def losses(method, generator, noise=0.0):
    """
    The losses of one method.

    :param generator: splitting masks, a generator made anew for each run, so that the methods of one seed draw alike.
    :param float noise: standard deviation of the noise, for the losses that know it.
    """
    mc, mse = dinv.loss.MCLoss(), dinv.metric.MSE()
    equivariant = dict(
        mask_generator=generator, transform=rotations_and_flips(), eval_transform=rotations_and_flips(full=True)
    )
    r2r = dinv.loss.R2RLoss(noise_model=dinv.physics.GaussianNoise(noise), eval_n_samples=1)
    return {
        "supervised": lambda: [dinv.loss.SupLoss(metric=mse)],
        "MC": lambda: [mc],
        "EI": lambda: [mc, dinv.loss.EILoss(rotations_and_flips(), apply_noise=False)],
        "splitting": lambda: [dinv.loss.SplittingLoss(mask_generator=generator)],
        "SSDU": lambda: [dinv.loss.SplittingLoss(mask_generator=generator, eval_split_input=False)],
        "ours, no motions": lambda: [EquivariantSplittingLoss(mask_generator=generator)],
        "deepinv ES": lambda: [dinv.loss.EquivariantSplittingLoss(**equivariant)],
        "ours": lambda: [EquivariantSplittingLoss(**equivariant)],
        "ours, R2R": lambda: [EquivariantSplittingLoss(**equivariant, consistency_loss=r2r)],
        "ours, SURE": lambda: [
            EquivariantSplittingLoss(**equivariant, consistency_loss=dinv.loss.SureGaussianLoss(noise))
        ],
    }[method]()


METHODS = {
    "clean": ["supervised", "MC", "EI", "splitting", "ours, no motions", "deepinv ES", "ours"],
    "noisy": ["supervised", "MC", "ours, R2R", "ours, SURE"],
}


@dataclass
class Setting:
    """What one seed of one variant trains and tests on."""

    x_train: torch.Tensor
    x_test: torch.Tensor
    physics: dinv.physics.LinearPhysics
    splits: dinv.physics.generator.PhysicsGenerator
    make_network: type[nn.Module]
    noise: float = 0.0
    batch: int = 8
    complex_abs: bool = False


def reconstruct(model, y, physics):
    takes = isinstance(model, dinv.loss.SplittingLoss.SplittingModel)
    return model(y, physics, update_parameters=True) if takes else model(y, physics)


def train(setting, functions, y, steps):
    x, physics, batch = setting.x_train, setting.physics, setting.batch
    model = setting.make_network()
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
def evaluate(setting, model, y):
    x, physics, options = setting.x_test, setting.physics, {"complex_abs": setting.complex_abs}
    x_net = model(y, physics)
    if not setting.complex_abs:
        x_net = x_net.clamp(0, 1)
    inner = model.model if isinstance(model, dinv.loss.SplittingLoss.SplittingModel) else model
    transform = rotations_and_flips(full=True)
    straight, errors = inner(y, physics), []
    for g in transform.iterate_params(transform.get_params(x)):
        turned = dinv.physics.VirtualLinearPhysics(physics=physics, transform=transform, g_params=g)
        errors.append((transform.transform(inner(y, turned), **g) - straight).pow(2).mean())
    error = max(float(torch.stack(errors).mean()), 10**-9.9)
    psnr, ssim = dinv.metric.PSNR(**options)(x_net, x), dinv.metric.SSIM(**options)(x_net, x)
    return {"psnr": float(psnr.mean()), "ssim": float(ssim.mean()), "equivariance": -10 * math.log10(error)}


def crops(data, name, number):
    image = torch.from_numpy(np.asarray(Image.open(data / "material" / f"{name}.png"), dtype=np.float32)) / 255
    source, side = torch.Generator().manual_seed(0), SIZE[-1]
    corners = torch.randint(0, len(image) - side + 1, (number, 2), generator=source)
    return torch.stack([image[i : i + side, j : j + side] for i, j in corners])[:, None]


def standardised(x):
    """(N, n) images of mean zero and norm one, whose products are correlations."""
    return nn.functional.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True), dim=1)


def inpainting(variant, seed, data):
    x_train, x_test = crops(data, "learn", 1000), crops(data, "test", 32)
    alike = float((standardised(x_test) @ standardised(x_train).T).max())
    assert alike < 0.95, f"a test crop and a training crop have correlation {alike:.3f}"
    source = torch.Generator().manual_seed(1000 + seed)
    mask = BernoulliSplittingMaskGenerator(SIZE, 0.3, rng=source).step(1, input_mask=torch.ones(1, *SIZE))["mask"]
    noise = NOISE if variant == "noisy" else 0.0
    physics = dinv.physics.Inpainting(SIZE, mask=mask, noise_model=dinv.physics.GaussianNoise(noise, rng=source))
    splits = BernoulliSplittingMaskGenerator(SIZE, split_ratio=0.9)
    return Setting(x_train, x_test, physics, splits, Network, noise)


def run(setting, method, seed, steps):
    y_train, y_test = setting.physics(setting.x_train), setting.physics(setting.x_test)
    torch.manual_seed(seed)
    start = time.process_time()
    model = train(setting, losses(method, setting.splits, setting.noise), y_train, steps)
    seconds = time.process_time() - start
    return evaluate(setting, model, y_test) | {"seconds": seconds}


def read(cache):
    """The finished runs of a file of JSON lines."""
    lines = cache.read_text().splitlines() if cache and cache.exists() else []
    return {line.pop("run"): line for line in map(json.loads, lines)}


def run_all(methods, make_setting, steps, seeds, cache=None):
    """
    Run every method of every variant, a seed at a time.

    :param dict methods: names of the methods by variant.
    :param make_setting: ``make_setting(variant, seed)``.
    :return: dict of results by ``variant/method/seed/steps``.
    """
    results = read(cache)
    for seed in range(seeds):
        for variant, names in methods.items():
            for method in names:
                key = f"{variant}/{method}/{seed}/{steps}"
                if key not in results:
                    results[key] = run(make_setting(variant, seed), method, seed, steps)
                    print(key, {k: round(v, 4) for k, v in results[key].items()}, flush=True)
                    if cache:
                        with cache.open("a") as file:
                            print(json.dumps({"run": key} | results[key]), file=file)
    return results


def summary(values):
    return {
        "mean": round(float(np.mean(values)), 3),
        "se": round(float(np.std(values, ddof=1) / len(values) ** 0.5), 3),
    }


def report(methods, results, steps, seeds, network):
    """Print the table, and all figures as one JSON object in the last line."""
    table, paired, seconds = {}, {}, 0.0
    for variant, names in methods.items():
        print(f"\n{variant:<24}{'PSNR':>16}{'SSIM':>16}{'equivariance':>18}{'CPU s':>9}")
        of = {m: [results[f"{variant}/{m}/{s}/{steps}"] for s in range(seeds)] for m in names}
        for method, rows in of.items():
            row = table[f"{variant}, {method}"] = {k: summary([r[k] for r in rows]) for k in rows[0]}
            cells = "".join(f"{row[k]['mean']:>10.3f}±{row[k]['se']:.3f}" for k in ("psnr", "ssim", "equivariance"))
            print(f"{method:<24}{cells}{row['seconds']['mean']:>9.0f}")
            seconds += sum(r["seconds"] for r in rows)
            if "ours" in names and method != "ours":
                differences = [ours["psnr"] - r["psnr"] for ours, r in zip(of["ours"], rows)]
                paired[f"{variant}, ours - {method}"] = summary(differences)
    weights = sum(p.numel() for p in network.parameters())
    figures = {"steps": steps, "seeds": seeds, "weights": weights, "training_cpu_minutes": round(seconds / 60, 1)}
    print(json.dumps({**table, "paired_psnr": paired, **figures, "versions": versions()}))


def parser(description):
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="80 steps, two seeds")
    found.add_argument("--steps", type=int, default=3000)
    found.add_argument("--seeds", type=int, default=3, help="at least two, for the standard errors")
    found.add_argument("--cache", type=Path, help="JSON lines, one for each finished run")
    return found


def main():
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True)
    args = options.parse_args()
    warnings.simplefilter("ignore")
    steps, seeds = (80, 2) if args.quick else (args.steps, args.seeds)
    results = run_all(METHODS, lambda v, s: inpainting(v, s, args.data), steps, seeds, args.cache)
    report(METHODS, results, steps, seeds, Network())


if __name__ == "__main__":
    main()
