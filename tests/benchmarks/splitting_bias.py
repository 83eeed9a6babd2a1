"""
What the consistency losses estimate: deepinv's EquivariantSplittingLoss and ours against the true image.

    python tests/benchmarks/splitting_bias.py [--repeats 5]

For a linear reconstructor, noisy inpainting and masks of ratio 0.7: the mean over 4000 draws a repeat, its standard error, and
the supervised value that the loss estimates by its own theory at the same draws, prediction term and its noise included. ``z`` is
the mean of the differences in units of their standard error. The last line is one JSON object.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import deepinv as dinv
import torch
from common import versions

sys.path.insert(0, str(Path(__file__).parent.parent))
from splitting_cases import CONSISTENCY, SIZE, losses_and_truths

from deepinv_flows import EquivariantSplittingLoss

CLASSES = {"deepinv": dinv.loss.EquivariantSplittingLoss, "ours": EquivariantSplittingLoss}


def row(loss_class, name, x, repeats):
    values, truths = map(torch.cat, zip(*(losses_and_truths(loss_class, name, x) for _ in range(repeats))))
    scale = len(values) ** -0.5
    error = values - truths
    return {
        "mean": round(float(values.mean()), 5),
        "se": round(float(values.std() * scale), 5),
        "true": round(float(truths.mean()), 5),
        "z": round(float(error.mean() / (error.std() * scale)), 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    x = torch.rand(1, *SIZE) + 0.2
    result = {}
    print(f"{'consistency':<14}{'class':<9}{'mean':>10}{'se':>10}{'true':>10}{'z':>9}")
    for name in CONSISTENCY:
        for label, loss_class in CLASSES.items():
            try:
                found = result[f"{name}, {label}"] = row(loss_class, name, x, args.repeats)
                print(
                    f"{name:<14}{label:<9}"
                    + "".join(f"{found[k]:>10}" for k in ("mean", "se", "true"))
                    + f"{found['z']:>9}"
                )
            except (ValueError, RuntimeError) as error:
                result[f"{name}, {label}"] = f"{type(error).__name__}: {error}"
                print(f"{name:<14}{label:<9} {type(error).__name__}: {error}")
    print(json.dumps({**result, "draws": 4000 * args.repeats, "versions": versions()}))


if __name__ == "__main__":
    main()
