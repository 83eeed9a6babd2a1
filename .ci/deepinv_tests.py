"""deepinv's own installed tests of the classes that register() replaces, with ours in their place: run as a script."""

import sys
from pathlib import Path

import deepinv
import pytest

import deepinv_flows

TESTS = Path(deepinv.__file__).parent / "tests"
CHOSEN = {"test_optim.py": "patch or prior", "test_loss.py": "-es", "test_unfolded.py": ""}

deepinv_flows.register()
assert deepinv.optim.PatchNR is deepinv_flows.PatchNR
outcomes = [
    pytest.main([str(TESTS / name), "-q", "-p", "no:cacheprovider", "-W", "ignore", f"-k={k}"])
    for name, k in CHOSEN.items()
]
sys.exit(any(outcomes))
