"""deepinv's own installed tests of the classes that register() replaces, with ours in their place: run as a script."""

import sys
from pathlib import Path

import deepinv
import pytest
import torch

import deepinv_flows

TESTS = Path(deepinv.__file__).parent / "tests"
CHOSEN = {"test_optim.py": "patch or prior", "test_loss.py": "-es", "test_unfolded.py": ""}

torch.set_num_threads(1)  # the tensors are small
deepinv_flows.register()
assert deepinv.optim.PatchNR is deepinv_flows.PatchNR
# "addopts=": the virtual environment may lie below our pyproject.toml, whose options are not meant for these
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts="]
outcomes = [pytest.main([str(TESTS / name), *options, f"-k={k}"]) for name, k in CHOSEN.items()]
sys.exit(any(outcomes))
