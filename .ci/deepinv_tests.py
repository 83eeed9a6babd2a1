"""deepinv's own installed tests of the classes that register() replaces, with ours in their place: run as a script."""

import sys
from pathlib import Path

import deepinv
import pytest
import torch

import deepinv_flows

TESTS = Path(deepinv.__file__).parent / "tests"
CHOSEN = {"test_optim.py": "(patch or prior)", "test_loss.py": "-es", "test_unfolded.py": "test"}

# on import, since each process of pytest-xdist has this file as a plugin
torch.set_num_threads(1)  # the tensors are small
deepinv_flows.register()
assert deepinv.optim.PatchNR is deepinv_flows.PatchNR

if __name__ == "__main__":
    files = [str(TESTS / name) for name in CHOSEN]
    chosen = " or ".join(f"({name} and {k})" for name, k in CHOSEN.items())
    # "addopts=": the virtual environment may lie below our pyproject.toml, whose options are not meant for these
    options = ["-q", "-p", "no:cacheprovider", "-p", Path(__file__).stem, "-n2", "-W", "ignore", "-o", "addopts="]
    sys.exit(pytest.main([*files, *options, f"-k={chosen}", *sys.argv[1:]]))
