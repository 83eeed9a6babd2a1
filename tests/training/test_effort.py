"""Sizes, steps and threads of a training by its effort: what is given wins, what is chosen is said, stored and resumed."""

import json
import math

import pytest
import torch

from deepinv_flows import MAP, PatchNR, fit_patchnr, glow_flow
from deepinv_flows.training import effort
from deepinv_flows.training.effort import MINUTES, Plan, carried_out, describe, measured, plan
from deepinv_flows.training.samples import PatchSamples

GIVEN = dict(num_layers=1, sub_net_size=8, epochs=2, steps_per_epoch=3, batch_size=16)


def samples():
    return PatchSamples([torch.rand(1, 16, 16)], 3)


@pytest.mark.parametrize("name", MINUTES)
def test_sizes_follow_from_the_dimension_alone(name):
    assert plan(name, 36) == plan(name, 36)
    widths = [plan(name, dim).sub_net_size for dim in (9, 36, 48, 108, 192)]
    assert widths == sorted(widths) and all(64 <= width <= 512 for width in widths)
    assert plan("quick", 36).sub_net_size < plan(name, 36).sub_net_size or name == "quick"


def test_standard_has_the_sizes_it_had():
    """A folder of 0.1.0 is resumed without a word."""
    found = plan("standard", 108)
    assert (found.num_layers, found.sub_net_size, found.batch_size, found.epochs) == (5, 256, 1024, 40)


def test_what_is_given_wins_and_a_short_training_is_not_timed():
    found = plan("quick", 9, **GIVEN)
    assert all(getattr(found, name) == value for name, value in GIVEN.items())
    assert measured(found, glow_flow(9, 1, 8), samples(), "cpu") is found and not found.timed and not found.threads
    with pytest.raises(ValueError, match="expected effort to be one of 'quick', 'standard', 'thorough'; got 'slow'"):
        plan("slow", 9)
    with pytest.raises(ValueError, match="expected epochs to be an integer >= 1; got 0"):
        plan("quick", 9, epochs=0)


@pytest.mark.parametrize("name", MINUTES)
def test_steps_fill_the_minutes(name, monkeypatch):
    monkeypatch.setattr(effort, "_seconds", lambda step, device: 0.05)
    found = measured(plan(name, 9, num_layers=1, sub_net_size=8), glow_flow(9, 1, 8), samples(), "cpu")
    assert math.isclose(found.minutes, 0.9 * MINUTES[name], rel_tol=0.05)
    assert f"about {MINUTES[name]:.1f} minutes (50 ms a step" in describe(found, 9)
    epochs = measured(plan(name, 9, num_layers=1, sub_net_size=8, epochs=7), glow_flow(9, 1, 8), samples(), "cpu")
    assert epochs.epochs == 7 and math.isclose(epochs.minutes, 0.9 * MINUTES[name], rel_tol=0.05)


def test_a_slow_machine_still_trains(monkeypatch):
    monkeypatch.setattr(effort, "_seconds", lambda step, device: 100.0)
    found = measured(plan("quick", 9, num_layers=1, sub_net_size=8), glow_flow(9, 1, 8), samples(), "cpu")
    assert found.epochs * found.steps_per_epoch >= 0.9 * effort.LEAST_STEPS


def test_the_fastest_number_of_threads_is_taken(monkeypatch):
    """One that spins is not; whatever happens, torch has as many as before."""
    monkeypatch.setattr(effort, "_seconds", lambda step, device: {1: 0.06, 2: 0.79, 4: 0.05}[torch.get_num_threads()])
    torch.set_num_threads(4)
    try:
        found = measured(plan("quick", 9, num_layers=1, sub_net_size=8), glow_flow(9, 1, 8), samples(), "cpu")
        assert found.threads == 4 and set(found.timed) == {1, 2, 4} and torch.get_num_threads() == 4
        monkeypatch.setattr(effort, "_seconds", lambda step, device: 0.1 * torch.get_num_threads())
        found = measured(plan("quick", 9, num_layers=1, sub_net_size=8), glow_flow(9, 1, 8), samples(), "cpu")
        assert found.threads == 1 and "1 of 4 threads" in describe(found, 9)
        with carried_out(found, 9, verbose=False):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


def test_threads_are_chosen_for_a_given_number_of_steps_too(monkeypatch, tmp_path):
    """Of a long training, also one that is resumed, for whose number of threads another machine does not speak."""
    monkeypatch.setattr(effort, "_once", lambda step, device: 1.0)
    monkeypatch.setattr(effort, "_seconds", lambda step, device: 0.1 * torch.get_num_threads())
    torch.set_num_threads(2)
    try:
        given = plan("quick", 9, **{**GIVEN, "steps_per_epoch": 100})
        found = measured(given, glow_flow(9, 1, 8), samples(), "cpu")
        assert (found.steps_per_epoch, found.threads) == (100, 1)
        assert "200 steps of 16 patches: about 0.4 minutes (100 ms a step, 1 of 2 threads)" in describe(found, 9)
        effort.store(found, tmp_path)
        again = plan(None, 9, tmp_path, resume=True)
        assert (again.effort, again.threads, again.timed, again.steps_per_epoch) == ("quick", 0, {}, 100)
        assert measured(again, glow_flow(9, 1, 8), samples(), "cpu").threads == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_timing_does_not_change_what_is_drawn(sigma, monkeypatch):
    """However often a step is timed, the training draws the same numbers."""
    images, priors = torch.rand(1, 1, 12, 12), []
    for times in (0, 3):

        def timed(step, device, times=times):
            for _ in range(times):
                step()
            return 0.0

        monkeypatch.setattr(effort, "_once", timed)
        priors.append(fit_patchnr(images, patch_size=3, sigma=sigma, **{**GIVEN, "batch_size": 4}, verbose=False))
    ours, other = (prior.state_dict() for prior in priors)
    assert all(torch.equal(ours[name], other[name]) for name in ours if torch.is_tensor(ours[name]))


