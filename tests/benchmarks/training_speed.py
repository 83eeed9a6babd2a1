"""
Patches a second in training: a plain loop over deepinv's PatchNR against ours.

    python tests/benchmarks/training_speed.py [--batches 32 1024 4096] [--device cuda]

The default flow, Adam, one batch of random patches shown again and again; ours with fused Adam, as ``fit_patchnr`` trains, and
compiled (``fit_patchnr(compile=True)``; the compilation is not counted, but printed). bfloat16 is by autocast.
Then a step of score matching beside one of the likelihood, and a product with the Hessian beside a gradient, of the default flow
and of one for 8x8 patches with SiLU, on the patches of pieces of 4x4 patches. The last line is one JSON object, of the minima.
"""

import argparse
import json
import time

import deepinv as dinv
import torch
from common import in_turns, table, versions

from deepinv_flows import FlowModel, PatchNR, glow_flow
from deepinv_flows.training.denoising import mean_error


def deepinv_step(patches):
    prior = dinv.optim.PatchNR(patch_size=6, channels=1).to(patches.device)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-4)
    return _step(lambda: prior(patches[:, None]).mean(), optimizer)


def our_step(patches, **options):
    model = FlowModel(glow_flow(36).to(patches.device), dequantise=0, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    return _step(lambda: model(patches).mean(), optimizer)


def second_derivatives(patch_size, pieces, repeats, device, flow=None):
    """Times of a step of score matching over a step of the likelihood, and of a product with the Hessian over a gradient."""
    sigma, side = torch.full((pieces, 1, 1, 1), 0.1, device=device), 4 * patch_size
    x = torch.rand(pieces, 1, side, side, device=device)
    batch = {"x": x, "y": x + 0.1 * torch.randn_like(x), "params": {"sigma": sigma}}
    patches = x.unfold(2, patch_size, 1).unfold(3, patch_size, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, patch_size**2)
    prior = PatchNR(flow, patch_size=patch_size).to(device)
    prior._asked.second = True  # as training has it from its first step on
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-4, fused=True)
    likelihood = FlowModel(prior.normalizing_flow, dequantise=0)
    ways = {
        "likelihood": _step(lambda: likelihood(patches).mean(), optimizer),
        "score matching": _step(lambda: mean_error(prior, batch, device), optimizer),
    }
    seconds = in_turns(ways, repeats)
    prior.requires_grad_(False)
    at = x.clone().requires_grad_()
    grad = prior.grad(at)
    products = {
        "gradient": lambda: prior.grad(x),
        "product with the Hessian": lambda: torch.autograd.grad(grad, at, x, retain_graph=True),
    }
    seconds |= in_turns(products, repeats)
    table(seconds, f"{len(patches)} patches of {patch_size}x{patch_size}, {device}")
    least = {name: min(values) for name, values in seconds.items()}
    return {
        f"score_over_likelihood_{patch_size}": round(least["score matching"] / least["likelihood"], 2),
        f"hessian_over_gradient_{patch_size}": round(least["product with the Hessian"] / least["gradient"], 2),
    }


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
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--pieces", type=int, default=4, help="pieces of score matching; of 8x8 patches each has 625")
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
    smooth = glow_flow(64, 5, 192, permute=True, activation="silu", generator=torch.Generator())
    for patch_size, flow in ((6, None), (8, smooth)):
        result |= second_derivatives(patch_size, args.pieces, args.repeats, args.device, flow)
    print(json.dumps({**result, "device": args.device, "versions": versions()}))


if __name__ == "__main__":
    main()
