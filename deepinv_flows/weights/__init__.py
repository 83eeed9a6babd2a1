"""
Weights: checkpoints in every dialect, beside the shipped ``.safetensors`` files and their cards.

Files are read, checked and written in :mod:`~deepinv_flows.weights.files`. The names and functions of each dialect are in
:mod:`~deepinv_flows.weights.dialects`, where a new dialect belongs, and the modules of 0.1.0 in
:mod:`~deepinv_flows.weights.former`.
"""

from .dialects import CheckpointError, Weights, convert, modern, to_deepinv
from .files import KNOWN, build, find, guarded, load_into, located, new_flow, patch_config, read_torch, shipped, write
from .former import find_former_modules

find_former_modules()

__all__ = [
    "KNOWN",
    "CheckpointError",
    "Weights",
    "build",
    "convert",
    "find",
    "guarded",
    "load_into",
    "located",
    "modern",
    "new_flow",
    "patch_config",
    "read_torch",
    "shipped",
    "to_deepinv",
    "write",
]
