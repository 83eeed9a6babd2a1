r"""
Recovery of faces, in the latent space of an image flow and with a PatchNR, after Asim et al. (2020).

    python tests/benchmarks/faces_recovery.py --data DIR [--save-path RUNS] [--flow FILE] [--patch FILE]

``DIR/faces64.npz`` holds ``train``, ``val``, ``test`` (the 12 faces of the published tables) and ``ood`` (no faces),
N x 64 x 64 x 3, 8 bit. Both flows are trained on ``train`` unless weights are given; an interrupted training goes on from RUNS.
``--side 32`` halves the images first. Strengths of all methods are chosen on images of ``val``, from the grids printed.

- ``denoising``: noise of standard deviation 0.05, 0.1, 0.2; BM3D (package bm3d), TV, PatchNR, LatentMAP with gamma |z|, and
  FlowDenoiser, with a flow trained by score matching at each level;
- ``sensing``: m Gaussian measurements of entries N(0, 1/m), noise N(0, 0.01/m); Lasso in DCT and Haar, TV, PatchNR, LatentMAP;
- ``inpainting``: a centred square of a third of the side is missing;
- ``ood``: the same sensing of images that are no faces;
- ``questions``: start, penalty and optimizer of LatentMAP at one m.

The published figures stand beside ours. The last line is one JSON object.
"""

import argparse
import copy
import functools
import json
import time
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
import torch.nn.functional as F
from common import versions
from deepinv.physics.functional import dct_2d, idct_2d

from deepinv_flows import (
    BitsPerDim,
    FlowDenoiser,
    FlowModel,
    FlowPrior,
    LatentMAP,
    PatchNR,
    fit_flow,
    fit_patchnr,
    image_flow,
)

PUBLISHED = {
    "denoising": {
        0.05: {"BM3D": 33.95, "LatentMAP": 34.04},
        0.1: {"BM3D": 29.93, "LatentMAP": 30.48},
        0.2: {"BM3D": 25.16, "LatentMAP": 27.09},
    },
    "sensing": {
        500: {"Lasso DCT": 15.70, "Lasso wavelet": 12.96, "LatentMAP": 27.00},
        1000: {"Lasso DCT": 17.77, "Lasso wavelet": 14.60, "LatentMAP": 30.09},
        2500: {"Lasso DCT": 21.76, "Lasso wavelet": 18.11, "LatentMAP": 34.56},
        5000: {"Lasso DCT": 26.44, "Lasso wavelet": 22.73, "LatentMAP": 36.95},
    },
}
SECTIONS = ("denoising", "sensing", "inpainting", "ood", "questions")


def load(folder: Path, side: int) -> dict[str, torch.Tensor]:
    raw = np.load(folder / "faces64.npz")
    images = {name: torch.from_numpy(raw[name]).permute(0, 3, 1, 2).float() / 255 for name in raw.files}
    # means of 2x2 pixels, rounded to grey levels again
    return (
        images
        if side == 64
        else {name: (255 * F.avg_pool2d(x, 64 // side)).round() / 255 for name, x in images.items()}
    )


def psnr(x_net: torch.Tensor, x: torch.Tensor) -> float:
    return float(dinv.metric.PSNR()(x_net.clamp(0, 1), x).mean())


# --- problems: physics and measurements ---


def noisy(x, sigma, seed):
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma, rng=torch.Generator().manual_seed(seed)))
    return physics, physics(x), sigma


@functools.cache
def gaussian_matrix(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m)) / m**0.5


def sensed(x, m, seed):
    A, shape = gaussian_matrix(m, x[0].numel()), x.shape[1:]
    noise = dinv.physics.GaussianNoise(0.1 / m**0.5, rng=torch.Generator().manual_seed(seed))
    physics = dinv.physics.LinearPhysics(
        A=lambda x, **kwargs: x.flatten(1) @ A.T,
        A_adjoint=lambda y, **kwargs: (y @ A).view(-1, *shape),
        noise_model=noise,
    )
    physics.norm = (1 + (x[0].numel() / m) ** 0.5) ** 2  # largest eigenvalue of A^T A (Marchenko & Pastur 1967)
    return physics, physics(x), 0.1 / m**0.5


