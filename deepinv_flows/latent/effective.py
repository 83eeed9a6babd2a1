"""How many independent samples a chain is worth."""

import torch
from torch import Tensor

NUM_PROJECTIONS = 32


class Trace:
    """
    A few numbers of each sample: projections of its tensors on random directions, which all samples share.

    :param torch.Generator generator: source of the directions.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.directions: list[Tensor] = []
        self.rows: list[list[Tensor]] = []

    def add(self, *tensors: Tensor) -> None:
        """Of a sample, tensors (B, ...); each of the tensors counts for itself."""
        flat = [x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
        if not self.directions:
            self.directions = [self._directions(x) for x in flat]
        self.rows.append([x @ d for x, d in zip(flat, self.directions)])

    def effective(self) -> Tensor:
        """Effective numbers of samples (B,): the median over the projections of a tensor, the least over the tensors."""
        numbers = [effective(torch.stack(values)).median(-1).values for values in zip(*self.rows)]
        return torch.stack(numbers).amin(0)

    def _directions(self, x: Tensor) -> Tensor:
        source, shape = self.generator, (x.shape[1], min(NUM_PROJECTIONS, x.shape[1]))
        return torch.randn(shape, generator=source, device=source.device, dtype=x.dtype).to(x.device)


def effective(values: Tensor) -> Tensor:
    r"""
    Effective number of samples of chains, by Geyer's initial positive sequence.

    .. math::

        n_\\text{eff} = \frac{n}{1 + 2 \sum_{t \ge 1} \rho_t}

    where the sum of autocorrelations :math:`\rho_t` ends with the last pair of neighbours whose sum is positive.

    :param torch.Tensor values: n samples (n, ...), each entry a chain of its own.
    :return: numbers (...) between 1 and n; 1 for a chain that does not move.

    Source: Geyer, "Practical Markov chain Monte Carlo", Statistical Science 1992.
    """
    n = len(values)
    centred = (values - values.mean(0)).double()
    variance = centred.square().mean(0)
    still = variance <= torch.finfo(values.dtype).eps ** 2 * values.double().square().mean(0)
    total, positive = torch.zeros_like(variance), ~still
    for t in range(0, n - 1, 2):
        pair = sum((centred[: n - s] * centred[s:]).sum(0) / n for s in (t, t + 1)) / variance.clamp_min(1e-300)
        positive = positive & (pair > 0)
        total = total + torch.where(positive, pair, torch.zeros_like(pair))
    return torch.where(still, 1.0, n / (2 * total - 1)).clamp(1, n).to(values.dtype)
