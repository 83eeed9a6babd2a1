"""
Cost and memory per patch of one value and image gradient, from small to large images.

    python tests/benchmarks/patch_scaling.py [--sizes 64 128 ... 4096] [--deepinv-up-to 512] [--out scaling.png]

The default flow with random weights, all patches, weights frozen in both priors; a fresh process for each size, so that memory
is its own. Seconds are the clock's; those of the processor, which other work on the machine does not add to, stand beside them.
The last line is one JSON object: microseconds a patch, MB over the image, how a 2048 x 2048 image compares with four of
1024 x 1024, and for 512 and more the largest ratio of two sizes' seconds a pixel.
"""

import argparse
import json
import time

import torch
from common import backward, memory_of, pair, peak_over, versions


def measure(who: str, size: int, repeats: int, width: int) -> None:
    theirs, ours = pair(sub_net_size=width)
    prior = (theirs if who == "deepinv" else ours).requires_grad_(False)
    x = torch.rand(1, 1, size, size)
    seconds, processor = [], []

    def call():
        start, start_processor = time.perf_counter(), time.process_time()
        backward(prior, x)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)

    memory = peak_over(lambda: backward(prior, torch.rand(1, 1, 24, 24)), call)
    for _ in range(repeats - 1):
        call()
    print(json.dumps([min(seconds), min(processor), memory]))


def plot(rows: dict, path: str) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for who, found in rows.items():
        sizes = list(found)
        axes[0].plot(sizes, [found[size]["us_per_patch"] for size in sizes], "o-", label=who)
        axes[1].plot(sizes, [found[size]["mb"] for size in sizes], "o-", label=who)
    axes[0].set(ylabel="microseconds a patch", ylim=(0, None))
    axes[1].set(ylabel="MB over the image", yscale="log")
    for ax in axes:
        ax.set(xlabel="pixels a side", xscale="log")
        ax.legend()
    plt.tight_layout()
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--deepinv-up-to", type=int, default=512, help="it needs 27 kB a patch: 28 GB at 1024")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=256, help="of the flow's networks")
    parser.add_argument("--out", help="where to save the plot")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], *map(int, args.measure[1:]))
    rows = {"deepinv": {}, "ours": {}}
    print(f"{'size':>6}{'':>10}{'seconds':>10}{'processor':>11}{'us/patch':>10}{'MB':>8}")
    for size in args.sizes:
        for who in rows:
            if who == "deepinv" and size > args.deepinv_up_to:
                continue
            seconds, processor, memory = memory_of(
                __file__, "--measure", who, str(size), str(args.repeats), str(args.width)
            )
            cost = seconds / (size - 5) ** 2 * 1e6
            found = {"seconds": seconds, "processor_seconds": processor, "us_per_patch": cost, "mb": memory}
            rows[who][size] = {name: round(value, 3) for name, value in found.items()}
            print(f"{size:>6}{who:>10}{seconds:>10.3f}{processor:>11.3f}{cost:>10.1f}{memory:>8.0f}", flush=True)
    if args.out:
        plot(rows, args.out)
    result = dict(rows)
    if {1024, 2048} <= set(rows["ours"]):
        large, small = rows["ours"][2048], rows["ours"][1024]
        result["time_2048_over_four_1024"] = round(large["seconds"] / (4 * small["seconds"]), 3)
    large = {size: row for size, row in rows["ours"].items() if size >= 512}
    for name in ("seconds", "processor_seconds") if len(large) > 1 else ():
        per_pixel = [row[name] / size**2 for size, row in large.items()]
        result[f"spread_of_{name}_per_pixel"] = round(max(per_pixel) / min(per_pixel), 3)
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
