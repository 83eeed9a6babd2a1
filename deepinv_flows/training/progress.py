"""One progress bar for a whole training, and an estimate of its duration."""

import time

import torch
from tqdm import tqdm

MEASURED = 20  # the estimate is printed after so many batches; the first one warms up and is not timed


class Progress:
    """
    A progress bar over all batches of a training, with its loss and the best evaluation loss so far.

    :param int batches: number of batches in an epoch.
    :param int start: number of epochs that were done before.
    :param int epochs: number of all epochs.
    """

    def __init__(self, batches: int, start: int, epochs: int):
        self.batches, self.start, self.epochs, self.done = batches, start, epochs, 0
        self.bar = tqdm(
            total=batches * epochs, initial=batches * start, dynamic_ncols=True, unit="batch", desc="training"
        )

    def step(self, loss: float, best: float | None) -> None:
        """Called after each batch, with the mean loss of its epoch and the best evaluation loss."""
        self.done += 1
        if self.done == 1:
            self.began = time.perf_counter()
        if self.done == min(MEASURED, self.batches) > 1:
            self._say_what_it_takes((time.perf_counter() - self.began) / (self.done - 1))
        if self.done % 25 == 0 or self.done % self.batches == 0:
            self._show(loss, best)
        self.bar.update()

    def close(self, loss: float, best: float | None) -> None:
        self._show(loss, best)
        self.bar.close()

    def _show(self, loss: float, best: float | None) -> None:
        shown = {"epoch": f"{self.start + -(-self.done // self.batches)}/{self.epochs}", "loss": f"{loss:.4g}"}
        self.bar.set_postfix(shown if best is None else {**shown, "best": f"{best:.4g}"}, refresh=False)

    def _say_what_it_takes(self, seconds: float) -> None:
        left = self.batches * (self.epochs - self.start)
        total = seconds * left
        length = f"{total / 60:.1f} minutes" if total >= 60 else f"{total:.0f} seconds"
        self.bar.write(
            f"{left} batches in {self.epochs - self.start} epochs, {1000 * seconds:.1f} ms each on {torch.get_num_threads()} "
            f"threads: about {length} without evaluation"
        )
