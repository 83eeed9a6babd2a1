"""Four dialects are read and two are written; a state dict says which function it is for, and a misfit changes nothing."""

import copy
import math

import deepinv as dinv
import pytest
import torch
from cases import BUILT, make
from dialects import DIALECTS, LAYERS, WIDTH, deepinv_040, deepinv_now, enlarge, ours

from deepinv_flows import CheckpointError, PatchNR, glow_flow


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("patch", [(3, 1), (3, 3), (6, 1)], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(dialect, patch, prefix, tmp_path):
    raw, truth = DIALECTS[dialect](*patch)
    state = raw.get("net_state_dict", raw.get("state_dict", raw))
    plain = {key.removeprefix("normalizing_flow."): value for key, value in state.items()}
    state = {f"normalizing_flow.{key}": value for key, value in plain.items()} if prefix else plain
    raw = {**raw, "net_state_dict": state} if "net_state_dict" in raw else raw
    raw = {**raw, "state_dict": state} if "state_dict" in raw else raw
    raw = state if "epoch" not in raw and "net_state_dict" not in raw else raw
    path = tmp_path / "weights.pt"
    torch.save(raw, path)
    sizes = dict(patch_size=patch[0], channels=patch[1])

    loaded = PatchNR(pretrained=str(path), **sizes, num_layers=LAYERS, sub_net_size=WIDTH)
    inferred = PatchNR.from_checkpoint(path, channels=patch[1])
    by_state = ours(*patch)
    by_state.load_state_dict(raw)
    x = torch.randn(50, loaded.dim)
    for prior in (loaded, inferred, by_state):
        torch.testing.assert_close(copy.deepcopy(prior).double()(x[None].double())[0], truth(x), rtol=1e-9, atol=1e-9)

    # and once more through our own file
    loaded.save(tmp_path / "ours.safetensors")
    again = PatchNR.from_checkpoint(tmp_path / "ours.safetensors")
    assert (again.patch_size, again.channels) == patch
    assert torch.equal(again(x[None]), loaded(x[None]))


def test_the_two_clamps_differ():
    state, truth = deepinv_040(6, 1)
    wrong = ours(6, 1)
    wrong.normalizing_flow = glow_flow(36, LAYERS, WIDTH)
    blocks = {k.replace("normalizing_flow.module_list", "blocks"): v for k, v in state.items()}
    wrong.load_state_dict(blocks)
    x = torch.randn(50, 36)
    assert (wrong(x[None])[0] / truth(x) - 1).abs().median() > 1e-2


def test_to_deepinv_and_back():
    prior = enlarge(ours(3, 3))
    theirs = dinv.optim.PatchNR(patch_size=3, channels=3, num_layers=LAYERS, sub_net_size=WIDTH)
    theirs.load_state_dict(prior.to_deepinv_state_dict())
    x = torch.randn(1, 20, 27)
    torch.testing.assert_close(theirs(x), prior(x), rtol=1e-5, atol=1e-5)
    back = ours(3, 3)
    back.load_state_dict(theirs.state_dict())
    assert torch.equal(back(x), prior(x))


@pytest.mark.parametrize("name", BUILT)
def test_to_deepinv_refuses_other_functions(name):
    prior = PatchNR(make(name, 9, torch.float32), patch_size=3)
    if name == "glow":
        assert len(prior.to_deepinv_state_dict()) == 24
    else:
        with pytest.raises(ValueError, match="expected a flow that deepinv's PatchNR has too; got"):
            prior.to_deepinv_state_dict()


def test_deepinv_weights_inside_a_larger_module():
    theirs = torch.nn.ModuleDict({"prior": enlarge(dinv.optim.PatchNR(patch_size=3, num_layers=2, sub_net_size=8))})
    mine = torch.nn.ModuleDict({"prior": PatchNR(patch_size=3, num_layers=2, sub_net_size=8)})
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 5, 9)
    torch.testing.assert_close(mine["prior"](x), theirs["prior"](x))


def test_strict_is_honoured():
    prior = ours(3, 1)
    state = prior.state_dict()
    first = next(key for key in state if key.endswith("weight"))
    removed = {key: state[key] for key in state if key != first}
    with pytest.raises(CheckpointError, match="missing tensors"):
        prior.load_state_dict(removed)
    assert prior.load_state_dict(removed, strict=False).missing_keys == [first]