def holed(x, side, seed):
    mask, start = torch.ones_like(x[:1]), (x.shape[-1] - side) // 2
    mask[..., start : start + side, start : start + side] = 0
    noise = dinv.physics.GaussianNoise(0.01, rng=torch.Generator().manual_seed(seed))
    physics = dinv.physics.Inpainting(tuple(x.shape[1:]), mask=mask[0], noise_model=noise)
    return physics, physics(x), 0.01


# --- methods: (physics, y, sigma, strength) to images ---


class Lasso(dinv.optim.Prior):
    """The l1 norm of orthonormal coefficients."""

    def __init__(self, analyse, synthesise):
        super().__init__()
        self.explicit_prior, self.analyse, self.synthesise = True, analyse, synthesise

    def fn(self, x, *args, **kwargs):
        return self.analyse(x).abs().flatten(1).sum(1)

    def prox(self, x, *args, gamma=1.0, **kwargs):
        return self.synthesise(F.softshrink(self.analyse(x), float(gamma)))


def haar(x, levels=4):
    x = x.clone()
    side = x.shape[-1]
    for _ in range(levels):
        a = x[..., :side, :side]
        for dim in (2, 3):
            even, odd = a.unflatten(dim, (-1, 2)).unbind(dim + 1)
            a = torch.cat([even + odd, even - odd], dim) / 2**0.5
        x[..., :side, :side] = a
        side //= 2
    return x


def inverse_haar(w, levels=4):
    w = w.clone()
    for level in reversed(range(levels)):
        side = w.shape[-1] // 2**level
        a = w[..., :side, :side]
        for dim in (3, 2):
            low, high = a.chunk(2, dim)
            a = torch.stack([low + high, low - high], dim + 1).flatten(dim, dim + 1) / 2**0.5
        w[..., :side, :side] = a
    return w


def proximal_descent(prior, physics, y, sigma, strength, iterations):
    model = dinv.optim.FISTA(
        data_fidelity=dinv.optim.L2(), prior=prior, lambda_reg=strength, max_iter=iterations,
        stepsize=0.99 / getattr(physics, "norm", 1.0), early_stop=False,
    )  # fmt: skip
    return model(y, physics)


def total_variation(physics, y, sigma, strength, iterations=200):
    if isinstance(physics, dinv.physics.Denoising):
        return dinv.models.TVDenoiser(n_it_max=200)(y, strength)
    return proximal_descent(dinv.optim.TVPrior(n_it_max=10), physics, y, sigma, strength, iterations)


orthonormal_dct, inverse_dct = (functools.partial(transform, norm="ortho") for transform in (dct_2d, idct_2d))


def lasso_dct(physics, y, sigma, strength, iterations=200):
    return proximal_descent(Lasso(orthonormal_dct, inverse_dct), physics, y, sigma, strength, iterations)


def lasso_wavelet(physics, y, sigma, strength, iterations=200):
    return proximal_descent(Lasso(haar, inverse_haar), physics, y, sigma, strength, iterations)


def first_by_dct(physics, y, sigma):
    return lasso_dct(physics, y, sigma, 0.1)


def first_by_tv(physics, y, sigma):
    return total_variation(physics, y, sigma, sigma, 100)


def bm3d(physics, y, sigma, strength):
    return dinv.models.BM3D()(y, sigma)


