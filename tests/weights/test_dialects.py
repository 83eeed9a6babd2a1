"""Four dialects in, two out; whatever is broken is refused and changes nothing."""

import copy
import io
import math
import pickle

import deepinv as dinv
import pytest
import torch
from cases import BUILT, make
from dialects import DIALECTS, LAYERS, WIDTH, deepinv_040, deepinv_now, enlarge
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deepinv_flows import CheckpointError, PatchNR, glow_flow


def ours(patch_size, channels):
    return PatchNR(patch_size=patch_size, channels=channels, num_layers=LAYERS, sub_net_size=WIDTH)


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
        with pytest.raises(ValueError, match="deepinv's PatchNR has no flow like"):
            prior.to_deepinv_state_dict()


@pytest.mark.parametrize("name", BUILT)
def test_save_and_from_checkpoint(name, tmp_path):
    prior = PatchNR(make(name, 18, torch.float32), patch_size=3, channels=2)
    prior.save(tmp_path / "weights.safetensors")
    again = PatchNR.from_checkpoint(tmp_path / "weights.safetensors")
    x = torch.rand(2, 2, 9, 7)
    assert torch.equal(again(x), prior(x))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


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


class Evil:
    def __reduce__(self):
        return (print, ("code in a checkpoint was run",))


def _torch_bytes(obj) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def broken_files(good: dict) -> dict[str, bytes]:
    first = next(iter(good))
    nan = {**good, first: torch.full_like(good[first], math.nan)}
    shape = {**good, first: good[first][:-1]}
    return {
        "empty": b"",
        "garbage": b"not a checkpoint at all, sorry" * 10,
        "truncated": _torch_bytes(good)[:-500],
        "half": _torch_bytes(good)[: len(_torch_bytes(good)) // 2],
        "code": _torch_bytes({**good, "evil": Evil()}),
        "bare pickle": pickle.dumps(Evil()),
        "nan": _torch_bytes(nan),
        "wrong shape": _torch_bytes(shape),
        "missing tensor": _torch_bytes({key: good[key] for key in list(good)[1:]}),
        "other network": _torch_bytes({"conv.weight": torch.rand(3)}),
        "no tensors": _torch_bytes({"blocks.0": 3}),
        "list": _torch_bytes([torch.rand(3)]),
    }


@pytest.mark.parametrize("fault", broken_files(deepinv_now(3, 1)[0]))
def test_broken_files_are_refused(fault, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    path.write_bytes(broken_files(deepinv_now(3, 1)[0])[fault])
    with pytest.raises(CheckpointError) as error:
        PatchNR(patch_size=3, num_layers=LAYERS, sub_net_size=WIDTH, pretrained=str(path))
    assert len(str(error.value)) < 500
    assert "was run" not in capsys.readouterr().out


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


def test_our_files_are_checked_too(tmp_path):
    path = tmp_path / "weights.safetensors"
    ours(3, 1).save(path)
    with pytest.raises(
        CheckpointError, match=r"expected weights for .*\(patch dimension 36\); found weights for patch dimension 9"
    ):
        PatchNR(pretrained=str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="neither a torch nor a safetensors file"):
        PatchNR.from_checkpoint(path)
    with pytest.raises(ValueError, match="know their architecture; got NormalizingFlow"):
        PatchNR(make("deepinv", 9, torch.float32), patch_size=3).save(path)
    save_file({"w": torch.rand(3)}, path)
    with pytest.raises(CheckpointError, match=r"not the weights of a PatchNR: tensors named \['w'\]"):
        PatchNR.from_checkpoint(path)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_flipped_bytes_give_finite_weights_or_our_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "weights"
    if data.draw(st.booleans()):
        PatchNR(patch_size=2, num_layers=1, sub_net_size=4).save(path)
        raw = path.read_bytes()
    else:
        raw = _torch_bytes(dinv.optim.PatchNR(patch_size=2, num_layers=1, sub_net_size=4).state_dict())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(raw) - 1))
        raw = raw[:where] + bytes([data.draw(st.integers(0, 255))]) + raw[where + 1 :]
    path.write_bytes(raw)
    try:
        prior = PatchNR(patch_size=2, num_layers=1, sub_net_size=4, pretrained=str(path))
    except CheckpointError:
        return
    assert all(torch.isfinite(p).all() for p in prior.parameters())


def test_pretrained_names():
    with pytest.raises(
        CheckpointError, match="nothing: no file or shipped weights of this name; shipped: 'gravel', 'lfw', 'PatchNR_"
    ):
        PatchNR(pretrained="nothing")
    with pytest.raises(CheckpointError, match=r"missing.pt: no file"):
        PatchNR.from_checkpoint("missing.pt")


def test_lodopab_needs_internet(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("deepinv.models.utils.load_state_dict_from_url", offline)
    with pytest.raises(CheckpointError, match="downloaded by deepinv and needs internet access: no route to host"):
        PatchNR(patch_size=3, pretrained="PatchNR_lodopab_small2")


def test_lodopab_weights_when_there_is_internet(monkeypatch):
    theirs = enlarge(dinv.optim.PatchNR(patch_size=3))
    monkeypatch.setattr("deepinv.models.utils.load_state_dict_from_url", lambda *a, **k: theirs.state_dict())
    prior = PatchNR(patch_size=3, pretrained="PatchNR_lodopab_small2")
    x = torch.randn(1, 5, 9)
    torch.testing.assert_close(prior(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_shipped_weights():
    prior = PatchNR(pretrained="gravel")
    assert prior(torch.rand(1, 1, 12, 12)).isfinite().all()
    assert sum(p.numel() * p.element_size() for p in prior.parameters()) < 3e6


# --- a state dict says which function it is for ---


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


@pytest.mark.parametrize("name", ["deepinv", "freia_sequence", "freia_block", "allinone"])
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


@pytest.mark.parametrize(
    "raw",
    [
        {1: torch.rand(2)},
        {"module_list.x.subnet1.0.weight": torch.rand(2, 2), "module_list.0.subnet1.0.weight": torch.rand(2, 2)},
        {"module_list.0.subnet1.0.weight": torch.rand(2)},
        {"module_list.0": torch.rand(2)},
        {"blocks.0.subnet3.0.weight": torch.rand(2, 2)},
        {"blocks.0.subnet1.0.weight": torch.rand(2, 2).to_sparse()},
        {"_extra_state": torch.tensor([1, 2, 3], dtype=torch.uint8)},
        {},
    ],
    ids=lambda raw: str(list(raw)),
)
def test_odd_state_dicts_raise_our_error(raw, tmp_path):
    torch.save(raw, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="odd.pt: "):
        PatchNR(patch_size=3, pretrained=str(tmp_path / "odd.pt"))
    with pytest.raises(CheckpointError):
        PatchNR.from_checkpoint(tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="state dict: "):
        PatchNR(patch_size=3).load_state_dict(raw)


@pytest.mark.parametrize("metadata", ["3", "{}x", '{"a": 1}', '{"config": {"builder": "glow_flow"}, "patch": {}}'])
def test_odd_metadata_raises_our_error(metadata, tmp_path):
    save_file({"w": torch.rand(3)}, tmp_path / "odd.safetensors", {"deepinv_flows": metadata})
    with pytest.raises(CheckpointError, match="odd.safetensors: "):
        PatchNR(pretrained=str(tmp_path / "odd.safetensors"))


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


def test_saved_files_have_the_users_permissions(tmp_path):
    ours(3, 1).save(tmp_path / "weights")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


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
