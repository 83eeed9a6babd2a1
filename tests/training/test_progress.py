"""One bar for a whole training in a terminal, a line an epoch elsewhere; resumed trainings count from where they were."""

import io
import re
import sys

import pytest
import torch

from deepinv_flows import console, fit_flow, fit_patchnr, image_flow
from deepinv_flows.training import effort

IMAGES = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
OPTIONS = dict(epochs=3, steps_per_epoch=25, batch_size=4, patch_size=3, sub_net_size=8)
FIGURES = r"loss [-\d.e]+ nats, best [-\d.e]+ nats; [\d.]+ s"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def long(monkeypatch):
    monkeypatch.setattr(console, "LONG", 0.0)


def test_one_bar_counts_all_epochs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    fit_patchnr(IMAGES, IMAGES, save_path=tmp_path, **OPTIONS)
    bar = sys.stderr.getvalue()
    assert "/75 " in bar and "/25 " not in bar and re.search(r"epoch=\d/3, loss=[-\d.e]+", bar)
    assert re.fullmatch(rf"training: 3 of 3 epochs, {FIGURES}\n", capsys.readouterr().out)


def test_a_line_an_epoch(capsys, tmp_path):
    fit_patchnr(IMAGES, IMAGES, save_path=tmp_path, **OPTIONS)
    lines = [f"epoch 1 of 3, {FIGURES}", f"epoch 2 of 3, {FIGURES}", f"3 of 3 epochs, {FIGURES}"]
    assert re.fullmatch("".join(f"training: {line}\n" for line in lines), capsys.readouterr().out)
    fit_patchnr(IMAGES, IMAGES, save_path=tmp_path, resume=True, **{**OPTIONS, "epochs": 5})
    lines = [f"epoch 4 of 5, {FIGURES}", f"5 of 5 epochs, {FIGURES}"]
    assert re.fullmatch("".join(f"training: {line}\n" for line in lines), capsys.readouterr().out)


def test_no_best_is_told_where_the_last_weights_are_returned(capsys):
    flow = image_flow((1, 12, 12), 1, 1, 4)
    for train in (lambda: fit_patchnr(IMAGES, **OPTIONS), lambda: fit_flow(flow, IMAGES, epochs=3)):
        train()
        told = capsys.readouterr().out.splitlines()
        assert len(told) == 3 and all(
            re.fullmatch(r"training: .*epochs?.*, loss [-\d.e]+ nats; [\d.]+ s", line) for line in told
        )


def test_the_duration_is_announced_once(capsys, monkeypatch):
    monkeypatch.setattr(effort, "_seconds", lambda step, device: 60.0)
    monkeypatch.setattr(effort, "LEAST_STEPS", 2)
    fit_patchnr(IMAGES, **{**OPTIONS, "epochs": 2, "steps_per_epoch": None})
    out = capsys.readouterr().out
    assert out.startswith("fit_patchnr: ") and out.count("about") == 1


@pytest.mark.parametrize("options", [{"verbose": False}, {"show_progress_bar": False}])
def test_quiet_is_quiet(options, capsys):
    fit_patchnr(IMAGES, **OPTIONS, **options)
    fit_flow(image_flow((1, 12, 12), 1, 1, 4), IMAGES, epochs=1, **options)
    assert capsys.readouterr() == ("", "")
