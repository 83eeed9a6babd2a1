import pytest

from deepinv_flows.patchnr import potential


@pytest.fixture(autouse=True)
def written_out(monkeypatch):
    """Use the derivatives that are written out also for few patches, as in small test images; autograd would evaluate these."""
    monkeypatch.setattr(potential, "FEW", 0)
