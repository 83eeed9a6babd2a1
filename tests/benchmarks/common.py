"""What the speed benchmarks share: the two priors with equal weights, times taken in turns, memory in fresh processes."""

import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable

import deepinv as dinv
import torch

from deepinv_flows import PatchNR

FLOP_PER_MULTIPLY = 2


def versions() -> dict:
    names = ("torch", "deepinv", "FrEIA", "deepinv-flows")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "threads": torch.get_num_threads()}


def check_disjoint(images: dict[str, torch.Tensor], least: float = 0.05, learned: str = "train") -> None:
    """
    Refuse test images that were seen in training.

    :param dict images: images (N, C, H, W) in [0, 1] by part; those of one size are compared.
    :param float least: least root mean squared distance of two images.
    :param str learned: the part that is trained on; every other is compared with it.
    :raises ValueError: naming both images and their distance.
    """
    for part, others in images.items():
        if part == learned or others.shape[1:] != images[learned].shape[1:]:
            continue
        # differences, not squared norms: those of equal images would differ by rounding
        distances = torch.cdist(
            others.flatten(1), images[learned].flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest, which = (distances / others[0].numel() ** 0.5).min(1)
        if near := (nearest < least).nonzero().flatten().tolist():
            pairs = ", ".join(f"{part}[{k}] and {learned}[{which[k]}] ({nearest[k]:.3f})" for k in near)
            raise ValueError(f"expected no image within {least} RMSE of one that is trained on; got {pairs}")


def pair(patch_size: int = 6, seed: int = 0, **sizes) -> tuple[dinv.optim.PatchPrior, PatchNR]:
    """deepinv's prior on images and ours, with equal weights."""
    torch.manual_seed(seed)
    theirs = dinv.optim.PatchNR(patch_size=patch_size, channels=1, **sizes)
    ours = PatchNR(patch_size=patch_size, channels=1, **sizes)
    ours.load_state_dict(theirs.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dinv.optim.PatchPrior(theirs, patch_size=patch_size, n_patches=-1), ours


def backward(prior, x: torch.Tensor):
    """Value and image gradient as a loop of the user's own takes them."""
    for p in prior.parameters():
        p.grad = None
    leaf = x.detach().requires_grad_()
    value = prior(leaf)
    value.sum().backward()
    return value.detach(), leaf.grad


def in_turns(ways: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the ways taking turns so that whatever else the machine does meets them alike."""
    for way in ways.values():
        way()
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def best_sgemm(dtype=torch.float32) -> float:
    """FLOP/s of the fastest of a few large matrix products, each tried ten times."""
    best = 0.0
    for rows, inner, cols in ((2048, 2048, 2048), (4096, 1024, 1024), (4096, 256, 256)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, cols).to(dtype)
        out = torch.empty(rows, cols, dtype=dtype)
        for _ in range(10):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, FLOP_PER_MULTIPLY * rows * inner * cols / (time.perf_counter() - start))
    return best


def flop_per_patch(prior: PatchNR) -> float:
    """Of the matrix products of one value and image gradient."""
    multiplies = sum(p.numel() for p in prior.parameters() if p.ndim == 2)
    return 2 * FLOP_PER_MULTIPLY * multiplies  # forward, and back to the input


def table(seconds: dict[str, list[float]], title: str) -> None:
    print(f"\n{title:<44}{'min ms':>10}{'median ms':>11}")
    for name, values in seconds.items():
        print(f"{name:<44}{min(values) * 1e3:>10.1f}{statistics.median(values) * 1e3:>11.1f}")


def memory_of(script: str, *args: str) -> float:
    """Peak memory in MB over what was there before, which ``script`` run anew with these arguments prints last."""
    out = subprocess.run([sys.executable, "-W", "ignore", script, *args], check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


def peak_over(before, call) -> float:
    """MB by which ``call()`` raises this process (Linux) at its peak, after ``before()``, a small call of its kind."""
    before()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    start = _status("VmRSS")
    call()
    return _status("VmHWM") - start


def check_apart(images: Iterable[torch.Tensor], x: torch.Tensor, least: float = 0.05, step: int = 8) -> None:
    """
    Refuse a test image that is a piece of a training image.

    :param list images: training images (C, H, W), whose pieces are compared, a corner every ``step`` pixels.
    :param torch.Tensor x: test image (1, C, H, W).
    :param float least: least root mean squared distance of x from a piece.
    :raises ValueError: naming the image, the corner of the piece and the distance.
    """
    height, width = x.shape[2:]
    for k, image in enumerate(images):
        for top in range(0, image.shape[1] - height + 1, step):
            for left in range(0, image.shape[2] - width + 1, step):
                piece = image[:, top : top + height, left : left + width]
                if (distance := float((piece - x[0]).square().mean().sqrt())) < least:
                    raise ValueError(
                        f"expected no test image within {least} RMSE of what is trained on; training image {k} is at "
                        f"{distance:.3f} from pixel ({top}, {left}) on"
                    )
