"""Trainings by :class:`deepinv.Trainer` that can be interrupted and resumed, and that end with finite weights."""

import contextlib
import copy
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepinv import Trainer
from deepinv.loss import Loss
from torch import Tensor, nn

from .. import weights as checkpoints
from .progress import Watched


def fit(
    model: nn.Module,
    losses: Loss,
    lr: float,
    save_path: str | Path | None,
    resume: bool,
    keep_best: bool,
    generator: torch.Generator,
    rates: dict[str, float] | None = None,
    **options,
) -> "_Trainer":
    """
    Train a model in place.

    :param torch.nn.Module model: model that :class:`deepinv.Trainer` can train.
    :param deepinv.loss.Loss losses: the loss.
    :param float lr: largest learning rate of Adam.
    :param str save_path: folder of this training; with ``None`` no files are written.
    :param bool resume: continue the newest run in that folder that has a readable checkpoint.
    :param bool keep_best: end with the weights of the best epoch.
    :param torch.Generator generator: source of all random numbers; checkpoints hold its state.
    :param dict rates: learning rates of parameters, by name, that have their own.
    :param options: options of :class:`deepinv.Trainer`; ``verbose`` shows a progress bar.
    :return: the trainer, which knows the losses.
    :raises ValueError: when weights are not finite at the end, and when a checkpoint cannot be read or written.
    """
    bar = bool(options.pop("verbose", True)) and options.pop("show_progress_bar", True)
    if resume and save_path is None:
        raise ValueError("expected save_path, the folder of the training to resume; got None")
    if keep_best and not options.get("compute_eval_losses", True):
        raise ValueError("expected compute_eval_losses=True, as the evaluation loss chooses the weights; got False")
    earlier = _continued(_runs(Path(save_path))) if resume and save_path is not None else []
    newest = _newest(earlier)
    if newest is not None:
        with checkpoints.guarded(newest):  # of another architecture?
            checkpoints.load_into(model, checkpoints.read_torch(newest)["state_dict"])
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own: list[dict[str, Any]] = [{"params": [named.pop(name)], "lr": rate} for name, rate in (rates or {}).items()]
    weights = list(named.values())
    optimizer = torch.optim.Adam([{"params": weights}, *own], lr=lr, fused=weights[0].device.type in ("cpu", "cuda"))
    defaults = dict(
        metrics=None, compute_train_metrics=False, compute_eval_losses=True, early_stop_on_losses=True,
        check_grad=True,  # deepinv 0.5.0 clips only when it also checks
        verbose=False, show_progress_bar=False,  # one bar of ours for all epochs
        non_blocking_transfers=False,
    )  # fmt: skip
    trainer = _Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, WarmCosine(options["epochs"])),
        losses=losses,
        ckpt_pretrained=newest,
        save_path=None if save_path is None else _new_run(Path(save_path)),
        **{**defaults, **options},
    )
    trainer.generators, trainer.bar, trainer.keep_best = (generator,), bar, keep_best
    with torch.enable_grad():
        trainer.train()
    if keep_best:
        model.load_state_dict(_best(earlier, type(losses).__name__, trainer.best))
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise ValueError(f"the training diverged: weights are not finite (lr {lr})")
    return trainer


class Resumes:
    """
    Mixin of :class:`deepinv.Trainer`, with which a resumed training ends like one that was not interrupted.

    The options of the optimizer and the schedule are those given when the training is resumed, not those of the checkpoint: a new
    learning rate applies, and a training that became longer continues at the rate that its schedule has at the epoch reached.
    The random states of ``generators`` are restored.
    """

    generators: tuple[torch.Generator, ...] = ()
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    epoch_start: int

    def save_model(self, filename: str, epoch: int, state: dict | None = None) -> None:
        states = {"generators": [generator.get_state() for generator in self.generators]}
        super().save_model(filename, epoch, {**states, **(state or {})})  # type: ignore[misc]

    def load_model(self, ckpt_pretrained: str | Path | None = None, strict: bool = True) -> dict | None:
        optimizer, scheduler, self.scheduler = self.optimizer, self.scheduler, None
        groups = (
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] if optimizer else []
        )
        try:
            checkpoint = super().load_model(ckpt_pretrained, strict)  # type: ignore[misc]
        finally:
            self.scheduler = scheduler
        if checkpoint is None:
            return None
        for group, now in zip(optimizer.param_groups if optimizer else [], groups):
            group.update(now)
        if scheduler:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch: a scheduler steps before its optimizer
                for _ in range(getattr(scheduler, "last_epoch", 0), self.epoch_start):
                    scheduler.step()
        for generator, state in zip(self.generators, checkpoint.get("generators", [])):
            generator.set_state(state.cpu())
        return checkpoint


