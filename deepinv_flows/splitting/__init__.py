"""
Equivariant splitting: a loss that trains a reconstructor without ground truth.

``loss`` puts together the ``model`` that splits its input, the ``masks`` it splits by and the ``terms`` of the loss; ``pickling``
copies and compares deepinv's transforms and mask generators.
"""

from .loss import EquivariantSplittingLoss
from .masks import LineSplittingMaskGenerator

__all__ = ["EquivariantSplittingLoss", "LineSplittingMaskGenerator"]
