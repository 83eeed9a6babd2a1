r"""
Limited-angle tomography with a PatchNR
=======================================

A stone in its container is seen from 140 of 180 degrees, with few photons. What the missing directions would have told, a prior
has to tell. Four stones, seen whole, are enough to learn one: patches of 6x6 pixels are many. A normalizing flow on them
(PatchNR) is compared with a Gaussian mixture on them (EPLL), with total variation, and with filtered back-projection.

The stones are drawn by chance, each anew: four to learn from, one to tune on, one for the test. With ``--lodopab`` the images are
those of deepinv's downloadable excerpt of LoDoPaB-CT and the priors those published with it; that needs the internet.
"""

import argparse
import json
import os
import time
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import skimage.filters
import torch
from deepinv.optim import EPLL, LogPoissonLikelihood, PatchPrior, TVPrior

from deepinv_flows import NMAPG, PatchNR, fit_patchnr, nmapg

SHORT = bool(os.environ.get("DEEPINV_FLOWS_SHORT"))
HERE = Path(globals().get("__file__", "")).parent  # a notebook has no file
OUTPUT = HERE / ("output/short" if SHORT else "output")
SIDE, ITERATIONS = (32, 5) if SHORT else (96, 60)
DEQUANTISE = 8 / 255
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--lodopab", action="store_true", help="deepinv's excerpt of LoDoPaB-CT and published weights (downloads)"
)
args, _ = parser.parse_known_args()  # sphinx-gallery has arguments of its own
start = time.perf_counter()
torch.manual_seed(0)

# %%
# The stones: two minerals and pores, where smoothed noise is high, in a container's wall. Drawn twice as fine, so that edges are
# grey as a detector would see them.


def stone(seed):
    fine = 2 * SIDE
    fields = torch.randn(2, fine, fine, generator=torch.Generator().manual_seed(seed)).numpy()
    pores, mineral = (torch.from_numpy(skimage.filters.gaussian(f, sigma)) for f, sigma in zip(fields, (4, 7)))
    line = torch.linspace(-1, 1, fine)
    radius = (line[:, None] ** 2 + line**2).sqrt()
    image = torch.where(mineral > 0.3 * mineral.std(), 0.9, 0.55)
    image[pores > 0.7 * pores.std()] = 0.1
    image[radius > 0.8] = 0.0
    image[(radius > 0.86) & (radius < 0.93)] = 0.35
    return torch.nn.functional.avg_pool2d(image[None, None], 2)


# %%
# The two priors learn from the same images, with the same little noise on their grey levels.


def stones():
    train, held_out, test = (torch.cat([stone(seed) for seed in seeds]) for seeds in (range(4), (4,), (5,)))
    sizes = {"sub_net_size": 16, "epochs": 1} if SHORT else {"sub_net_size": 128, "epochs": 30}
    options = dict(steps_per_epoch=10 if SHORT else 60, batch_size=512, dequantise=DEQUANTISE, verbose=False)
    patchnr = fit_patchnr(train, **sizes, **options)
    epll = EPLL(pretrained=None, n_components=5 if SHORT else 20)
    patches = dinv.datasets.PatchDataset(train + DEQUANTISE * (torch.rand_like(train) - 0.5), patch_size=6)
    loader = torch.utils.data.DataLoader(patches, batch_size=10_000, shuffle=True)
    epll.GMM.fit(loader, max_iters=2 if SHORT else 15)
    return held_out, test, patchnr, epll


def lodopab():
    url = "https://huggingface.co/datasets/deepinv/LoDoPaB-CT_toy/resolve/main/LoDoPaB-CT_small.pt"
    try:
        images = dinv.utils.load_torch_url(url)
        patchnr = PatchNR(pretrained="PatchNR_lodopab_small2", patch_size=3, sub_net_size=128)
        epll = EPLL(pretrained="GMM_lodopab_small2", n_components=20, patch_size=3)
    except OSError as error:  # what urllib and requests raise derives from it
        raise SystemExit(
            f"--lodopab downloads images and weights from huggingface.co, which failed: {error}\n"
            "Without --lodopab everything is generated here."
        ) from None
    return images["train_imgs"][:1], images["test_imgs"][:1], patchnr, epll


began = time.perf_counter()
held_out, test, patchnr, epll = lodopab() if args.lodopab else stones()
print(f"priors: {time.perf_counter() - began:.1f} s")
patchnr.requires_grad_(False), epll.requires_grad_(False)
epll_prior = PatchPrior(epll.negative_log_likelihood, patch_size=epll.patch_size)

# %%
# The physics is deepinv's, with the noise of few photons behind a logarithm, and so is its negative log-likelihood.

side = test.shape[-1]
noise = {"N0": 1024.0 if args.lodopab else 4096.0, "mu": 1 / 50 * 362 / side}
data_fidelity = LogPoissonLikelihood(**noise)