@dataclass
class _Trainer(Watched, Resumes, Trainer):
    """
    deepinv's Trainer, whose interrupted writes leave the last good checkpoint intact.

    :param int keep_interval: the checkpoint of every epoch divisible by this number is kept, and the newest one.
    :param bool keep_best: whether training ends with the weights of its best epoch; only then is a best loss shown.
    """

    keep_interval: int = 1
    keep_best: bool = True
    best: tuple[float, dict[str, Tensor]] | None = None  # loss and weights of the best epoch of this run
    past: list[float] | None = None  # evaluation losses of the epochs before this run
    earlier: list[float] | None = None  # losses of its steps

    def figures(self) -> dict[str, float]:
        best = min(filter(math.isfinite, self.eval_losses()), default=None) if self.keep_best else None
        own = self.model.figures() if hasattr(self.model, "figures") else {}
        return super().figures() | own | ({} if best is None else {"best": best})

    def eval_losses(self) -> list[float]:
        """The evaluation losses of all epochs, including those before an interruption."""
        (losses,) = self.eval_loss_history.values()
        return [*(self.past or []), *losses]

    def step_losses(self) -> list[float]:
        """The losses of all steps, including those before an interruption."""
        (losses,) = self.loss_history.values()
        return [*(self.earlier or []), *losses]

    def save_model(self, filename: str, epoch: int, state: dict | None = None) -> None:
        if filename == "ckp_best.pth.tar":
            self.best = self.eval_losses()[-1], copy.deepcopy(self.model.state_dict())
        if not self.save_path:
            return
        folder = Path(self.save_path)
        try:
            super().save_model(f"{filename}.part", epoch, {**self._past(), **(state or {})})
            os.replace(folder / f"{filename}.part", folder / filename)
        except (OSError, RuntimeError) as error:  # torch's archive writer raises the latter
            (folder / f"{filename}.part").unlink(missing_ok=True)
            raise checkpoints.CheckpointError(f"{folder / filename}: cannot be written ({error})") from error
        if filename == f"ckp_{epoch}.pth.tar" and (epoch - 1) % self.keep_interval:
            (folder / f"ckp_{epoch - 1}.pth.tar").unlink(missing_ok=True)

    def _past(self) -> dict[str, Any]:
        return {"past": self.past or [], "earlier": self.earlier or [], **self._watched()}

    def _watched(self) -> dict[str, dict]:
        return {"watched": self.model.watched} if hasattr(self.model, "watched") else {}

    def load_model(self, ckpt_pretrained: str | Path | None = None, strict: bool = True) -> dict | None:
        checkpoint = super().load_model(ckpt_pretrained, strict)
        if checkpoint is not None:  # early stopping and the best epoch depend on all epochs
            (losses,) = checkpoint["eval_loss"].values()
            self.past = [*checkpoint.get("past", []), *losses]
            self.earlier = [*checkpoint.get("earlier", []), *next(iter(checkpoint["loss"].values()))]
            self._watched().get("watched", {}).update(checkpoint.get("watched", {}))
        return checkpoint

    def save_best_model(self, epoch: int, train_ite: int, **kwargs) -> None:
        losses = self.eval_losses()  # deepinv would compare a metric, if one is reported
        if losses and losses[-1] <= min(filter(math.isfinite, losses), default=-math.inf):
            self.save_model("ckp_best.pth.tar", epoch)

    def stop_criterion(self, epoch: int, train_ite: int, **kwargs) -> bool:
        losses = self.eval_losses()
        return epoch > self.eval_interval * (self.early_stop + losses.index(min(losses)))


class WarmCosine:
    """Factor of the learning rate at an epoch. It rises in the first twentieth of the epochs and then falls along a cosine."""

    def __init__(self, epochs: int):
        self.epochs, self.warm = epochs, epochs / 20

    def __call__(self, epoch: int) -> float:
        if epoch < self.warm:
            return (epoch + 0.5) / (self.warm + 0.5)
        return 0.5 + 0.5 * math.cos(math.pi * epoch / self.epochs)


def _runs(folder: Path) -> list[Path]:
    """The folders ``run_0``, ``run_1``, ... in this folder, in their order; all other names are ignored."""
    found = [path for path in folder.glob("run_*") if re.fullmatch(r"run_\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[4:]))


def _new_run(folder: Path) -> Path:
    """Make the next folder. Two trainings that start at the same time get different folders."""
    number = 1 + max((int(path.name[4:]) for path in _runs(folder)), default=-1)
    while True:
        try:
            (folder / f"run_{number}").mkdir(parents=True)
            return folder / f"run_{number}"
        except FileExistsError:
            if folder.exists() and not folder.is_dir():
                raise checkpoints.CheckpointError(
                    f"{folder}: expected a folder for checkpoints; found a file"
                ) from None
            number += 1
        except OSError as error:
            raise checkpoints.CheckpointError(f"{folder}: cannot be written ({error.strerror})") from None


def _readable(runs: list[Path], pattern: str) -> Iterator[tuple[dict, Path]]:
    """The checkpoints of deepinv's Trainer in some runs, without those that an interruption cut short."""
    for path in (path for run in runs for path in run.glob(f"*/{pattern}")):
        with contextlib.suppress(checkpoints.CheckpointError):
            yield checkpoints.read_torch(path), path


def _newest(runs: list[Path]) -> Path | None:
    # of two checkpoints of the same epoch, the numbered one, which the Trainer writes last
    for run in reversed(runs):
        order = [(raw["epoch"], "best" not in path.name, path) for raw, path in _readable([run], "ckp_*.pth.tar")]
        if order:
            return max(order)[2]
    return None


def _continued(runs: list[Path]) -> list[Path]:
    """The newest run with a readable checkpoint, after those that it continues: others in the folder are other trainings."""
    found: list[Path] = []
    for run in reversed(runs):
        one = next(_readable([run], "ckp_*.pth.tar"), None)  # all of a run say what it continues, those of 0.1.0 do not
        if one is not None:
            found.insert(0, run)
            if one[0].get("earlier", ...) == []:
                break
    return found


def _best(earlier: list[Path], loss: str, now: tuple[float, dict[str, Tensor]] | None) -> dict[str, Tensor]:
    """The weights of the best epoch of this run and the runs that it continues."""
    before = [(raw["eval_loss"][loss][-1], raw["state_dict"]) for raw, _ in _readable(earlier, "ckp_best.pth.tar")]
    scored = [(value, state) for value, state in [*before, *([now] if now else [])] if math.isfinite(value)]
    if not scored:
        raise ValueError("the training diverged: no evaluation loss is finite")
    return min(scored, key=lambda pair: pair[0])[1]
