import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads():
    # the networks here are small: more threads only wait for one another
    torch.set_num_threads(1)
