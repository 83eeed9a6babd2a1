"""
What long work says: a bar while it runs, where there is a terminal, and one line at its end.

Work of under ``LONG`` seconds says nothing, so that loops and tests stay quiet. In a file a bar would be a line for each of
its steps; there ``Console.milestone`` says a line in its place, at most one every ``LONG`` seconds, and work without milestones
one every ``RARE`` seconds, so that nobody takes it for hung.
"""

import sys
import time
from numbers import Real

from torch import Tensor
from tqdm import tqdm

LONG, RARE = 2.0, 20.0  # seconds


class Console:
    """
    Says how far a work is, and what came of it: ``result``, by default the number of steps and what the last one showed.

    :param str who: what works; every line begins with it.
    :param int total: number of steps, or ``None`` if nobody knows.
    :param bool verbose: whether to say anything.
    :param int initial: steps that were done before.
    :param bool sparse: whether lines in a file are left to ``milestone`` alone.

    >>> from deepinv_flows.console import Console
    >>> with Console("sum", total=3) as console:
    ...     for k in range(3):
    ...         console.update(term=k)  # "sum: 3 iterations, term 2; 2.5 s", had it taken so long
    """

    def __init__(self, who: str, total: int | None, verbose: bool = True, initial: int = 0, sparse: bool = False):
        self.who, self.verbose, self.result, self.steps = who, verbose, "", initial
        self.total, self.sparse = total, sparse
        self.shown: dict[str, Tensor | float | str] = {}
        self.began = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=initial, desc=who, delay=LONG, leave=False, dynamic_ncols=True,
            disable=not (verbose and self.terminal),
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def update(self, **shown: Tensor | float | str) -> None:
        """A step was done. Of tensors the mean is shown, and only computed when it is."""
        self.steps, self.shown = self.steps + 1, shown
        if self.bar.update():
            self.bar.set_postfix({name: _said(value) for name, value in shown.items()}, refresh=False)
        if not self.sparse and self._due(RARE):
            of = "" if self.total is None else f" of at most {self.total}"
            self.milestone(", ".join([f"iteration {self.steps}{of}", *self._last()]))

    def milestone(self, text: str) -> None:
        """A line in place of the bar, where there is no terminal."""
        if self._due(LONG):
            self.last = time.monotonic()
            print(f"{self.who}: {text}; {duration(self.seconds)}", flush=True)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Remove the bar, and say the result, unless there was an error."""
        self.bar.close()
        if self.verbose and kind is None and self.seconds >= LONG:
            result = self.result or ", ".join([f"{self.steps} iterations", *self._last()])
            print(f"{self.who}: {result}; {duration(self.seconds)}", flush=True)

    def _due(self, seconds: float) -> bool:
        return self.verbose and not self.terminal and time.monotonic() - self.last >= seconds

    def _last(self) -> list[str]:
        return [f"{name} {_said(value)}" for name, value in self.shown.items()]


def duration(seconds: float) -> str:
    """A time as a reader wants it."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def _said(value: Tensor | float | str) -> str:
    if isinstance(value, Tensor):
        value = float(value.detach().double().mean())
    return f"{value:.5g}" if isinstance(value, Real) else str(value)
