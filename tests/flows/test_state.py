"""State dicts: they hold numbers that survive arithmetic, and load by deepinv's names, in its order, and as 0.1.0 wrote them."""

import io

import deepinv as dinv
import numpy as np
import pytest
import torch
from cases import BUILT, make
from deepinv.optim.prior import NormalizingFlow

from deepinv_flows import Reversed, allinone_flow, glow_flow, image_flow
from deepinv_flows.flows import as_permutation

FLOWS = {
    **{name: (lambda seed, name=name: make(name, 8, torch.float32, 0.1, seed)) for name in BUILT},
    "image": lambda seed: image_flow((1, 4, 8), 2, 2, 4, generator=torch.Generator().manual_seed(seed)),
    "image_glow": lambda seed: image_flow((1, 4, 8), 1, 2, 4, "glow", generator=torch.Generator().manual_seed(seed)),
}
samples = {"image": torch.rand(3, 1, 4, 8), "image_glow": torch.rand(3, 1, 4, 8)}


def values(flow, name):
    return torch.cat([out.flatten().double() for out in flow(samples.get(name, torch.linspace(-1, 1, 24).view(3, 8)))])


def sent_through_a_file(state):
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


ARITHMETIC = {
    "half": (lambda sd: {k: v.half() for k, v in sd.items()}, 1e-2),
    "bfloat16": (lambda sd: {k: v.bfloat16() for k, v in sd.items()}, 1e-1),
    "double": (lambda sd: {k: v.double() for k, v in sd.items()}, 1e-12),
    "average": (lambda sd: {k: 0.9 * v + 0.1 * v for k, v in sd.items()}, 1e-5),
    "numpy": (lambda sd: {k: torch.from_numpy(np.array(v)) for k, v in sd.items()}, 1e-12),
    "file": (sent_through_a_file, 1e-12),
}


@pytest.mark.parametrize("name", FLOWS)
def test_state_dicts_are_numbers(name):
    flow = FLOWS[name](0)
    state = flow.state_dict()
    assert all(v.is_floating_point() for v in state.values())
    assert sum(v.norm() for v in state.values()).isfinite()
    for way, (change, tolerance) in ARITHMETIC.items():
        other = FLOWS[name](1)
        other.load_state_dict(change(state))
        error = (values(other, name) - values(flow, name)).norm() / values(flow, name).norm()
        assert error < tolerance, way
        back, x = other(other(samples.get(name, torch.rand(3, 8)))[0], rev=True)[0], samples.get(name)
        assert x is None or torch.allclose(back, x, atol=1e-4), way


def test_a_moving_average_of_a_training_keeps_permutations():
    flow = glow_flow(48, 2, 8, permute=True)
    average = {k: v.clone() for k, v in flow.state_dict().items()}
    for _ in range(1000):
        average = {k: 0.999 * average[k] + 0.001 * v for k, v in flow.state_dict().items()}
    flow.load_state_dict(average)
    swa = torch.optim.swa_utils.AveragedModel(flow, use_buffers=True)
    swa.update_parameters(flow)
    swa.module.load_state_dict(swa.module.state_dict())


@pytest.mark.parametrize(
    "builder",
    [
        lambda g: glow_flow(9, 2, 8, permute=True, generator=g),
        lambda g: allinone_flow(9, 2, 8, permute_soft=True, generator=g),
        lambda g: image_flow((1, 8, 8), 1, 1, 4, "glow", generator=g),
    ],
)
def test_averages_of_different_permutations_are_refused(builder):
    a, b = (builder(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    mean = {k: 0.5 * v + 0.5 * b.state_dict()[k] for k, v in a.state_dict().items()}
    with pytest.raises(RuntimeError, match="is not a (permutation|rotation)"):
        a.load_state_dict(mean)


def test_as_permutation():
    perm = torch.randperm(300)
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int64, torch.int16):
        assert torch.equal(as_permutation(perm.to(dtype)), perm)
    for wrong in (perm + 0.2, perm.clamp(1), perm.bfloat16(), perm * float("nan"), perm + 1j):
        with pytest.raises(ValueError, match="permutation|indices"):
            as_permutation(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flow_in_half_precision_keeps_its_permutation(dtype):
    flow = glow_flow(600, 1, 4, permute=True)
    halved = glow_flow(600, 1, 4, permute=True).to(dtype)
    halved.load_state_dict(flow.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(halved.buffers(), flow.buffers()))
    again = glow_flow(600, 1, 4, permute=True)
    again.load_state_dict(halved.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), flow.buffers()))


