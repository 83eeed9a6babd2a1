"""
One iteration of limited-angle CT at 362 x 362: physics and prior apart, ours against deepinv's.

    python tests/benchmarks/ct_iteration.py [--size 362] [--angles 100]

An iteration is the gradient of ||A x - y||^2 / 2 for ``deepinv.physics.Tomography`` over angles from 20 to 160 degrees, and the
one of the prior on all patches, as in deepinv's example of patch priors (there the weights collect gradients too). The last
line is one JSON object, of the minima.
"""

import argparse
import json

import deepinv as dinv
import torch
from common import backward, in_turns, pair, table, versions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=362)
    parser.add_argument("--angles", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    physics = dinv.physics.Tomography(angles=torch.linspace(20, 160, args.angles), img_width=args.size, circle=False)
    theirs, ours = pair()
    ours.requires_grad_(False)
    x = torch.rand(1, 1, args.size, args.size)
    y = physics(x)
    data_fidelity = dinv.optim.L2()

    def physics_gradient():
        leaf = x.clone().requires_grad_()
        data_fidelity(leaf, y, physics).sum().backward()

    with torch.no_grad():
        assert torch.allclose(theirs(x), ours(x), rtol=1e-4)
    ways = {
        "physics": physics_gradient,
        "prior, deepinv": lambda: backward(theirs, x),
        "prior, ours": lambda: backward(ours, x),
    }
    seconds = in_turns(ways, args.repeats)
    table(seconds, f"{args.size} x {args.size}, {args.angles} angles")
    best = {name: min(values) for name, values in seconds.items()}
    iteration = {who: best["physics"] + best[f"prior, {who}"] for who in ("deepinv", "ours")}
    print(f"an iteration: deepinv {iteration['deepinv']:.2f} s, ours {iteration['ours']:.2f} s")
    result = {f"ms {name}": round(value * 1e3, 1) for name, value in best.items()}
    result["ratio_iteration"] = round(iteration["deepinv"] / iteration["ours"], 2)
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
