"""What the tables of the arena share: rows kept in a file, weights with a name, mixtures of Gaussians, a step on a GPU."""

import contextlib
import json
import math
import zlib
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from torch import Tensor
from torch.nn import functional as F

from deepinv_flows import PatchNR
from deepinv_flows.weights import located

ON_GPU = 2**18  # patches at a time, for which there are about 5 GB: fewer and longer operations


class Rows:
    """
    Rows of a table as lines of a file, so that a run that was interrupted goes on, and several runs make one table.

    :param Path path: the file, to which each row is appended when it is known; ``None`` keeps none.
    """

    def __init__(self, path: Path | None):
        self.path, self.own = path, list[tuple[dict, dict]]()

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The last row of this key, of this run or another."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path is not None and self.path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):  # of a run that was stopped, and empty lines
                kept.append(json.loads(line))
        pairs = [*self.own, *((line["key"], line["row"]) for line in kept)]
        return next((row for other, row in reversed(pairs) if other == key), None)

    def add(self, key: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        self.own.append((key, row))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:  # one write of a line, so that runs side by side do not mix
                file.write("\n" + json.dumps({"key": key, "row": row}) + "\n")
        return row


def fingerprint(weights: str | Path) -> str:
    """What tells two files of weights apart, shipped or not."""
    path = Path(located(weights))
    return f"{path.name} {zlib.crc32(path.read_bytes()):08x}"


def best_strength(score, grid, widenings: int) -> tuple[float, dict[float, float], bool]:
    """
    The strength of the highest score, the scores, and whether the best lies at an end of what was tried.

    The grid rises; where its best is at an end it is continued there, by the ratio of the last two. 0 is not an end, as nothing
    lies below it.
    """
    tried = {strength: score(strength) for strength in grid}
    for _ in range(widenings + 1):
        chosen, (low, *_, high) = max(tried, key=tried.get), sorted(tried)
        if chosen not in (low, high) or chosen == 0:
            return chosen, tried, False
        if len(tried) < len(grid) + widenings:
            positive = [strength for strength in sorted(tried) if strength > 0]
            pair = positive[-2:] if chosen == high else positive[1::-1]
            beyond = float(f"{pair[1] ** 2 / pair[0]:.2g}")
            tried[beyond] = score(beyond)
    return chosen, tried, True


def divided(images: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Images of BSD's ``train400`` to train on, and every fortieth, from the 21st on, to choose by."""
    return [x for k, x in enumerate(images) if k % 40 != 20], images[20::40]


def mean_and_error(values: Tensor | list[float]) -> tuple[float, float]:
    """The mean and its standard error, which is 0 for a single value."""
    found = torch.as_tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / len(found) ** 0.5 if len(found) > 1 else 0.0


def load_prior(weights: str | Path, device: str, **options) -> PatchNR:
    return on_device(PatchNR.from_checkpoint(weights, **options).requires_grad_(False), device)


def on_device(prior: PatchNR, device: str) -> PatchNR:
    if device != "cpu":
        prior.chunk_size = ON_GPU
    return prior.to(device)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def some_patches(images: list[Tensor], patch_size: int, number: int, generator: torch.Generator) -> Tensor:
    """About ``number`` patches (n, D), as many of each image."""
    found, share = [], math.ceil(number / len(images))
    for x in images:
        patches = F.unfold(x, patch_size)[0].T
        found.append(patches[torch.randperm(len(patches), generator=generator)[:share]])
    return torch.cat(found)


def expectation_maximisation(
    x: Tensor, components: int, generator: torch.Generator, steps: int = 30, means: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Weights (K,), means (K, D) and covariances (K, D, D) of a mixture of Gaussians.

    :param Tensor x: patches (n, D), on the device that is to compute.
    :param bool means: whether Gaussians have means; otherwise these are 0.
    """
    draws = torch.softmax(3 * torch.randn(len(x), components, generator=generator), 1).to(x)
    # by their brightness or contrast at first, so that the components differ
    order = (x.mean(1) if means else x.pow(2).sum(1)).argsort().argsort() * components // len(x)
    parts = draws.mul_(0.5).add_(F.one_hot(order, components), alpha=0.5)
    small = 1e-5 * torch.eye(x.shape[1], device=x.device)
    for _ in range(steps):
        total = parts.sum(0)
        count = total.clamp_min(1.0)[:, None]  # a component that lost its patches stays finite
        centres = parts.T @ x / count if means else x.new_zeros(components, x.shape[1])
        covs = torch.stack([(x * part[:, None]).T @ x for part in parts.T]) / count[:, :, None]
        covs = covs - centres[:, :, None] * centres[:, None, :] + small
        inverses, volumes = torch.linalg.inv(covs), torch.logdet(covs)
        for k, centre in enumerate(centres):
            away = x - centre
            parts[:, k] = -0.5 * (((away @ inverses[k]) * away).sum(1) + volumes[k])
        parts = torch.softmax(parts + (total / len(x)).log(), 1)
    return total / len(x), centres, covs


class MixturePrior(dinv.optim.Prior):
    """
    The mean over all patches of -log p of a mixture of Gaussians, up to a constant: EPLL's as an explicit prior.

    :param Tensor weights, means, covs: of the mixture.
    :param int chunk: patches at a time.
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor, patch_size: int, chunk: int = 8192):
        super().__init__()
        self.explicit_prior, self.patch_size, self.chunk = True, patch_size, chunk
        factors = torch.linalg.cholesky(covs.double())
        whitening = torch.linalg.inv(factors)
        self.register_buffer("whitening", whitening.flatten(0, 1).T.contiguous().to(covs))
        self.register_buffer("shift", (whitening @ means.double()[:, :, None]).flatten().to(covs))
        heights = weights.double().log() - factors.diagonal(dim1=1, dim2=2).log().sum(1)
        self.register_buffer("heights", heights.to(covs))

    def nll(self, patches: Tensor) -> Tensor:
        u = (patches @ self.whitening - self.shift).square().view(len(patches), len(self.heights), -1).sum(2)
        return -torch.logsumexp(self.heights - 0.5 * u, 1)

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        return _Mean.apply(x, self)


class _Mean(torch.autograd.Function):
    """Value and gradient of a :class:`MixturePrior` together, chunk by chunk."""

    @staticmethod
    def forward(ctx, x, prior):
        patches = F.unfold(x, prior.patch_size).transpose(1, 2)  # (B, n, D)
        flat, value, grads = patches.flatten(0, 1), [], []
        for part in flat.split(prior.chunk):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                nll = prior.nll(leaf)
                grads.append(torch.autograd.grad(nll.sum(), leaf)[0])
            value.append(nll.detach())
        grad = torch.cat(grads).view_as(patches).transpose(1, 2)
        ctx.save_for_backward(F.fold(grad, x.shape[2:], prior.patch_size) / patches.shape[1])
        return torch.cat(value).view(patches.shape[:2]).mean(1)

    @staticmethod
    def backward(ctx, weight):
        (grad,) = ctx.saved_tensors
        return weight.view(-1, 1, 1, 1) * grad, None
