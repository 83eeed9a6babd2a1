"""
Seconds and memory of one value and image gradient of PatchNR, ours against deepinv's.

    python tests/benchmarks/patch_speed.py [--sizes 64 128 362] [--quick] [--device cuda]

The default flow with random weights, equal in both; all patches of one image. deepinv runs as in its own example (the
weights collect gradients too) and with its weights frozen. ``ratio_example`` and ``ratio_frozen`` divide these times by ours
after ``requires_grad_(False)``; ``ratio_unfrozen`` compares the example's loop in both. ``limit_fraction`` is the rate of our
matrix products over the best rate measured for any. Outputs are compared before anything is timed. The last line is one
JSON object, of the minima.
"""

import argparse
import json

import torch
from common import backward, best_sgemm, flop_per_patch, in_turns, memory_of, pair, peak_over, table, versions

SMALL = 24  # side of the image that warms up


def ways_of(theirs, ours, x):
    def way(prior, frozen, precision=None):
        def call():
            prior.requires_grad_(not frozen)
            prior.precision = precision
            return backward(prior, x)

        return call

    return {
        "deepinv, as in its example": way(theirs, False),
        "deepinv, weights frozen": way(theirs, True),
        "ours, the same loop": way(ours, False),
        "ours, weights frozen": way(ours, True),
        'ours, frozen, precision="bfloat16"': way(ours, True, "bfloat16"),
    }


def compare(ways: dict) -> dict[str, float]:
    results = {name: way() for name, way in ways.items()}
    truth = results["deepinv, weights frozen"]

    def error(name):
        value, grad = results[name]
        assert (value - truth[0]).abs().max() <= 2e-2 * truth[0].abs().max(), name
        return float((grad - truth[1]).norm() / truth[1].norm())

    return {"grad_error": error("ours, weights frozen"), "grad_error_bf16": error('ours, frozen, precision="bfloat16"')}


def measure_memory(who: str, size: int) -> None:
    theirs, ours = pair()
    prior = theirs if who == "deepinv" else ours.requires_grad_(False)
    small, large = torch.rand(1, 1, SMALL, SMALL), torch.rand(1, 1, size, size)
    call = second_derivatives if who == "second derivatives" else backward
    print(json.dumps(peak_over(lambda: call(prior, small), lambda: call(prior, large))))


def second_derivatives(prior, x):
    leaf = x.requires_grad_()
    prior.grad(leaf).square().sum().backward()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 362], help="sides of the images")
    parser.add_argument("--quick", action="store_true", help="one size, 256, and few repeats")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return measure_memory(args.memory[0], int(args.memory[1]))
    sizes, repeats = ([256], 3) if args.quick else (args.sizes, args.repeats)

    theirs, ours = (prior.to(args.device) for prior in pair())
    result = {}
    for size in sizes:
        torch.manual_seed(size)
        ways = ways_of(theirs, ours, torch.rand(1, 1, size, size, device=args.device))
        result |= compare(ways)
        seconds = in_turns(ways, repeats)
        table(seconds, f"{size} x {size}, {args.device}")
        example, frozen, same_loop, own, bf16 = (min(seconds[name]) for name in ways)
        result |= {
            f"ratio_example_{size}": round(example / own, 2),
            f"ratio_frozen_{size}": round(frozen / own, 2),
            f"ratio_unfrozen_{size}": round(example / same_loop, 2),
            f"ratio_bf16_{size}": round(example / bf16, 2),
        }
    if args.device == "cpu":
        size = sizes[-1]
        limit = best_sgemm()
        own = min(seconds["ours, weights frozen"])
        achieved = flop_per_patch(ours) * (size - 5) ** 2 / own
        print(f"\nmatrix products: ours {achieved / 1e9:.0f} GFLOP/s, best measured {limit / 1e9:.0f} GFLOP/s,")
        print(f"in bfloat16 {best_sgemm(torch.bfloat16) / 1e9:.0f} GFLOP/s")
        whose = ("deepinv", "ours", "second derivatives")
        memory = {who: memory_of(__file__, "--memory", who, str(size)) for who in whose[: 2 if args.quick else 3]}
        print("MB over the image:", {who: round(mb) for who, mb in memory.items()})
        result |= {
            f"limit_fraction_{size}": round(achieved / limit, 3),
            f"memory_ratio_{size}": round(memory["deepinv"] / memory["ours"], 1),
            f"memory_mb_{size}": {who: round(mb) for who, mb in memory.items()},
        }
    print(json.dumps({**result, "device": args.device, "versions": versions()}))


if __name__ == "__main__":
    main()
