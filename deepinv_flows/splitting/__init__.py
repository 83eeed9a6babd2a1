"""
Equivariant splitting: a loss that trains a reconstructor without ground truth.

``loss`` puts together the ``model`` that splits its input, by ``masks`` with two ``parts`` and after ``recorruption``, and the
``terms`` of the loss; ``joint`` draws for batches that several processes share; ``pickling`` copies and compares deepinv's parts.
"""

from .loss import EquivariantSplittingLoss
from .masks import LineSplittingMaskGenerator

__all__ = ["EquivariantSplittingLoss", "LineSplittingMaskGenerator"]
