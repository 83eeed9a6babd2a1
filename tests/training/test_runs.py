"""Trainings in folders: interrupted, resumed, lengthened, in parallel, stopped early, diverged."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from deepinv_flows import CheckpointError, fit_flow, fit_patchnr, image_flow
from deepinv_flows.training import runs
from deepinv_flows.training.runs import WarmCosine, _newest


def test_early_stopping(tmp_path):
    options = dict(patch_size=3, sub_net_size=64, epochs=60, steps_per_epoch=30, batch_size=64, augment=False)
    fit_patchnr(
        torch.rand(1, 1, 8, 8),
        torch.rand(1, 1, 30, 30),
        early_stop=2,
        save_path=tmp_path,
        verbose=False,
        lr=3e-3,
        **options,
    )
    epochs = [int(p.name.split("_")[1].split(".")[0]) for p in tmp_path.glob("*/*/ckp_[0-9]*")]
    assert max(epochs) < 59


def test_runs_in_one_folder_do_not_mix(tmp_path):
    options = dict(patch_size=3, sub_net_size=8, steps_per_epoch=20, batch_size=64, verbose=False, save_path=tmp_path)
    image, other = torch.rand(1, 1, 20, 20), torch.zeros(1, 1, 20, 20)
    first = fit_patchnr(image, image, epochs=4, **options)
    second = fit_patchnr(image, image, epochs=1, **options)
    third = fit_patchnr(other, other, epochs=2, num_layers=2, **options)
    with torch.no_grad():
        assert first(image) < second(image) < third(image)
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run_0", "run_1", "run_2"]


def test_resuming_another_architecture_names_the_file(tmp_path):
    options = dict(patch_size=3, epochs=1, steps_per_epoch=2, verbose=False, save_path=tmp_path)
    fit_patchnr(torch.rand(1, 1, 20, 20), sub_net_size=8, **options)
    with pytest.raises(ValueError, match="ckp_0.pth.tar: .*expected shape"):
        fit_patchnr(torch.rand(1, 1, 20, 20), sub_net_size=16, resume=True, **options)


@pytest.mark.parametrize("held_out", [True, False])
def test_divergence_is_reported(held_out):
    image = 1e3 * torch.rand(1, 1, 12, 12)
    options = dict(patch_size=3, sub_net_size=8, epochs=3, steps_per_epoch=20, batch_size=32, verbose=False)
    with pytest.raises(ValueError, match="diverged"):
        fit_patchnr(image, image if held_out else None, lr=1e30, **options)


TRAIN = """
    import torch
    from deepinv_flows import fit_patchnr
    torch.set_num_threads(1)
    x = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 70, 70, generator=torch.Generator().manual_seed(0)), 5, 1)
    prior = fit_patchnr(
        x, x, patch_size=3, sub_net_size=16, epochs={epochs}, steps_per_epoch={steps}, batch_size=128, save_path={path!r},
        resume=True, verbose=False)
    print(float(prior(x).detach()))
