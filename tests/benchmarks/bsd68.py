r"""
Gaussian denoising of the 68 grey test images of the Berkeley segmentation data set, by patch priors and their rivals.

    python tests/benchmarks/bsd68.py --data DIR [--quick] [--denoiser FILE ...] [--prior FILE] [--cache FOLDER]

Protocol: noise of standard deviation 15, 25 and 50 grey levels, unclipped, from fixed seeds; PSNR and SSIM
of the clipped estimates. ``DIR/bsd`` holds ``train400`` (180x180, trained on) and ``set68``. Strengths are chosen on ten images
of ``train400`` that are kept from every training, numbers 21, 61, ..., 381 of its sorted names.

- BM3D: the package bm3d, which is told the noise level and has nothing to choose;
- TV: deepinv's ``TVDenoiser`` until it stands still, its strength chosen;
- EPLL: deepinv's, with a mixture of 200 Gaussians on 6x6 patches without their mean, fitted to 50 000 patches of ``train400``,
  and a flat density of the mean; its penalties are multiplied by a chosen factor;
- MAP: ``MAP(prior)``, for ``--prior``, a PatchNR that was trained by its likelihood on ``train400``; its strength chosen;
- denoiser: ``FlowDenoiser(prior)``, for those of ``--denoiser`` that know the level; nothing to choose.

``--quick`` takes every twelfth test image and noise 25; a method without weights is left out. ``--cache`` keeps the mixture.
The last line is one JSON object: mean PSNR at 25 by method, ``null`` for one left out, and all rows.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import deepinv as dinv
import torch
from common import check_disjoint, versions
from faces_recovery import best_strength
from torch import Tensor
from torch.nn import functional as F

from deepinv_flows import MAP, FlowDenoiser, PatchNR, load_images

LEVELS, PATCH, COMPONENTS, FITTED = (15, 25, 50), 6, 200, 50_000
HELD_OUT = slice(20, None, 40)
SHIPPED = {"denoiser": "natural25"}
PSNR, SSIM = dinv.metric.PSNR(), dinv.metric.SSIM()


def noisy(x: Tensor, sigma: float, seed: int) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def by_bm3d(y: Tensor, sigma: float, strength: float) -> Tensor:
    import bm3d

    return torch.from_numpy(bm3d.bm3d(y[0, 0].double().numpy(), sigma)).float()[None, None]


def by_tv(y: Tensor, sigma: float, strength: float) -> Tensor:
    return dinv.models.TVDenoiser(n_it_max=1000, crit=1e-6)(y, strength * sigma)


def by_epll(y: Tensor, sigma: float, strength: float, mixture) -> Tensor:
    model = dinv.optim.EPLL(mixture, pretrained=None, patch_size=PATCH)
    betas = [strength * beta / sigma**2 for beta in (1, 4, 8, 16, 32)]
    with torch.no_grad():
        return model(y, dinv.physics.Denoising(), sigma=sigma, betas=betas, batch_size=2000)


def by_map(y: Tensor, sigma: float, strength: float, prior: PatchNR) -> Tensor:
    lambda_reg = strength * y[0].numel() / prior.dim
    model = MAP(prior, dinv.optim.L2(sigma=sigma), lambda_reg, verbose=False)
    return model(y, dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma)))


def by_denoiser(y: Tensor, sigma: float, strength: float, denoiser: FlowDenoiser) -> Tensor:
    with torch.no_grad():
        return denoiser(y, sigma)


def fitted_mixture(images: list[Tensor], cache: Path | None):
    """A mixture of Gaussians of mean zero, by 30 steps of expectation maximisation, with a flat density of the patch's mean."""
    mixture = dinv.optim.utils.GaussianMixtureModel(COMPONENTS, PATCH**2)
    path = None if cache is None else cache / "bsd68_mixture.pt"
    if path is not None and path.is_file():
        covs, weights = torch.load(path, weights_only=True)
    else:
        generator = torch.Generator().manual_seed(0)
        patches = torch.cat([F.unfold(x, PATCH)[0].T for x in images])
        x = patches[torch.randperm(len(patches), generator=generator)[:FITTED]]
        covs, weights = expectation_maximisation(x - x.mean(1, keepdim=True), generator)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((covs, weights), path)
    mixture.set_cov(covs + torch.ones(PATCH**2, PATCH**2) / PATCH**2 * 10.0)
    mixture.set_weights(weights)
    return mixture


def expectation_maximisation(x: Tensor, generator: torch.Generator, steps: int = 30) -> tuple[Tensor, Tensor]:
    parts = torch.softmax(3 * torch.randn(len(x), COMPONENTS, generator=generator), 1)
    # by their contrast at first, so that the components differ
    order = x.pow(2).sum(1).argsort().argsort() * COMPONENTS // len(x)
    parts = 0.5 * parts + 0.5 * F.one_hot(order, COMPONENTS)
    small = 1e-5 * torch.eye(x.shape[1])
    for _ in range(steps):
        total = parts.sum(0)
        covs = torch.stack([(x * part[:, None]).T @ x for part in parts.T]) / total[:, None, None] + small
        scores = [-0.5 * (((x @ torch.linalg.inv(c)) * x).sum(1) + torch.logdet(c)) for c in covs]
        parts = torch.softmax(torch.stack(scores, 1) + (total / len(x)).log(), 1)
    return covs, total / len(x)