def test_a_misfit_changes_nothing_and_names_both_shapes():
    prior = ours(3, 1)
    before = copy.deepcopy(prior.state_dict())
    state, _ = deepinv_now(3, 1)
    key = "normalizing_flow.blocks.2.subnet2.4.weight"
    state[key] = state[key][:, :-1]
    with pytest.raises(CheckpointError, match=r"subnet1.4.weight: expected shape \(8, 24\); found \(8, 23\)"):
        prior.load_state_dict(state)
    state, _ = deepinv_now(3, 1)
    state[key][0, 0] = math.inf
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        prior.load_state_dict(state)
    with pytest.raises(CheckpointError, match="missing tensors"):
        PatchNR(patch_size=3, num_layers=LAYERS + 1, sub_net_size=WIDTH).load_state_dict(deepinv_040(3, 1)[0])
    assert all(torch.equal(before[k], v) for k, v in prior.state_dict().items())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_own_state_of_any_dialect_comes_back(dialect, tmp_path):
    prior = ours(3, 1)
    prior.load_state_dict(DIALECTS[dialect](3, 1)[0])
    torch.save(prior.state_dict(), tmp_path / "own.pt")
    x = torch.randn(1, 20, 9)
    again = ours(3, 1)
    again.load_state_dict(prior.state_dict())
    for other in (again, PatchNR.from_checkpoint(tmp_path / "own.pt"), copy.deepcopy(prior)):
        assert torch.equal(other(x), prior(x))


@pytest.mark.parametrize("name", BUILT)
def test_own_state_of_any_flow(name, tmp_path):
    prior = PatchNR(make(name, 9, torch.float32), patch_size=3)
    torch.save(prior.state_dict(), tmp_path / "own.pt")
    x = torch.randn(1, 20, 9)
    assert torch.equal(PatchNR.from_checkpoint(tmp_path / "own.pt")(x), prior(x))
    other = PatchNR(make(name, 9, torch.float32, seed=1), patch_size=3)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other(x), prior(x))


def test_another_functions_weights_are_refused_inside_a_larger_module():
    inner = PatchNR(glow_flow(9, 2, 8, clamp_activation="ATAN"), patch_size=3)
    outer = torch.nn.ModuleDict({"prior": inner})
    theirs = torch.nn.ModuleDict({"prior": dinv.optim.PatchNR(patch_size=3, num_layers=2, sub_net_size=8)})
    with pytest.raises(RuntimeError, match="Missing key"):
        outer.load_state_dict(theirs.state_dict())
    silu = torch.nn.ModuleDict({"prior": PatchNR(glow_flow(9, 2, 8, activation="silu"), patch_size=3)})
    with pytest.raises(ValueError, match="expected weights of a flow .*ATAN.*; found weights of .*silu"):
        outer.load_state_dict(silu.state_dict())


@pytest.mark.parametrize("name", ["deepinv", "freia_sequence", "freia_graph", "freia_block", "allinone"])
def test_pretrained_for_a_users_own_flow(name, tmp_path):
    prior = PatchNR(make(name, 9, torch.float32), patch_size=3)
    torch.save(prior.state_dict(), tmp_path / "own.pt")
    again = PatchNR(make(name, 9, torch.float32, seed=1), patch_size=3, pretrained=tmp_path / "own.pt")
    x = torch.randn(1, 20, 9)
    assert torch.equal(again(x), prior(x))


def test_deepinv_weights_into_deepinvs_flow(tmp_path):
    theirs = enlarge(dinv.optim.PatchNR(patch_size=3, num_layers=2, sub_net_size=8))
    torch.save(theirs.state_dict(), tmp_path / "deepinv.pt")
    flow = dinv.optim.PatchNR(patch_size=3, num_layers=2, sub_net_size=8).normalizing_flow
    x = torch.randn(1, 20, 9)
    torch.testing.assert_close(PatchNR(flow, pretrained=str(tmp_path / "deepinv.pt"), patch_size=3)(x), theirs(x))


def test_another_dialect_keeps_a_frozen_prior_frozen():
    prior = ours(3, 1).requires_grad_(False).eval()
    prior.load_state_dict(deepinv_040(3, 1)[0])
    assert not any(p.requires_grad for p in prior.parameters()) and not prior.normalizing_flow.training


def test_deepinv_names_without_strict():
    state, _ = deepinv_now(3, 1)
    del state["normalizing_flow.blocks.0.subnet1.0.weight"]
    prior = ours(3, 1)
    missing = prior.load_state_dict(state, strict=False).missing_keys
    assert missing == ["normalizing_flow.module_list.1.subnet2.0.weight"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_weights_of_another_kind_are_refused(dtype):
    state, _ = deepinv_now(3, 1)
    key = next(iter(state))
    state[key] = state[key].to(dtype)
    with pytest.raises(CheckpointError, match="expected a dense torch.float32 tensor; found"):
        ours(3, 1).load_state_dict(state)


def test_patch_dimension_is_named():
    state, _ = deepinv_now(3, 3)
    with pytest.raises(CheckpointError, match=r"patch dimension 9\); found weights for patch dimension 27"):
        PatchNR(glow_flow(9, LAYERS, WIDTH, clamp_activation="ATAN"), patch_size=3).load_state_dict(state)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_loading_draws_no_random_numbers(dialect, tmp_path):
    raw, _ = DIALECTS[dialect](3, 1)
    prior = ours(3, 1)
    torch.save(raw, tmp_path / "weights.pt")
    state = torch.get_rng_state()
    prior.load_state_dict(raw)
    PatchNR.from_checkpoint(tmp_path / "weights.pt")
    if dialect in ("deepinv", "trainer"):
        prior.to_deepinv_state_dict()
    assert torch.equal(state, torch.get_rng_state())


class Outer(torch.nn.Module):
    """A user's module that holds one of our flows, with or without a weight of its own."""

    def __init__(self, name="glow_permuted", own=False, seed=0):
        super().__init__()
        self.inner = make(name, 9, torch.float32, seed=seed)
        if own:
            self.shift = torch.nn.Parameter(torch.full((9,), float(seed)))

    def forward(self, x, rev=False):
        return self.inner(x - getattr(self, "shift", 0), rev=rev)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["glow", "glow_permuted", "reversed", "allinone"])
