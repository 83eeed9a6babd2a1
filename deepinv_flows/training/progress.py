"""One bar for a whole training, and what it will take."""

import time

import torch
from tqdm import tqdm

MEASURED = 20  # batches that are timed before the estimate is said; the first one, which warms up, is not


class Progress:
    """
    A bar over all batches of a training, with its loss and the best evaluation so far.

    :param int batches: batches in an epoch.
    :param int start: epochs that are behind.
    :param int epochs: epochs in all.
    """

    def __init__(self, batches: int, start: int, epochs: int):
        self.batches, self.start, self.epochs, self.done = batches, start, epochs, 0
        self.bar = tqdm(
            total=batches * epochs, initial=batches * start, dynamic_ncols=True, unit="batch", desc="training"
        )

    def step(self, loss: float, best: float | None) -> None:
        """After a batch: its epoch's mean loss, and the best evaluation loss."""
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
            f"threads: about {length}, evaluation not counted"
        )
