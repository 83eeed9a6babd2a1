"""The metrics that deepinv's optimizers record in each iteration, under the same names."""

from collections.abc import Callable

from deepinv.loss.metric import PSNR
from torch import Tensor


class Metrics:
    """
    PSNR, objective and relative change of each image, iteration by iteration.

    :param Callable generate: maps latents to images.
    :param torch.Tensor z: latents where the search starts.
    :param torch.Tensor x_gt: true images, for the PSNR; with ``None`` the PSNR is not recorded.
    """

    def __init__(self, generate: Callable[[Tensor], Tensor], z: Tensor, x_gt: Tensor | None):
        self.generate, self.x, self.x_gt = generate, generate(z), x_gt
        self.values: dict[str, list[list[float]]] = {name: [[] for _ in z] for name in ("psnr", "cost", "residual")}
        self._append("psnr", self._psnr(self.x))

    def update(self, z: Tensor, value: Tensor) -> None:
        x = self.generate(z)
        self._append("residual", ((x - self.x).flatten(1).norm(dim=1) / (x.flatten(1).norm(dim=1) + 1e-6)).tolist())
        self._append("cost", value.tolist())
        self._append("psnr", self._psnr(x))
        self.x = x

    def _psnr(self, x: Tensor) -> list[float]:
        return [] if self.x_gt is None else PSNR()(x, self.x_gt).tolist()

    def _append(self, name: str, values: list[float]) -> None:
        for history, value in zip(self.values[name], values):
            history.append(value)