def test_another_effort_than_that_of_the_training_is_refused(tmp_path):
    effort.store(plan("quick", 9, seconds_per_step=1), tmp_path)
    with pytest.raises(
        ValueError, match="expected effort='quick', with which the training in .* began; got 'thorough'"
    ):
        plan("thorough", 9, tmp_path, resume=True)
    assert plan("thorough", 9, tmp_path, resume=False).effort == "thorough"
    assert plan(None, 9, tmp_path, resume=True).effort == "quick" and plan(None, 9).effort == "standard"


def test_what_was_chosen_is_saved_with_the_weights(tmp_path):
    prior = fit_patchnr(torch.rand(1, 1, 12, 12), patch_size=3, effort="quick", **GIVEN, verbose=False)
    prior.save(tmp_path / "prior.safetensors")
    MAP(prior, verbose=False).save(tmp_path / "map.safetensors")
    for again in (
        PatchNR.from_checkpoint(tmp_path / "prior.safetensors"),
        PatchNR(pretrained=tmp_path / "prior.safetensors", patch_size=3),
        MAP.from_checkpoint(tmp_path / "map.safetensors").prior,
    ):
        assert again.effort == prior.effort == {"effort": "quick", **GIVEN, "seconds_per_step": 0.0, "threads": 0}


@pytest.mark.parametrize("busy, expected", [(10, 0.01), (100, 0.05)])
def test_a_busy_moment_does_not_count(monkeypatch, busy, expected):
    """Half a second of steps that take five times as long does not, but a slow machine does, in whichever unit."""
    clock, steps = [0.0], []

    def step():
        steps.append(clock[0])
        clock[0] += 0.05 if len(steps) <= busy else 0.01

    monkeypatch.setattr(effort.time, "perf_counter", lambda: clock[0])
    assert math.isclose(effort._seconds(step, "cpu"), expected, rel_tol=1e-6)
    assert clock[0] < 2
    steps.clear()
    monkeypatch.setattr(effort.time, "perf_counter", lambda: 10 * clock[0])
    assert math.isclose(effort._seconds(step, "cpu"), 0.5, rel_tol=1e-6) and len(steps) < 12


def test_timing_leaves_flow_and_random_state_alone():
    flow, seen = glow_flow(9, 1, 8), samples()
    state = torch.get_rng_state()
    before = [p.clone() for p in flow.parameters()]
    found = measured(plan("quick", 9, batch_size=16), flow, seen, "cpu")
    assert torch.equal(state, torch.get_rng_state()) and found.steps_per_epoch > 0
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(flow.parameters(), before))


def test_stored_and_resumed(tmp_path, capsys, monkeypatch):
    """However fast the machine is then."""
    images = torch.rand(1, 1, 12, 12)
    options = dict(patch_size=3, save_path=tmp_path, effort="quick")
    monkeypatch.setattr(effort, "LEAST_STEPS", 1)
    monkeypatch.setattr(effort, "_seconds", lambda step, device: 0.9 * 60 * 2 / 6)
    prior = fit_patchnr(images, **{**GIVEN, "steps_per_epoch": None}, **options)
    assert "1 blocks of width 8 on patches of dimension 9, 6 steps of 16 patches" in capsys.readouterr().out
    assert prior.effort["steps_per_epoch"] == 3 and prior.effort["sub_net_size"] == 8
    assert json.loads((tmp_path / "effort.json").read_text())["steps_per_epoch"] == 3
    monkeypatch.setattr(effort, "_seconds", lambda step, device: 1e-6)
    again = fit_patchnr(images, resume=True, epochs=3, verbose=False, **options)
    found = [again.effort[name] for name in ("num_layers", "epochs", "steps_per_epoch", "batch_size")]
    assert found == [1, 3, 3, 16]
    assert capsys.readouterr().out == ""


def test_a_given_prior_keeps_its_sizes():
    options = dict(epochs=1, steps_per_epoch=2, batch_size=16)
    prior = fit_patchnr(torch.rand(1, 1, 12, 12), prior=PatchNR(glow_flow(9, 1, 8), patch_size=3), **options)
    assert "the prior given, on patches of dimension 9, 2 steps" in describe(Plan(**prior.effort), 9)
    assert prior.effort["num_layers"] == prior.effort["sub_net_size"] == 0
