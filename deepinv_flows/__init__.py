"""Normalizing-flow priors for deepinv."""

from .checkpoints import CheckpointError
from .flows import Reversed, allinone_flow, as_flow, build_flow, glow_flow
from .patchnr import PatchNR

__version__ = "0.1.0"
__all__ = ["CheckpointError", "PatchNR", "Reversed", "allinone_flow", "as_flow", "build_flow", "glow_flow"]
