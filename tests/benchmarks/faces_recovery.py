r"""
Recovery of faces, in the latent space of an image flow and with a PatchNR, after Asim et al. (2020).

    python tests/benchmarks/faces_recovery.py --data DIR [--save-path RUNS] [--flow FILE] [--patch FILE]

``DIR/faces64.npz`` holds ``train``, ``val``, ``test`` (the 12 faces of the published tables) and ``ood`` (images that are not
faces), N x 64 x 64 x 3, 8 bit. No image of the other parts may lie within 0.05 RMSE of one of ``train``, which is asserted first.
Both flows are trained on ``train`` unless weights are given; an interrupted training goes on from RUNS. ``--side 32`` halves the
images. The strengths of all methods are chosen on the same images of ``val``, from grids that are widened until the best does not
lie at an end; where it still does, the row says so. Figures are means over the test images with their standard error.

- ``denoising``: noise of standard deviation 0.05, 0.1, 0.2; BM3D (package bm3d), TV, PatchNR, LatentMAP with gamma |z|, and
  FlowDenoiser, with a flow trained by score matching at each level, all by one recipe; its mean over shifts and mirror images is
  a row of its own; and FlowDenoiser with a PatchNR of noisy patches at each level, trained by their likelihood and then by score
  matching;
- ``sensing``: m Gaussian measurements, entries N(0, 1/m), noise N(0, 0.01/m); Lasso in DCT and Haar, TV, PatchNR, LatentMAP with
  gamma |z| and, as a temperature of the latents, with |z|^2 / 2 tau^2, and the most likely image by the sum of PatchNR's and the
  flow's log-densities, by Adam from LatentMAP's result;
- ``inpainting``: a centred square of a third of the side is missing;
- ``ood``: the same sensing of images that are not faces, with the strengths chosen on faces;
- ``posterior``: denoising by the posterior mean of LatentSampler, without a strength to choose, and how often pixels lie within
  one and two posterior standard deviations of it (68% and 95% for a Gaussian); minutes an image;
- ``questions``: start, penalty and optimizer of LatentMAP at one m, on images of ``val``.

The published figures of the same method, or of Glow for LatentMAP, stand beside ours. ``--rows FILE`` keeps each row, and takes
those that are there from it, so that sections can be run one after another, or side by side. The last line is one JSON object.
"""

import argparse
import copy
import functools
import importlib.util
import json
import time
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
import torch.nn.functional as F
from arena import Rows, best_strength, fingerprint, mean_and_error
from common import check_disjoint, versions
from recovery_methods import (
    Kept,
    bm3d,
    bm3d_rgb,
    by_score,
    by_scores_of_views,
    holed,
    image_map,
    lasso_dct,
    lasso_wavelet,
    latent,
    moved_to,
    noisy,
    patch_energy,
    posterior,
    sensed,
    total_variation,
)

from deepinv_flows import BitsPerDim, FlowDenoiser, FlowModel, FlowPrior, PatchNR, fit_flow, fit_patchnr, image_flow

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
PATCHES = "FlowDenoiser of patches"
SECTIONS = ("denoising", "sensing", "inpainting", "ood", "posterior", "questions")


