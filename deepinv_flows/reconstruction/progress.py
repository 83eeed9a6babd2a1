"""What watches a search: the best iterate of each image, when to stop, and what deepinv's optimizers record."""

import math
import time
from collections.abc import Callable

import torch
from deepinv.loss.metric import PSNR
from torch import Tensor, nn

from ..solvers import per_sample

WINDOW = 10  # iterations between two looks at how far the iterates moved
DIVERGED = 1e4  # times the size of the start


class Finished(Exception):
    """Raised inside a solver when there is no need to go on."""


def size(x: Tensor) -> Tensor:
    """Norm of each sample."""
    return x.flatten(1).norm(dim=1)


class Progress:
    """
    Keeps the best iterate of each sample, and raises :class:`Finished` once all samples are done or the time is up.

    A sample is done when its best iterate moved by less than ``tol`` times its norm in the last ten iterations; what it is by
    then does not depend on the other samples of the batch.

    :param torch.Tensor x: the start (B, ...).
    :param torch.Tensor value: its objective (B,).
    :param int max_iter: bound on the number of iterations.
    :param float tol: see above; 0 never stops.
    :param float max_seconds: bound on the time.
    :param torch.Tensor x_gt: true images, for the metric.
    :param torch.nn.Module metric: of images and true images; ``None`` is the PSNR.
    :param Callable update: shows an iteration, as :meth:`deepinv_flows.console.Console.update`.
    """

    def __init__(self, x: Tensor, value: Tensor, max_iter: int, tol: float, max_seconds: float = math.inf,
                 x_gt: Tensor | None = None, metric: nn.Module | None = None,
                 update: Callable[..., None] = lambda **shown: None):  # fmt: skip
        self.x, self.value, self.first, self.scale = x.clone(), value.clone(), value, size(x)
        self.max_iter, self.tol, self.max_seconds = max_iter, tol, max_seconds
        self.x_gt, self.metric = x_gt, PSNR() if metric is None else metric
        self.done = torch.zeros_like(value, dtype=torch.bool)
        self.marked, self.iterations, self.start, self.late = self.x, 0, time.monotonic(), False
        self.metrics: dict[str, list[list[float]]] = {name: [[] for _ in x] for name in ("psnr", "cost", "residual")}
        self._append("psnr", self._score())
        self.update = update

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> str:
        """What to say of a search that ended at ``max_iter`` before it had converged."""
        if self.tol == 0 or bool(self.done.all()):
            return ""
        if self.iterations >= self.max_iter:
            return ", the most allowed: it had not converged, so try a larger max_iter"
        return ", when the time was up: it had not converged, so try a larger max_seconds" if self.late else ""

    def __call__(self, x: Tensor, value: Tensor) -> None:
        """Take note of an iterate and its objective."""
        if (bad := value.isnan() | ~torch.isfinite(x.flatten(1)).all(1)).any():
            raise ValueError(
                f"the objective of images {bad.nonzero().flatten().tolist()} of the batch, or the iterate, is not finite any "
                f"more after {self.iterations + 1} iterations"
            )
        self._check_bounded(x, value)
        lower = (value < self.value) & ~self.done
        before = self.x
        self.x = torch.where(per_sample(lower, x), x, self.x)
        self.value = torch.where(lower, value, self.value)
        self._append("cost", self.value.tolist())
        self._append("residual", (size(self.x - before) / (size(self.x) + 1e-6)).tolist())
        self._append("psnr", self._score())
        self.iterations += 1
        self.update(objective=self.value)
        if self.iterations % WINDOW == 0:
            self.done = self.done | (size(self.x - self.marked) < self.tol * size(self.x))
            self.done = self.done | ((self.x == self.marked).flatten(1).all(1) & (self.tol > 0))
            self.marked = self.x
        self.late = self.seconds > self.max_seconds
        if self.late or self.iterations >= self.max_iter or bool(self.done.all()):
            raise Finished

    def _check_bounded(self, x: Tensor, value: Tensor) -> None:
        # a start may be tiny; from one that is not, an objective with a bound falls by less than its size
        fallen = value < self.first - self.first.abs()
        away = (size(x) > DIVERGED * self.scale) & (self.scale > 0) & fallen
        if away.any():
            raise ValueError(
                f"the objective of images {away.nonzero().flatten().tolist()} of the batch falls without bound: after "
                f"{self.iterations + 1} iterations their norm is over {DIVERGED:.0e} times that of the start. Is the prior "
                "bounded from below?"
            )

    def _score(self) -> list[float]:
        return [] if self.x_gt is None else self.metric(self.x, self.x_gt).reshape(-1).tolist()

    def _append(self, name: str, values: list[float]) -> None:
        for history, value in zip(self.metrics[name], values):
            history.append(value)
