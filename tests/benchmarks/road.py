r"""
The road from images to a reconstruction, the same for six problems: train ``quick``, tune, reconstruct.

    python tests/benchmarks/road.py [--only NAME ...] [--save DIR] [--cache FILE]
    python tests/benchmarks/road.py --oracle [--only NAME ...] [--models DIR] [--device cuda] [--into DIR]

Each problem is trained on images that the test images are not among, lambda_reg is tuned on others, and the test images are
reconstructed by the same five lines. Beside them stand total variation, run to convergence at the strength that is best for the
test images, and the best of a grid of solvers and strengths, each with ten times the time and the iterations (L-BFGS at every
strength, the others at its best one and the two beside it): both are computed by ``--oracle`` with the flow that the road
trained, chosen by the true images, and kept in ``road_oracle.json``. ``rule`` and ``unsupervised`` (``"sure"``, or
``"discrepancy"`` where that is refused) are the PSNR with lambda_reg found without clean images. ``--cache`` appends each row to
a file of JSON lines, and rows that it holds are not repeated, unless for the oracle. The last line is one JSON object:
``margin_over_tv``, the least over the problems; ``gap_to_oracle``, the largest, between reconstructions by the same flow;
``gap_of_tune`` and ``gap_of_unsupervised``, the largest that the choice of lambda_reg alone leaves; ``minutes``, the longest
road from import to the first picture; and the rows.

On another machine: ``--pack FILE`` writes the images and ``--images FILE`` reads them, without scikit-image and nilearn;
``--save DIR`` keeps the models of a road, and ``--models DIR`` computes the oracle with them in place of a training. Then
processes ``--only NAME --into DIR`` run side by side, each with a file of its own, and ``--merge DIR`` puts these together.
"""

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import deepinv as dinv  # noqa: E402
import torch  # noqa: E402
from common import check_apart, versions  # noqa: E402
from road_problems import PROBLEMS, measured, pack, problem  # noqa: E402

from deepinv_flows import MAP, fit_patchnr  # noqa: E402
from deepinv_flows.reconstruction.search import highest  # noqa: E402

IMPORTED = time.perf_counter() - BEGAN
ORACLE = Path(__file__).with_name("road_oracle.json")
ORACLE_IMAGES = 2  # of those to test
PSNR = dinv.metric.PSNR()


def road(images, val_images, y, physics, options):
    """What a user writes."""
    prior = fit_patchnr(images, effort="quick", verbose=False, device=y.device, **options)
    trained = time.perf_counter()
    model = MAP(prior, verbose=False)
    model.tune(val_images, physics, max_seconds=100)
    return model, model(y, physics), trained


def row(name, args):
    began = time.perf_counter()
    images, val_images, x, physics, options = problem(name, args.images)
    loaded = time.perf_counter()
    check_apart(images, x)
    began += time.perf_counter() - loaded  # no part of a road
    x, y, physics = measured(x, physics, args.device)
    model, x_net, trained = road(images, val_images.to(args.device), y[:1], physics, options)
    minutes = (IMPORTED + time.perf_counter() - began) / 60
    found = {"minutes": round(minutes, 2), "training": round((trained - began) / 60, 2)}
    found |= {"lambda_reg": float(f"{model.tuned['lambda_reg']:.4g}"), "iterations": model.chosen["iterations"]}
    if args.save:
        keep_picture(args.save, name, model, x[:1], y[:1], physics, x_net)
    x_net = torch.cat([x_net, *(model(one, physics) for one in y[1:].split(1))])
    found["psnr"] = psnr(x_net, x)
    if len(x) > 1:
        found["psnr_error"] = round(float(PSNR(x_net, x).std() / len(x) ** 0.5), 3)
    found["rule"] = psnr(each(MAP(model.prior, lambda_reg="rule", verbose=False), y, physics), x)
    x_net, way = unsupervised(model.prior, y, physics)
    return found | {"unsupervised": psnr(x_net, x), "by": way}, (model, x, y, physics)


