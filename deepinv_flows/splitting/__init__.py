"""
Equivariant splitting: a loss that trains a reconstructor without ground truth.

``loss`` combines the ``model`` that splits its input with the ``terms`` of the loss. ``masks`` and ``parts`` say how the
measurements are split, ``recorruption`` adds noise before that, ``joint`` draws random numbers for batches that several processes
share, and ``pickling`` copies and compares deepinv's transforms and generators.
"""

from .loss import EquivariantSplittingLoss
from .masks import LineSplittingMaskGenerator

__all__ = ["EquivariantSplittingLoss", "LineSplittingMaskGenerator"]
