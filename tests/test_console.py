"""Long work shows a bar in a terminal and says a line at its end; short work says nothing."""

import io
import sys
from types import SimpleNamespace

import deepinv as dinv
import pytest
import torch

from deepinv_flows import MAP, LatentMAP, LatentSampler, PatchNR, fit_flow, fit_patchnr, image_flow, nmapg
from deepinv_flows import console as console_module
from deepinv_flows.console import Console, duration

X = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PHYSICS = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))


def flow():
    return image_flow((1, 8, 8), num_levels=1, num_steps=1, hidden=4)


WORKS = {
    "nmapg": lambda **options: nmapg(lambda x: (x**2).flatten(1).sum(1), X, **options),
    "MAP": lambda **options: MAP(PatchNR(patch_size=3, num_layers=1, sub_net_size=8), max_iter=3, **options)(
        X, PHYSICS
    ),
    "MAP.tune": lambda **options: MAP(PatchNR(patch_size=3, num_layers=1, sub_net_size=8), max_iter=3, **options).tune(
        X, PHYSICS
    ),
    "LatentMAP": lambda **options: LatentMAP(flow(), max_iter=3, **options)(X, PHYSICS),
    "LatentSampler": lambda **options: LatentSampler(flow(), max_iter=3, warm_up=2, map_iter=2, **options)(X, PHYSICS),
    "training": lambda **options: (
        fit_patchnr(X, patch_size=3, sub_net_size=8, epochs=2, steps_per_epoch=3, batch_size=8, **options),
        fit_flow(flow(), X, epochs=2, batch_size=2, **options),
    ),
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def long(monkeypatch):
    monkeypatch.setattr(console_module, "LONG", 0.0)


@pytest.mark.parametrize("name", WORKS)
def test_short_work_is_quiet(name, capsys, monkeypatch):
    monkeypatch.setattr(console_module, "LONG", 1e9)
    WORKS[name]()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", WORKS)
def test_one_switch_silences_long_work(name, capsys, long, monkeypatch):
    WORKS[name](verbose=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    WORKS[name](verbose=False)
    assert sys.stderr.getvalue() == "" and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", WORKS)
def test_in_a_file_long_work_says_lines_and_shows_no_bar(name, capsys, long):
    WORKS[name]()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and all(line.startswith(f"{name}: ") and line[-1] == "s" for line in lines)
    if name == "MAP.tune":  # a line a weight, and one at the end
        assert len(lines) > 4 and all(line.startswith("MAP.tune: lambda_reg ") for line in lines)
    else:  # two trainings of two epochs: a line at the first, one at the end
        assert len(lines) == (4 if name == "training" else 1)


@pytest.mark.parametrize("name", WORKS)
def test_in_a_file_nobody_takes_long_work_for_hung(name, capsys, long, monkeypatch):
    monkeypatch.setattr(console_module, "RARE", 0.0)
    WORKS[name]()
    out, err = capsys.readouterr()
    said = [line for line in out.splitlines() if f"{name}: iteration " in line]
    assert err == "" and bool(said) == (name != "training")


@pytest.mark.parametrize("name", WORKS)
def test_a_terminal_shows_a_bar_and_a_line_at_the_end(name, capsys, long, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    WORKS[name]()
    lines = capsys.readouterr().out.splitlines()
    assert f"{name}:" in sys.stderr.getvalue() and len(lines) == (2 if name == "training" else 1)


@pytest.fixture
def clock(monkeypatch):
    """A time that the test sets."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_what_the_line_holds(capsys, clock):
    with Console("sum", 3) as console:
        for k in range(3):
            console.update(term=torch.tensor([k, k + 1.0]), name="a")
        clock.seconds = 2.5
    assert capsys.readouterr().out == "sum: 3 iterations, term 2.5, name a; 2.5 s\n"
    with pytest.raises(ValueError), Console("sum", 3) as console:
        clock.seconds = 9.0
        raise ValueError
    assert capsys.readouterr().out == ""


def test_milestones_are_apart(capsys, clock):
    console = Console("work", 9)
    for clock.seconds in (1.0, 2.0, 3.0, 5.0):
        console.milestone("so far")
    assert capsys.readouterr().out == "work: so far; 2.0 s\nwork: so far; 5.0 s\n"


def test_times_as_a_reader_wants_them():
    assert (duration(4.21), duration(99.0), duration(300.0)) == ("4.2 s", "99.0 s", "5.0 minutes")
