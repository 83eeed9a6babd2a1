"""Flows by ``config``, the description that a builder leaves in the flow it builds."""

from typing import Any

import torch
from torch import nn

from ..checks import check_choice
from .contract import Reversed
from .image import image_flow
from .vector import allinone_flow, glow_flow


def build_flow(config: dict, generator: torch.Generator | None = None) -> nn.Module:
    """
    Build the flow that a builder's ``config`` describes, with new weights.

    :param dict config: ``flow.config`` of a flow made by a builder.
    :param torch.Generator generator: source of the new weights; ``None`` takes torch's global one.
    :return: flow of the same architecture.
    :raises ValueError: for a description that is not from one of our builders.

    >>> from deepinv_flows import build_flow, glow_flow
    >>> build_flow(glow_flow(4, num_layers=1).config).config["dim"]
    4
    """
    builders: dict[Any, Any] = {"glow_flow": glow_flow, "allinone_flow": allinone_flow, "image_flow": image_flow}
    config = dict(config)
    name, reverse = config.pop("builder", None), config.pop("reversed", False)
    check_choice("builder", name, builders)
    try:
        flow = builders[name](**config, generator=generator)
    except TypeError as error:
        raise ValueError(f"not an architecture that {name} builds: {error}") from None
    return Reversed(flow) if reverse else flow