def mean_psnr(method: Callable, images: list[Tensor], sigma: float, strength: float) -> float:
    found = [float(PSNR(method(noisy(x, sigma, k), sigma, strength).clamp(0, 1), x)) for k, x in enumerate(images)]
    return round(sum(found) / len(found), 3)


def row(method: Callable, grid: list[float], held_out: list[Tensor], test: dict[int, Tensor], sigma: float) -> dict:
    """Choose the strength on the images held out, and apply it to the test images."""
    strength, at_end = grid[0], False
    if len(grid) > 1:
        score = functools.partial(mean_psnr, method, held_out, sigma)
        strength, _, at_end = best_strength(score, grid, 4)
    psnrs, ssims, start = [], [], time.perf_counter()
    for number, x in test.items():
        found = method(noisy(x, sigma, 1000 + number), sigma, strength).clamp(0, 1)
        psnrs.append(float(PSNR(found, x)))
        ssims.append(float(SSIM(found, x)))
    seconds = (time.perf_counter() - start) / len(test)
    ends = {"strength": strength, **({"at_end_of_grid": True} if at_end else {})} if len(grid) > 1 else {}
    return {**_mean("psnr", psnrs), **_mean("ssim", ssims), "seconds": round(seconds, 1), **ends}


def _mean(name: str, values: list[float]) -> dict[str, float]:
    """The mean and its standard error."""
    found = torch.tensor(values, dtype=torch.float64)
    return {name: round(float(found.mean()), 3), f"{name} error": round(float(found.std() / len(found) ** 0.5), 3)}


def methods(args, train: list[Tensor]) -> dict[str, tuple[Callable, list[float], Callable]]:
    """By name: the method, the strengths to try, and which noise levels it takes."""

    def always(sigma):
        return True

    found: dict[str, tuple[Callable, list[float], Callable]] = {
        "bm3d": (by_bm3d, [0], always),
        "tv": (by_tv, [0.7, 1.0, 1.4], always),
    }
    if "epll" not in args.without:
        start = time.perf_counter()
        mixture = fitted_mixture(train, args.cache)
        print(f"EPLL fitted in {time.perf_counter() - start:.0f} s", flush=True)
        found["epll"] = (functools.partial(by_epll, mixture=mixture), [0.5, 1.0, 2.0], always)
    if args.prior:
        prior = PatchNR.from_checkpoint(args.prior).requires_grad_(False)
        found["map"] = (functools.partial(by_map, prior=prior), [0.1, 0.2, 0.4], always)
    for name in args.denoiser:
        prior = PatchNR.from_checkpoint(name).requires_grad_(False)
        low, high = prior.sigma_range or (0.0, float("inf"))
        key = "denoiser" if len(args.denoiser) == 1 else f"denoiser {name}"
        method = functools.partial(by_denoiser, denoiser=FlowDenoiser(prior))
        found[key] = (method, [0], lambda sigma, low=low, high=high: 0.999 * low < sigma < 1.001 * high)
    return {name: method for name, method in found.items() if name not in args.without}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="six test images, noise 25")
    parser.add_argument("--denoiser", nargs="*", default=list(SHIPPED.values()), help="files, or shipped weights")
    parser.add_argument("--prior", help="file of PatchNR.save, for MAP")
    parser.add_argument("--cache", type=Path, help="folder for what is fitted")
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    args = parser.parse_args()
    everything, tests = ([x[None] for x in load_images(args.data / "bsd" / part)] for part in ("train400", "set68"))
    held_out = everything[HELD_OUT]
    train = [x for k, x in enumerate(everything) if k not in range(400)[HELD_OUT]]
    check_disjoint({"train": torch.cat(train), "held out": torch.cat(held_out)})
    corners = torch.cat([x[:, :, i : i + 180, j : j + 180] for x in tests for i in (0, 70, 140) for j in (0, 70, 140)
                         if i + 180 <= x.shape[2] and j + 180 <= x.shape[3]])  # fmt: skip
    check_disjoint({"train": torch.cat(everything), "crops of the test images": corners})
    test = {k + 1: x for k, x in enumerate(tests) if not args.quick or k % 12 == 0}
    rows = methods(args, train)
    at_25: dict[str, float | None] = dict.fromkeys(("bm3d", "epll", "tv", "map", "bilevel", "denoiser"))
    table: dict[int, dict] = {}
    for level in (25,) if args.quick else LEVELS:
        for name, (method, grid, takes) in rows.items():
            if takes(level / 255):
                found = row(method, grid, held_out, test, level / 255)
                print(f"sigma {level}, {name}: {found}", flush=True)
                table.setdefault(level, {})[name] = found
                if level == 25:
                    at_25[name] = found["psnr"]
    print(json.dumps({**at_25, "rows": table, "images": len(test), **versions()}))


if __name__ == "__main__":
    main()
