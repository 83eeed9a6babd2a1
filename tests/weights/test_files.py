"""Weights in files: broken files are refused and change nothing, and what is written is read again."""

import io
import math
import pickle
from pathlib import Path

import deepinv as dinv
import pytest
import torch
from cases import BUILT, make
from dialects import LAYERS, WIDTH, deepinv_now, enlarge, ours
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deepinv_flows import (
    MAP,
    CheckpointError,
    FlowDenoiser,
    FlowPrior,
    PatchNR,
    allinone_flow,
    glow_flow,
    image_flow,
    load_images,
    weights,
)


@pytest.mark.parametrize("name", BUILT)
def test_save_and_from_checkpoint(name, tmp_path):
    prior = PatchNR(make(name, 18, torch.float32), patch_size=3, channels=2)
    prior.save(tmp_path / "weights.safetensors")
    again = PatchNR.from_checkpoint(tmp_path / "weights.safetensors")
    x = torch.rand(2, 2, 9, 7)
    assert torch.equal(again(x), prior(x))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


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
        CheckpointError,
        match="nothing: no file or shipped weights of this name; shipped: 'gravel', 'lfw', 'natural', "
        "'natural15-50', 'natural25', 'Patch",
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
    for path in Path(weights.__file__).parent.glob("*.safetensors"):
        assert path.stat().st_size < 3e6 and path.with_suffix(".md").is_file()
    assert PatchNR(pretrained="gravel")(torch.rand(1, 1, 12, 12)).isfinite().all()


@pytest.mark.parametrize("name, levels", [("natural25", (25, 25)), ("natural15-50", (15, 50))])
def test_shipped_denoisers_remove_noise(name, levels):
    prior = PatchNR.from_checkpoint(name)
    assert prior.sigma_range == tuple(level / 255 for level in levels)
    (x,) = load_images("gravel")
    x = x[None, :, :64, :64]
    for level in {25, *levels}:
        y = x + level / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            x_net = FlowDenoiser(prior)(y, level / 255)
        assert (x_net - x).square().mean() < (0.8 if level == 15 else 0.5) * (y - x).square().mean()
    with pytest.raises(ValueError, match="for which the prior was trained"):
        FlowDenoiser(prior)(y, 10 / 255)


def test_shipped_prior_of_photographs_reconstructs():
    prior = PatchNR.from_checkpoint("natural", pad=True).requires_grad_(False)
    (x,) = load_images("gravel")
    x, physics = x[None, :, :48, :48], dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x_net = MAP(prior, dinv.optim.L2(sigma=0.1), 0.4 * x.numel() / prior.dim, max_iter=30, verbose=False)(y, physics)
    assert (x_net - x).square().mean() < 0.5 * (y - x).square().mean()


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


def test_saved_files_have_the_users_permissions(tmp_path):
    ours(3, 1).save(tmp_path / "weights")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_double_is_saved_as_double(tmp_path):
    """Weights are not rounded; those of a shorter dtype than torch's default are loaded in the default dtype."""
    for flow in ("glow_permuted", "allinone_soft_exp"):
        prior = PatchNR(make(flow, 9, torch.float64), patch_size=3)
        prior.save(tmp_path / "double")
        torch.save(prior.state_dict(), tmp_path / "double.pt")
        x = torch.rand(1, 20, 9, dtype=torch.float64)
        for path in ("double", "double.pt"):
            assert torch.equal(PatchNR.from_checkpoint(tmp_path / path)(x), prior(x))
            assert torch.equal(PatchNR(pretrained=tmp_path / path, patch_size=3)(x), prior(x))
    image = FlowPrior(image_flow((1, 8, 8), 2, 1, 4).double())
    image.save(tmp_path / "image")
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(FlowPrior(pretrained=tmp_path / "image")(x), image(x))
    PatchNR(patch_size=3).bfloat16().save(tmp_path / "short")
    assert PatchNR.from_checkpoint(tmp_path / "short")(x[:, :, :4, :4].float()).dtype == torch.float32


def test_faults_of_writing(tmp_path):
    prior = ours(3, 1)
    with pytest.raises(CheckpointError, match=r"weights: cannot be written \(there is no folder .*missing\)"):
        prior.save(tmp_path / "missing" / "weights")
    with pytest.raises(CheckpointError, match=r"cannot be written \(it is a folder"):
        prior.save(tmp_path)
    if Path("/proc/self").is_dir():
        with pytest.raises(CheckpointError, match=r"/proc/self/weights: cannot be written \([A-Z]"):
            prior.save("/proc/self/weights")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["ours", "zip", "pickle"])
