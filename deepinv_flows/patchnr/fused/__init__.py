"""
Derivatives of patch flows written out, for flows whose parts are all known.

``recognise`` turns a flow into ``steps``, if its modules are still ``originals``; their ``networks`` work in the buffers of a
``workspace``. ``sweep`` adds up values and gradients, those in the weights too, over the patches.
"""

from .recognise import steps_of
from .steps import recorded_nll
from .sweep import patch_sums

__all__ = ["patch_sums", "recorded_nll", "steps_of"]