def make_physics(seed):
    return dinv.physics.Tomography(
        angles=torch.linspace(20, 160, 10 if SHORT else 100 if args.lodopab else 60),
        img_width=side,
        circle=False,
        normalize=False,
        noise_model=dinv.physics.LogPoissonNoise(**noise, rng=torch.Generator().manual_seed(seed)),
    )


# %%
# All three priors by the same solver, started from filtered back-projection. Total variation has a proximity operator; the patch
# priors are smooth, and so is their sum with the data fidelity, which :func:`deepinv_flows.nmapg` takes as it is.


def total_variation(y, physics, lambda_reg):
    model = NMAPG(data_fidelity, TVPrior(n_it_max=20), lambda_reg, stepsize=1e-3, max_iter=ITERATIONS)
    return model(y, physics, init=physics.fbp(y))


def by_patches(prior):
    def reconstruct(y, physics, lambda_reg):
        def energy(x):
            return data_fidelity(x, y, physics) + lambda_reg * prior(x)

        return nmapg(energy, physics.fbp(y), stepsize=1e-3, max_iter=ITERATIONS, verbose=False)

    return reconstruct


# %%
# One number of each is tuned on a stone that nobody learned from (on LoDoPaB around those of deepinv's example); the grids are
# shown.

psnr, ssim = dinv.metric.PSNR(), dinv.metric.SSIM()
methods = {"total variation": total_variation, "EPLL": by_patches(epll_prior), "PatchNR": by_patches(patchnr)}
if args.lodopab:
    grids = {"total variation": [1.0, 3.0, 10.0, 30.0], "EPLL": [60.0, 120.0, 240.0], "PatchNR": [60.0, 120.0, 240.0]}
else:
    unit = side**2 / 6**2  # see the docstring of PatchNR
    grids = {"EPLL": [0.8 * unit, 1.6 * unit, 3.2 * unit], "PatchNR": [0.4 * unit, 0.8 * unit, 1.2 * unit]}
    grids["total variation"] = [5.0, 10.0, 20.0]
physics = make_physics(seed=0)
y = physics(held_out)
chosen = {}
for name, method in methods.items():
    began = time.perf_counter()
    scores = {value: float(psnr(method(y, physics, value).clamp(0, 1), held_out)) for value in grids[name]}
    chosen[name] = max(scores, key=scores.get)
    seconds = (time.perf_counter() - began) / len(scores)
    print(
        f"{name}, {seconds:.1f} s each, PSNR on the held-out image:",
        {round(k, 1): round(v, 2) for k, v in scores.items()},
    )

# %%
# The test.

physics = make_physics(seed=1)
y = physics(test)
images = {"filtered back-projection": physics.fbp(y)}
images |= {name: method(y, physics, chosen[name]) for name, method in methods.items()}
images = {name: x.clamp(0, 1) for name, x in images.items()}
figures = {
    name: {"psnr": round(float(psnr(x, test)), 2), "ssim": round(float(ssim(x, test)), 3)} for name, x in images.items()
}

# %%
# What it looks like: the whole test image, what is wrong in it, on one scale for all, and a detail. Filtered back-projection is
# wrong everywhere; the priors are wrong where edges run along directions that are missing, and PatchNR is least wrong.

panels = {f"{name}\n{figures[name]['psnr']:.2f} dB, SSIM {figures[name]['ssim']:.3f}": x for name, x in images.items()}
panels["ground truth"] = test
low, high = side * 3 // 10, side * 7 // 10
gray, hot = {"cmap": "gray", "vmin": 0, "vmax": 1}, {"cmap": "magma", "vmin": 0, "vmax": 0.4}
figure, axes = plt.subplots(3, len(panels), figsize=(10, 6.3), layout="constrained")
for column, (title, x) in zip(axes.T, panels.items()):
    whole, wrong, detail = column
    whole.imshow(x[0, 0], **gray)
    whole.add_patch(plt.Rectangle((low, low), high - low, high - low, fill=False, color="orange"))
    whole.set_title(title, fontsize=10)
    error = wrong.imshow((x - test)[0, 0].abs(), **hot)
    detail.imshow(x[0, 0, low:high, low:high], **gray)
    for axis in column:
        axis.set_axis_off()
axes[1, -1].clear()  # the error of the truth is zero: its place is for the scale
axes[1, -1].set_axis_off()
figure.colorbar(error, cax=axes[1, -1].inset_axes([0.2, 0.05, 0.12, 0.9]), label="absolute error", extend="max")
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "patchnr_limited_angle_ct.png", dpi=160)
print("figure:", OUTPUT / "patchnr_limited_angle_ct.png")
print(json.dumps({**figures, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))

# %%
# What a full run of this script wrote:
#
# .. image:: /../thumbnails/patchnr_limited_angle_ct.png
#    :width: 800
#    :alt: the figure of this script

# sphinx_gallery_thumbnail_path = '../thumbnails/patchnr_limited_angle_ct.png'