def test_a_users_module_round_one_of_our_flows(name, own, tmp_path):
    prior, other = (PatchNR(Outer(name, own, seed), patch_size=3) for seed in (0, 1))
    torch.save(prior.state_dict(), tmp_path / "own.pt")
    x = torch.randn(1, 20, 9)
    for state in (
        prior.state_dict(),
        prior.normalizing_flow.state_dict(),
        dict(prior.state_dict()),
    ):
        other.load_state_dict(PatchNR(Outer(name, own, 1), patch_size=3).state_dict())
        assert not torch.equal(other(x), prior(x))
        other.load_state_dict(state)
        assert torch.equal(other(x), prior(x))
    assert torch.equal(PatchNR(Outer(name, own, 1), patch_size=3, pretrained=tmp_path / "own.pt")(x), prior(x))
    with pytest.raises(CheckpointError):  # what the module does to its input is not in the file
        PatchNR.from_checkpoint(tmp_path / "own.pt")
    silu = PatchNR(Outer("glow_silu", own), patch_size=3)
    if name == "glow":
        with pytest.raises(CheckpointError, match="expected weights of a flow .*relu.*; found weights of .*silu"):
            prior.load_state_dict(silu.state_dict())


@pytest.mark.parametrize("name", BUILT)
def test_priors_load_what_arithmetic_left(name, tmp_path):
    prior, other = (PatchNR(make(name, 9, torch.float32, 0.1, seed), patch_size=3) for seed in (0, 1))
    x = torch.randn(1, 20, 9)
    for change in (lambda v: 0.9 * v + 0.1 * v, lambda v: torch.from_numpy(v.numpy().copy()), lambda v: v.double()):
        state = {key: change(value) for key, value in prior.state_dict().items()}
        other.load_state_dict(state)
        torch.testing.assert_close(other(x), prior(x), rtol=1e-4, atol=1e-4)
        torch.save(state, tmp_path / "arithmetic.pt")
        made = PatchNR(make(name, 9, torch.float32, 0.1, 2), patch_size=3, pretrained=tmp_path / "arithmetic.pt")
        torch.testing.assert_close(made(x), prior(x), rtol=1e-4, atol=1e-4)
    if name.startswith("glow"):
        with pytest.raises(CheckpointError, match="whose config was lost on the way"):
            PatchNR.from_checkpoint(tmp_path / "arithmetic.pt")


def test_permutations_of_another_flow_are_checked():
    prior = PatchNR(glow_flow(9, 2, 8, permute=True), patch_size=3)
    state = prior.state_dict()
    key = next(key for key in state if key.endswith("2.perm"))
    for wrong in (state[key] + 0.4, state[key].clamp(min=1)):
        with pytest.raises(CheckpointError, match="perm: is not a permutation"):
            prior.load_state_dict({**state, key: wrong})


@pytest.mark.parametrize("name", ["allinone", "allinone_soft_exp", "allinone_householder"])
def test_rotations_are_checked_before_anything_is_loaded(name):
    priors = [PatchNR(make(name, 9, torch.float32, 0.1, seed), patch_size=3) for seed in (0, 1)]
    a, b = ({k: v.clone() for k, v in prior.state_dict().items()} for prior in priors)
    with pytest.raises(CheckpointError, match="w_.*: is not a rotation"):
        priors[0].load_state_dict({key: 0.5 * a[key] + 0.5 * b[key] for key in a})
    assert all(torch.equal(value, a[key]) for key, value in priors[0].state_dict().items())


def test_a_users_own_integers_stay_integers():
    """A user's flow whose buffers have the names of ours."""

    class Own(Outer):
        def __init__(self, seed=0):
            super().__init__(seed=seed)
            self.register_buffer("perm", torch.randperm(9, generator=torch.Generator().manual_seed(seed)))
            self.register_buffer("initialised", torch.tensor(True))

        def forward(self, x, rev=False):
            return self.inner(x[:, self.perm], rev=rev)

    prior, other = (PatchNR(Own(seed), patch_size=3) for seed in (0, 1))
    other.load_state_dict(prior.state_dict())
    x = torch.rand(1, 5, 9)
    assert torch.equal(other(x), prior(x)) and other.normalizing_flow.perm.dtype == torch.int64
