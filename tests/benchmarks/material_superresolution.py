r"""
The PatchNR paper's superresolution of a material, with our priors and their rivals.

    python tests/benchmarks/material_superresolution.py --data DIR [--methods NAMES] [--device cuda] [--rows FILE]
        [--checkpoint FILE] [--denoiser FILE] [--bilevel FILE]

Protocol (Altekrueger et al. 2023, section 4.2): y = S x + 0.01 n, S a 16x16 Gaussian kernel of standard deviation 2, circular
at the bottom and right ends, stride 4. ``DIR/material`` holds ``learn.png``, ``val.png``, ``test.png`` and the paper's own
``published_reconstruction.png``. All train on ``learn.png`` (with ``val.png`` for the best epoch), choose their strengths by the
cropped PSNR of ``val.png``, from grids that are widened until the best does not lie at an end, and reconstruct ``test.png``.

- patchnr: PatchNR, Adam on the paper's objective, on ``--n-patches`` random patches a step;
- map: the same prior, all patches, by ``MAP``;
- epll: a mixture of 200 Gaussians on 6x6 patches, minimised by ``MAP`` too;
- tv: total variation, 500 iterations of FISTA;
- plug-and-play: ``FlowDenoiser`` of a PatchNR of noisy patches for a range of levels, in half-quadratic splitting, whose schedule
  is chosen too;
- bilevel: the prior of the first row, trained further by ``fit_bilevel`` for this physics, on ``--minutes``; nothing to choose.

Files of weights are read where they are there, and written after training otherwise. ``--rows`` as in ``bsd68.py``: runs side by
side, each with some methods, make one table by a last run with all. The last line is one JSON object; ``chosen`` is our method
that ``val.png`` chooses.
"""

import argparse
import copy
import functools
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
from arena import MixturePrior, Rows, best_strength, device_name, fingerprint, load_prior, on_device
from common import check_disjoint, versions
from material_methods import (
    NOISE,
    bicubic,
    by_adam,
    by_map,
    by_model,
    by_tv,
    fitted_mixture,
    make_physics,
    ways,
)
from PIL import Image
from train_bilevel import middle, train_bilevel

from deepinv_flows import MAP, FlowDenoiser, PatchNR, fit_patchnr, glow_flow
from deepinv_flows.patchnr import potential

OURS, RIVALS = ("patchnr", "map", "plug-and-play", "bilevel"), ("epll", "tv")
# published images of test.png, measured by us (data/README.md): PSNR whole, cropped by 40, SSIM
PUBLISHED = {
    "PatchNR, arXiv 2205.12021": (27.90, 28.29, 0.788),
    "PatchNR, arXiv 2312.16611": (27.75, 28.17, 0.782),
    "EPLL, 200 components, arXiv 2312.16611": (27.70, 28.14, 0.785),
    "weakly convex ridge": (26.65, 27.78, 0.781),
    "weakly convex ridge, spatially adaptive": (26.72, 27.91, 0.782),
    "adversarial local regulariser": (26.98, 27.35, 0.767),
    "Wasserstein patch prior": (26.93, 27.35, 0.753),
}


def load(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32) / 255)[None, None]


