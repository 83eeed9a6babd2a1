r"""
The road from images to a reconstruction, the same for six problems: train ``quick``, tune, reconstruct.

    python tests/benchmarks/road.py [--only NAME ...] [--oracle] [--save DIR] [--cache FILE]

Each problem is trained on images that the test image is not one of, lambda_reg is tuned on another, and the test image is
reconstructed by the same five lines. Beside it stand total variation, run to convergence at the strength that is best for the
test image, and the best of a grid of solvers and strengths with ten times the iterations (L-BFGS at every strength, the others
at its best one and the two beside it): both are computed by ``--oracle`` with the flow that the road trained, chosen by the
true image, and kept in ``road_oracle.json``. ``rule`` and ``unsupervised`` (``"sure"``, or ``"discrepancy"`` where that is
refused) are the PSNR with lambda_reg found without clean images. ``--cache`` appends each row to a file of JSON lines, and rows
that it holds are not repeated, unless for the oracle. The last line is one JSON object: ``margin_over_tv``, the
least over the problems; ``gap_to_oracle``, the largest; ``minutes``, the longest road from import to picture; and the rows.
"""

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import deepinv as dinv  # noqa: E402
import torch  # noqa: E402
from common import versions  # noqa: E402

from deepinv_flows import MAP, fit_patchnr  # noqa: E402
from deepinv_flows.images import load_images, phantoms  # noqa: E402
from deepinv_flows.reconstruction.search import highest  # noqa: E402

IMPORTED = time.perf_counter() - BEGAN
ORACLE = Path(__file__).with_name("road_oracle.json")
PSNR = dinv.metric.PSNR()


def noise(sigma):
    return dinv.physics.GaussianNoise(sigma, rng=torch.Generator().manual_seed(0))


def blur(sigma):
    return dinv.physics.functional.gaussian_blur(sigma=(sigma, sigma))


def texture(name, side=96):
    """Training rows, and pieces for tuning and testing from below them."""
    image = load_images(name)[0]
    below = image[:, -side:]
    return [image[:, : -side - 16]], below[None, ..., :side], below[None, ..., side + 16 : 2 * side + 16]


def deblurring():
    images = [load_images(name, channels=3)[0] for name in ("coffee", "chelsea", "rocket")]
    coffee, image = images[0], load_images("astronaut", channels=3)[0][None]
    images[0] = coffee[..., :-112]
    physics = dinv.physics.Blur(filter=blur(2.0), padding="circular", noise_model=noise(0.02))
    return images, coffee[None, :, 150:246, -96:], image[..., :128, 128:256], physics, {"patch_size": 4}


def tomography():
    """Ellipses from two thirds of the angles; the noise is a fifteenth of the standard deviation of the sinogram."""
    draw = torch.Generator().manual_seed(1)
    images = phantoms(12, 96, generator=draw)
    physics = dinv.physics.Tomography(
        torch.linspace(0, 120, 61)[:-1], 96, circle=False, normalize=True, noise_model=noise(0.005)
    )
    return images[:9], images[9:11], images[11:12], physics, {}


def superresolution():
    images, tune, test = texture("gravel")
    physics = dinv.physics.Downsampling(
        (1, 96, 96), filter=blur(1.5), factor=3, padding="circular", noise_model=noise(0.01)
    )
    return images, tune, test, physics, {}