def load(folder: Path, side: int) -> dict[str, torch.Tensor]:
    raw = np.load(folder / "faces64.npz")
    images = {name: torch.from_numpy(raw[name]).permute(0, 3, 1, 2).float() / 255 for name in raw.files}
    # means of 2x2 pixels, rounded to grey levels again
    return (
        images
        if side == 64
        else {name: (255 * F.avg_pool2d(x, 64 // side)).round() / 255 for name, x in images.items()}
    )


def psnrs(x_net: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return dinv.metric.PSNR()(x_net.cpu().clamp(0, 1), x)


def psnr(x_net: torch.Tensor, x: torch.Tensor) -> float:
    return float(psnrs(x_net, x).mean())


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
            device=args.device, mixed_precision=args.mixed_precision,
        )  # fmt: skip
        FlowPrior(flow).save(runs / f"flow{args.side}.safetensors")
    middle = time.perf_counter()
    if args.patch:
        prior = PatchNR.from_checkpoint(args.patch)
    else:
        prior = fit_patchnr(
            images["train"], images["val"], patch_size=args.patch_size, epochs=args.patch_epochs, steps_per_epoch=250,
            augment=False, mixed_precision=args.mixed_precision,
            save_path=runs / f"patch{args.side}", resume=True, device=args.device,
        )  # fmt: skip
        prior.save(runs / f"patch{args.side}.safetensors")
    spent = {"seconds_flow": middle - start, "seconds_patch": time.perf_counter() - middle}
    given = {"seconds_flow": args.flow, "seconds_patch": args.patch}
    seconds = {name: None if given[name] else round(value) for name, value in spent.items()}
    # from here on weights are in files, which tell rows apart
    args.flow, args.patch = (given or runs / f"{name}{args.side}.safetensors"
                             for given, name in ((args.flow, "flow"), (args.patch, "patch")))  # fmt: skip
    return flow.requires_grad_(False).to(args.device), prior.requires_grad_(False).to(args.device), seconds


def train_denoisers(images, args) -> tuple[dict[float, FlowDenoiser], int | None]:
    """A flow for each noise level by denoising score matching: one at the middle level, then that a while longer at each."""
    start, runs = time.perf_counter(), args.save_path

    def fitted(flow, sigma, name, epochs, lr):
        fit_flow(
            flow.requires_grad_(True).to(args.device), images["train"], images["val"], sigma=sigma, epochs=epochs, lr=lr,
            batch_size=args.denoiser_batch_size, save_path=runs / f"{name}{args.side}", resume=True, device=args.device,
            mixed_precision=args.mixed_precision,
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
        sizes = args.denoiser_levels, args.denoiser_steps, args.denoiser_hidden, args.coupling
        common = image_flow(images["train"].shape[1:], *sizes, activation="silu", generator=generator)
        fitted(common, middle, "denoiser", args.denoiser_epochs, lr=1.5e-3)
    for sigma in missing:
        flows[sigma] = fitted(copy.deepcopy(common), sigma, f"denoiser_{sigma}_", args.level_epochs, lr=1e-3)
        args.denoisers = [*args.denoisers, f"{sigma}={runs / f'denoiser_{sigma}_{args.side}.safetensors'}"]
    found = {
        sigma: FlowDenoiser(FlowPrior(flow.requires_grad_(False).to(args.device))) for sigma, flow in flows.items()
    }
    return found, round(time.perf_counter() - start) if missing else None


def train_patch_denoisers(images, args) -> tuple[dict[float, FlowDenoiser], int]:
    """A PatchNR of noisy patches for each noise level, all by one recipe: their likelihood, and then score matching."""
    start, found = time.perf_counter(), {}
    files = {float(level): file for level, file in (pair.split("=") for pair in args.patch_denoisers)}
    for sigma in args.noise:
        name = args.save_path / f"patch_denoiser_{sigma}_{args.side}"
        if sigma in files:
            found[sigma] = FlowDenoiser(PatchNR.from_checkpoint(files[sigma]).requires_grad_(False).to(args.device))
            continue

        def fitted(objective, epochs, sigma=sigma, name=name, **options):
            return fit_patchnr(
                images["train"], images["val"], sigma=sigma, objective=objective, epochs=epochs, augment=False,
                batch_size=args.patch_denoiser_batch_size, save_path=f"{name}_{objective}", resume=True, device=args.device,
                **options,
            )  # fmt: skip

        sizes = dict(patch_size=8, num_layers=5, sub_net_size=192)
        prior = fitted("likelihood", args.patch_denoiser_epochs, **sizes, steps_per_epoch=100,
                       mixed_precision=args.mixed_precision)  # fmt: skip
        prior = fitted("score", args.patch_denoiser_score_epochs, prior=prior, steps_per_epoch=50, lr=3e-4)
        prior.save(f"{name}.safetensors")
        args.patch_denoisers = [*args.patch_denoisers, f"{sigma}={name}.safetensors"]
        found[sigma] = FlowDenoiser(prior.requires_grad_(False).to(args.device))
    return found, None if files else round(time.perf_counter() - start)


def made_with(args, method: str) -> dict:
    """What tells rows of other weights, images or iterations apart."""
    names = "side", "images", "tuning_images", "iterations", "patch_iterations", "widenings"
    files = [args.flow, args.patch]
    if method.startswith("FlowDenoiser"):
        denoisers = args.patch_denoisers if method == PATCHES else args.denoisers
        files += [pair.split("=")[1] for pair in denoisers]
    return {**{name: getattr(args, name) for name in names}, "weights": [fingerprint(file) for file in files if file]}


def compare(title, problem, methods, tune, test, published, args, kept, chosen_for=None) -> dict[str, dict]:
    """Choose the strength of each method on ``tune``, or take those chosen for another problem, and apply it to ``test``."""
    rows = {}
    tuning, testing = (moved_to(args.device, problem)(x, seed=seed) for seed, x in enumerate((tune, test)))
    for name, (method, grid) in methods.items():
        of = made_with(args, name)
        if known := kept.find({"problem": title, "method": name, **of}):
            rows[name] = known
            print(
                f"{title:<20}{name:<28}{known['psnr']:>7.2f} +-{known['error']:>5.2f}{published.get(name, ''):>10}, kept"
            )
            continue
        if args.merge:
            continue
        chosen, tried, at_end = grid[0], {}, False
        before = kept.find({"problem": chosen_for, "method": name, **of})
        if before and "strength" in before:
            chosen, at_end = before["strength"], before["at_end_of_grid"]
        elif len(grid) > 1:
            chosen, tried, at_end = best_strength(
                lambda strength, method=method: round(psnr(method(*tuning, strength), tune), 2), grid, args.widenings
            )
        start = time.perf_counter()
        found = psnrs(method(*testing, chosen), test)
        seconds, (mean, error) = time.perf_counter() - start, mean_and_error(found)
        rows[name] = dict(psnr=round(mean, 2), error=round(error, 2), seconds=round(seconds, 1))
        rows[name] |= dict(strength=chosen, at_end_of_grid=at_end) if len(grid) > 1 else {}
        kept.add({"problem": title, "method": name, **of}, rows[name])
        note = f"  val: {dict(sorted(tried.items()))}" + (", best AT THE END" if at_end else "") if tried else ""
        print(
            f"{title:<20}{name:<28}{rows[name]['psnr']:>7.2f} +-{error:>5.2f}{published.get(name, ''):>10}"
            f"{seconds:>8.1f} s{note}",
            flush=True,
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add(
        "--save-path", type=Path, default=Path("runs_faces"), help="folder for checkpoints and weights of the trainings"
    )
    add("--flow", help="weights of an image flow, instead of training")
    add("--patch", help="weights of a PatchNR, instead of training")
    add("--denoisers", nargs="+", default=[], help="weights of FlowDenoisers, as 0.1=FILE, instead of training")
    add("--patch-denoisers", nargs="+", default=[], help="the same of those of patches")
    add("--rows", type=Path, help="file of rows, which are added to it, and not computed again")
    add("--merge", action="store_true", help="nothing but the rows that are in this file")
    add("--train-only", action="store_true", help="end after the trainings")
    add("--side", type=int, choices=(64, 32), default=64)
    add("--levels", type=int, default=4)
    add("--steps", type=int, default=8)
    add("--hidden", type=int, default=96)
    add("--coupling", default="allinone")
    add("--epochs", type=int, default=110)
    add("--mixed-precision", default=False, help='of the trainings: "bf16" where the processor has such products')
    add("--patch-size", type=int, default=6)
    add("--patch-epochs", type=int, default=15, help="epochs of 250 batches of 1024 patches")
    add("--denoiser-levels", type=int, default=3)
    add("--denoiser-steps", type=int, default=8)
    add("--denoiser-hidden", type=int, default=64)
    add(
        "--denoiser-epochs", type=int, default=30, help="of the flow at the middle level, from which each level goes on"
    )
    add("--denoiser-batch-size", type=int, default=8, help="images")
    add("--patch-denoiser-epochs", type=int, default=8, help="at each level: epochs of 100 batches of the likelihood")
    add("--patch-denoiser-score-epochs", type=int, default=4, help="and then epochs of 50 batches of score matching")
    add("--patch-denoiser-batch-size", type=int, default=2048, help="patches")
    add("--level-epochs", type=int, default=8, help="at each level, after these; the same for all")
    add("--device", default="cpu")
    add("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    add("--noise", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    add("--measurements", type=int, nargs="+", default=[500, 1000, 2500, 5000])
    add("--images", type=int, default=12, help="test images of each kind")
    add("--tuning-images", type=int, default=8, help="images of val on which all methods are tuned")
    add("--widenings", type=int, default=6, help="strengths by which a grid is continued at most")
    add("--posterior-noise", type=float, nargs="+", default=[0.2])
    add("--posterior-iterations", type=int, default=40, help="of LatentSampler, after half as many")
    add("--iterations", type=int, default=150, help="of LatentMAP")
    add("--patch-iterations", type=int, default=200, help="of PatchNR and of both priors")
    add("--without", nargs="+", default=[], help="methods to leave out")
    args = parser.parse_args()
    if "denoising" in args.sections and "BM3D" not in args.without and importlib.util.find_spec("bm3d") is None:
        parser.error('the package bm3d is not installed; --without BM3D "BM3D, deepinv" leaves its rows out')
    return args


def methods(flow, prior, denoisers, of_patches, args) -> dict:
    """What is compared in each section: methods by name, each with the strengths to choose from."""
    by_flow = functools.partial(latent, flow, args.iterations)
    latent_map, patches = (by_flow, [0.0, 1.0, 10.0, 30.0]), patch_energy(prior)

    squared = functools.partial(by_flow, penalty="squared"), [0.3, 1.0, 3.0]

    def refined(energies, start, **options):
        return functools.partial(image_map, energies, args.patch_iterations, Kept(functools.partial(start, **options)))

    by_tv = functools.partial(total_variation, iterations=100)
    found = {
        "sensing": {
            "Lasso DCT": (lasso_dct, [0.01, 0.03, 0.1]),
            "Lasso wavelet": (lasso_wavelet, [0.01, 0.03, 0.1]),
            "TV": (total_variation, [0.1, 0.3, 1.0, 3.0]),
            "PatchNR": (refined([patches], lasso_dct, strength=0.1), [1e-4, 3e-4, 1e-3]),
            "LatentMAP": latent_map,
            "LatentMAP, temperature": squared,
            "both priors": (refined([patches, FlowPrior(flow)], by_flow, strength=1.0), [3e-5, 1e-4, 3e-4]),
        },
        "inpainting": {
            "TV": (total_variation, [0.03, 0.1, 0.3]),
            "PatchNR": (refined([patches], by_tv, strength=0.1), [1e-5, 1e-4, 1e-3]),
            "LatentMAP": latent_map,
        },
    }
    for sigma in args.noise:
        found[sigma] = {
            "noisy": (lambda physics, y, sigma, strength: y, [0]),
            "BM3D": (bm3d_rgb, [0]),
            "BM3D, deepinv": (bm3d, [0]),
            "TV": (total_variation, [f * sigma for f in (0.5, 0.8, 1.2)]),
            "PatchNR": (refined([patches], by_tv, strength=sigma), [f * sigma**2 for f in (0.3, 0.6, 1.0)]),
            "LatentMAP": (by_flow, [30.0, 60.0, 100.0, 150.0]),
        }
        if sigma in of_patches:
            found[sigma][PATCHES] = functools.partial(by_score, of_patches[sigma]), [0]
        if sigma in denoisers:
            found[sigma]["FlowDenoiser"] = functools.partial(by_score, denoisers[sigma]), [0]
            found[sigma]["FlowDenoiser, mean of 10 views"] = (
                functools.partial(by_scores_of_views, denoisers[sigma]),
                [0],
            )
    return {
        section: {name: method for name, method in those.items() if name not in args.without}
        for section, those in found.items()
    }


def main():
    args = parse()
    images = load(args.data, args.side)
    check_disjoint(images)
    flow, prior, result = train(images, args)
    denoisers = {}
    if "denoising" in args.sections and "FlowDenoiser" not in args.without:
        denoisers, result["seconds_denoisers"] = train_denoisers(images, args)
    of_patches: dict[float, FlowDenoiser] = {}
    if "denoising" in args.sections and PATCHES not in args.without:
        of_patches, result["seconds_patch_denoisers"] = train_patch_denoisers(images, args)
    if args.train_only:
        return print(json.dumps({**result, "device": args.device}))
    prior.n_patches, prior.subset = max(256, args.side**2 // 4), "grid"
    result["bits_per_dim"] = bits_per_dim(flow, images)

    kept = Rows(args.rows)
    tune, test, ood = images["val"][: args.tuning_images], images["test"][: args.images], images["ood"][: args.images]
    compared = methods(flow, prior, denoisers, of_patches, args)
    published = PUBLISHED if args.side == 64 else {"denoising": {}, "sensing": {}}
    print(f"\n{'':<20}{'':<28}{'PSNR':>7}{'':>8}{'published':>10}")
    if "denoising" in args.sections:
        result["denoising"] = {
            sigma: compare(f"noise {sigma}", functools.partial(noisy, sigma=sigma), compared[sigma], tune, test,
                           published["denoising"].get(sigma, {}), args, kept)
            for sigma in args.noise
        }  # fmt: skip
    for section, on, beside in (("sensing", test, published["sensing"]), ("ood", ood, {})):
        if section in args.sections:
            found = {
                m: compare(f"{section}, m = {m}", functools.partial(sensed, m=m), compared["sensing"], tune, on,
                           beside.get(m, {}), args, kept, f"sensing, m = {m}")
                for m in args.measurements
            }  # fmt: skip
            result[section] = {m: rows for m, rows in found.items() if rows}
    if "inpainting" in args.sections:
        side = args.side // 3
        problem = functools.partial(holed, side=side)
        result["inpainting"] = compare(f"square of {side}", problem, compared["inpainting"], tune, test, {}, args, kept)
    if "posterior" in args.sections:
        found = {sigma: posterior_row(flow, sigma, test, args, kept) for sigma in args.posterior_noise}
        result["posterior"] = {sigma: row for sigma, row in found.items() if row}
    if "questions" in args.sections:
        result["questions"] = questions(flow, args, tune[:4], ood[:4])
    print(
        json.dumps(
            {**result, "published": published, "images": len(test), "tuned_on": len(tune), "versions": versions()}
        )
    )


def posterior_row(flow, sigma, test, args, kept) -> dict | None:
    """Image by image, as each takes minutes."""
    physics, y, _ = moved_to(args.device, functools.partial(noisy, sigma=sigma))(test, seed=1)
    rows: list[dict] = []
    for k, x in enumerate(test.split(1)):
        key = {"problem": f"noise {sigma}", "method": "posterior mean", "image": k, **made_with(args, "posterior mean")}
        key["posterior_iterations"] = args.posterior_iterations
        row = kept.find(key)
        if row is None and args.merge:
            return None
        if row is None:
            start = time.perf_counter()
            mean, spread = posterior(flow, args.posterior_iterations, physics, y[k : k + 1], sigma, x)
            row = kept.add(key, {"psnr": psnr(mean, x), **spread, "seconds": round(time.perf_counter() - start, 1)})
        print(f"noise {sigma}, posterior mean of image {k}: {row}", flush=True)
        rows.append(row)
    return posterior_summary(rows)


def posterior_summary(rows: list[dict]) -> dict:
    of = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    value, error = mean_and_error(of["psnr"])
    return {
        "psnr": round(value, 2),
        "error": round(error, 2),
        **{name: round(float(of[name].mean()), 3) for name in ("within 1", "within 2")},
        "rms error": round(float(of["square error"].mean().sqrt()), 4),
        "rms deviation": round(float(of["variance"].mean().sqrt()), 4),
        "effective": round(float(of["effective"].mean()), 1),
        "seconds": round(float(of["seconds"].sum()), 1),
    }


def bits_per_dim(flow, images) -> dict[str, float]:
    model, metric, device = FlowModel(flow), BitsPerDim(), next(flow.parameters()).device
    with torch.no_grad():
        parts = {k: images[k].to(device) for k in ("val", "test", "ood")}
        found = {k: round(float(metric(model(x), x).mean()), 3) for k, x in parts.items()}
    print("bits per dimension:", found, flush=True)
    return found


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
        "from Lasso DCT": dict(strength=0.0, init=lambda y, physics: flow(lasso_dct(physics, y, None, 0.1))[0]),
    }
    for name, way in ways.items():
        scores = []
        for x in (test, ood):
            physics, y, sigma = moved_to(args.device, functools.partial(sensed, m=m))(x, 1)
            scores.append(round(psnr(latent(flow, args.iterations, physics, y, sigma, **way), x), 2))
        found[name] = scores
        print(f"m = {m}, {name:<28} faces {scores[0]:.2f}, others {scores[1]:.2f}", flush=True)
    return found


if __name__ == "__main__":
    main()
