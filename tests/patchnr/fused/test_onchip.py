"""The kernels, in Triton's interpreter, which evaluates them with numpy on a CPU; it knows float16, but not bfloat16."""

import copy
import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch

from deepinv_flows import PatchNR, Reversed, glow_flow
from deepinv_flows.patchnr.fused import onchip, sweep, trial
from deepinv_flows.patchnr.fused.recognise import steps_of
from deepinv_flows.patchnr.fused.steps import Coupling, Program
from deepinv_flows.patchnr.fused.workspace import Workspace

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # has to be set before Triton is imported
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by the test of the whole file")


@pytest.mark.skipif(INTERPRETED or importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_this_file_in_the_interpreter():
    options = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", __file__]
    # without the options of this run, such as a least coverage
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV"))}
    run = subprocess.run(
        [sys.executable, *options], env=env | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout + run.stderr


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(onchip, "available", lambda device: True)
    monkeypatch.setattr(onchip, "_capacity", lambda device: 232448)  # of an H100
    monkeypatch.setattr(trial, "_verdicts", {})


FLOWS = {
    "default": lambda: glow_flow(6, 2, 16),
    "odd, permuted": lambda: glow_flow(7, 2, 24, permute=True),
    "inverse": lambda: Reversed(glow_flow(6, 2, 16)),
    "tanh": lambda: glow_flow(6, 2, 16, clamp_activation="TANH"),
    "whitened": lambda: glow_flow(6, 2, 16, permute=True, whiten=True),
    "wide": lambda: glow_flow(36, 1, 256),
}


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def evaluated(flow, x, weight, dtype, backward=True, change=lambda steps, space: steps):
    space = Workspace(len(x), weight.dtype, CPU, dtype)
    with torch.no_grad():
        program = Program(change(steps_of(flow), space), x.shape[1], space, backward)
        program.x.copy_(x.t())
        program.weight.copy_(weight)
        program.value.fill_(torch.nan)
        program.run()
    return program.value.double(), program.grad.double()


@interpreted
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("n", [40, 160])
def test_kernels_against_float64(name, n, on_a_gpu):
    flow = FLOWS[name]()
    for p in flow.parameters():
        p.data *= 1.5
    x, weight = torch.rand(n, 36 if name == "wide" else 7 if "odd" in name else 6) - 0.5, torch.rand(n)
    value, grad = evaluated(copy.deepcopy(flow).double(), x.double(), weight.double(), torch.float64)

    def kernels(steps, space):
        found = onchip.on_chip(steps, space, True)
        assert all(isinstance(step, onchip.OnChip) for step in found) or name == "whitened"
        return found

    actual, actual_grad = evaluated(flow, x, weight, torch.float16, change=kernels)
    assert relative(actual, value) < 2e-3 and relative(actual_grad, grad) < 2e-2
    forward_only = evaluated(
        flow, x, weight, torch.float16, False, lambda steps, space: onchip.on_chip(steps, space, False)
    )
    torch.testing.assert_close(forward_only[0], actual, rtol=0, atol=0)


@interpreted
def test_the_prior_uses_kernels_for_frozen_weights(on_a_gpu, monkeypatch):
    used = []
    monkeypatch.setattr(sweep, "on_chip", lambda *args: used.append(found := onchip.on_chip(*args)) or found)
    prior = PatchNR(glow_flow(9, 2, 16), patch_size=3, channels=1).requires_grad_(False)
    x = torch.rand(2, 1, 12, 11)
    expected, grad = prior(x), prior.grad(x)
    assert not any(isinstance(step, onchip.OnChip) for steps in used for step in steps)
    monkeypatch.setattr("deepinv_flows.patchnr.potential._product_dtype", lambda *args: torch.float16)
    assert relative(prior(x), expected) < 2e-3 and relative(prior.grad(x), grad) < 2e-2
    assert all(isinstance(step, onchip.OnChip) for step in used[-1])


def launched_with(fault, monkeypatch):
    """Kernels that are launched as they should be, and then ``fault`` on the state and the other arguments."""
    right = onchip._launch

    def launch(name, x, *arguments, **constants):
        right(name, x, *arguments, **constants)
        fault(name, x, arguments)

    monkeypatch.setattr(onchip, "_launch", launch)


def does_not_compile(name, x, arguments):
    raise RuntimeError("out of resource: shared memory")


FAULTS = {
    "state": lambda name, x, arguments: x.mul_(1.1),
    "last patches": lambda name, x, arguments: x[:, -8:].mul_(1.3),
    "log-determinant": lambda name, x, arguments: arguments[2].add_(1.0) if name == "forward_kernel" else None,
    "gradient": lambda name, x, arguments: x.mul_(1.1) if name == "backward_kernel" else None,
    "one NaN": lambda name, x, arguments: x[1, 7].fill_(torch.nan),
    "one NaN in a gradient": lambda name, x, arguments: x[1, 7].fill_(torch.nan) if name == "backward_kernel" else None,
    "does not compile": does_not_compile,
}


@interpreted
@pytest.mark.parametrize("name", FAULTS)
def test_wrong_kernels_are_not_used(name, on_a_gpu, monkeypatch):
    monkeypatch.setattr("deepinv_flows.patchnr.potential._product_dtype", lambda *args: torch.float16)
    prior = PatchNR(glow_flow(4, 2, 16), patch_size=2, channels=1).requires_grad_(False)
    x, state = torch.rand(2, 1, 12, 13), torch.get_rng_state()
    with monkeypatch.context() as without:
        without.setattr(onchip, "available", lambda device: False)
        expected = prior.grad(x)
    launched_with(FAULTS[name], monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [prior.grad(x), prior.grad(x)]
    assert all(torch.equal(grad, expected) for grad in found)
    (warning,) = (str(w.message) for w in caught if issubclass(w.category, UserWarning))
    how = (
        "do not run (RuntimeError: out of resource" if name == "does not compile" else "disagree with the plain path by"
    )
    assert how in warning and warning.endswith("the plain path is used")
    assert torch.equal(torch.get_rng_state(), state)


@interpreted
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("backward", [True, False])
def test_right_kernels_pass_with_room(name, backward, on_a_gpu, monkeypatch):
    monkeypatch.setattr(
        trial, "TOLERANCE", 0.2 * trial.TOLERANCE
    )  # numbers here have 3 more bits than those in bfloat16
    couplings = [step for step in steps_of(FLOWS[name]()) if isinstance(step, Coupling)]
    assert all(onchip.usable(step, torch.float16, CPU, backward) for step in couplings)
    assert 1 <= len(trial._verdicts) <= 2


@interpreted
def test_nan_is_kept(on_a_gpu):
    flow = glow_flow(6, 2, 16)
    x = torch.rand(32, 6)
    x[3, 1], x[5, 4] = torch.nan, torch.nan
    value, grad = evaluated(
        flow, x, torch.ones(32), torch.float16, change=lambda steps, space: onchip.on_chip(steps, space, True)
    )
    bad = torch.zeros(32, dtype=torch.bool)
    bad[[3, 5]] = True
    assert torch.equal(value.isnan(), bad) and torch.equal(grad.isnan().any(0), bad)


OTHERS = {
    "too wide": lambda: glow_flow(6, 1, 512),
    "another activation": lambda: glow_flow(6, 1, 16, activation="gelu"),
    "two networks": lambda: glow_flow(6, 1, 16, coupling="realnvp"),
    "additive": lambda: glow_flow(6, 1, 16, coupling="nice"),
    "volume preserving": lambda: glow_flow(6, 1, 16, coupling="gin"),
    "double": lambda: glow_flow(6, 1, 16).double(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_couplings_stay(name, on_a_gpu):
    steps = steps_of(OTHERS[name]())
    assert not any(onchip.fits(step, torch.bfloat16, CPU) for step in steps)
    assert onchip.chunk_size(steps, torch.bfloat16, CPU, True) is None


def test_only_in_16_bits_and_only_where_there_are_kernels(on_a_gpu, monkeypatch):
    steps = steps_of(glow_flow(36, permute=True))
    assert all(onchip.fits(step, torch.bfloat16, CPU) == isinstance(step, Coupling) for step in steps)
    monkeypatch.setattr(onchip, "passed", lambda *args: True)
    assert onchip.chunk_size(steps, torch.bfloat16, CPU, True) > 507**2
    monkeypatch.setattr(onchip, "passed", lambda *args: False)
    assert onchip.chunk_size(steps, torch.bfloat16, CPU, True) is None
    assert not any(onchip.fits(step, torch.float32, CPU) for step in steps)
    monkeypatch.undo()
    assert not any(onchip.fits(step, torch.bfloat16, CPU) for step in steps)
