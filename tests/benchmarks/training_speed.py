"""
Patches a second in training: a plain loop over deepinv's PatchNR against ours.

    python tests/benchmarks/training_speed.py [--batches 32 1024 4096] [--device cuda]

The default flow, Adam, one batch of random patches shown again and again; ours with fused Adam, as ``fit_patchnr`` trains, and
compiled (``fit_patchnr(compile=True)``; the compilation is not counted, but printed). bfloat16 is by autocast. The last line
is one JSON object, of the minima.
"""

import argparse
import json
import time

import deepinv as dinv
import torch
from common import in_turns, table, versions

from deepinv_flows import FlowModel, glow_flow


def deepinv_step(patches):
    prior = dinv.optim.PatchNR(patch_size=6, channels=1).to(patches.device)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-4)
    return _step(lambda: prior(patches[:, None]).mean(), optimizer)


def our_step(patches, **options):
    model = FlowModel(glow_flow(36).to(patches.device), dequantise=0, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    return _step(lambda: model(patches).mean(), optimizer)


def _step(loss, optimizer):
    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def in_bfloat16(step, device_type):
    def call():
        with torch.autocast(device_type, torch.bfloat16):
            step()

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    result = {}
    for batch in args.batches:
        patches = torch.rand(batch, 36, device=args.device)
        ways = {
            "deepinv": deepinv_step(patches),
            "ours": our_step(patches),
            "ours, compiled": our_step(patches, compile=True),
            "ours, bfloat16 autocast": in_bfloat16(our_step(patches), patches.device.type),
        }
        start = time.perf_counter()
        ways["ours, compiled"]()
        print(f"compilation: {time.perf_counter() - start:.1f} s")
        seconds = in_turns(ways, args.repeats)
        table(seconds, f"batch {batch}, {args.device}")
        rates = {name: round(batch / min(values)) for name, values in seconds.items()}
        print(f"patches a second: {rates}")
        result[f"patches_per_s_{batch}"] = rates
        best = max(rates["ours"], rates["ours, compiled"])
        result[f"training_ratio_{batch}"] = round(best / rates["deepinv"], 2)
    print(json.dumps({**result, "device": args.device, "versions": versions()}))


if __name__ == "__main__":
    main()