"""


def run(path, epochs=6, steps=60):
    code = textwrap.dedent(TRAIN.format(path=str(path), epochs=epochs, steps=steps))
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed(tmp_path):
    whole = run(tmp_path / "whole")
    expected = float(whole.communicate()[0])
    broken = run(tmp_path / "broken", steps=60)
    deadline = time.time() + 120
    while not list(tmp_path.glob("broken/*/*/ckp_2.pth.tar")) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(broken.pid, signal.SIGKILL)
    broken.wait()
    newest = _newest([tmp_path / "broken" / "run_0"])
    reached = torch.load(newest, weights_only=False)["epoch"]
    assert 1 <= reached < 5
    # a checkpoint that the kill cut short is skipped
    (newest.parent / "ckp_99.pth.tar").write_bytes(newest.read_bytes()[:1000])
    resumed = float(run(tmp_path / "broken").communicate()[0])
    runs = sorted((tmp_path / "broken").glob("run*"))
    assert [path.name for path in runs] == ["run_0", "run_1"]
    last = next(runs[1].iterdir())
    again = [int(p.name.split("_")[1].split(".")[0]) for p in last.glob("ckp_[0-9]*")]
    assert min(again) == reached + 1 and max(again) == 5  # no finished epoch is repeated
    state = torch.load(last / f"ckp_{max(again)}.pth.tar", weights_only=False)["optimizer"]["state"]
    assert state[0]["step"] == 6 * 60  # the optimizer went on counting
    assert abs(resumed - expected) < 0.05 * abs(expected)


# --- resumed as if never interrupted ---

IMAGES = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 18, 18, generator=torch.Generator().manual_seed(0)), 5, 1)
FACES = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def patches(path, epochs, **options):
    defaults = dict(patch_size=3, sub_net_size=8, steps_per_epoch=8, batch_size=6, verbose=False, dequantise=0.1)
    return fit_patchnr(IMAGES, epochs=epochs, save_path=path, **{**defaults, **options})


def whole(path, epochs, **options):
    flow = image_flow((1, 8, 8), 2, 1, 4, generator=torch.Generator().manual_seed(2))
    return fit_flow(flow, FACES, epochs=epochs, save_path=path, batch_size=8, verbose=False, **options)


def scores(path, epochs, **options):
    return whole(path, epochs, sigma=0.1, **options)


class Stop(Exception):
    pass


def interrupted(fit, path, monkeypatch, epochs, after, **options):
    """A training that is ended by force when the checkpoint of epoch ``after`` is written."""
    save = runs._Trainer.save_model

    def stopping(self, filename, epoch, state=None):
        save(self, filename, epoch, state)
        if epoch == after and filename != "ckp_best.pth.tar":
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(runs._Trainer, "save_model", stopping)
        with pytest.raises(Stop):
            fit(path, epochs, **options)


def newest(path):
    return torch.load(_newest(runs._runs(path)), weights_only=False)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("fit", [patches, whole, scores])
def test_resumed_is_uninterrupted(fit, held_out, tmp_path, monkeypatch):
    """Weights, learning rate, state of the optimizer and state of the generator are equal to the bit."""
    options = {"eval_images": IMAGES if fit is patches else FACES} if held_out else {}
    expected = fit(tmp_path / "whole", 5, **options)
    interrupted(fit, tmp_path / "broken", monkeypatch, 5, 1, **options)
    found = fit(tmp_path / "broken", 5, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), expected.state_dict().values()))
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "broken")
    assert list(a["eval_loss"].values()) == [b["past"] + losses for losses in b["eval_loss"].values()]
    assert [losses[-3:] for losses in a["loss"].values()] == list(b["loss"].values())
    assert torch.equal(a["generators"][0], b["generators"][0])
    assert [g["lr"] for g in a["optimizer"]["param_groups"]] == [g["lr"] for g in b["optimizer"]["param_groups"]]


def test_lengthened_goes_on_at_the_rate_of_the_new_length(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def recording(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    patches(tmp_path, 4, steps_per_epoch=1, batch_size=64)
    patches(tmp_path, 8, steps_per_epoch=1, batch_size=64, resume=True)
    expected = [1e-3 * WarmCosine(4)(k) for k in range(4)] + [1e-3 * WarmCosine(8)(k) for k in range(4, 8)]
    assert list(filter(None, rates)) == pytest.approx(expected)  # what is timed does not learn
    rates.clear()
    patches(tmp_path, 10, steps_per_epoch=1, batch_size=64, resume=True, lr=1e-4)
    assert list(filter(None, rates)) == pytest.approx([1e-4 * WarmCosine(10)(k) for k in (8, 9)])


def test_early_stopping_counts_epochs_before_an_interruption(tmp_path, monkeypatch):
    options = dict(eval_images=torch.rand(1, 1, 12, 12), early_stop=1, lr=1e-2, sub_net_size=32)
    patches(tmp_path / "whole", 40, **options)
    expected = newest(tmp_path / "whole")["eval_loss"]["FlowNLL"]
    interrupted(patches, tmp_path / "broken", monkeypatch, 40, 1, **options)
    patches(tmp_path / "broken", 40, resume=True, **options)
    found = newest(tmp_path / "broken")
    assert found["past"] + found["eval_loss"]["FlowNLL"] == expected


# --- folders ---


def test_a_new_training_looks_at_nothing_else(tmp_path):
    """A training ignores other files in its folder, and never writes to the folder of another run, even if one was deleted."""
    options = dict(steps_per_epoch=2, eval_images=IMAGES)
    for _ in range(2):
        patches(tmp_path, 1, **options)
    (tmp_path / "run_0").rename(tmp_path / "run_old")
    (tmp_path / "run_0.txt").write_text("notes")
    (tmp_path / "run_7").write_text("a file")
    before = sorted((tmp_path / "run_1").rglob("*"))
    patches(tmp_path, 1, **options)
    assert sorted((tmp_path / "run_1").rglob("*")) == before and (tmp_path / "run_2").is_dir()
    patches(tmp_path, 2, resume=True, **options)
    assert (tmp_path / "run_3").is_dir()


def test_what_is_resumed_is_the_newest_training(tmp_path):
    """Not one before it in the same folder that came further, or was better."""
    options = dict(eval_images=IMAGES, lr=1e-2)
    patches(tmp_path, 6, **options)
    other = patches(tmp_path, 2, generator=torch.Generator().manual_seed(99), **options)
    same = patches(tmp_path, 2, generator=torch.Generator().manual_seed(99), resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), other.state_dict().values()))
    longer = patches(tmp_path, 3, resume=True, **options)
    found = newest(tmp_path)
    assert found["epoch"] == 2 and len(found["past"]) == 2 and longer.effort["epochs"] == 3


def test_sizes_of_a_short_training_are_resumed(tmp_path):
    options = dict(patch_size=3, steps_per_epoch=2, save_path=tmp_path, verbose=False)
    fit_patchnr(IMAGES, effort="quick", epochs=1, **options)
    again = fit_patchnr(IMAGES, epochs=2, resume=True, **options)
    assert (again.effort["effort"], again.effort["sub_net_size"], again.effort["batch_size"]) == ("quick", 64, 512)
    with pytest.raises(ValueError, match="expected effort='quick'"):
        fit_patchnr(IMAGES, effort="standard", epochs=3, resume=True, **options)


def test_weights_are_not_chosen_by_losses_that_are_not_computed():
    with pytest.raises(ValueError, match="expected compute_eval_losses=True"):
        patches(None, 1, eval_images=IMAGES, compute_eval_losses=False)


def test_two_trainings_of_one_second_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_runs", lambda folder: [])  # each looks before the other has made its folder
    found = {runs._new_run(tmp_path) for _ in range(5)}
    assert len(found) == 5 and all(path.is_dir() for path in found)


def test_disks_that_are_full(tmp_path, monkeypatch):
    """Without save_path nothing is written; with it, an error names the file, and no incomplete file stays."""

    def full(obj, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *args: full(None, tmp_path / "temporary"))
    patches(None, 2, eval_images=IMAGES)
    with pytest.raises(CheckpointError, match=r"ckp_best.pth.tar: cannot be written \(.*No space left on device"):
        patches(tmp_path, 2, eval_images=IMAGES)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["effort.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: "):
        patches(tmp_path / "file", 1)


def test_resuming_needs_a_folder():
    with pytest.raises(ValueError, match="expected save_path, the folder of the training to resume; got None"):
        patches(None, 1, resume=True)
