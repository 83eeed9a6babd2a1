"""
The modules of 0.1.0, which objects that it pickled whole still name; the table says where their content is now.

This module goes with 0.4.0, and not before December 2027.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

MOVED = {
    "_freia": ["flows.freia"],
    "builders": ["iterators.builders"],
    "contract": ["flows.contract"],
    "denoiser": ["reconstruction.denoiser", "training.score_matching"],
    "dialects": ["weights.dialects"],
    "distributed": ["patchnr.distributed"],
    "flow_prior": ["latent.prior"],
    "image_flows": ["flows.image"],
    "likelihood": ["training.likelihood"],
    "parallel": ["training.distributed"],
    "portable": ["splitting.pickling"],
    "samples": ["training.samples"],
    "splitting_masks": ["splitting.masks"],
    "splitting_model": ["splitting.model"],
}
_PACKAGE = __package__.split(".")[0]


class FormerModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook: a module of 0.1.0 is found where its content is now."""

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def create_module(self, spec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        for name in MOVED[module.__name__.partition(".")[2]]:
            content = vars(importlib.import_module(f"{_PACKAGE}.{name}"))
            vars(module).update({key: value for key, value in content.items() if not key.startswith("__")})


def find_former_modules() -> None:
    """Install the import hook, unless it is installed already."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        sys.meta_path.append(FormerModules())
