"""
Weights: checkpoints in every dialect, beside the ``.safetensors`` that are shipped and their cards.

Reading, checking and writing files is in :mod:`~deepinv_flows.weights.files`, a dialect's names and function in
:mod:`~deepinv_flows.weights.dialects`: a new dialect goes there.
"""

from .dialects import CheckpointError, Weights, convert, modern, to_deepinv
from .files import build, find, guarded, load_into, new_flow, patch_config, read_torch, shipped, write
from .former import find_former_modules

find_former_modules()

__all__ = [
    "CheckpointError",
    "Weights",
    "build",
    "convert",
    "find",
    "guarded",
    "load_into",
    "modern",
    "new_flow",
    "patch_config",
    "read_torch",
    "shipped",
    "to_deepinv",
    "write",
]
