"""
Training of flows by deepinv's Trainer.

``fit`` takes images and returns a trained flow. ``samples`` draws from the images, ``likelihood`` and ``score_matching`` are the
objectives, ``runs`` survive interruptions, ``progress`` is shown, and ``distributed`` divides batches between several processes.
``bilevel`` trains a prior for its reconstructions: ``inner`` is such a reconstruction as a model, ``measuring`` gives it images.
"""

from .bilevel import fit_bilevel
from .distributed import DistributedTrainer
from .fit import fit_flow, fit_patchnr
from .likelihood import BitsPerDim, FlowModel, FlowNLL
from .progress import Watched
from .runs import Resumes
from .samples import ImageSamples, PatchSamples, subset
from .start import initialised

__all__ = [
    "BitsPerDim",
    "DistributedTrainer",
    "FlowModel",
    "FlowNLL",
    "ImageSamples",
    "PatchSamples",
    "Resumes",
    "Watched",
    "fit_bilevel",
    "fit_flow",
    "fit_patchnr",
    "initialised",
    "subset",
]