def bm3d_rgb(physics, y, sigma, strength):
    """The package's own way with colours, which denoises luminance and chrominance; deepinv's takes channels one by one."""
    import bm3d

    images = [bm3d.bm3d_rgb(image.permute(1, 2, 0).double().numpy(), sigma) for image in y]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def patchnr(prior, iterations, start, physics, y, sigma, strength):
    """Adam on |Ax - y|^2 / 2 + strength HW/p^2 g(x), from another method's result."""
    x = start(physics, y, sigma).clone().requires_grad_()
    weight = strength * x[0, 0].numel() / prior.patch_size**2
    optimizer = torch.optim.Adam([x], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        (dinv.optim.L2()(x, y, physics) + weight * prior(x)).sum().backward()
        optimizer.step()
        schedule.step()
    return x.detach()


def latent(flow, iterations, physics, y, sigma, strength, **options):
    """LatentMAP on |A G(z) - y|^2 / 2 sigma^2 + strength |z|."""
    fidelity = dinv.optim.L2(sigma=sigma)
    return LatentMAP(flow, fidelity, lambda_reg=strength, max_iter=iterations, **options)(y, physics)


def by_score(denoiser, physics, y, sigma, strength):
    """The mean of the estimates from an image, the same moved by a pixel each way, and their mirror images."""
    padded, (height, width) = F.pad(y, (1, 1, 1, 1), mode="reflect"), y.shape[-2:]
    total, count = torch.zeros_like(padded), torch.zeros_like(padded)
    for i, j in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
        window = (..., slice(i, i + height), slice(j, j + width))
        moved = padded[window]
        with torch.no_grad():
            total[window] += denoiser(moved, sigma) + denoiser(moved.flip(3), sigma).flip(3)
        count[window] += 2
    return (total / count.clamp(min=1))[..., 1:-1, 1:-1]


# --- the experiment ---


def train(images, args) -> tuple[torch.nn.Module, PatchNR, dict]:
    start, shape, generator = time.perf_counter(), images["train"].shape[1:], torch.Generator().manual_seed(0)
    runs = args.save_path
    if args.flow:
        flow = FlowPrior(pretrained=args.flow).normalizing_flow
    else:
        flow = image_flow(shape, args.levels, args.steps, args.hidden, args.coupling, generator=generator).to(
            args.device
        )
        fit_flow(
            flow, images["train"], images["val"], epochs=args.epochs, save_path=runs / f"flow{args.side}", resume=True,
            device=args.device,
        )  # fmt: skip
        FlowPrior(flow).save(runs / f"flow{args.side}.safetensors")
    seconds = {"seconds_flow": round(time.perf_counter() - start)}
    if args.patch:
        prior = PatchNR.from_checkpoint(args.patch)
    else:
        prior = fit_patchnr(
            images["train"], images["val"], patch_size=args.patch_size, epochs=args.patch_epochs, augment=False,
            save_path=runs / f"patch{args.side}", resume=True, device=args.device,
        )  # fmt: skip
        prior.save(runs / f"patch{args.side}.safetensors")
    seconds["seconds_patch"] = round(time.perf_counter() - start) - seconds["seconds_flow"]
    return flow.requires_grad_(False).cpu(), prior.requires_grad_(False).cpu(), seconds


def train_denoisers(images, args) -> tuple[dict[float, FlowDenoiser], int | None]:
    """A flow for each noise level by denoising score matching: one at the middle level, then that a while longer at each."""
    start, runs = time.perf_counter(), args.save_path

    def fitted(flow, sigma, name, epochs, lr):
        fit_flow(
            flow.requires_grad_(True).to(args.device), images["train"], images["val"], sigma=sigma, batch_size=8,
            epochs=epochs, lr=lr, save_path=runs / f"{name}{args.side}", resume=True, device=args.device,
        )  # fmt: skip
        FlowPrior(flow).save(runs / f"{name}{args.side}.safetensors")
        return flow

    flows = {}
    for pair in args.denoisers:
        level, file = pair.split("=")
        flows[float(level)] = FlowPrior(pretrained=file).normalizing_flow
    missing = [sigma for sigma in args.noise if sigma not in flows]
    if missing:
        middle, generator = sorted(args.noise)[len(args.noise) // 2], torch.Generator().manual_seed(0)
        sizes = args.levels, args.steps, args.hidden, args.coupling
        common = image_flow(images["train"].shape[1:], *sizes, activation="silu", generator=generator)
        fitted(common, middle, "denoiser", args.denoiser_epochs, lr=1.5e-3)
    for sigma in missing:
        flows[sigma] = fitted(copy.deepcopy(common), sigma, f"denoiser_{sigma}_", args.level_epochs, lr=1e-3)
    found = {sigma: FlowDenoiser(FlowPrior(flow.requires_grad_(False).cpu())) for sigma, flow in flows.items()}
    return found, round(time.perf_counter() - start) if missing else None


def compare(title, problem, methods, tune, test, published) -> dict[str, float]:
    """Choose the strength of each method on ``tune``, and apply it to ``test``."""
    scores = {}
    tuning, testing = problem(tune, seed=0), problem(test, seed=1)
    for name, (method, grid) in methods.items():
        start, chosen = time.perf_counter(), grid[0]
        if len(grid) > 1:
            tried = {strength: round(psnr(method(*tuning, strength), tune), 2) for strength in grid}
            chosen = max(tried, key=tried.get)
        scores[name] = round(psnr(method(*testing, chosen), test), 2)
        note = f"  val: {tried}" if len(grid) > 1 else ""
        beside = published.get(name, "")
        print(
            f"{title:<22}{name:<16}{scores[name]:>7.2f}{beside:>10}{time.perf_counter() - start:>8.0f} s{note}",
            flush=True,
        )
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--save-path", type=Path, default=Path("runs_faces"), help="folder for checkpoints and weights of the trainings"
    )
    parser.add_argument("--flow", help="weights of an image flow, instead of training")
    parser.add_argument("--patch", help="weights of a PatchNR, instead of training")
    parser.add_argument("--side", type=int, choices=(64, 32), default=64)
    parser.add_argument("--denoisers", nargs="+", default=[], help="weights of FlowDenoisers, as 0.1=FILE")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--coupling", default="allinone")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--patch-epochs", type=int, default=40, help="epochs of 250 batches of 1024 patches")
    parser.add_argument("--denoiser-epochs", type=int, default=30, help="at the middle level")
    parser.add_argument("--level-epochs", type=int, default=30, help="at each level, after these")
    parser.add_argument("--device", default="cpu", help="of the trainings")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--measurements", type=int, nargs="+", default=[500, 1000, 2500, 5000])
    parser.add_argument("--images", type=int, default=12, help="test images of each kind")
    parser.add_argument("--tuning-images", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=150, help="of LatentMAP")
    parser.add_argument("--patch-iterations", type=int, default=200, help="of PatchNR")
    parser.add_argument("--without", nargs="+", default=[], help="methods to leave out")
    args = parser.parse_args()

    images = load(args.data, args.side)
    flow, prior, result = train(images, args)
    by_level = {}
    if "denoising" in args.sections and "FlowDenoiser" not in args.without:
        by_level, result["seconds_denoisers"] = train_denoisers(images, args)
    prior.n_patches, prior.subset = max(256, args.side**2 // 4), "grid"
    model = FlowModel(flow)
    with torch.no_grad():
        bits = {k: float(BitsPerDim()(model(images[k]), images[k]).mean()) for k in ("val", "test", "ood")}
    result["bits_per_dim"] = {name: round(value, 3) for name, value in bits.items()}
    print("bits per dimension:", result["bits_per_dim"], flush=True)

    tune, test, ood = images["val"][: args.tuning_images], images["test"][: args.images], images["ood"][: args.images]
    by_flow = functools.partial(latent, flow, args.iterations)
    by_patches = functools.partial(patchnr, prior, args.patch_iterations)
    linear = {
        "Lasso DCT": (lasso_dct, [0.01, 0.03, 0.1]),
        "Lasso wavelet": (lasso_wavelet, [0.01, 0.03, 0.1]),
        "TV": (total_variation, [0.1, 0.3, 1.0, 3.0]),
        "PatchNR": (functools.partial(by_patches, first_by_dct), [1e-4, 3e-4, 1e-3]),
        "LatentMAP": (by_flow, [0.0, 1.0, 10.0, 30.0]),
    }
    linear = {name: method for name, method in linear.items() if name not in args.without}

    def denoisers(sigma):
        found = {
            "noisy": (lambda physics, y, sigma, strength: y, [0]),
            "BM3D": (bm3d_rgb, [0]),
            "BM3D, deepinv": (bm3d, [0]),
            "TV": (total_variation, [f * sigma for f in (0.5, 0.8, 1.2)]),
            "PatchNR": (functools.partial(by_patches, first_by_tv), [f * sigma**2 for f in (0.3, 0.6, 1.0)]),
            "LatentMAP": (by_flow, [30.0, 60.0, 100.0, 150.0]),
        }
        if by_level:
            found["FlowDenoiser"] = (functools.partial(by_score, by_level[sigma]), [0])
        return {name: method for name, method in found.items() if name not in args.without}

    run = functools.partial(compare, tune=tune, test=test)
    print(f"\n{'':<22}{'':<16}{'PSNR':>7}{'published':>10}")
    if "denoising" in args.sections:
        result["denoising"] = {
            sigma: run(f"noise {sigma}", lambda x, seed, s=sigma: noisy(x, s, seed), denoisers(sigma),
                       published=PUBLISHED["denoising"].get(sigma, {}) if args.side == 64 else {})
            for sigma in args.noise
        }  # fmt: skip
    for section, on in (("sensing", test), ("ood", ood)):
        if section in args.sections:
            result[section] = {
                m: compare(f"{section}, m = {m}", lambda x, seed, m=m: sensed(x, m, seed), linear, tune, on,
                           PUBLISHED["sensing"].get(m, {}) if section == "sensing" and args.side == 64 else {})
                for m in args.measurements
            }  # fmt: skip
    if "inpainting" in args.sections:
        few = {name: linear[name] for name in ("TV", "LatentMAP") if name in linear}
        if "PatchNR" in linear:
            few["PatchNR"] = functools.partial(by_patches, first_by_tv), [1e-5, 1e-4, 1e-3]
        side = args.side // 3
        result["inpainting"] = run(f"square of {side}", lambda x, seed: holed(x, side, seed), few, published={})
    if "questions" in args.sections:
        result["questions"] = questions(flow, args, test[:4], ood[:4])
    print(json.dumps({**result, "images": len(test), "versions": versions()}))


def questions(flow, args, test, ood) -> dict:
    """Start, penalty and optimizer, at the middle number of measurements; mean PSNR of faces and of other images."""
    m, found = sorted(args.measurements)[len(args.measurements) // 2], {}
    ways = {
        "zero, no penalty, LBFGS": dict(strength=0.0),
        "random of std 0.1": dict(strength=0.0, init="random", init_std=0.1),
        "random of std 0.7": dict(strength=0.0, init="random", init_std=0.7),
        "penalty norm": dict(strength=10.0),
        "penalty squared": dict(strength=0.5, penalty="squared"),
        "Adam": dict(strength=0.0, optimizer="adam"),
        "from the pseudo-inverse": dict(strength=0.0, init=lambda y, physics: flow(physics.A_adjoint(y))[0]),
    }
    for name, way in ways.items():
        scores = []
        for x in (test, ood):
            physics, y, sigma = sensed(x, m, seed=1)
            scores.append(round(psnr(latent(flow, args.iterations, physics, y, sigma, **way), x), 2))
        found[name] = scores
        print(f"m = {m}, {name:<28} faces {scores[0]:.2f}, others {scores[1]:.2f}", flush=True)
    return found


if __name__ == "__main__":
    main()
