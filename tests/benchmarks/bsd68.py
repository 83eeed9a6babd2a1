r"""
Gaussian denoising of the 68 grey test images of the Berkeley segmentation data set, by patch priors and their rivals.

    python tests/benchmarks/bsd68.py --data DIR [--quick] [--denoiser FILE ...] [--prior FILE] [--bilevel FILE ...]
        [--device cuda] [--workers N] [--rows FILE] [--cache FOLDER]

Protocol: noise of standard deviation 15, 25 and 50 grey levels, unclipped, from fixed seeds; PSNR and SSIM
of the clipped estimates. ``DIR/bsd`` holds ``train400`` (180x180, trained on) and ``set68``. Strengths are chosen on ten images
of ``train400`` that are kept from every training, numbers 21, 61, ..., 381 of its sorted names.

- BM3D: the package bm3d, which is told the noise level and has nothing to choose; always on the processor, by ``--workers``;
- TV: deepinv's ``TVDenoiser`` until it stands still, its strength chosen;
- EPLL: deepinv's, with a mixture of 200 Gaussians on 6x6 patches without their mean, fitted to ``--fitted`` patches of
  ``train400``, and a flat density of the mean; its penalties are multiplied by a chosen factor;
- MAP: ``MAP(prior)``, for ``--prior``, a PatchNR trained on ``train400`` with little noise, of images that are mirrored at their
  borders; its strength chosen;
- bilevel: the models of ``--bilevel``, of ``train_bilevel.py``, that were trained for the level; nothing to choose;
- denoiser: ``FlowDenoiser(prior)``, for those of ``--denoiser`` that know the level; nothing to choose. Each is a row, and
  ``denoiser`` the one of the narrowest range.

``--quick`` takes every twelfth test image and noise 25, and chooses strengths on the middle 96x96 pixels of the ten images; a
method without weights is left out. ``--cache`` keeps the mixture.
``--rows`` keeps each row as a line of a file, and takes from there what it finds: an interrupted run goes on, and runs side by
side, each with some of ``--methods`` or ``--levels``, make one table by a last run with all of them. Seconds are per image, on
the device named in the row, whatever else it did then.
The last line is one JSON object: mean PSNR at 25 by method, ``null`` for one left out, and all rows.
"""

import argparse
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
from arena import (
    Rows,
    best_strength,
    device_name,
    divided,
    expectation_maximisation,
    fingerprint,
    load_prior,
    mean_and_error,
    on_device,
    some_patches,
)
from common import check_disjoint, versions
from torch import Tensor

from deepinv_flows import MAP, FlowDenoiser, PatchNR, load_images

LEVELS, PATCH, COMPONENTS = (15, 25, 50), 6, 200
SHIPPED = {"denoiser": ["natural25", "natural15-50"], "prior": "natural"}
METHODS = ("bm3d", "epll", "tv", "map", "bilevel", "denoiser")
PSNR, SSIM = dinv.metric.PSNR(), dinv.metric.SSIM()
SPAWN = multiprocessing.get_context("spawn")  # forked processes may hang, or share a GPU


@dataclass
class Method:
    """
    A row of the table at each level.

    :param Callable make: makes what maps y, sigma and a strength to an estimate, when the first row is computed.
    :param list grid: strengths to choose from; one where there is nothing to choose.
    :param str of: what tells it from the same method with other weights.
    """

    make: Callable[[], Callable]
    grid: list[float]
    of: str = ""
    takes: Callable[[float], bool] = lambda sigma: True
    width: float = 0.0  # of the range of levels


def noisy(x: Tensor, sigma: float, seed: int) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def by_bm3d(y: Tensor, sigma: float, strength: float) -> Tensor:
    return torch.from_numpy(timed_bm3d(y.numpy(), sigma)[0])


def timed_bm3d(y: np.ndarray, sigma: float) -> tuple[np.ndarray, float]:
    import bm3d

    start = time.perf_counter()
    found = bm3d.bm3d(y[0, 0].astype(np.float64), sigma).astype(np.float32)[None, None]
    return found, time.perf_counter() - start


def by_tv(y: Tensor, sigma: float, strength: float) -> Tensor:
    return dinv.models.TVDenoiser(n_it_max=1000, crit=1e-6)(y, strength * sigma)


def by_epll(y: Tensor, sigma: float, strength: float, mixture) -> Tensor:
    model = dinv.optim.EPLL(mixture, pretrained=None, patch_size=PATCH)
    betas = [strength * beta / sigma**2 for beta in (1, 4, 8, 16, 32)]
    with torch.no_grad():
        batch = 2000 if y.device.type == "cpu" else 40_000
        return model(y, dinv.physics.Denoising(), sigma=sigma, betas=betas, batch_size=batch)


