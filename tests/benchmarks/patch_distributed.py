"""
PatchNR over processes: seconds of one gradient, and what of them is the all-reduce.

    python tests/benchmarks/patch_distributed.py [--processes 1 2] [--sizes 256 512 1024] [--repeats 3]

The default flow with random weights frozen, each process on one thread, over gloo on this machine; one process needs no group.
An all-reduce of a tensor of the image's size is timed alone as well. The last line is one JSON object: for each size and
number of processes the least seconds of the slowest process, its processor seconds, the speed-up over one process by either,
the largest difference from one process's gradient relative to its largest entry, and the MB over the image at a process's peak.
"""

import argparse
import json
import tempfile
import time

import torch
import torch.distributed as dist
from common import peak_over, versions

from deepinv_flows import DistributedPatchNR


def gradient(rank: int, processes: int, size: int, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/store{size}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    prior = DistributedPatchNR().requires_grad_(False)
    x = torch.rand(1, 1, size, size)
    found = {"mb": peak_over(lambda: prior.grad(x[:, :, :24, :24]), lambda: prior.grad(x))}
    seconds, processor, reduce = [], [], []
    for _ in range(repeats):
        start, start_processor = time.perf_counter(), time.process_time()
        grad = prior.grad(x)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
        start = time.perf_counter()
        if processes > 1:
            dist.all_reduce(torch.empty_like(x))
        reduce.append(time.perf_counter() - start)
    found |= {"seconds": min(seconds), "processor_seconds": min(processor), "all_reduce_seconds": min(reduce)}
    if processes == 1:
        torch.save(grad, f"{folder}/grad{size}")
    else:
        expected = torch.load(f"{folder}/grad{size}")
        found["difference"] = float((grad - expected).abs().max() / expected.abs().max())
        dist.destroy_process_group()
    with open(f"{folder}/{processes}-{size}-{rank}.json", "w") as file:
        json.dump(found, file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    result = {}
    print(
        f"{'size':>6}{'processes':>11}{'seconds':>9}{'processor':>11}{'all-reduce':>12}{'speed-up':>10}{'error':>10}{'MB':>7}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            for n in sorted({1, *args.processes}):
                torch.multiprocessing.spawn(gradient, (n, size, args.repeats, folder), nprocs=n)
                ranks = []
                for rank in range(n):
                    with open(f"{folder}/{n}-{size}-{rank}.json") as file:
                        ranks.append(json.load(file))
                row = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
                row["speed_up"] = result[f"{size}, 1"]["seconds"] / row["seconds"] if n > 1 else 1.0
                row["processor_speed_up"] = (
                    result[f"{size}, 1"]["processor_seconds"] / row["processor_seconds"] if n > 1 else 1.0
                )
                result[f"{size}, {n}"] = row
                print(
                    f"{size:>6}{n:>11}{row['seconds']:>9.3f}{row['processor_seconds']:>11.3f}{row['all_reduce_seconds']:>12.4f}"
                    f"{row['speed_up']:>10.2f}{row.get('difference', 0):>10.1e}{row['mb']:>7.0f}",
                    flush=True,
                )
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
