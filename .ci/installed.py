"""The wheel as a user has it: run with ``python -I``, outside the checkout that is named, beside the wheel's own dependencies."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import deepinv as dinv
import torch

import deepinv_flows

IMPORT_SECONDS = 0.2  # of the processor, which other processes do not lengthen
TIMED = "import time, deepinv; began = time.process_time(); import deepinv_flows; print(time.process_time() - began)"


def files(package: Path) -> set[Path]:
    return {path.relative_to(package) for path in package.rglob("*.*") if path.suffix != ".pyc"}


checkout, package = Path(sys.argv[1]), Path(deepinv_flows.__file__).parent
assert package != checkout / "deepinv_flows"
assert files(package) == files(checkout / "deepinv_flows"), files(package) ^ files(checkout / "deepinv_flows")

distribution = importlib.metadata.distribution("deepinv-flows")
assert distribution.version == deepinv_flows.__version__
entry_points = [entry for entry in distribution.entry_points if entry.group.startswith("deepinv.")]
loaded = {entry.name: entry.load() for entry in entry_points}
assert loaded["PatchNR"] is deepinv_flows.PatchNR and {"unfolded_builder", "DEQ_builder"} <= loaded.keys()

prior, y, physics = loaded["PatchNR"](pretrained="gravel"), torch.rand(1, 1, 12, 12), dinv.physics.Denoising()
for builder in ("unfolded_builder", "DEQ_builder"):
    model = loaded[builder](
        "PGD", {"lambda": 0.01, "stepsize": 0.5}, data_fidelity=dinv.optim.L2(), prior=prior, max_iter=2
    )
    assert model(y, physics).isfinite().all()
assert deepinv_flows.FlowPrior(pretrained="lfw")(torch.rand(1, 1, 24, 24)).isfinite().all()

seconds = min(float(subprocess.check_output([sys.executable, "-IW", "ignore", "-c", TIMED])) for _ in range(5))
print(f"{len(loaded)} entry points of version {distribution.version} load; import {seconds:.3f} s over deepinv's own")
assert seconds < IMPORT_SECONDS, f"expected an import under {IMPORT_SECONDS} s over deepinv's own; got {seconds:.3f} s"