def test_open_files(kind, tmp_path):
    prior = ours(3, 1)
    if kind == "ours":
        prior.save(tmp_path / "weights")
        buffer = io.BytesIO((tmp_path / "weights").read_bytes())
    else:
        state = prior.to_deepinv_state_dict()
        torch.save(state, buffer := io.BytesIO(), _use_new_zipfile_serialization=kind == "zip")
        (tmp_path / "weights").write_bytes(buffer.getvalue())
    x = torch.rand(1, 20, 9)
    sizes = dict(patch_size=3, num_layers=LAYERS, sub_net_size=WIDTH)
    for load in (lambda f: PatchNR(pretrained=f, **sizes), PatchNR.from_checkpoint):
        buffer.seek(0)
        assert torch.equal(load(buffer)(x), prior(x)) and torch.equal(load(tmp_path / "weights")(x), prior(x))
        with open(tmp_path / "weights", "rb") as file:
            assert torch.equal(load(file)(x), prior(x))
    with pytest.raises(CheckpointError, match="BytesIO: "):
        PatchNR(pretrained=io.BytesIO(b"something else"))


def test_a_header_of_640_bytes_is_not_a_pickle(tmp_path):
    """A file of safetensors begins with the length of its header; a length of 640 is b"\\x80\\x02", which begins a pickle too."""
    prior = ours(3, 1)
    prior.save(tmp_path / "weights")
    raw = (tmp_path / "weights").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    padded = 0x02 * 256 + 0x80 + 256 * 256 * (size // 65536 + 1)
    (tmp_path / "weights").write_bytes(padded.to_bytes(8, "little") + raw[8 : 8 + size].ljust(padded) + raw[8 + size :])
    x = torch.rand(1, 20, 9)
    assert torch.equal(PatchNR.from_checkpoint(tmp_path / "weights")(x), prior(x))


@pytest.mark.parametrize("patch", [(6, 3), (3, 1), (6, 1), (3, 2), (8, 3), (5, 4)], ids=str)
def test_channels_that_fit(patch, tmp_path):
    """A file of deepinv's gives the dimension alone; the number of channels is the smallest for which square patches fit it."""
    torch.save(deepinv_now(*patch)[0], tmp_path / "deepinv.pt")
    dim = patch[0] ** 2 * patch[1]
    fewest = next(c for c in range(1, dim) if (dim / c) ** 0.5 % 1 == 0)
    found = PatchNR.from_checkpoint(tmp_path / "deepinv.pt")
    assert found.dim == dim and found.channels == fewest
    for known in (dict(channels=patch[1]), dict(patch_size=patch[0]), dict(patch_size=patch[0], channels=patch[1])):
        found = PatchNR.from_checkpoint(tmp_path / "deepinv.pt", **known)
        assert (found.patch_size, found.channels) == patch
    with pytest.raises(CheckpointError, match=rf"channels=7; found weights for patch dimension {dim}: pass channels="):
        PatchNR.from_checkpoint(tmp_path / "deepinv.pt", channels=7)


def test_a_dimension_without_square_patches_is_named(tmp_path):
    flow = glow_flow(7, 1, 4)
    torch.save(flow.to_deepinv_state_dict(), tmp_path / "seven.pt")
    with pytest.raises(CheckpointError, match="square patches .*; found weights for patch dimension 7: pass channels="):
        PatchNR.from_checkpoint(tmp_path / "seven.pt")
    assert PatchNR.from_checkpoint(tmp_path / "seven.pt", channels=7).patch_size == 1


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_seeded_script_keeps_its_noise(pretrained, tmp_path):
    """The constructor draws as many numbers of torch's global generator as deepinv's constructor does."""
    sizes = dict(patch_size=3, num_layers=2, sub_net_size=8)
    torch.save(dinv.optim.PatchNR(**sizes).state_dict(), tmp_path / "w.pt")
    noise = []
    for cls in (dinv.optim.PatchNR, PatchNR):
        torch.manual_seed(7)
        cls(pretrained=str(tmp_path / "w.pt") if pretrained else None, **sizes)
        noise.append(torch.randn(3))
    assert torch.equal(*noise)


def test_the_range_of_the_images_is_kept(tmp_path):
    prior = ours(3, 1)
    prior.image_range = (-0.25, 1.5)
    prior.save(tmp_path / "weights")
    assert PatchNR.from_checkpoint(tmp_path / "weights").image_range == (-0.25, 1.5)
    assert PatchNR(pretrained=tmp_path / "weights", patch_size=3).image_range == (-0.25, 1.5)


@pytest.mark.parametrize("build", [glow_flow, allinone_flow])
def test_a_flow_of_shared_blocks_is_saved(build, tmp_path):
    flow = build(9, 2, 8)
    flow.module_list[1 + (build is glow_flow)] = flow.module_list[int(build is glow_flow)]
    prior = PatchNR(flow, patch_size=3)
    prior.save(tmp_path / "weights.safetensors")
    x = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(PatchNR.from_checkpoint(tmp_path / "weights.safetensors")(x), prior(x))
