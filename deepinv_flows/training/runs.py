"""Trainings by :class:`deepinv.Trainer` that survive interruptions and end with finite weights."""

import contextlib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from deepinv import Trainer
from deepinv.loss import Loss
from torch import Tensor, nn

from .. import weights as checkpoints


def fit(
    model: nn.Module, largest: float, losses: Loss, lr: float, save_path, resume: bool, keep_best: bool, **options
) -> None:
    """
    Train in place.

    :param torch.nn.Module model: what :class:`deepinv.Trainer` trains.
    :param float largest: largest entry of the images, for the message if it diverges.
    :param deepinv.loss.Loss losses: the loss.
    :param float lr: largest learning rate, of Adam.
    :param str save_path: folder of this training; ``None`` keeps nothing.
    :param bool resume: continue from the newest readable checkpoint there.
    :param bool keep_best: end with the weights of the best epoch.
    :param options: those of :class:`deepinv.Trainer`.
    :raises ValueError: when weights end up not finite.
    """
    with tempfile.TemporaryDirectory() as scratch, torch.enable_grad():
        runs = _train(model, losses, lr, Path(save_path or scratch), resume, **options)
        if keep_best:
            model.load_state_dict(_best(runs, type(losses).__name__))
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise ValueError(f"the training diverged: weights are not finite (lr {lr}, images up to {largest:.3g})")


def _train(model: nn.Module, losses: Loss, lr: float, folder: Path, resume: bool, **options) -> list[Path]:
    """Train by deepinv's Trainer in a new run folder; returns that folder and those of the runs it continues."""
    runs = sorted(folder.glob("run_*"), key=lambda path: int(path.name[4:]))
    run = folder / f"run_{len(runs)}"
    earlier = runs if resume else []
    newest = _newest(earlier)
    if newest is not None:
        with checkpoints.guarded(newest):  # of another architecture?
            checkpoints.load_into(model, checkpoints.read_torch(newest)["state_dict"])
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=lr, fused=weights[0].device.type in ("cpu", "cuda"))
    _Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, _WarmCosine(options["epochs"])),
        losses=losses,
        metrics=None,
        compute_train_metrics=False,
        compute_eval_losses=True,
        early_stop_on_losses=True,
        check_grad=True,  # deepinv 0.5.0 clips only when it also checks
        ckpt_pretrained=newest,
        save_path=run,
        freq_update_progress_bar=25,
        non_blocking_transfers=False,
        show_progress_bar=options["verbose"],
        **options,
    ).train()
    return [*earlier, run]


@dataclass
class _Trainer(Trainer):
    """
    deepinv's Trainer, which writes where the last good checkpoint is, with writes that cannot break it.

    :param int keep_interval: of the checkpoints of every epoch those of every such epoch stay, and the newest.
    """

    keep_interval: int = 1

    def save_model(self, filename: str, epoch: int, state: dict | None = None) -> None:
        folder = Path(self.save_path)
        super().save_model(f"{filename}.part", epoch, state)
        os.replace(folder / f"{filename}.part", folder / filename)
        if filename == f"ckp_{epoch}.pth.tar" and (epoch - 1) % self.keep_interval:
            (folder / f"ckp_{epoch - 1}.pth.tar").unlink(missing_ok=True)


class _WarmCosine:
    """Factor of the learning rate at an epoch: up over the first twentieth of the epochs, then down along a cosine."""

    def __init__(self, epochs: int):
        self.epochs, self.warm = epochs, epochs / 20

    def __call__(self, epoch: int) -> float:
        if epoch < self.warm:
            return (epoch + 0.5) / (self.warm + 0.5)
        return 0.5 + 0.5 * math.cos(math.pi * epoch / self.epochs)


def _readable(runs: list[Path], pattern: str) -> list[tuple[dict, Path]]:
    """Checkpoints of deepinv's Trainer in some runs; one cut short by an interruption is passed over."""
    found = []
    for path in (path for run in runs for path in run.glob(f"*/{pattern}")):
        with contextlib.suppress(checkpoints.CheckpointError):
            found.append((checkpoints.read_torch(path), path))
    return found


def _newest(runs: list[Path]) -> Path | None:
    # of two from one epoch, the numbered one was written after the scheduler's step
    order = [(raw["epoch"], "best" not in path.name, path) for raw, path in _readable(runs, "ckp_*.pth.tar")]
    return max(order)[2] if order else None


def _best(runs: list[Path], loss: str) -> dict[str, Tensor]:
    scored = [(raw["eval_loss"][loss][-1], raw["state_dict"]) for raw, _ in _readable(runs, "ckp_best.pth.tar")]
    scored = [(loss, state) for loss, state in scored if math.isfinite(loss)]
    if not scored:
        raise ValueError("the training diverged: no evaluation loss is finite")
    return min(scored, key=lambda pair: pair[0])[1]
