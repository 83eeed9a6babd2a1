"""What 0.1.0 wrote loads and gives the same results: objects pickled whole before its modules moved, and trainings."""

import importlib
import json
import pickle
from pathlib import Path

import deepinv as dinv
import pytest
import torch

from deepinv_flows import CheckpointError, DistributedTrainer, FlowModel, FlowNLL, PatchNR, glow_flow
from deepinv_flows.weights import former, load_into

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


# --- state dicts of 0.1.0: permutations of integers, the description as bytes, networks in FrEIA's order ---

TRAININGS = torch.load(Path(__file__).parent / "trainings_0_1_0.pt", weights_only=True)


def model(dim):
    return FlowModel(glow_flow(dim, 2, 6, permute=True), dequantise=0)


@pytest.mark.parametrize("trainer", [dinv.Trainer, DistributedTrainer])
@pytest.mark.parametrize("dim", TRAININGS)
def test_trainings_of_0_1_0_go_on(dim, trainer, tmp_path):
    """A training goes on from epoch 2 to 5, also by way of a checkpoint of today, with the right moments of Adam."""
    x, flow = TRAININGS[dim]["x"], model(dim)
    torch.save(TRAININGS[dim]["checkpoint"], tmp_path / "ckp_1.pth.tar")
    loader = torch.utils.data.DataLoader(torch.utils.data.StackDataset(x=x, y=x), batch_size=16)
    options = dict(losses=FlowNLL(), metrics=None, device="cpu", verbose=False, compute_train_metrics=False)
    checkpoint = tmp_path / "ckp_1.pth.tar"
    for epochs in (4, 5):
        flow = model(dim)
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
        trainer(
            flow, dinv.physics.Denoising(), optimizer, loader, epochs=epochs, save_path=tmp_path / str(epochs),
            ckpt_pretrained=checkpoint, **options,
        ).train()  # fmt: skip
        checkpoint = next((tmp_path / str(epochs)).glob(f"*/ckp_{epochs - 1}.pth.tar"))
    torch.testing.assert_close(flow(x), TRAININGS[dim]["five_epochs"], rtol=1e-4, atol=1e-4)
    assert all(value.is_floating_point() for value in flow.state_dict().values())


@pytest.mark.parametrize("dim", TRAININGS)
def test_deepinvs_order_comes_back_with_deepinvs_weights(dim):
    first, second = glow_flow(dim, 2, 6), glow_flow(dim, 2, 6)
    names, parameters = [name for name, _ in first.named_parameters()], list(first.parameters())
    old = dict(glow_flow(dim, 2, 6).state_dict())
    for key in [key for key in old if key.endswith("perm")]:
        old[key] = old[key].long()
    old["_extra_state"] = torch.tensor(list(json.dumps(first.config).encode()), dtype=torch.uint8)
    second.load_state_dict(first.to_deepinv_state_dict())
    first.load_state_dict(old)
    assert [name for name, _ in first.named_parameters()] != names
    assert all(a is b for a, b in zip(first.parameters(), parameters))
    assert all(torch.equal(value, old[key].float()) for key, value in first.state_dict().items())
    first.load_state_dict(second.to_deepinv_state_dict())
    assert [name for name, _ in first.named_parameters()] == names
    assert all(a is b for a, b in zip(first.parameters(), parameters))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize("dim", TRAININGS)
def test_checkpoints_of_0_1_0_are_priors(dim, tmp_path):
    torch.save(TRAININGS[dim]["checkpoint"], tmp_path / "ckp.pth.tar")
    patch = dict(patch_size=3 if dim == 9 else 2, channels=1 if dim == 9 else 2)
    prior = PatchNR.from_checkpoint(tmp_path / "ckp.pth.tar", **patch)
    other = PatchNR(glow_flow(dim, 2, 6, permute=True), **patch)
    other.load_state_dict(TRAININGS[dim]["checkpoint"])
    x = torch.rand(1, 5, dim)
    assert torch.equal(prior(x), other(x))
    with pytest.raises(CheckpointError, match="expected weights of a flow .*; found weights of"):
        load_into(
            FlowModel(glow_flow(dim, 2, 6, permute=True, activation="silu")), TRAININGS[dim]["checkpoint"]["state_dict"]
        )
