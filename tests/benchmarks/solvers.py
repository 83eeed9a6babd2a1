r"""
Which algorithm minimises a PatchNR objective fastest: objective against seconds, for deepinv's and ours.

    python tests/benchmarks/solvers.py [--data DIR --flow FILE] [--crop 64] [--out FILE.png] [--only NAME ...]
    python tests/benchmarks/solvers.py --starts [--problems NAME ...] [--side 24] [--seconds 1.5] [--repeats 1] [--only NAME ...]

With ``--starts``: what to choose, on five problems (``solver_problems.py``) from three starts. Every way has the same seconds;
it is timed until it is within 1% of the best objective that any way found from that start. The recommended way is that of MAP:
L-BFGS on the whole objective, all its terms by their gradients, from the start of least objective among MAP's own and the given
one. The last line is one JSON object: the seconds, how many times
the fastest other way's the recommended way took in the worst case, and where another was faster.

Without: superresolution by 4 with 1% noise. Without ``--data``: the photograph *gravel*, rows the shipped flow never saw, and
that flow.
With it: the PatchNR paper's material (``DIR/material/test.png``, see ``material_superresolution.py``) and the flow of ``--flow``.
Every way starts from bicubic interpolation and minimises |Ax - y|^2 / 2 + lambda g(x) on all patches, for as long as Adam's 300
iterations take with the paper's fixed step. Seconds are those of the process on one thread (``time.process_time``), so that
other programs do not count; evaluating the objective for the plot does not either. Of several settings of a way the best final
objective counts. The last line is one JSON object: objectives, and seconds to Adam's final objective and to the best that Adam
saw, ``null`` where not reached.
"""

import argparse
import json
import math
import time
from pathlib import Path

import deepinv as dinv
import skimage.data
import torch
from common import versions
from material_superresolution import bicubic, load, make_physics
from solver_problems import NOISE as PROBLEMS
from solver_problems import problem as make_problem

import deepinv_flows
from deepinv_flows import PatchNR, nmapg
from deepinv_flows.reconstruction.algorithms import by_lbfgs
from deepinv_flows.reconstruction.objective import DataTerm, Objective
from deepinv_flows.reconstruction.starts import candidates, least

NOISE, ADAM_ITERATIONS, ADAM_STEP = 0.01, 300, 0.03
L2 = dinv.optim.L2()


class TimeUp(Exception):
    pass


class Watch:
    """Notes objective and seconds; its own time does not count."""

    def __init__(self, objective, limit=math.inf):
        self.objective, self.limit, self.track = objective, limit, []
        self.spent, self.since = 0.0, time.process_time()

    def __call__(self, x) -> None:
        self.spent += time.process_time() - self.since
        with torch.no_grad():
            self.track.append((round(self.spent, 2), float(self.objective(x))))
        if self.spent > self.limit:
            raise TimeUp
        self.since = time.process_time()

    def seconds_to(self, level):
        return next((seconds for seconds, value in self.track if value <= level), None)


def gravel(side):
    x = torch.from_numpy(skimage.data.gravel()[300 : 300 + side, :side]).float()[None, None] / 255
    kernel = dinv.physics.functional.gaussian_blur(sigma=(2.0, 2.0))
    noise = dinv.physics.GaussianNoise(NOISE, rng=torch.Generator().manual_seed(0))
    physics = dinv.physics.Downsampling(x.shape[1:], filter=kernel, factor=4, padding="circular", noise_model=noise)
    y = physics(x)
    return physics, y, torch.nn.functional.interpolate(y, scale_factor=4, mode="bicubic"), PatchNR(pretrained="gravel")


def material(folder, flow, side):
    x = load(folder / "material" / "test.png")[..., :side, :side]
    physics = make_physics(side)
    y = physics(x)
    return physics, y, bicubic(y), PatchNR.from_checkpoint(flow)


def adam(x, objective, watch):
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=ADAM_STEP)
    for _ in range(ADAM_ITERATIONS):
        optimizer.zero_grad()
        objective(x).sum().backward()
        optimizer.step()
        watch(x.detach())


