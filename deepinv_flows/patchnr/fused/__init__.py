"""
Derivatives of patch flows written out, for flows whose parts are all known.

``recognise`` turns a flow into ``steps``, whose ``networks`` work in the buffers of a ``workspace``; ``sweep`` adds up values and
gradients, those in the weights too, over the patches.
"""

from .recognise import steps_of
from .sweep import patch_sums

__all__ = ["patch_sums", "steps_of"]
