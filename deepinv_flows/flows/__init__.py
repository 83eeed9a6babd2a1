"""
Flows: the contract that every prior here relies on, and builders of flows that satisfy it.

The contract and the negative log-likelihood are in :mod:`~deepinv_flows.flows.contract`. Flows on vectors are built in
:mod:`~deepinv_flows.flows.vector`, flows on images in :mod:`~deepinv_flows.flows.image` (their class is in
:mod:`~deepinv_flows.flows.multiscale`), and flows by ``config`` in :mod:`~deepinv_flows.flows.building`. Flows at fixed
conditions are in :mod:`~deepinv_flows.flows.conditional`, generators of images in :mod:`~deepinv_flows.flows.generator`. What a
state dict holds is in :mod:`~deepinv_flows.flows.state`, and what FrEIA's blocks need to be pickled and copied in
:mod:`~deepinv_flows.flows.freia`.
"""

from .building import build_flow
from .conditional import Given, condition_list
from .contract import Reversed, as_flow, evaluate, like_weights, nll, unwrapped
from .generator import Conditions, ImageGenerator
from .image import image_flow
from .state import (
    CONFIG,
    DEEPINV_ORDER,
    EXTRA,
    FREIA_ORDER,
    NETWORKS,
    KnowsItsConfig,
    as_permutation,
    decode_config,
    deepinv_key,
    deepinv_state_dict,
    glow_config,
    is_rotation,
    rename_deepinv,
    same_function,
)
from .vector import allinone_flow, gaussianise, glow_flow

__all__ = [
    "CONFIG",
    "DEEPINV_ORDER",
    "EXTRA",
    "FREIA_ORDER",
    "NETWORKS",
    "Conditions",
    "Given",
    "ImageGenerator",
    "KnowsItsConfig",
    "Reversed",
    "allinone_flow",
    "as_flow",
    "as_permutation",
    "build_flow",
    "condition_list",
    "decode_config",
    "deepinv_key",
    "deepinv_state_dict",
    "evaluate",
    "gaussianise",
    "glow_config",
    "glow_flow",
    "image_flow",
    "is_rotation",
    "like_weights",
    "nll",
    "rename_deepinv",
    "same_function",
    "unwrapped",
]