def figures(x_net: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    x_net = x_net.clamp(0, 1).cpu()
    crop = (Ellipsis, slice(40, -40), slice(40, -40))
    psnr, ssim = dinv.metric.PSNR(), dinv.metric.SSIM()
    return {
        "psnr": round(float(psnr(x_net, x)), 3),
        "psnr_crop40": round(float(psnr(x_net[crop], x[crop])), 3),
        "ssim": round(float(ssim(x_net, x)), 4),
    }


class Bench:
    """The images, what was trained, and the rows."""

    def __init__(self, args):
        self.args, self.rows = args, Rows(args.rows)
        folder = args.data / "material"
        images = {name: load(folder / f"{name}.png") for name in ("learn", "val", "test")}
        check_disjoint({f"{name}.png": x for name, x in images.items()}, learned="learn.png")
        self.published = figures(load(folder / "published_reconstruction.png"), images["test"])
        if args.crop:
            images = {name: middle(x[0], args.crop)[None] for name, x in images.items()}
        self.images, self.physics = images, make_physics(images["test"].shape[-1], args.device)
        # drawn on the processor, so that each device sees the same noise
        seeds = {"test": 0, "val": 1, "learn": 2}  # strengths are not chosen on the noise of the test
        self.y = {name: make_physics(x.shape[-1], seed=seeds[name])(x).to(args.device) for name, x in images.items()}

    def trained(self, name: str, file: str | None, train: Callable[[], PatchNR | MAP], read: Callable):
        """The model of a file, or one that is trained and saved there; and what tells it from others."""
        if file is None or not Path(file).is_file():
            start = time.perf_counter()
            model = train()
            seconds = round(time.perf_counter() - start)
            print(f"{name} trained in {seconds} s", flush=True)
            of = f"trained by {uuid.uuid4()}"
            if file is not None:
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                model.save(file)
                of = fingerprint(file)
            self.rows.add({"trained": name, "of": of}, {"seconds": seconds})
            return model.requires_grad_(False), of
        return read(file).requires_grad_(False), fingerprint(file)

    @functools.cached_property
    def prior(self) -> tuple[PatchNR, str]:
        args, learn, val = self.args, self.images["learn"], self.images["val"]

        def train():
            flow = glow_flow(36, args.layers, args.width, activation=args.activation)
            prior = PatchNR(flow, patch_size=6) if args.activation != "relu" else None
            sizes = dict(num_layers=args.layers, sub_net_size=args.width) if prior is None else dict(prior=prior)
            prior = fit_patchnr(
                learn, val, **sizes, epochs=args.epochs, steps_per_epoch=250, batch_size=args.batch_size,
                dequantise=args.dequantise, device=args.device, save_path=args.save_path,
                resume=args.save_path is not None,
            )  # fmt: skip
            return on_device(prior, args.device)

        read = functools.partial(load_prior, device=args.device)
        return self.trained("patchnr", args.checkpoint, train, read)

    @functools.cached_property
    def denoiser(self) -> tuple[FlowDenoiser, str]:
        args, learn, val = self.args, self.images["learn"], self.images["val"]

        def train():
            options = dict(sigma=tuple(args.sigma), batch_size=2048, device=args.device)
            prior = fit_patchnr(
                learn, val, objective="likelihood", patch_size=8, num_layers=5, sub_net_size=192,
                epochs=args.denoiser_epochs, steps_per_epoch=200, **options,
            )  # fmt: skip
            if args.score_epochs:
                more = dict(objective="score", epochs=args.score_epochs, steps_per_epoch=50, lr=3e-4)
                prior = fit_patchnr(learn, val, prior=prior, **more, **options)
            return on_device(prior, args.device)

        prior, of = self.trained("denoiser", args.denoiser, train, functools.partial(load_prior, device=args.device))
        return FlowDenoiser(prior), of

    @functools.cached_property
    def bilevel(self) -> tuple[MAP, str]:
        args = self.args

        def train():
            prior = copy.deepcopy(self.prior[0])
            pieces = [middle(self.images["val"][0], args.bilevel_eval)]
            return train_bilevel(
                prior, [self.images["learn"][0]], pieces, make_physics(args.bilevel_crop, args.device), NOISE,
                minutes=args.minutes, crop=args.bilevel_crop, batch_size=args.bilevel_batch, device=args.device,
                lr=args.bilevel_lr,
            )  # fmt: skip

        def read(file):
            model = MAP.from_checkpoint(file)
            on_device(model.prior, args.device)
            return model

        model, of = self.trained("bilevel", args.bilevel, train, read)
        model.verbose = False
        return model, of

    @functools.cached_property
    def mixture(self) -> MixturePrior:
        start = time.perf_counter()
        mixture = fitted_mixture(self.images["learn"], self.args.device, self.args.fitted)
        seconds = round(time.perf_counter() - start)
        self.rows.add({"trained": "epll", "of": f"{self.args.fitted} patches"}, {"seconds": seconds})
        return mixture

    def method(self, name: str) -> tuple[dict[str, Callable], list[float], str, dict[str, str]]:
        """Ways and strengths to choose from, what tells it from the same method otherwise, and the key of its training."""
        args = self.args
        if name == "tv":
            return {"": functools.partial(by_tv, iterations=500)}, [1e-4, 3e-4, 1e-3], "", {}
        if name == "epll":
            of = f"{args.fitted} patches"
            return (
                {"": lambda *problem: by_map(*problem, prior=self.mixture)},
                [0.05, 0.1, 0.2],
                of,
                dict(trained=name, of=of),
            )
        if name == "plug-and-play":
            denoiser, of = self.denoiser
            return (
                ways(denoiser, args.steps),
                [0.1, 0.3, 1.0],
                f"{of}, {args.steps} steps",
                dict(trained="denoiser", of=of),
            )
        if name == "bilevel":
            model, of = self.bilevel
            return {"": functools.partial(by_model, model=model)}, [1.0], of, dict(trained=name, of=of)
        prior, of = self.prior
        training = dict(trained="patchnr", of=of)
        if name == "map":
            return {"": functools.partial(by_map, prior=prior)}, [0.05, 0.1, 0.2], of, training
        prior = copy.copy(prior)
        prior.n_patches, prior.subset = args.n_patches, args.subset
        way = functools.partial(by_adam, prior=prior, iterations=args.iterations, step=args.step)
        how = f"{args.n_patches} patches ({args.subset}), {args.iterations} steps of {args.step}"
        return {"": way}, args.lambda_reg, f"{of}, {how}", training

    def row(self, name: str) -> dict:
        """The row of a method: its strength and way are chosen on val.png, and applied to test.png."""
        several, grid, of, training = self.method(name)
        key = {"method": name, "of": of, "crop": self.args.crop, "grid": grid, **self.where()}
        if (found := self.rows.find(key)) is not None:
            return found

        def figured(way: Callable, strength: float, image: str = "val") -> dict[str, float]:
            return figures(way(self.physics, self.y[image], strength), self.images[image])

        choices = []
        for said, way in several.items():
            chosen, at_end = grid[0], False
            if len(grid) > 1:
                score = functools.partial(lambda strength, way: figured(way, strength)["psnr_crop40"], way=way)
                chosen, tried, at_end = best_strength(score, grid, 6)
                print(f"{name} {said} on val.png: {dict(sorted(tried.items()))}", flush=True)
            value = tried[chosen] if len(grid) > 1 else figured(way, chosen)["psnr_crop40"]
            choices.append((value, said, chosen, at_end))
        value, said, chosen, at_end = max(choices)
        start = time.perf_counter()
        row = figured(several[said], chosen, "test")
        row |= {"seconds": round(time.perf_counter() - start, 1), "val psnr_crop40": value}
        row |= {"seconds_training": (self.rows.find(training) or {}).get("seconds")} if training else {}
        row |= ({"strength": chosen} if len(grid) > 1 else {}) | ({"schedule": said} if said else {})
        row |= ({"at_end_of_grid": True} if at_end else {}) | self.where()
        return self.rows.add(key, row)

    def where(self) -> dict:
        return {"device": device_name(self.args.device), "tf32": self.args.tf32, "precision": self.args.precision}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--methods", nargs="+", choices=(*OURS, *RIVALS), default=(*RIVALS, *OURS))
    add("--device", default="cpu")
    add("--tf32", action="store_true", help="allow matrix products with 10-bit mantissas on a GPU")
    add("--rows", type=Path, help="file that keeps rows")
    add("--train-only", action="store_true", help="train what the methods need, and end")
    add("--crop", type=int, help="side of a central piece of each image, to try the script")
    add("--checkpoint", help="weights of the PatchNR")
    add("--save-path", help="folder for its training checkpoints; an interrupted training resumes from it")
    add("--width", type=int, default=128)
    add("--layers", type=int, default=8)
    add("--activation", default="relu", help='"silu" suits the second derivatives of bilevel training')
    add("--epochs", type=int, default=24, help="epochs of 250 batches")
    add("--batch-size", type=int, default=1024)
    add("--dequantise", type=float, default=4 / 255, help="width of the noise added in training")
    add("--lambda-reg", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="of patchnr, in the paper's units")
    add("--iterations", type=int, default=150)
    add("--step", type=float, default=0.03)
    add("--n-patches", type=int, default=22_000, help="random patches an iteration; -1 for all")
    add("--subset", default="grid", choices=("uniform", "grid"), help="how they are drawn")
    add("--precision", choices=("bfloat16",), help="of matrix products, emulated if need be")
    add("--fitted", type=int, default=100_000, help="patches to which the mixture of EPLL is fitted")
    add("--denoiser", help="weights of the PatchNR of noisy patches")
    add("--sigma", type=float, nargs=2, default=(0.01, 0.1), help="its levels")
    add("--denoiser-epochs", type=int, default=20, help="of the likelihood: of 200 batches of 2048 patches")
    add("--score-epochs", type=int, default=5, help="of score matching afterwards, of 50 such batches")
    add("--steps", type=int, default=24, help="of plug-and-play")
    add("--bilevel", help="file of MAP.save")
    add("--minutes", type=float, default=5.0, help="of bilevel training")
    add("--bilevel-crop", type=int, default=128, help="wide, as S is circular at two ends")
    add("--bilevel-batch", type=int, default=4)
    add("--bilevel-lr", type=float, default=1e-3)
    add("--bilevel-eval", type=int, default=200, help="side of the piece of val.png that chooses the best epoch")
    return parser.parse_args()


def main():
    args = parse()
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    if args.precision:  # PatchNR itself would not: without the hardware it is slower than float32
        potential._product_dtype = lambda x, precision: getattr(torch, args.precision)
    bench = Bench(args)
    if args.train_only:
        for name in args.methods:
            bench.method(name)
        return
    for name, found in PUBLISHED.items():
        print(f"published, {name}: whole {found[0]:.2f}, cropped {found[1]:.2f}, SSIM {found[2]:.3f}")
    print("published_reconstruction.png", bench.published)
    rows = {"bicubic, shift-corrected": figures(bicubic(bench.y["test"]), bench.images["test"])}
    for name in args.methods:
        rows[name] = bench.row(name)
        print(name, rows[name], flush=True)
    ours = [name for name in OURS if name in rows]
    chosen = max(ours, key=lambda name: rows[name]["val psnr_crop40"], default=None)
    print(f"val.png chooses {chosen}")
    result = {"chosen": chosen, "rows": rows, **{f"published_{key}": value for key, value in bench.published.items()}}
    print(json.dumps({**result, "published": PUBLISHED, **versions()}))


if __name__ == "__main__":
    main()
