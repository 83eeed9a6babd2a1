"""
Equivariant splitting, deepinv's class and ours in turns in one process: seconds of an evaluation and of a training step.

    python tests/benchmarks/splitting_speed.py [--batch 32] [--repeats 60]

Inpainting of 32x32 images, masks of ratio 0.9, five splits in evaluation, without motions; MCLoss() has torch's MSELoss, which
returns one number for a batch, and MCLoss(MSE()) deepinv's metric. ``ratio`` is ours over deepinv's, of the minima and of the
medians. The last line is one JSON object.
"""

import argparse
import json
import statistics
import warnings

import deepinv as dinv
import torch
from common import in_turns, versions
from deepinv.physics.generator import BernoulliSplittingMaskGenerator

from deepinv_flows import EquivariantSplittingLoss

SIZE = (1, 32, 32)
CLASSES = {"deepinv": dinv.loss.EquivariantSplittingLoss, "ours": EquivariantSplittingLoss}
METRICS = {"MCLoss()": lambda: (), "MCLoss(MSE())": lambda: (dinv.metric.MSE(),)}
NETWORKS = {"small": dict(depth=3, nf=8), "of the configs": dict(depth=7, nf=24)}


def ways(loss_class, metric, network, batch):
    torch.manual_seed(0)
    terms = dict(consistency_loss=dinv.loss.MCLoss(*metric()), prediction_loss=dinv.loss.MCLoss(*metric()))
    loss = loss_class(mask_generator=BernoulliSplittingMaskGenerator(SIZE, 0.9), **terms)
    backbone = dinv.models.DnCNN(1, 1, pretrained=None, **network)
    model = loss.adapt_model(dinv.models.ArtifactRemoval(backbone, mode="adjoint"))
    physics = dinv.physics.Inpainting(SIZE, mask=0.5)
    y = physics(torch.rand(batch, *SIZE))

    def evaluate():
        model.eval()
        with torch.no_grad():
            return loss(model(y, physics, update_parameters=True), y, physics, model)

    def train():
        model.train()
        loss(model(y, physics, update_parameters=True), y, physics, model).mean().backward()

    return {"evaluation": evaluate, "training": train}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = {}
    for size, network in NETWORKS.items():
        for name, metric in METRICS.items():
            both = {label: ways(loss_class, metric, network, args.batch) for label, loss_class in CLASSES.items()}
            for step in ("evaluation", "training"):
                seconds = in_turns({label: each[step] for label, each in both.items()}, args.repeats)
                least, middle = ({k: f(v) for k, v in seconds.items()} for f in (min, statistics.median))
                row = {f"{k}_ms": round(1e3 * v, 2) for k, v in least.items()}
                row |= {
                    "ratio": round(least["ours"] / least["deepinv"], 3),
                    "ratio_of_medians": round(middle["ours"] / middle["deepinv"], 3),
                }
                result[f"{size}, {name}, {step}"] = row
                print(f"{size}, {name}, {step}: {row}", flush=True)
    print(json.dumps({**result, "batch": args.batch, "repeats": args.repeats, "versions": versions()}))


if __name__ == "__main__":
    main()
