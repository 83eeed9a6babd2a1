"""Trainings from YAML files: run, resumed, on a user's own images, by several processes, and with errors."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import deepinv as dinv
import pytest
import torch
from config_cases import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from deepinv_flows import PatchNR, console

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
spec = importlib.util.spec_from_file_location("train", EXAMPLES / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


def arguments(name, path, *overrides):
    quiet = ["epochs=1", "trainer.show_progress_bar=false", f"save_path={path}"]
    return ["--config", str(CONFIGS / f"{name}.yaml"), *TINY[name].split(), *quiet, *overrides]


def checkpoint(path, pattern="ckp_[0-9]*"):
    newest = max(Path(path).glob(f"*/{pattern}"), key=lambda file: file.stat().st_mtime)
    return torch.load(newest, weights_only=False)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my images"
    (path / "below").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "below/c.png"):
        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(path / name)
    return path


def test_there_is_a_test_for_every_config():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_config_runs_and_resumes_on_own_images(name, tmp_path, folder, capsys):
    assert train.main(arguments(name, tmp_path)) == 0
    first = checkpoint(tmp_path)
    (metric,) = first["eval_metrics"].values()
    assert first["epoch"] == 0 and torch.tensor(metric).isfinite().all()
    (next(tmp_path.glob("2*")) / "ckp_9.pth.tar").write_bytes(b"cut short")
    next(tmp_path.glob("2*")).rename(tmp_path / "first")  # a second run in the same second would want its name
    assert train.main(arguments(name, tmp_path, "resume=true", "epochs=2", f"data={folder}")) == 0
    second = checkpoint(tmp_path)
    assert "successfully loaded from checkpoint" in capsys.readouterr().out
    assert second["epoch"] == 1 and len(second["loss"].popitem()[1]) == 1
    steps = [max(state["step"] for state in each["optimizer"]["state"].values()) for each in (first, second)]
    assert steps[1] == 2 * steps[0]


def test_trained_weights_are_a_prior_and_seeds_decide(tmp_path):
    for k, seed in enumerate((3, 3, 4)):
        assert train.main(arguments("patchnr", tmp_path / str(k), f"seed={seed}")) == 0
    losses = [checkpoint(tmp_path / str(k))["loss"] for k in range(3)]
    assert losses[0] == losses[1] != losses[2]
    prior = PatchNR.from_checkpoint(next(tmp_path.glob("0/*/ckp_best.pth.tar")))
    assert prior(torch.rand(2, 1, 9, 9)).isfinite().all()


def one_line(capsys, argv):
    """The message of a faulty call, which has to be all that is written to the error stream."""
    code = train.main(argv)
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("train.py: ") and error.count("\n") == 1, (argv, error)
    return error


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["epoch=3"], "no key 'epoch' in .*patchnr.yaml; did you mean 'epochs'"),
        (["model.flow.num_layer=3"], "did you mean 'model.flow.num_layers'"),
        (["zzz=3"], "no key 'zzz' .* it has data, channels"),
        (["epochs"], "expected key=value; got 'epochs'"),
        (["epochs=0"], "expected epochs to be an integer >= 1; got 0"),
        (["batch_size=many"], "expected batch_size to be an integer >= 1; got 'many'"),
        (["data=/no/such/folder"], "expected a folder of images, a file, .* got '/no/such/folder'"),
        (["model._target_=deepinv_flows.FlowModl"], "model: .*FlowModl"),
        (["+model.colour=red"], "model: TypeError: .*unexpected keyword argument 'colour'"),
        (["+trainer.colour=red"], "unexpected keyword argument 'colour'"),
        (["channels=${nothing}"], "Interpolation key 'nothing' not found"),
        (["patch_size=[1,"], "ParserError"),
        (["patch_size=1000"], "expected images of at least 1000 x 1000 pixels"),
        (["resume=none.pth.tar"], "none.pth.tar"),
        (["dtype=float8"], "expected dtype to be one of 'float32', 'float64'; got 'float8'"),
        (["optimizer.lr=1e30", "epochs=2"], "diverged|finite"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_faults_say_one_line(overrides, message, tmp_path, capsys):
    assert re.search(message, one_line(capsys, arguments("patchnr", tmp_path, *overrides)))


def test_faults_of_files(tmp_path, capsys):
    assert "no_such.yaml" in one_line(capsys, ["--config", str(tmp_path / "no_such.yaml")])
    assert "--config" in one_line(capsys, [])
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    assert "broken.yaml" in one_line(capsys, ["--config", str(tmp_path / "broken.yaml")])
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "expected keys and values" in one_line(capsys, ["--config", str(tmp_path / "list.yaml")])
    (tmp_path / "empty.yaml").write_text("")
    one_line(capsys, ["--config", str(tmp_path / "empty.yaml")])
    (tmp_path / "images").mkdir()
    assert "got" in one_line(capsys, arguments("patchnr", tmp_path, f"data={tmp_path / 'images'}"))
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    assert "a.png" in one_line(capsys, arguments("patchnr", tmp_path, f"data={tmp_path / 'images'}"))
    other = arguments("patchnr", tmp_path / "other")
    assert train.main(other) == 0
    next((tmp_path / "other").glob("2*")).rename(tmp_path / "other" / "first")
    assert "size mismatch" in one_line(capsys, [*other, "resume=true", "model.flow.sub_net_size=16"])


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("data", "a #1", "a #1"),
        ("data", "2024", "2024"),
        ("data", "a: b", "a: b"),
        ("data", "1e3", "1e3"),
        ("data", "yes", "yes"),
        ("data", "[camera, coins]", ["camera", "coins"]),
        ("data", '"a b"', "a b"),
        ("save_path", "null", None),
        ("save_path", "-", "-"),
        ("resume", "true", True),
        ("resume", "2024", "2024"),
        ("resume", "runs/a #1/ckp_0.pth.tar", "runs/a #1/ckp_0.pth.tar"),
        ("test_data", "007", "007"),
        ("model._target_", "a.b #c", "a.b #c"),
        ("channels", "3", 3),
        ("samples_per_epoch", "null", None),
        ("optimizer.lr", "1e-4", 1e-4),
        ("+trainer.early_stop", "3", 3),
        ("+note", "a #1", "a #1"),
    ],
)
def test_paths_are_texts_and_numbers_are_numbers(key, text, expected):
    config = train.read_config(str(CONFIGS / "patchnr.yaml"), [f"{key}={text}"])
    found = OmegaConf.select(config, key.removeprefix("+"))
    found = OmegaConf.to_container(found) if OmegaConf.is_list(found) else found
    assert found == expected and type(found) is type(expected)


def test_a_folder_of_any_name_is_trained_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a #1", "2024", "a: b"):
        folder.rename(tmp_path / name)
        folder = tmp_path / name
        assert train.main(arguments("patchnr", tmp_path / f"run {name}", f"data={name}", "channels=3")) == 0
    other = train.main(arguments("patchnr", tmp_path / "none", "data=a"))
    assert other == 1 and "got 'a'" in capsys.readouterr().err


def test_resuming_nothing_is_refused(tmp_path, capsys):
    error = one_line(capsys, arguments("patchnr", tmp_path, "resume=true"))
    assert f"resume=true: no readable checkpoint under {tmp_path}; resume=false starts anew" in error
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckp_0.pth.tar").write_bytes(b"cut short")
    assert "no readable checkpoint" in one_line(capsys, arguments("patchnr", tmp_path, "resume=true"))
    for mode in ("resume=true", "mode=test"):
        assert f"{mode} needs save_path" in one_line(capsys, [*arguments("patchnr", tmp_path, mode), "save_path=null"])
    assert "no readable checkpoint" in one_line(capsys, arguments("patchnr", tmp_path, "mode=test"))
    assert "test_data is for mode=test" in one_line(capsys, arguments("patchnr", tmp_path, "test_data=coins"))
    assert "expected mode to be one of" in one_line(capsys, arguments("patchnr", tmp_path, "mode=evaluate"))


def set_aside(path):
    """Rename a run, as a second run in the same second would have the same name."""
    next(path.glob("2*")).rename(path / "first")


@pytest.mark.parametrize("name", TINY)
def test_resumed_is_uninterrupted(name, tmp_path):
    """Without a schedule that depends on the number of epochs, weights, metrics and random states are equal to the bit."""
    assert train.main(arguments(name, tmp_path / "whole", "epochs=3", "scheduler=null")) == 0
    assert train.main(arguments(name, tmp_path / "broken", "epochs=2", "scheduler=null")) == 0
    set_aside(tmp_path / "broken")
    assert train.main(arguments(name, tmp_path / "broken", "epochs=3", "scheduler=null", "resume=true")) == 0
    one, two = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "broken")
    assert all(torch.equal(two["state_dict"][key], value) for key, value in one["state_dict"].items())
    assert all(torch.equal(a, b) for a, b in zip(one["generators"], two["generators"]))
    assert [values[-1] for values in one["eval_metrics"].values()] == [
        values[-1] for values in two["eval_metrics"].values()
    ]


def test_a_checkpoint_without_random_states_is_resumed_in_the_same_order(tmp_path):
    """Version 0.1.0 wrote such files. The order of the samples and their noise depend on the seed and the epoch alone."""
    options = ["scheduler=null", "seed=3"]
    assert train.main(arguments("unfolded_nmapg", tmp_path / "whole", "epochs=3", *options)) == 0
    assert train.main(arguments("unfolded_nmapg", tmp_path / "broken", "epochs=2", *options)) == 0
    set_aside(tmp_path / "broken")
    for path in (tmp_path / "broken" / "first").glob("ckp_*"):
        state = torch.load(path, weights_only=False)
        torch.save({key: value for key, value in state.items() if key != "generators"}, path)
    assert train.main(arguments("unfolded_nmapg", tmp_path / "broken", "epochs=3", "resume=true", *options)) == 0
    one, two = checkpoint(tmp_path / "whole")["state_dict"], checkpoint(tmp_path / "broken")["state_dict"]
    assert all(torch.equal(two[key], value) for key, value in one.items())


def test_lengthened_goes_on_at_the_rate_of_the_new_length(tmp_path):
    assert train.main(arguments("patchnr", tmp_path, "epochs=2")) == 0
    assert checkpoint(tmp_path)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)
    set_aside(tmp_path)
    assert train.main(arguments("patchnr", tmp_path, "epochs=3", "resume=true", "optimizer.lr=1e-2")) == 0
    state = checkpoint(tmp_path)
    assert state["scheduler"]["base_lrs"] == [1e-2] and state["scheduler"]["T_max"] == 3
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)
    assert state["scheduler"]["last_epoch"] == 3


# --- using what was trained ---


def header(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line.removeprefix("#   ") for line in lines if line.startswith("#   "))


@pytest.mark.parametrize("name", TINY)
def test_the_header_shows_how_to_reconstruct(name, tmp_path):
    assert train.main(arguments(name, tmp_path)) == 0
    run = next(tmp_path.glob("2*"))
    code = header(name)
    assert code.count("\n") in (4, 5) and f"runs/{name}/<date>" in code
    config = OmegaConf.load(run / "config.yaml")
    flow = name in ("patchnr", "image_flow")
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1)) if flow else train.instantiate(config.physics)
    x = torch.rand(1, 1, 12 if name == "patchnr" else config.size, 12 if name == "patchnr" else config.size)
    names = {"y": physics(x), "physics": physics}
    exec(code.replace(f"runs/{name}/<date>", str(run)), names)
    assert names["x_net"].shape == x.shape and names["x_net"].isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_mode_test_evaluates_and_writes_images(name, tmp_path, folder, capsys):
    assert train.main(arguments(name, tmp_path)) == 0
    run = next(tmp_path.glob("2*"))
    best = torch.load(run / "ckp_best.pth.tar", weights_only=False)
    (metric,) = best["eval_metrics"]
    capsys.readouterr()
    assert train.main(arguments(name, tmp_path, "mode=test")) == 0
    out = capsys.readouterr().out
    assert f"{metric}: " in out and f"images: {run / 'test'}" in out
    assert list(tmp_path.glob("2*")) == [run]
    pictures = list((run / "test").rglob("*.png"))
    assert pictures
    assert (
        train.main(arguments(name, tmp_path, "mode=test", f"test_data={folder}", f"resume={run / 'ckp_best.pth.tar'}"))
        == 0
    )
    assert f"{metric}: " in capsys.readouterr().out


def test_mode_test_uses_the_settings_of_the_run_and_each_image_once(tmp_path, folder, capsys):
    assert train.main(arguments("splitting_noiseless", tmp_path)) == 0
    run = next(tmp_path.glob("2*"))
    quiet = ["trainer.show_progress_bar=false", "mode=test", "channels=1", f"test_data={folder}"]
    config = ["--config", str(CONFIGS / "splitting_noiseless.yaml"), f"save_path={tmp_path}"]
    capsys.readouterr()
    with pytest.warns(UserWarning, match="3 of 3 files"):
        assert train.main([*config, *quiet]) == 0, capsys.readouterr().err  # without the sizes of the training
    assert f"images: {run / 'test'}" in capsys.readouterr().out


def test_grey_from_a_folder_in_colour_is_said(folder, tmp_path):
    with pytest.warns(
        UserWarning, match="3 of 3 files of .* are in colour and are read as grey; channels=3 keeps the colours"
    ):
        train.main(arguments("patchnr", tmp_path, f"data={folder}"))


def test_in_a_file_a_training_says_a_line_an_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "LONG", 0.0)
    loud = ["epochs=3", "trainer.show_progress_bar=true"]
    assert train.main(arguments("patchnr", tmp_path, *loud)) == 0
    out, err = capsys.readouterr()
    lines = [line.split(", loss ")[0] for line in out.splitlines() if line.startswith("training: ")]
    assert lines == [f"training: {text}" for text in ("epoch 1 of 3", "epoch 2 of 3", "3 of 3 epochs")]
    assert "BitsPerDim" in out and "%|" not in err and "Train epoch" not in out + err
    assert train.main(arguments("patchnr", tmp_path, "trainer.show_progress_bar=true", "mode=test")) == 0
    assert "%|" not in capsys.readouterr().err


def test_progress_bars_are_on_by_default():
    assert all(config["trainer"]["show_progress_bar"] is True for config in FILES.values())


FILES = {name: OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml")) for name in TINY}
words = st.text(st.characters(codec="ascii", exclude_characters="\x00"), max_size=8)
values = st.one_of(
    words, st.sampled_from(["-1", "0", "2", "1e-9", "nan", ".inf", "[]", "{}", "null", "[1, a]", "{a: 1}", "${data}"])
)


@st.composite
def faulty(draw):
    name = draw(st.sampled_from(sorted(TINY)))
    known = st.sampled_from([key for key in train.keys(FILES[name]) if "_target_" not in key and key != "save_path"])
    keys = st.one_of(known, words, st.builds("{}.{}".format, known, words), st.builds("+{}.x".format, known))
    return name, draw(st.lists(st.builds("{}={}".format, keys, values), min_size=1, max_size=2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(faulty())
def test_any_override_trains_or_says_one_line(tmp_path_factory, case):
    name, overrides = case
    path = tmp_path_factory.mktemp("fuzz")
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        code = train.main(arguments(name, path, *overrides))
    error = stderr.getvalue()
    assert code == 0 or (code == 1 and error.startswith("train.py: ") and error.count("\n") == 1), error


def run(*command):
    return subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True)


def test_the_command_fails_without_a_traceback(tmp_path):
    done = run(str(EXAMPLES / "train.py"), *arguments("patchnr", tmp_path, "model._target_=os.nothing"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "os.nothing" in done.stderr


def test_a_process_that_dies_ends_the_training_with_one_line(tmp_path, monkeypatch):
    """``train.py`` prints one line, before the report of torchrun."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}")
    mortal = '{_target_: distributed_cases.Mortal, rank: "${oc.decode:${oc.env:RANK}}"}'
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(EXAMPLES / "train.py")]
    done = run(*torchrun, *arguments("unfolded_nmapg", tmp_path, f"losses={mortal}", "epochs=9"))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert line.endswith("process 0 of 2 stops, since another process of its group has ended early")


def test_two_processes_train_as_one(tmp_path):
    """Two processes have the losses of every step, the metrics and the weights of one process on the whole batch."""
    options = ["epochs=2", "dtype=float64", "trainer.compute_eval_losses=true", "+trainer.log_train_batch=true"]
    assert train.main(arguments("patchnr", tmp_path / "one", *options)) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(EXAMPLES / "train.py")]
    done = run(*torchrun, *arguments("patchnr", tmp_path / "two", *options))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainable parameters") == 1
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    for history in ("loss", "eval_loss", "eval_metrics"):
        (expected,), (found,) = one[history].values(), two[history].values()
        assert len(expected) == 4
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=0)
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-9, atol=1e-12)
