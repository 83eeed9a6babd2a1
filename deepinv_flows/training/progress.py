"""One progress bar for a whole training, in a terminal; elsewhere a line an epoch."""

import contextlib
from typing import Any

from ..console import Console


class Watched:
    """
    Mixin of :class:`deepinv.Trainer`, with one bar over all epochs in place of two bars for each.

    Where there is no terminal it says a line an epoch, though not more often than every two seconds; at the end a line with loss,
    metrics and time.
    """

    bar: bool = False  # whether it is wanted
    console: Console | None = None
    epoch: int
    loss: float
    epoch_start: int
    epochs: int
    train_dataloader: Any
    logs_total_loss_train: Any
    eval_metrics_history: dict[str, list[float]]
    losses: list[Any]

    def train(self) -> Any:
        self.console = None  # of a training before
        with contextlib.ExitStack() as self.opened:
            model = super().train()  # type: ignore[misc]
            if self.console is not None:
                self.console.result = f"{self.epoch + 1} of {self.epochs} epochs, {self._said()}"
        return model

    def step(self, epoch: int, *args, train: bool = True, **kwargs) -> None:
        if train and self.bar and self.console is None:
            batches = min(len(loader) for loader in self.train_dataloader)
            console = Console("training", batches * self.epochs, initial=batches * self.epoch_start, sparse=True)
            self.console, self.epoch = self.opened.enter_context(console), epoch
        if self.console is not None and epoch > self.epoch:  # the one before has been evaluated by now
            self.console.milestone(f"epoch {self.epoch + 1} of {self.epochs}, {self._said()}")
        super().step(epoch, *args, train=train, **kwargs)  # type: ignore[misc]
        if train and self.console is not None:
            self.epoch, self.loss = epoch, self.logs_total_loss_train.avg
            self.console.update(epoch=f"{epoch + 1}/{self.epochs}", **self.figures())

    def figures(self) -> dict[str, float]:
        """What tells how good the model is by now."""
        metrics = {name: history[-1] for name, history in self.eval_metrics_history.items() if history}
        return {"loss": self.loss, **metrics}

    def _said(self) -> str:
        unit = getattr(self.losses[0], "unit", "")
        units = {"loss": unit, "best": unit}
        return ", ".join(f"{name} {value:.4g} {units.get(name, '')}".rstrip() for name, value in self.figures().items())
