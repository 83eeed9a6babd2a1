import sys
from pathlib import Path

import pytest
import torch

# spawned processes import the modules of tests by these names; at the end, so that the installed package comes first
sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads():
    # the networks here are small: more threads only wait for one another
    torch.set_num_threads(1)