def lbfgs(x, objective, scale, watch):
    """On the objective divided by ``scale``: torch's first step is at most 1 / |gradient|_1."""
    x = x.clone().requires_grad_()
    settings = {"tolerance_grad": 0, "tolerance_change": 0, "history_size": 10, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([x], max_iter=10**6, max_eval=10**6, **settings)

    def closure():
        watch(x.detach())
        optimizer.zero_grad()
        value = objective(x).sum() / scale
        value.backward()
        return value

    optimizer.step(closure)


def of_class(name, **options):
    """A deepinv optimizer, or one of ours, on data fidelity and prior."""

    def run(x, problem, watch):
        physics, y, prior, lambda_reg = problem
        kind = getattr(deepinv_flows, name, None) or getattr(dinv.optim, name)
        model = kind(data_fidelity=L2, prior=prior, lambda_reg=lambda_reg, max_iter=10**6, **options)
        model.fixed_point.update_metrics_fn = lambda metrics, X_prev, X, **kwargs: watch(X["est"][0])
        model(y, physics, init=(x, x), compute_metrics=True)

    return run


def steps(kind, *values, **options):
    return [(kind, {"stepsize": value, **options}) for value in values]


# the settings tried of each way; g_first enters the prior by its gradient, else by its proximity operator
WAYS = {
    "NMAPG": steps("NMAPG", 30.0, g_first=True),
    "IPiano": steps("IPiano", 30.0, inertia=0.8, g_first=True),
    "DavisYin": steps("DavisYin", 1.0, 10.0, g_first=True),
    "CondatVu": steps("CondatVu", 1.0, stepsize_dual=0.1),
    "GD, backtracking": steps("GD", 30.0, backtracking=True),
    "PGD": steps("PGD", 1.0, 10.0, g_first=True),
    "FISTA": steps("FISTA", 1.0, 10.0, g_first=True),
    "HQS": steps("HQS", 1.0),
    "DRS": steps("DRS", 1.0),
    "ADMM": steps("ADMM", 1.0),
}


def timed(run, objective, limit) -> Watch:
    watch = Watch(objective, limit)
    try:
        run(watch)
    except (TimeUp, ValueError) as stop:  # PatchNR refuses NaN: the step was too long
        if isinstance(stop, ValueError):
            print("  stopped:", str(stop)[:90])
    return watch


def plot(watches, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    least = min(value for watch in watches.values() for _, value in watch.track)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for colour, (name, watch) in zip(plt.cm.tab20.colors, watches.items()):
        seconds, values = zip(*watch.track)
        axes.plot(seconds, [value - least + 1e-6 for value in values], label=name, color=colour)
    axes.set(yscale="log", xlabel="seconds of one core", ylabel="objective over the least seen")
    axes.legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


class ShownTo:
    """What MAP's search tells a watch."""

    max_iter = 10**6

    def __init__(self, watch):
        self.watch = watch

    def __call__(self, x, value):
        self.watch(x)


@torch.no_grad()
def recommended(x, objective, problem, watch):
    """What MAP does: the start of least objective, then L-BFGS on the whole objective."""
    physics, y, prior, lambda_reg = problem
    prior = (
        prior if isinstance(prior, PatchNR) else dinv.optim.Prior(g=prior.fn)
    )  # value and gradient at once, as by Adam
    whole = Objective(DataTerm(L2, y, physics), prior, x.new_full((1,), lambda_reg), None, by_gradient=True)
    x, *_ = least(whole, candidates(y, physics, x))
    by_lbfgs(whole, x, ShownTo(watch))


def by_nmapg(**options):
    return lambda x, objective, problem, watch: nmapg(
        objective, x, max_iter=10**6, tol=0, callback=lambda u, F: watch(u), verbose=False, **options
    )


def by_class(name, **options):
    run = of_class(name, **options)
    return lambda x, objective, problem, watch: run(x, problem, watch)


FROM_STARTS = {
    "recommended": recommended,
    "nmapg on the whole objective": by_nmapg(),
    "NMAPG, prior smooth": by_class("NMAPG", g_first=True),
    "NMAPG, prior smooth, monotone": by_class("NMAPG", g_first=True, eta=0.0),
    "IPiano, prior smooth": by_class("IPiano", g_first=True, inertia=0.8, stepsize=30.0),
    "PGD, prior smooth": by_class("PGD", g_first=True, stepsize=10.0),
    "FISTA, prior smooth": by_class("FISTA", g_first=True, stepsize=10.0),
    "HQS": by_class("HQS"),
    "GD, backtracking": by_class("GD", stepsize=30.0, backtracking=True),
    "Adam": lambda x, objective, problem, watch: adam(x, objective, watch),
}


def seconds_within(tracks: list, share: float) -> list[float | None]:
    """Seconds of each to within this share of the best objective that any of them found."""
    best = min(value for track in tracks for _, value in track)
    level = best + share * abs(best)
    return [next((seconds for seconds, value in track if value <= level), None) for track in tracks]


def tracks_from(x, parts, ways, limit, repeats) -> dict[str, list]:
    """Of each way the run, of equal ones, that other programs disturbed least."""
    physics, y, prior, lambda_reg = parts

    def objective(x):
        return L2(x, y, physics) + lambda_reg * prior(x)

    found: dict[str, list] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            watch = timed(lambda watch, run=run: run(x, objective, parts, watch), objective, limit)
            found[way].append(watch.track or [(limit, math.inf)])
    return {way: max(runs, key=len) for way, runs in found.items()}


def compare_starts(problems, side, limit, repeats, only):
    ways = {name: way for name, way in FROM_STARTS.items() if not only or name in only or name == "recommended"}
    rows, worst = {}, (0.0, None)
    for name in problems:
        *parts, starts = make_problem(name, side)
        for start, x in starts.items():
            tracks = tracks_from(x, parts, ways, limit * x.shape[1], repeats)
            seconds = dict(zip(ways, seconds_within(list(tracks.values()), 0.01)))
            finals = {way: round(track[-1][1], 5) for way, track in tracks.items()}
            rows[f"{name} from {start}"] = {"seconds": seconds, "finals": finals}
            print(f"{name} from {start}")
            for way in ways:
                print(f"  {way:<32}{seconds[way]!s:>8} s to 1%, final {finals[way]}", flush=True)
            others = [s for way, s in seconds.items() if s is not None and way != "recommended"]
            if others:
                mine = seconds["recommended"]
                ratio = math.inf if mine is None else mine / max(min(others), 1e-9)
                worst = max(worst, (round(ratio, 2), f"{name} from {start}"), key=lambda pair: pair[0])
    print(json.dumps({"worst_ratio": worst[0], "where": worst[1], "rows": rows, "versions": versions()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--flow", help="weights for --data")
    parser.add_argument("--crop", type=int, default=64, help="side of the image, a multiple of 4")
    parser.add_argument("--strength", type=float, default=0.1, help="of the prior, in units of noise^2 H W / p^2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", help="names of the ways to run, beside Adam")
    parser.add_argument("--starts", action="store_true", help="five problems from three starts")
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS), help="of --starts")
    parser.add_argument("--side", type=int, default=24, help="of the images of --starts, a multiple of 4")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each way of --starts and each channel")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each way of --starts")
    args = parser.parse_args()
    if args.starts:
        torch.set_num_threads(1)
        return compare_starts(args.problems, args.side, args.seconds, args.repeats, args.only)
    if (args.data is None) != (args.flow is None):
        parser.error("give --data and --flow together")
    torch.set_num_threads(1)
    physics, y, x, prior = gravel(args.crop) if args.data is None else material(args.data, args.flow, args.crop)
    prior.requires_grad_(False)
    lambda_reg = args.strength * NOISE**2 * args.crop**2 / prior.patch_size**2

    def objective(x):
        return L2(x, y, physics) + lambda_reg * prior(x)

    watches = {"Adam": timed(lambda watch: adam(x, objective, watch), objective, math.inf)}
    limit, adam_final = watches["Adam"].track[-1]
    adam_best = min(value for _, value in watches["Adam"].track)
    print(f"Adam: {limit:.1f} s, final {adam_final:.6f}, best {adam_best:.6f}", flush=True)

    def record(name, run):
        watch = timed(run, objective, limit)
        if not watch.track:
            return
        value = watch.track[-1][1]
        print(
            f"{name}: {len(watch.track)} iterations, final {value:.6f}, Adam's in {watch.seconds_to(adam_final)} s",
            flush=True,
        )
        if name not in watches or value < watches[name].track[-1][1]:
            watches[name] = watch

    wanted = args.only or ["LBFGS", "nmapg", *WAYS]
    if "LBFGS" in wanted:
        record("LBFGS", lambda watch: lbfgs(x, objective, lambda_reg, watch))
    if "nmapg" in wanted:
        settings = {"stepsize": 30.0, "max_iter": 10**6, "tol": 0, "verbose": False}
        record("nmapg", lambda watch: nmapg(objective, x, **settings, callback=lambda u, F: watch(u)))
    for name, settings in WAYS.items():
        for kind, options in settings if name in wanted else []:
            run = of_class(kind, **options)
            record(name, lambda watch, run=run: run(x, (physics, y, prior, lambda_reg), watch))
    if args.out:
        plot(watches, args.out)
    result = {
        name: {
            "final": round(watch.track[-1][1], 7),
            "iterations": len(watch.track),
            "to_adam_final": watch.seconds_to(adam_final),
            "to_adam_best": watch.seconds_to(adam_best),
        }
        for name, watch in watches.items()
    }
    half = {name: r["to_adam_final"] for name, r in result.items() if name != "Adam" and r["to_adam_final"]}
    best = min(half, key=half.get, default=None)
    ratio = round(half[best] / limit, 3) if best else None
    print(
        json.dumps(
            {"seconds": limit, "best": best, "share_of_adams_time": ratio, "ways": result, "versions": versions()}
        )
    )


if __name__ == "__main__":
    main()