def unsupervised(prior, y, physics):
    """Reconstructions with lambda_reg found without clean images, and how."""
    try:
        return each(MAP(prior, lambda_reg="sure", verbose=False), y, physics), "sure"
    except ValueError as refused:
        print(refused, flush=True)
        return each(MAP(prior, lambda_reg="discrepancy", verbose=False), y, physics), "discrepancy"


def each(model, y, physics):
    """One image after another: each takes the time that it needs."""
    return torch.cat([model(one, physics) for one in y.split(1)])


def keep_picture(folder, name, model, x, y, physics, x_net):
    from torchvision.utils import save_image

    folder.mkdir(parents=True, exist_ok=True)
    guess = physics.A_adjoint(y) if x.shape != y.shape else y
    save_image(torch.cat([x, guess, x_net], 3).clamp(0, 1), folder / f"{name}.png")
    model.save(folder / f"{name}.safetensors")


def psnr(x_net, x) -> float:
    return round(float(PSNR(x_net, x).mean()), 3)


def best_of(prior, start, x, y, physics, **options):
    """The best PSNR over strengths, enclosed by steps of 2 on a log scale; and where."""

    def quality(weight):
        model = MAP(prior, lambda_reg=float(weight), verbose=False, **options)
        return PSNR(model(y, physics), x).mean().reshape(1)

    _, tried = highest(quality, torch.tensor([start]))
    weight, value = max(tried, key=lambda pair: float(pair[1]))
    return {"psnr": round(float(value), 3), "lambda_reg": float(f"{float(weight):.4g}")}


def total_variation(name, packed):
    """Depends on no training."""
    _, _, x, physics, _ = problem(name, packed)
    return best_of(dinv.optim.TVPrior(n_it_max=50), 0.01, x, physics(x), physics, tol=3e-4, max_iter=500)


def oracle(model, x, y, physics):
    """
    Ten times the time and the iterations that the road took: L-BFGS at every strength, the others at its best and the two beside.

    Yields what is known by then. ``of_tune`` is what L-BFGS loses at the road's strength against its best one, and
    ``of_unsupervised`` what the strengths that were found without clean images lose against that one.
    """
    x, y = x[:ORACLE_IMAGES], y[:ORACLE_IMAGES]
    began = time.perf_counter()
    road, steps = psnr(each(model, y, physics), x), model.chosen["iterations"]
    seconds = (time.perf_counter() - began) / len(x)
    blind = psnr(unsupervised(model.prior, y, physics)[0], x)

    def tried(solver, weights):
        # the step of Adam falls until its last iteration, so that its time is not cut short
        longer = {"max_iter": 10 * steps, "tol": 1e-4, "max_seconds": None if solver == "adam" else 10 * seconds}
        pairs = []
        for weight in weights:
            longest = MAP(model.prior, lambda_reg=weight, solver=solver, verbose=False, **longer)
            pairs.append((psnr(each(longest, y, physics), x), float(f"{weight:.4g}")))
            print(solver, pairs[-1], longest.chosen["iterations"], flush=True)
        return pairs

    def summary():
        best = {solver: dict(zip(("psnr", "lambda_reg"), max(pairs))) for solver, pairs in grid.items()}
        lost = {f"of_{way}": round(best["lbfgs"]["psnr"] - value, 3) for way, value in known.items()}
        return {"grid": best, "best": max(one["psnr"] for one in best.values()), "road": road, **lost}

    start = float(model.weight_for(x)[0])
    grid = {"lbfgs": tried("lbfgs", [start * 2.0**k for k in (-2, -1, 0, 1, 2)])}
    known = {"tune": grid["lbfgs"][2][0], "unsupervised": blind}
    for sign in (-1, 1):  # until the best is enclosed
        for k in range(3, 10):
            if sign * max(grid["lbfgs"])[1] == max(sign * weight for _, weight in grid["lbfgs"]):
                grid["lbfgs"] += tried("lbfgs", [start * 2.0 ** (sign * k)])
    yield summary()
    for solver in ("nmapg", "ipiano", "adam"):
        grid[solver] = tried(solver, [factor * max(grid["lbfgs"])[1] for factor in (0.5, 1.0, 2.0)])
        yield summary()


