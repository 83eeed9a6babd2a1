"""
What deepinv 0.5.0 gets wrong and this package does not: each defect of ``tests/upstream``, by deepinv and by ours.

    python tests/benchmarks/upstream_defects.py

About 20 seconds on one core. The last line is one JSON object {defect: {"deepinv": outcome, "ours": outcome}}, an outcome a
number, a truth, a shape, or the type and first line of an error.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from upstream import DEFECTS, SIDES, as_expected, outcome


def main():
    torch.set_num_threads(1)
    result = {}
    for name in DEFECTS:
        found = result[name] = {side: outcome(name, side) for side in SIDES}
        surprise = "" if all(as_expected(name, side, found[side]) for side in SIDES) else "  NOT AS EXPECTED"
        print("\n".join([name + surprise, *(f"    {side:<9}{str(found[side])[:110]}" for side in SIDES)]), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
