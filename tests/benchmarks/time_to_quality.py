"""
Seconds until a reconstruction of the PatchNR paper's material passes a PSNR and stays above it.

    python tests/benchmarks/time_to_quality.py --data DIR [--same FILE] [--recommended FILE] [--crop 300]

The problem is :mod:`material_superresolution`'s; all start from bicubic interpolation. The ways:

- deepinv: its PatchNR on all patches, Adam with a fixed step, as its example runs it;
- ours, same: the same weights, loop and step, with our PatchNR instead;
- ours, recommended: a narrower flow with random permutations, a sixteenth of the patches on random grids, a falling step;
- EPLL: deepinv's, a Gaussian mixture fitted to the same image, its standard schedule of betas.

The flows are trained on ``learn.png`` unless given. PSNR is taken between iterations and not timed; it is of the centre, the
outer 40 pixels left out. ``--crop`` takes a central piece of the image and of the published reconstruction whose PSNR is the
target. The last line is one JSON object: for each way its best PSNR and seconds to the target, to EPLL's best and to
``--levels``, ``null`` where it was not reached within ``--limit`` seconds.
"""

import argparse
import json
import math
import time
from pathlib import Path

import deepinv as dinv
import torch
from common import check_disjoint, versions
from material_superresolution import NOISE, bicubic, figures, load, make_physics

from deepinv_flows import PatchNR, fit_patchnr


def adam(prior, y, physics, lambda_reg, iterations, step, falling, watch):
    x = bicubic(y).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=step)
    for i in range(iterations):
        if falling:
            optimizer.param_groups[0]["lr"] = step * (0.01 + 0.99 * math.cos(math.pi * i / iterations / 2) ** 2)
        optimizer.zero_grad()
        (((physics.A(x) - y) ** 2).sum() + lambda_reg * prior(x).sum()).backward()
        optimizer.step()
        if not watch(x.detach()):
            return


class Watch:
    """Notes PSNR and seconds; its own time does not count."""

    def __init__(self, x, limit):
        self.x, self.limit, self.track = x, limit, []
        self.spent, self.since = 0.0, time.perf_counter()

    def __call__(self, x_net) -> bool:
        self.spent += time.perf_counter() - self.since
        self.track.append((self.spent, figures(x_net, self.x)["psnr_crop40"]))
        self.since = time.perf_counter()
        return self.spent < self.limit

    def seconds_to(self, level):
        """When the level is passed for good."""
        below = [k for k, (_, psnr) in enumerate(self.track) if psnr < level]
        first = below[-1] + 1 if below else 0
        return round(self.track[first][0], 1) if first < len(self.track) else None

    @property
    def best(self):
        return max(psnr for _, psnr in self.track)


def epll(learn, y, physics, watch, components=100):
    """deepinv's EPLL; the fit of its mixture is printed, not counted, as the flows' training is not."""
    start = time.perf_counter()
    patches = torch.nn.functional.unfold(learn, 6)[0].t()
    chosen = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:50_000]]
    model = dinv.optim.EPLL(n_components=components, pretrained=None, patch_size=6, channels=1)
    torch.manual_seed(0)
    model.GMM.fit(torch.utils.data.DataLoader(chosen, batch_size=10_000), max_iters=30)
    print(f"EPLL: mixture of {components} fitted in {time.perf_counter() - start:.0f} s", flush=True)
    betas = [beta / NOISE**2 for beta in (1.0, 4.0, 8.0, 16.0, 32.0)]
    watch.since = time.perf_counter()
    x = bicubic(y)
    with torch.no_grad():
        for k in range(4 * len(betas)):  # its five steps, then more at the last, so that it is not stopped early
            x = model(y, physics, sigma=NOISE, x_init=x, betas=[betas[min(k, len(betas) - 1)]], batch_size=20_000)
            if not watch(x):
                return


def flows(args, folder):
    learn, val = load(folder / "learn.png"), load(folder / "val.png")
    check_disjoint({"learn.png": learn, "val.png": val, args.image: load(folder / args.image)}, learned="learn.png")

    def trained(path, **sizes):
        return (
            PatchNR.from_checkpoint(path)
            if path
            else fit_patchnr(learn, val, epochs=args.epochs, steps_per_epoch=250, dequantise=4 / 255, **sizes)
        )

    same = trained(args.same, prior=PatchNR())
    recommended = trained(args.recommended, num_layers=8, sub_net_size=128)
    theirs = dinv.optim.PatchNR(patch_size=6, channels=1)
    theirs.load_state_dict(same.to_deepinv_state_dict())
    recommended.subset = "grid"
    return dinv.optim.PatchPrior(theirs, patch_size=6), same.requires_grad_(False), recommended.requires_grad_(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--same", help="weights of the default flow without permutations, for deepinv and ours")
    parser.add_argument("--recommended", help="weights of the flow that we recommend")
    parser.add_argument("--epochs", type=int, default=24, help="of each training, 250 batches of 1024 patches")
    parser.add_argument("--crop", type=int)
    parser.add_argument("--image", default="test.png")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for each way")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--recommended-iterations", type=int, default=150)
    parser.add_argument("--share", type=int, default=16, help="the recommended way takes one patch in this many")
    parser.add_argument("--lambda-reg", type=float, default=0.2, help="for the whole image")
    parser.add_argument("--levels", type=float, nargs="*", default=[27.5, 28.0])
    args = parser.parse_args()
    folder = args.data / "material"
    theirs, same, recommended = flows(args, folder)
    x, published = load(folder / args.image), None
    if args.image == "test.png":
        published = load(folder / "published_reconstruction.png")
    lambda_reg = args.lambda_reg
    if args.crop:
        start = (x.shape[-1] - args.crop) // 2
        centre = (Ellipsis, slice(start, start + args.crop), slice(start, start + args.crop))
        lambda_reg *= (args.crop / x.shape[-1]) ** 2  # the data term is a sum, the prior a mean
        x, published = x[centre], None if published is None else published[centre]
    physics = make_physics(x.shape[-1])
    y = physics(x)
    recommended.n_patches = (x.shape[-1] - 5) ** 2 // args.share
    watches = {}

    def way(name, run):
        watches[name] = Watch(x, args.limit)
        run(watches[name])
        track = watches[name].track
        print(f"{name}: best {watches[name].best} dB, {len(track)} iterations in {track[-1][0]:.1f} s", flush=True)

    way("EPLL", lambda w: epll(load(folder / "learn.png"), y, physics, w))
    final = args.recommended_iterations
    way("ours, recommended", lambda w: adam(recommended, y, physics, lambda_reg, final, 0.03, True, w))
    way("ours, same", lambda w: adam(same, y, physics, lambda_reg, args.iterations, 0.03, False, w))
    way("deepinv", lambda w: adam(theirs, y, physics, lambda_reg, args.iterations, 0.03, False, w))

    levels = {f"{level} dB": level for level in args.levels} | {"EPLL's best": watches["EPLL"].best}
    if published is not None:
        levels["published"] = figures(published, x)["psnr_crop40"]
    result = {"levels": levels}
    for name, watch in watches.items():
        result[name] = {"best": watch.best, **{key: watch.seconds_to(level) for key, level in levels.items()}}
        print(name, result[name])
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
