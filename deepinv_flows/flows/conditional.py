"""Conditional flows at fixed conditions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import transformed
from .contract import evaluate, takes, unwrapped


class Given(nn.Module):
    """
    A conditional flow at fixed conditions, which is a flow without conditions: ``Given(flow, c)(x) == flow(x, c=c)``.

    :param torch.nn.Module flow: a flow called as ``flow(x, c=[condition, ...], rev=False)``.
    :param torch.Tensor, list c: its conditions, or the only one, each of shape (N, ...), or (1, ...) if it is the same for all
        samples.
    :raises TypeError: for a flow that does not take conditions.

    >>> import torch
    >>> from deepinv_flows import image_flow
    >>> from deepinv_flows.flows import Given
    >>> flow = image_flow((1, 8, 8), num_levels=1, num_steps=1, hidden=4, dims_c=[(1, 8, 8)])
    >>> x, c = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    >>> torch.equal(Given(flow, c)(x)[0], flow(x, c=c)[0])
    True
    """

    def __init__(self, flow: nn.Module, c: Tensor | Sequence[Tensor]):
        super().__init__()
        if not takes(flow, "c"):
            raise TypeError(f"expected a flow that takes conditions c; {type(flow).__name__} does not")
        self.flow, conditions = flow, condition_list(c)
        self.count = len(conditions)
        for k, condition in enumerate(conditions):
            self.register_buffer(f"c{k}", condition, persistent=False)
        if (img_size := getattr(unwrapped(flow), "img_size", None)) is not None:
            self.img_size = img_size

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        conditions = [getattr(self, f"c{k}") for k in range(self.count)]
        return evaluate(self.flow, x, rev, [c.expand(len(x), *c.shape[1:]) if len(c) == 1 else c for c in conditions])


def condition_list(c: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """
    The conditions that a user gave, as a list.

    :raises TypeError: for anything but tensors.
    :raises ValueError: for NaN or infinite entries.
    """
    conditions = [] if c is None else [c] if torch.is_tensor(c) else list(c)
    for condition in conditions:
        if not torch.is_tensor(condition):
            raise TypeError(f"expected conditions as tensors; got {type(condition).__name__}")
        if not transformed(condition) and not bool(torch.isfinite(condition).all()):
            raise ValueError(f"a condition of shape {tuple(condition.shape)} holds NaN or infinite entries")
    return conditions
