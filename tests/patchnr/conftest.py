import pytest

from deepinv_flows.patchnr import potential


@pytest.fixture(autouse=True)
def written_out(monkeypatch):
    """Derivatives written out also for the few patches of small test images, which are otherwise left to autograd."""
    monkeypatch.setattr(potential, "FEW", 0)