def by_map(y: Tensor, sigma: float, strength: float, prior: PatchNR) -> Tensor:
    lambda_reg = strength * y[0].numel() / prior.dim
    # to a tolerance at which the PSNR stands still to 0.02 dB
    return by_model(y, sigma, 0, MAP(prior, dinv.optim.L2(sigma=sigma), lambda_reg, tol=1e-2, verbose=False))


def by_model(y: Tensor, sigma: float, strength: float, model: MAP) -> Tensor:
    return model(y, dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma)).to(y.device))


def by_denoiser(y: Tensor, sigma: float, strength: float, denoiser: FlowDenoiser) -> Tensor:
    with torch.no_grad():
        return denoiser(y, sigma)


def fitted_mixture(images: list[Tensor], args):
    """A mixture of Gaussians of mean zero, by expectation maximisation, with a flat density of the patch's mean."""
    mixture = dinv.optim.utils.GaussianMixtureModel(COMPONENTS, PATCH**2)
    path = None if args.cache is None else args.cache / f"bsd68_mixture_{COMPONENTS}_{PATCH}_{args.fitted}.pt"
    if path is not None and path.is_file():
        weights, covs = torch.load(path, weights_only=True)
    else:
        start, generator = time.perf_counter(), torch.Generator().manual_seed(0)
        x = some_patches(images, PATCH, args.fitted, generator).to(args.device)
        weights, _, covs = expectation_maximisation(x - x.mean(1, keepdim=True), COMPONENTS, generator)
        weights, covs = weights.cpu(), covs.cpu()
        print(f"EPLL fitted to {len(x)} patches in {time.perf_counter() - start:.0f} s", flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((weights, covs), path)
    mixture.set_cov(covs + torch.ones(PATCH**2, PATCH**2) / PATCH**2 * 10.0)
    mixture.set_weights(weights)
    return mixture.to(args.device)


def mean_psnr(method: Callable, images: list[Tensor], device: str, sigma: float, strength: float) -> float:
    estimates = (method(noisy(x, sigma, k).to(device), sigma, strength).clamp(0, 1).cpu() for k, x in enumerate(images))
    found = [float(PSNR(estimate, x)) for estimate, x in zip(estimates, images)]
    return round(sum(found) / len(found), 3)


def estimates(method: Callable, ys: list[Tensor], device: str, sigma: float, strength: float, workers: int):
    """Each estimate and its seconds."""
    if method is by_bm3d and workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
        with ProcessPoolExecutor(workers, SPAWN) as pool:
            for found, seconds in pool.map(timed_bm3d, [y.numpy() for y in ys], [sigma] * len(ys)):
                yield torch.from_numpy(found), seconds
        return
    for y in ys if device == "cpu" else [ys[0], *ys]:  # a GPU's first call takes longer, and is dropped below
        start = time.perf_counter()
        found = method(y.to(device), sigma, strength).cpu()
        yield found, time.perf_counter() - start


def row(
    method: Callable,
    grid: list[float],
    held_out: list[Tensor],
    test: dict[int, Tensor],
    sigma: float,
    device: str,
    workers: int,
) -> dict:
    """Choose the strength on the images held out, and apply it to the test images."""
    strength, at_end = grid[0], False
    if len(grid) > 1:
        score = functools.partial(mean_psnr, method, held_out, device, sigma)
        strength, _, at_end = best_strength(score, grid, 4)
    ys = [noisy(x, sigma, 1000 + number) for number, x in test.items()]
    found = list(estimates(method, ys, device, sigma, strength, workers))[-len(ys) :]
    images = [estimate.clamp(0, 1) for estimate, _ in found]
    psnrs, ssims = ([float(metric(a, x)) for a, x in zip(images, test.values())] for metric in (PSNR, SSIM))
    seconds = sum(seconds for _, seconds in found) / len(found)
    ends = {"strength": strength, **({"at_end_of_grid": True} if at_end else {})} if len(grid) > 1 else {}
    return {**_mean("psnr", psnrs), **_mean("ssim", ssims), "seconds": round(seconds, 2), **ends}


def where(device: str, tf32: bool) -> dict:
    return {} if device == "cpu" else {"device": device_name(device), "tf32": tf32}


def _mean(name: str, values: list[float]) -> dict[str, float]:
    """The mean and its standard error."""
    mean, error = mean_and_error(values)
    return {name: round(mean, 3), f"{name} error": round(error, 3)}


def methods(args, train: list[Tensor]) -> dict[str, list[Method]]:
    """By name: what is compared, each with the strengths to try, and which noise levels it takes."""
    found: dict[str, list[Method]] = {name: [] for name in METHODS}
    found["bm3d"] = [Method(lambda: by_bm3d, [0])]
    fitted = f"{args.fitted} patches"
    found["epll"] = [
        Method(lambda: functools.partial(by_epll, mixture=fitted_mixture(train, args)), [0.5, 1.0, 2.0], fitted)
    ]
    found["tv"] = [Method(lambda: by_tv, [0.7, 1.0, 1.4])]
    if args.prior and "map" in args.methods:
        make = functools.partial(load_prior, args.prior, args.device, pad=True)
        found["map"] = [
            Method(lambda: functools.partial(by_map, prior=make()), [0.1, 0.2, 0.4], fingerprint(args.prior))
        ]
    for name in args.bilevel if "bilevel" in args.methods else []:
        model = MAP.from_checkpoint(name, verbose=False).requires_grad_(False)
        on_device(model.prior, args.device)
        known = float(model.data_fidelity.norm) ** -0.5
        method = functools.partial(by_model, model=model)
        takes = functools.partial(_within, low=known, high=known)
        found["bilevel"].append(Method(lambda method=method: method, [0], fingerprint(name), takes))
    for name in args.denoiser if "denoiser" in args.methods else []:
        prior = load_prior(name, args.device)
        low, high = prior.sigma_range or (0.0, float("inf"))
        method = functools.partial(by_denoiser, denoiser=FlowDenoiser(prior))
        takes = functools.partial(_within, low=low, high=high)
        found["denoiser"].append(Method(lambda method=method: method, [0], fingerprint(name), takes, high - low))
    return {name: found[name] for name in args.methods}


def _within(sigma: float, low: float, high: float) -> bool:
    return 0.999 * low < sigma < 1.001 * high


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--quick", action="store_true", help="six test images, noise 25")
    add("--denoiser", nargs="*", default=SHIPPED["denoiser"], help="files, or shipped weights")
    add("--prior", default=SHIPPED["prior"], help="file of PatchNR.save, for MAP, or shipped weights")
    add("--bilevel", nargs="*", default=[], help="files of MAP.save, each for the level of its L2")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--levels", type=int, nargs="+", choices=LEVELS, default=LEVELS)
    add("--device", default="cpu", help="of all methods but BM3D")
    add("--tf32", action="store_true", help="allow matrix products with 10-bit mantissas on a GPU")
    add("--workers", type=int, default=1, help="processes for BM3D")
    add("--fitted", type=int, default=50_000, help="patches to which EPLL is fitted")
    add("--rows", type=Path, help="file that keeps rows")
    add("--cache", type=Path, help="folder for the mixture")
    return parser.parse_args()


def main():
    args = parse()
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    everything, tests = ([x[None] for x in load_images(args.data / "bsd" / part)] for part in ("train400", "set68"))
    train, held_out = divided(everything)
    check_disjoint({"train": torch.cat(train), "held out": torch.cat(held_out)})
    if args.quick:
        held_out = [x[:, :, 42:138, 42:138] for x in held_out]
    corners = torch.cat([x[:, :, i : i + 180, j : j + 180] for x in tests for i in (0, 70, 140) for j in (0, 70, 140)
                         if i + 180 <= x.shape[2] and j + 180 <= x.shape[3]])  # fmt: skip
    check_disjoint({"train": torch.cat(everything), "crops of the test images": corners})
    test = {k + 1: x for k, x in enumerate(tests) if not args.quick or k % 12 == 0}
    rows, compared, made = Rows(args.rows), methods(args, train), {}
    at_25: dict[str, float | None] = dict.fromkeys(METHODS)
    table: dict[int, dict] = {}
    for level in (25,) if args.quick else args.levels:
        for kind, several in compared.items():
            device = "cpu" if kind == "bm3d" else args.device
            on = where(device, args.tf32)
            fitting = [method for method in several if method.takes(level / 255)]
            narrowest = [method for method in fitting if method.width == min(other.width for other in fitting)]
            for method in fitting:
                name = kind if narrowest == [method] else f"{kind} {method.of}"
                key = dict(level=level, method=kind, of=method.of, images=len(test), **on)
                found = rows.find(key)
                if found is None:
                    made[id(method)] = made.get(id(method)) or method.make()
                    options = (held_out, test, level / 255, device, args.workers)
                    found = row(made[id(method)], method.grid, *options)
                    found = rows.add(key, found | on)
                print(f"sigma {level}, {name}: {found}", flush=True)
                table.setdefault(level, {})[name] = found
                if level == 25 and name == kind:  # the test images do not choose among several
                    at_25[kind] = found["psnr"]
    print(json.dumps({**at_25, "rows": table, "images": len(test), **versions()}))


if __name__ == "__main__":
    main()
