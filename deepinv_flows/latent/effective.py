"""How many independent samples a chain is worth."""

import torch
from torch import Tensor

NUM_PROJECTIONS = 32


class Trace:
    """A few numbers of each sample: projections of its tensors on random directions, which all samples share."""

    def __init__(self) -> None:
        self.directions: list[Tensor] = []
        self.rows: list[list[Tensor]] = []

    def add(self, *tensors: Tensor) -> None:
        """Of a sample, floating-point tensors (B, ...); each of the tensors counts for itself."""
        flat = [x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
        if not self.directions:
            self.directions = [_directions(x) for x in flat]
        self.rows.append([(x @ d).cpu() for x, d in zip(flat, self.directions)])

    def effective(self) -> Tensor:
        """
        Effective numbers of samples (B,): the median over the projections of a tensor, the least over the tensors.

        The first tensor is what moves. Of the others, functions of it, what does not change does not count.
        """
        first, *others = [effective(torch.stack(values)) for values in zip(*self.rows)]
        numbers = [first.nan_to_num(1.0), *(other.nan_to_num(torch.inf) for other in others)]
        return torch.stack([number.median(-1).values for number in numbers]).amin(0)


def _directions(x: Tensor) -> Tensor:
    # from a generator of their own, so that what is watched does not change the chain
    shape = x.shape[1], min(NUM_PROJECTIONS, x.shape[1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)


def effective(values: Tensor) -> Tensor:
    r"""
    Effective number of samples of chains, by Geyer's initial positive sequence.

    .. math::

        n_\text{eff} = \frac{n}{1 + 2 \sum_{t \ge 1} \rho_t}

    where the sum of autocorrelations :math:`\rho_t` ends with the last pair of neighbours whose sum is positive.

    :param torch.Tensor values: n samples (n, ...), each entry a chain of its own.
    :return: numbers (...) between 1 and n; NaN for a chain that does not move, 1 for one that is not finite.

    Source: Geyer, "Practical Markov chain Monte Carlo", Statistical Science 1992.
    """
    n = len(values)
    centred = (values - values.mean(0)).double()
    variance = centred.square().mean(0)
    still = variance <= torch.finfo(values.dtype).eps ** 2 * values.double().square().mean(0)
    total, positive = torch.zeros_like(variance), ~still & variance.isfinite()
    known = positive
    for t in range(0, n - 1, 2):
        pair = sum((centred[: n - s] * centred[s:]).sum(0) / n for s in (t, t + 1)) / variance.clamp_min(1e-300)
        positive = positive & (pair > 0)
        if not positive.any():
            break
        total = total + torch.where(positive, pair, torch.zeros_like(pair))
    # neighbours that lie on opposite sides of the mean may be worth more than n
    number = torch.where(known, n / (2 * total - 1).clamp_min(1 / n), 1.0).clamp(1, n)
    return torch.where(still, torch.nan, number).to(values.dtype)
