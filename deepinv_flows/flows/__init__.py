"""
Flows: the contract that every prior here relies on, and builders of flows that satisfy it.

The contract and the negative log-likelihood are in :mod:`~deepinv_flows.flows.contract`; builders for vectors, for images and by
``config`` in modules of these names, the flow that the second builds in :mod:`~deepinv_flows.flows.multiscale`; flows at fixed
conditions in :mod:`~deepinv_flows.flows.conditional`; flows and other modules as generators of images in
:mod:`~deepinv_flows.flows.generator`; what FrEIA needs to be pickled and copied in :mod:`~deepinv_flows.flows.freia`.
"""

from .building import build_flow
from .conditional import Given
from .contract import KnowsItsConfig, Reversed, as_flow, decode_config, evaluate, like_weights, nll, same_function
from .generator import Conditions, ImageGenerator, unwrapped
from .image import image_flow
from .vector import allinone_flow, glow_flow

__all__ = [
    "Conditions",
    "Given",
    "ImageGenerator",
    "KnowsItsConfig",
    "Reversed",
    "allinone_flow",
    "as_flow",
    "build_flow",
    "decode_config",
    "evaluate",
    "glow_flow",
    "image_flow",
    "like_weights",
    "nll",
    "same_function",
    "unwrapped",
]
