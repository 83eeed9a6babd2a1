"""The trainings that YAML files describe: run, resumed, on a user's own images, by several processes, and with faults."""

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from deepinv_flows import PatchNR

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
spec = importlib.util.spec_from_file_location("train", EXAMPLES / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

CROPS = "size=16 train_data.number=8 eval_data.number=4 batch_size=4"
SPLITTING = f"{CROPS} model.backbone_net.depth=3 model.backbone_net.nf=4"
TINY = {
    "image_flow": "size=8 train_data.images.number=8 eval_data.number=4 batch_size=4 model.flow.flow.num_steps=1",
    "learned_primal_dual": f"{CROPS} model.max_iter=2 model.nf=4 physics.angles=8",
    "patchnr": "samples_per_epoch=128 batch_size=64 eval_data.size=64 model.flow.num_layers=2 model.flow.sub_net_size=8",
    "splitting_noiseless": SPLITTING,
    "splitting_noisy": SPLITTING,
    "unfolded_nmapg": f"{CROPS} model.max_iter=2 model.stepsize=[0.1,0.1] model.lambda_reg=[0.1,0.1]",
}


def arguments(name, path, *overrides):
    return ["--config", str(CONFIGS / f"{name}.yaml"), *TINY[name].split(), "epochs=1", f"save_path={path}", *overrides]


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
    """What a faulty call says; nothing else may come to light on the error stream."""
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


def test_two_processes_train_as_one(tmp_path):
    """The losses of every step, the metrics, and the weights: one process on the joined batch, and two."""
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