def inpainting():
    images, tune, test = texture("grass")
    mask = (torch.rand(1, 96, 96, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    return images, tune, test, dinv.physics.Inpainting((1, 96, 96), mask=mask, noise_model=noise(0.01)), {}


def denoising():
    images, tune, test = texture("brick")
    return images, tune, test, dinv.physics.Denoising(noise(0.1)), {}


def mri():
    """Axial slices of the MNI152 template, every 2 mm; those to test, to tune and to train are 20 mm and more apart."""
    from nilearn.datasets import load_mni152_template

    volume = torch.from_numpy(load_mni152_template(resolution=2).get_fdata()).float()
    volume = (volume / volume.max())[1:97, 10:106]
    slices = {k: volume[:, :, k].T.flip(0)[None].contiguous() for k in (18, 21, 24, 35, 46, 57, 60, 63, 66)}
    lines = (torch.rand(96, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    lines[42:54] = 1
    mask = lines.expand(96, 96)

    def measure(x, **kwargs):
        return torch.view_as_real(mask * torch.fft.fftshift(torch.fft.fft2(x[:, 0], norm="ortho"), (1, 2)))

    def back(y, **kwargs):
        return torch.fft.ifft2(torch.fft.ifftshift(mask * torch.view_as_complex(y), (1, 2)), norm="ortho").real[:, None]

    physics = dinv.physics.LinearPhysics(A=measure, A_adjoint=back, noise_model=Masked(0.01, mask))
    images = [slices[k] for k in (18, 21, 24, 57, 60, 63, 66)]
    return images, slices[35][None], slices[46][None], physics, {}


class Masked(dinv.physics.GaussianNoise):
    """Noise where something is measured."""

    def __init__(self, sigma, mask):
        super().__init__(sigma, rng=torch.Generator().manual_seed(0))
        self.mask = mask[None, ..., None]

    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs) * self.mask


PROBLEMS = {f.__name__: f for f in (deblurring, tomography, superresolution, inpainting, denoising, mri)}


def check_apart(images, x):
    """The test image is nowhere in the training images."""
    for image in images:
        for top in range(0, image.shape[1] - x.shape[2] + 1, 8):
            for left in range(0, image.shape[2] - x.shape[3] + 1, 8):
                piece = image[:, top : top + x.shape[2], left : left + x.shape[3]]
                assert (piece - x[0]).square().mean() > 1e-4, "the test image is one of the training"


def road(images, val_images, y, physics, options):
    """What a user writes."""
    prior = fit_patchnr(images, effort="quick", verbose=False, **options)
    trained = time.perf_counter()
    model = MAP(prior, verbose=False)
    model.tune(val_images, physics, max_seconds=100)
    return model, model(y, physics), trained


def row(name, save):
    began = time.perf_counter()
    images, val_images, x, physics, options = PROBLEMS[name]()
    with torch.random.fork_rng(devices=[]):
        y = physics(x)
    model, x_net, trained = road(images, val_images, y, physics, options)
    minutes = (IMPORTED + time.perf_counter() - began) / 60
    check_apart(images, x)
    found = {"psnr": psnr(x_net, x), "minutes": round(minutes, 2), "training": round((trained - began) / 60, 2)}
    found |= {"lambda_reg": float(f"{model.tuned['lambda_reg']:.4g}"), "iterations": model.chosen["iterations"]}
    found["rule"] = psnr(MAP(model.prior, lambda_reg="rule", verbose=False)(y, physics), x)
    for way in ("sure", "discrepancy"):
        try:
            found["unsupervised"], found["by"] = (
                psnr(MAP(model.prior, lambda_reg=way, verbose=False)(y, physics), x),
                way,
            )
            break
        except ValueError as refused:
            print(f"{name}: {refused}", flush=True)
    if save:
        from torchvision.utils import save_image

        guess = physics.A_adjoint(y) if x.shape != y.shape else y
        save_image(torch.cat([x, guess, x_net], 3).clamp(0, 1), Path(save) / f"{name}.png")
        model.save(Path(save) / f"{name}.safetensors")
    return found, (model, x, y, physics)


def psnr(x_net, x) -> float:
    return round(float(PSNR(x_net, x)), 3)


def best_of(prior, start, x, y, physics, **options):
    """The best PSNR over strengths, enclosed by steps of 2 on a log scale; and where."""

    def quality(weight):
        return PSNR(MAP(prior, lambda_reg=float(weight), verbose=False, **options)(y, physics), x)

    _, tried = highest(quality, torch.tensor([start]))
    weight, value = max(tried, key=lambda pair: float(pair[1]))
    return {"psnr": round(float(value), 3), "lambda_reg": float(f"{float(weight):.4g}")}


def total_variation(name):
    """Depends on no training."""
    _, _, x, physics, _ = PROBLEMS[name]()
    return best_of(dinv.optim.TVPrior(n_it_max=50), 0.01, x, physics(x), physics, tol=3e-4, max_iter=500)


def oracle(model, x, y, physics):
    """Ten times the iterations that the road took: L-BFGS at every strength, the other solvers at its best and the two beside."""
    longer = {"max_iter": 10 * model.chosen["iterations"], "tol": 1e-4}
    grid = {"lbfgs": best_of(model.prior, model.tuned["lambda_reg"], x, y, physics, solver="lbfgs", **longer)}
    for solver in ("nmapg", "ipiano", "adam"):
        found = []
        for factor in (0.5, 1.0, 2.0):
            weight = factor * grid["lbfgs"]["lambda_reg"]
            x_net = MAP(model.prior, lambda_reg=weight, solver=solver, verbose=False, **longer)(y, physics)
            found.append({"psnr": psnr(x_net, x), "lambda_reg": float(f"{weight:.4g}")})
        grid[solver] = max(found, key=lambda row: row["psnr"])
        print(solver, grid[solver], flush=True)
    return {"grid": grid, "best": max(found["psnr"] for found in grid.values())}


def kept() -> dict:
    return json.loads(ORACLE.read_text()) if ORACLE.is_file() else {}


def keep(name, **found):
    print(name, found, flush=True)
    everything = kept()
    everything[name] = {**everything.get(name, {}), **found}
    ORACLE.write_text(json.dumps(everything, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--oracle", action="store_true", help="compute what stands beside, and keep it")
    parser.add_argument("--tv", action="store_true", help="of that, total variation alone, without a road")
    parser.add_argument("--save", type=Path, help="folder for pictures and models")
    parser.add_argument("--cache", type=Path, help="JSON lines, one for each finished row")
    args = parser.parse_args()
    if args.oracle or args.tv:
        for name in args.only:
            keep(name, tv=total_variation(name))
        if args.tv:
            return
    done = args.cache.read_text().splitlines() if args.cache and args.cache.exists() else []
    rows = {} if args.oracle else {line.pop("row"): line for line in map(json.loads, done)}
    for name in args.only:
        if name not in rows:
            rows[name], problem = row(name, args.save)
            if args.oracle:
                keep(name, **oracle(*problem))
            if args.cache:
                with args.cache.open("a") as file:
                    print(json.dumps({"row": name} | rows[name]), file=file)
        beside = kept().get(name, {})
        known = {"tv": beside.get("tv", {}).get("psnr"), "oracle": beside.get("best")}
        rows[name] |= {key: value for key, value in known.items() if value is not None}
        print(name, rows[name], flush=True)
    margins = [r["psnr"] - r["tv"] for r in rows.values() if "tv" in r]
    gaps = [r["oracle"] - r["psnr"] for r in rows.values() if "oracle" in r]
    rows = {name: rows[name] for name in args.only}
    result = {
        "margin_over_tv": round(min(margins), 3) if margins else None,
        "gap_to_oracle": round(max(gaps), 3) if gaps else None,
        "minutes": max(r["minutes"] for r in rows.values()),
        "rows": rows,
        "versions": versions(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