def test_another_functions_weights_are_refused():
    """The weights are also read from a file, from inside another module, and for the inverse flow."""
    flow, silu = glow_flow(9, 2, 8), glow_flow(9, 2, 8, activation="silu")
    for theirs in (silu.state_dict(), sent_through_a_file(silu.state_dict())):
        with pytest.raises(ValueError, match="expected weights of a flow .*relu.*; found weights of .*silu"):
            flow.load_state_dict(theirs)
    with pytest.raises(ValueError, match="expected weights of a flow"):
        torch.nn.DataParallel(flow).load_state_dict(torch.nn.DataParallel(silu).state_dict())
    with pytest.raises(ValueError, match="expected weights of a flow"):
        Reversed(flow).load_state_dict(Reversed(silu).state_dict())


def test_trainers_checkpoint_of_another_function_is_refused(tmp_path):
    torch.save({"epoch": 0, "state_dict": glow_flow(9, 2, 8, activation="silu").state_dict()}, tmp_path / "ckp.pth.tar")
    with pytest.raises(ValueError, match="expected weights of a flow"):
        train(glow_flow(9, 2, 8), torch.rand(8, 9), 1, tmp_path / "ckp.pth.tar")


# --- deepinv's names, and its order, which is all that the state of an optimizer knows ---


def subnet(width):
    return lambda i, o: torch.nn.Sequential(
        torch.nn.Linear(i, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, o),
    )


class Likelihood(dinv.loss.Loss):
    """The training loss of deepinv's own example."""

    def forward(self, x, model, **kwargs):
        z, log_det = model(x)
        return 0.5 * (z**2).sum(1) - log_det


class Trainer(dinv.Trainer):
    def model_inference(self, y, physics, *args, **kwargs):
        return y


def train(flow, x, epochs, checkpoint=None, save_path=None):
    loader = torch.utils.data.DataLoader(torch.utils.data.StackDataset(x=x, y=x), batch_size=16)
    options = dict(
        epochs=epochs, losses=Likelihood(), metrics=None, compute_train_metrics=False, device="cpu", verbose=False
    )
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    physics = dinv.physics.Denoising()
    return Trainer(
        flow, physics, optimizer, loader, save_path=save_path, ckpt_pretrained=checkpoint, **options
    ).train()  # fmt: skip


@pytest.mark.parametrize("dim", [8, 9])
def test_deepinvs_training_goes_on_in_our_flow(dim, tmp_path):
    """The weights and Adam's state are loaded; with the moments of the other network, Adam's steps would differ."""
    torch.manual_seed(5)
    x = torch.randn(64, dim) @ torch.randn(dim, dim)
    theirs, ours = NormalizingFlow(dim, 2, subnet(6)), glow_flow(dim, 2, 6)
    train(theirs, x, 2, save_path=tmp_path)
    checkpoint = next(tmp_path.glob("*/ckp_1.pth.tar"))
    train(theirs, x, 5, checkpoint)
    train(ours, x, 5, checkpoint)
    for a, b in zip(ours(x), theirs(x)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


def test_names_of_deepinv_both_ways():
    theirs, ours = NormalizingFlow(9, 2, subnet(6)), glow_flow(9, 2, 6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(4, 9)
    torch.testing.assert_close(ours(x), theirs(x))
    assert list(ours.to_deepinv_state_dict()) == list(theirs.state_dict())
    other = NormalizingFlow(9, 2, subnet(6))
    other.load_state_dict(ours.to_deepinv_state_dict())
    assert torch.equal(other(x)[0], theirs(x)[0])
    with pytest.raises(ValueError, match="expected a flow that deepinv's PatchNR has too; got"):
        glow_flow(9, 2, 6, permute=True).to_deepinv_state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        glow_flow(9, 2, 6, clamp_activation="ATAN").load_state_dict(theirs.state_dict())