def kept(path=ORACLE) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def keep(path, name, **found):
    print(name, found, flush=True)
    everything = kept(path)
    everything[name] = {**everything.get(name, {}), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(everything, indent=1) + "\n")


def beside(name, args, trained):
    """Computes what stands beside a row, and keeps it; ``trained()`` is a road's model and its problem."""
    path = args.into / f"{name}.json" if args.into else ORACLE
    if args.tv or "tv" not in {**kept(), **kept(path)}.get(name, {}):
        keep(path, name, tv=total_variation(name, args.images))
    if args.oracle:
        began, (model, *of) = time.perf_counter(), trained()
        for found in oracle(model, *of):
            seconds = round(time.perf_counter() - began, 1)
            keep(path, name, **found, seconds=seconds, device=str(torch.device(args.device).type))


def saved(name, args):
    model = MAP.from_checkpoint(args.models / f"{name}.safetensors", verbose=False).to(args.device)
    *_, x, physics, _ = problem(name, args.images)
    return model, *measured(x, physics, args.device)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--oracle", action="store_true", help="compute what stands beside, and keep it")
    parser.add_argument("--tv", action="store_true", help="of that, total variation alone, again, without a road")
    parser.add_argument("--save", type=Path, help="folder for pictures and models")
    parser.add_argument("--cache", type=Path, help="JSON lines, one for each finished row")
    parser.add_argument("--device", default="cpu", help="of training and reconstruction")
    parser.add_argument("--models", type=Path, help="folder of --save, for --oracle without a training")
    parser.add_argument("--into", type=Path, help="folder for what --oracle finds, a file for each problem")
    parser.add_argument("--merge", type=Path, metavar="INTO", help="put the files of such a folder together, and stop")
    parser.add_argument("--images", type=Path, help="file that --pack wrote")
    parser.add_argument("--pack", type=Path, metavar="IMAGES", help="write the images of all problems, and stop")
    return parser.parse_args()


def main():
    args = arguments()
    torch.backends.cudnn.allow_tf32 = False  # blurs by ten bits are neither accurate nor adjoint to one another
    if args.pack:
        return pack(args.pack)
    if args.merge:
        for path in sorted(args.merge.glob("*.json")):
            for name, found in kept(path).items():
                keep(ORACLE, name, **found)
        return None
    if args.tv or args.models:
        for name in args.only:
            beside(name, args, lambda name=name: saved(name, args))
        return None
    done = args.cache.read_text().splitlines() if args.cache and args.cache.exists() else []
    rows = {} if args.oracle else {line.pop("row"): line for line in map(json.loads, done)}
    for name in args.only:
        if name not in rows:
            rows[name], trained = row(name, args)
            if args.oracle:
                beside(name, args, lambda trained=trained: trained)
            if args.cache:
                with args.cache.open("a") as file:
                    print(json.dumps({"row": name} | rows[name]), file=file)
    print(json.dumps(summed({name: rows[name] for name in args.only})))
    return None


def summed(rows):
    margins, gaps = [], {"gap_to_oracle": [], "gap_of_tune": [], "gap_of_unsupervised": []}
    for name, found in rows.items():
        known = kept().get(name, {})
        if "tv" in known:
            found["tv"] = known["tv"]["psnr"]
            margins.append(found["psnr"] - found["tv"])
        if "best" in known:  # of another training, maybe
            found |= {"oracle": known["best"], "oracle_gap": round(known["best"] - known["road"], 3)}
            found["lambda_gap"] = known["of_tune"]
            gaps["gap_to_oracle"].append(found["oracle_gap"])
            gaps["gap_of_tune"].append(known["of_tune"])
            gaps["gap_of_unsupervised"].append(known["of_unsupervised"])
        print(name, found, flush=True)
    return {
        "margin_over_tv": round(min(margins), 3) if margins else None,
        **{name: max(values) if values else None for name, values in gaps.items()},
        "minutes": max(found["minutes"] for found in rows.values()),
        "rows": rows,
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
