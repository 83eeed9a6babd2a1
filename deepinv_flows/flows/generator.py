"""Flows, other modules and functions as generators, which map latents to images."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .contract import as_flow, evaluate, takes, unwrapped

Conditions = Tensor | Sequence[Tensor] | None

VECTORS = ("glow_flow", "allinone_flow")


class ImageGenerator:
    """
    A generator G of images: a flow run in reverse, or any module or function that maps latents (B, ...) to images.

    FrEIA and zuko modules are adapted as :func:`deepinv_flows.as_flow` adapts them. The name and sizes of a flow that is
    compiled, or wrapped for data-parallel training, are those of the module inside.

    :param torch.nn.Module, Callable module: the flow or generator.
    :raises TypeError: for a flow of another calling convention, such as ``reverse=`` in place of ``rev=``.
    """

    def __init__(self, module: Callable):
        self.module: Any = as_flow(module) if isinstance(module, nn.Module) else module
        inner = unwrapped(self.module)
        self.name, self.invertible = type(inner).__name__, takes(inner, "rev")
        for name in ("reverse", "inverse"):
            if not self.invertible and takes(inner, name):
                raise TypeError(
                    f"expected a flow called as flow(x, rev=False), or a generator; {self.name}.forward takes {name}=: "
                    f"wrap it in a module whose forward(x, rev=False) returns (z, log_det)"
                )
        config = getattr(inner, "config", {})
        self.dim = config.get("dim") if config.get("builder") in VECTORS else None
        self.latent_shape = getattr(inner, "img_size", None) if self.dim is None else (self.dim,)

    def decode(self, z: Tensor, c: Conditions = None) -> Tensor:
        """Images G(z)."""
        if self.invertible:
            return evaluate(self.module, z, rev=True, c=c)[0]
        return self.module(z) if c is None else self.module(z, c=c)

    def encode(self, x: Tensor, c: Conditions = None) -> Tensor:
        """
        Latents of images.

        :raises ValueError: for a generator that is not invertible.
        """
        if not self.invertible:
            raise ValueError(f"expected a flow, to find the latent of an image; a {self.name} does not have an inverse")
        return evaluate(self.module, x, c=c)[0]
