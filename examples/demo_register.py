r"""
One line before a deepinv script
================================

``plain_deepinv.py`` restores a photograph with :class:`deepinv.optim.PatchNR` and names nothing of ours. Here it runs twice, each
time in a process of its own and without a change: as it stands, and after ``deepinv_flows.register()``, which puts our class
where deepinv's was. The numbers stay the same to rounding; time and memory do not.

The photograph is scikit-image's *gravel* (CC0): a flow of deepinv's default size learns from its upper half, the script works
on the lower.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import skimage.data
import torch

from deepinv_flows import PatchNR, fit_patchnr

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
SCRIPT = HERE / "plain_deepinv.py"
SIDE, ITERATIONS, EPOCHS = (48, 5, 1) if SHORT else (144, 40, 8)
start = time.perf_counter()

# %%
# Weights in deepinv's own form: a flow as deepinv builds it, trained by three lines of ours.

upper_half = torch.from_numpy(skimage.data.gravel()[:256]).float()[None] / 255
sizes = dict(epochs=EPOCHS, steps_per_epoch=5 if SHORT else 60, batch_size=512, dequantise=1 / 255)
prior = fit_patchnr([upper_half], prior=PatchNR(), verbose=False, **sizes)
folder = Path(tempfile.mkdtemp())
torch.save(prior.to_deepinv_state_dict(), folder / "weights.pt")

# %%
# The two runs. What surrounds the script is one line, and the largest memory of the process over what it took to import, which
# Linux tells.

RUNNER = """
import runpy, sys
import deepinv, deepinv_flows, skimage.data

def peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return float("nan")

if sys.argv.pop(1) == "after":
    deepinv_flows.register()
sys.argv.pop(0)
imported = peak()
runpy.run_path(sys.argv[0])
print(peak() - imported)
"""


def run(when):
    result = folder / f"{when}.pt"
    arguments = [when, SCRIPT, folder / "weights.pt", result, SIDE, ITERATIONS]
    command = [sys.executable, "-W", "ignore", "-c", RUNNER, *map(str, arguments)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    print(f"{when}: {out[-2]}, {float(out[-1]):.0f} MB")
    return {**json.loads(out[-2]), "megabytes": float(out[-1])}, torch.load(result)


(before, images), (after, ours) = run("before"), run("after")
difference = (ours["x_net"] - images["x_net"]).abs()

# %%
# What it looks like. Above the same picture twice; below how little the two differ, and what each took.

figure, axes = plt.subplots(2, 3, figsize=(10, 7), layout="constrained")
panels = {
    "measurement": images["y"],
    f"before register()\n{before['psnr']:.3f} dB": images["x_net"],
    f"after register()\n{after['psnr']:.3f} dB": ours["x_net"],
}
for axis, (title, image) in zip(axes[0], panels.items()):
    axis.imshow(image[0, 0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title)
    axis.set_axis_off()
shown = axes[1, 0].imshow(difference[0, 0], cmap="magma")
axes[1, 0].set_title("difference of the two")
axes[1, 0].set_axis_off()
figure.colorbar(shown, ax=axes[1, 0], shrink=0.8)
for axis, key, scale, title in (
    (axes[1, 1], "seconds", 1e3, "ms an iteration"),
    (axes[1, 2], "megabytes", 1, "MB at the peak"),
):
    values = [scale * before[key], scale * after[key]]
    bars = axis.bar(["before", "after"], values, color=["0.6", "tab:orange"])
    axis.bar_label(bars, fmt="%.0f")
    axis.set_title(f"{title} ({values[0] / values[1]:.1f} : 1)")
    axis.spines[["top", "right"]].set_visible(False)
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "register.png", dpi=160)
print("figure:", OUTPUT / "register.png")
figures = {
    name: {key: round(value, 4) for key, value in run.items()} for name, run in (("before", before), ("after", after))
}
figures["largest difference"] = float(difference.max())
print(json.dumps({**figures, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/register.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/register.png'
