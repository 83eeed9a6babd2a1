"""
Derivatives of patch flows written out, for flows whose parts are all known.

``recognise`` turns a flow into ``steps``, if ``originals`` finds that its modules still compute what their classes say. The
``networks`` of the steps work in the buffers of a ``workspace``; on a GPU the ``kernels`` of ``onchip`` can take their place.
``sweep`` adds up values and gradients over the patches, ``second`` what ``tangents`` and their ``layers`` make of a direction.
"""

from .onchip import chunk_size
from .recognise import steps_of
from .second import Second, twice_differentiable
from .steps import recorded_nll
from .sweep import patch_sums

__all__ = ["Second", "chunk_size", "patch_sums", "recorded_nll", "steps_of", "twice_differentiable"]
