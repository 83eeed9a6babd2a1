"""Objects that 0.1.0 pickled whole, before its modules moved to folders, load and give what they gave."""

import importlib
import pickle
from pathlib import Path

import deepinv as dinv
import pytest
import torch

from deepinv_flows.weights import former

# made by 0.1.0: for each name the object, and (arguments, result) with "physics" in place of what does not pickle
OBJECTS = pickle.loads((Path(__file__).parent / "objects_0_1_0.pkl").read_bytes())


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_0_1_0_load(name):
    whole, call = OBJECTS[name]
    found = pickle.loads(whole)
    args, expected = pickle.loads(call)
    if args is not None:
        physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
        with torch.no_grad():
            out = found(*[physics if isinstance(a, str) else a for a in args])
        torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, expected, rtol=1e-4, atol=1e-5)
    assert b"deepinv_flows" in pickle.dumps(found)


@pytest.mark.parametrize("name", former.MOVED)
def test_former_modules_hold_what_they_held(name):
    module = importlib.import_module(f"deepinv_flows.{name}")
    new = [importlib.import_module(f"deepinv_flows.{place}") for place in former.MOVED[name]]
    assert any(value is vars(place).get(key) for place in new for key, value in vars(module).items())
