"""
Seconds on every path a user takes, ours against deepinv's: small and large images, many or one, frozen or not.

    python tests/benchmarks/paths.py [--quick] [--only TEXT] [--threads N] [--seconds S]

The default flow with random weights, equal in both; outputs are compared before anything is timed. A row is a path, a batch of
images, and whether the weights are frozen; both sides take turns, and the row's figure is the median of the ratios of deepinv's
time to ours in each turn, beside the row's target. Value and gradients are taken

- ``value``: of ``prior(x)`` alone, with gradients enabled;
- ``backward``: by ``prior(x).sum().backward()``, of images that ask for a gradient;
- ``weights``: by the same, of images that do not;
- ``unequal``: as ``backward``, of images weighted differently;
- ``second``: of ``grad(x)`` squared, by its graph;
- ``PatchPrior``: by ``deepinv.optim.PatchPrior(ours).grad``, and ``script`` by the loop of deepinv's example, through PatchPrior;
- ``GD``: in three iterations of deepinv's gradient descent, through PatchPrior;
- ``patches``: of ``prior(patches)``, and its backward pass.

The last line is one JSON object: all ratios, and ``worst_ratio``, the least of ratio over target.
"""

import argparse
import json
import statistics
import time

import deepinv as dinv
import torch
from common import pair, versions

PATCH = 6
SIZES = [
    (1, 8),
    (1, 32),
    (1, 72),
    (1, 181),
    (1, 362),
    (1, 512),
    (8, 32),
    (32, 16),
    (128, 8),
    (512, 8),
    (128, 32),
    (16, 128),
]
QUICK = [(1, 8), (1, 72), (1, 181), (128, 8), (8, 32)]


def ways(theirs, ours, x):
    """Path: (deepinv's way, ours, target for trainable weights, target for frozen ones)."""
    through = dinv.optim.PatchPrior(ours, patch_size=PATCH, n_patches=-1)
    patches = x.unfold(2, PATCH, 1).unfold(3, PATCH, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).contiguous()
    factors = torch.linspace(0.5, 1.5, len(x)) if len(x) > 1 else torch.ones(1)
    on_patches = theirs.negative_patch_log_likelihood
    faster = (1.5, 2.0)
    return {
        "value": (lambda: theirs(x), lambda: ours(x), 1.0, 1.0),
        "backward": (lambda: backward(theirs, x), lambda: backward(ours, x), 1.0, 1.0),
        "weights": (lambda: backward(theirs, x, image=False), lambda: backward(ours, x, image=False), 1.0, None),
        "unequal": (lambda: backward(theirs, x, factors), lambda: backward(ours, x, factors), 1.0, 1.0),
        "second": (lambda: second(theirs, x), lambda: second(ours, x), 1.0, 1.0),
        "PatchPrior": (lambda: theirs.grad(x.clone()), lambda: through.grad(x.clone()), *faster),
        "script": (lambda: backward(theirs, x), lambda: backward(through, x), 1.0, 1.0),
        "GD": (lambda: descent(theirs, x), lambda: descent(through, x), *faster),
        "patches": (lambda: backward(on_patches, patches), lambda: backward(ours, patches), 1.0, 1.0),
    }


def backward(prior, x, factors=None, image=True):
    for p in prior.parameters():
        p.grad = None
    leaf = x.detach().requires_grad_(image)
    value = prior(leaf)
    (value if factors is None else value * factors).sum().backward()
    return leaf.grad if image else next(p.grad for p in prior.parameters() if p.grad is not None)


def second(prior, x):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(prior.grad(leaf).square().sum(), leaf)[0]


def descent(prior, x):
    model = dinv.optim.GD(data_fidelity=dinv.optim.L2(), prior=prior, lambda_reg=0.1, stepsize=0.1, max_iter=3)
    return model(x.clone(), dinv.physics.Denoising())


def compare(name, theirs, ours):
    """Near, up to what rounding does at the kinks of ReLUs."""
    if name != "weights":  # whose parameters have another order
        assert (ours - theirs).norm() <= (0.1 if name == "second" else 1e-2) * theirs.norm(), name


def ratios(theirs, ours, seconds, least=3):
    """Deepinv's time over ours in each turn: that of the processor for a single thread, as others may use the machine."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found, end = [], time.perf_counter() + seconds
    while len(found) < least or (time.perf_counter() < end and len(found) < 51):
        times = []
        for way in (theirs, ours) if len(found) % 2 else (ours, theirs):
            start = clock()
            way()
            times.append(clock() - start)
        found.append(times[0] / times[1] if len(found) % 2 else times[1] / times[0])
    return found


def compiled(theirs, ours):
    """Graphs that are compiled for images of several sizes over those for two of them, and time over eager's."""
    from torch._dynamo.utils import counters

    def user(x):
        return 2 * ours(3 * x)

    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(user, backend="eager", dynamic=True)
    graphs = []
    for side in (32, 48, 40, 56):
        fast(x := torch.rand(1, 1, side, side))
        graphs.append(counters["stats"]["unique_graphs"])
    eager = statistics.median(ratios(lambda: user(x), lambda: fast(x), 2))
    return {
        "compiled_graphs": graphs[-1],
        "compiled_once": graphs[0] == graphs[-1],
        "eager_over_compiled": round(eager, 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few sizes, about ten minutes")
    parser.add_argument("--only", default="", help="the rows whose name holds this")
    parser.add_argument("--seconds", type=float, default=4, help="for each row, at least three turns")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    theirs, ours = pair(PATCH)
    result, worst = {}, float("inf")
    print(f"{'path':<34}{'ratio':>8}{'target':>8}{'turns':>7}")
    for batch, side in QUICK if args.quick else SIZES:
        torch.manual_seed(side)
        x = torch.rand(batch, 1, side, side)
        for frozen in (False, True):
            for prior in (theirs, ours):
                prior.requires_grad_(not frozen)
            for name, (way, own, *targets) in ways(theirs, ours, x).items():
                target, row = targets[frozen], f"{name} {batch}x{side}x{side} {'frozen' if frozen else 'trainable'}"
                if target is None or args.only not in row:
                    continue
                compare(name, way(), own())
                own()  # what a backward pass asked for is prepared from the next forward pass on
                found = ratios(way, own, min(args.seconds, 2) if args.quick else args.seconds)
                result[row] = round(statistics.median(found), 3)
                worst = min(worst, result[row] / target)
                print(f"{row:<34}{result[row]:>8.2f}{target:>8.1f}{len(found):>7}", flush=True)
    result |= compiled(theirs, ours) if args.only in "compiled" else {}
    print(json.dumps({**result, "worst_ratio": round(worst, 3), "versions": versions()}))


if __name__ == "__main__":
    main()
