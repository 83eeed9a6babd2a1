"""Properties that hold for whatever is put in: PatchNR is its naive loop, a broken file is refused, so is a bad parameter."""

import functools
import io
import math
import os
import sys
import tempfile
from pathlib import Path

import deepinv as dinv
import numpy as np
import pytest
import torch
from cases import make
from dialects import DIALECTS, LAYERS, WIDTH
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deepinv_flows import (
    NMAPG,
    CheckpointError,
    CondatVu,
    DavisYin,
    FlowPrior,
    IPiano,
    LatentGD,
    LearnedPrimalDual,
    PatchNR,
    image_flow,
)

FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

# --- PatchNR is the mean over a loop ---

NUMPY_PADS = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@functools.cache
def flow(name, dim, dtype):
    return make(name, dim, dtype, spread=0.2).requires_grad_(False)


def naive(flow, x, p, stride, pad):
    """Mean over a loop of patches, cut from what numpy pads."""
    values = []
    for image in x:
        if pad:
            # indices are padded, so that the loop has a gradient
            numbers = np.arange(image.numel()).reshape(image.shape)
            border = [(0, 0), (p - 1, p - 1), (p - 1, p - 1)]
            outside = np.pad(np.ones(image.shape), border, mode=NUMPY_PADS[pad])
            image = image.flatten()[torch.from_numpy(np.pad(numbers, border, mode=NUMPY_PADS[pad]))] * torch.from_numpy(
                outside
            )
        starts = [sorted({*range(0, side - p + 1, stride), side - p}) for side in image.shape[1:]]
        total = 0.0
        for i in starts[0]:
            for j in starts[1]:
                z, log_det = flow(image[:, i : i + p, j : j + p].reshape(1, -1).to(x.dtype))
                total = total + 0.5 * (z**2).sum() - log_det.sum()
        values.append(total / (len(starts[0]) * len(starts[1])))
    return torch.stack(values)


@st.composite
def problems(draw):
    p, channels = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    channels = max(channels, 2) if p == 1 else channels  # a coupling has two halves
    sides = st.integers(p, p + 4)
    shape = draw(st.integers(1, 2)), channels, draw(sides), draw(sides)
    options = dict(
        stride=draw(st.integers(1, p)),
        pad=draw(st.sampled_from([False, *NUMPY_PADS])),
        chunk_size=draw(st.sampled_from([None, 1, 7, 1000])),
    )
    name = draw(st.sampled_from(["glow_silu", "glow_permuted", "allinone", "freia_sequence", "glow_sigmoid"]))
    return shape, p, options, name, draw(st.sampled_from([torch.float32, torch.float64])), draw(st.integers(0, 99))


@given(problem=problems())
@FEW
def test_patchnr_is_its_naive_loop(problem):
    shape, p, options, name, dtype, seed = problem
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    prior = PatchNR(flow(name, shape[1] * p * p, dtype), patch_size=p, channels=shape[1], **options)
    leaf = x.clone().requires_grad_()
    expected = naive(prior.normalizing_flow, leaf, p, options["stride"], options["pad"])
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    tol = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-10)
    for view in (x, x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(prior(view), expected.detach(), **tol)
        torch.testing.assert_close(prior.grad(view), gradient, **tol)
    (by_autograd,) = torch.autograd.grad(prior(leaf).sum(), leaf)
    torch.testing.assert_close(by_autograd, gradient, **tol)
    # of all that there are, a subset is all
    assert torch.equal(PatchNR(prior.normalizing_flow, None, p, shape[1], n_patches=10**6, **options)(x), prior(x))


KINDS = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@given(
    shape=st.lists(st.integers(0, 5), max_size=6),
    dtype=st.sampled_from(KINDS),
    bad=st.sampled_from([0.5, math.nan, math.inf]),
)
@FEW
def test_patchnr_refuses_or_is_finite(shape, dtype, bad):
    prior = PatchNR(flow("glow_silu", 18, torch.float32), patch_size=3, channels=2, pad=True)
    x = torch.full(shape, bad if dtype.is_floating_point else 1, dtype=dtype)
    for method in (prior, prior.grad, prior.prox):
        try:
            out = method(x)
        except (ValueError, TypeError) as error:
            assert len(str(error)) > 20
        else:
            assert out.isfinite().all() and bad == 0.5 and dtype == torch.float32


NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.just(torch.tensor(2)),
    st.just([1]),
)


@given(
    name=st.sampled_from(["patch_size", "channels", "stride", "n_patches", "chunk_size", "pad", "subset", "precision"]),
    value=NUMBERS,
)
@FEW
def test_patchnr_options_are_refused_or_work(name, value):
    options = {"patch_size": 2, "channels": 1, "num_layers": 1, "sub_net_size": 4} | {name: value}
    try:
        prior = PatchNR(**options)
        channels, p = int(prior.channels), int(prior.patch_size)
        assert prior(torch.rand(1, channels, p + 2, p + 2)).isfinite().all()
    except (ValueError, TypeError) as error:
        assert "got" in str(error)


# --- broken files ---


def _bytes(obj) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@functools.cache
def saved(dialect) -> bytes:
    if dialect == "evil":
        return _bytes({**DIALECTS["deepinv"](2, 1)[0], "evil": Evil()})
    if dialect in DIALECTS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _bytes(DIALECTS[dialect](2, 1)[0])
    flow = image_flow((1, 4, 4), num_levels=1, num_steps=1, hidden=2, generator=torch.Generator())
    prior = FlowPrior(flow) if dialect == "ours_image" else PatchNR(patch_size=2, num_layers=LAYERS, sub_net_size=WIDTH)
    if dialect == "ours_state":
        return _bytes(prior.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        prior.save(f"{folder}/w")
        return Path(f"{folder}/w").read_bytes()


MADE = [*DIALECTS, "evil", "ours", "ours_state", "ours_image"]
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
ran = []
watching = False


def _watch(event, args):
    if watching and event.startswith(FORBIDDEN):
        ran.append((event, str(args)[:80]))


sys.addaudithook(_watch)


def test_code_would_be_noticed():
    global watching
    watching = True
    torch.load(io.BytesIO(saved("evil")), weights_only=False)
    watching = False
    assert ran.pop()[0] == "os.system" and not ran


@st.composite
def broken(draw):
    dialect = draw(st.sampled_from(MADE))
    raw = bytearray(saved(dialect))
    # what tells tensors apart stands at both ends, and in the first kilobytes of a safetensors file
    where = st.one_of(st.integers(0, len(raw) - 1), st.integers(0, 1500), st.integers(len(raw) - 4000, len(raw) - 1))
    for _ in range(draw(st.integers(0, 5))):
        raw[draw(where) % len(raw)] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        raw = raw[: draw(where) % len(raw)]
    return dialect, bytes(raw)


@given(file=broken())
@settings(FEW, max_examples=300)
def test_broken_files_give_finite_weights_or_our_error(file, tmp_path_factory):
    global watching
    dialect, raw = file
    path = tmp_path_factory.getbasetemp() / "broken"
    path.write_bytes(raw)
    ways = [
        lambda: PatchNR(pretrained=path, patch_size=2, num_layers=LAYERS, sub_net_size=WIDTH),
        lambda: PatchNR.from_checkpoint(path),
        lambda: PatchNR(make("deepinv", 4, torch.float32), pretrained=path, patch_size=2),
    ]
    for way in [lambda: FlowPrior(pretrained=path)] if dialect == "ours_image" else ways:
        watching = True
        try:
            prior = way()
        except CheckpointError as error:
            assert len(str(error)) < 1000
        else:
            assert all(p.isfinite().all() for p in prior.state_dict().values() if p.is_floating_point())
        finally:
            watching = False
    assert not ran


# --- parameters of the iterators ---

F = dinv.optim.L2()
G = dinv.optim.Tikhonov()
Y = torch.linspace(0.1, 1, 32).view(2, 1, 4, 4)
DECODER = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 16), torch.nn.Unflatten(1, (1, 4, 4)))
ITERATORS = {
    "condat_vu": (CondatVu, ["stepsize", "stepsize_dual", "lambda_reg", "beta", "lambda_reg_2"], {"prior_2": G}),
    "davis_yin": (DavisYin, ["stepsize", "lambda_reg", "beta", "lambda_reg_2"], {"prior_2": G}),
    "nmapg": (NMAPG, ["stepsize", "lambda_reg", "eta"], {}),
    "ipiano": (IPiano, ["stepsize", "lambda_reg", "inertia"], {}),
    "latent_gd": (functools.partial(LatentGD, DECODER), ["stepsize", "lambda_reg"], {"latent_shape": (1, 4, 4)}),
}
WRONG = st.sampled_from(
    [
        -1.0,
        -1,
        math.nan,
        math.inf,
        -math.inf,
        "0.5",
        None,
        1j,
        {},
        [],
        object(),
        torch.tensor(math.nan),
        [0.5, -1.0],
        [None],
    ]
)
RIGHT = {
    "inertia": st.floats(0, 0.99),
    "eta": st.floats(0, 0.99),
    "beta": st.floats(0.1, 1.0),
    "lambda_reg": st.floats(0, 10),
}
RIGHT["lambda_reg_2"] = RIGHT["lambda_reg"]


def build(name, parameters, **kwargs):
    kind, _, options = ITERATORS[name]
    return kind(data_fidelity=F, prior=G, **options, **{"max_iter": 4, **kwargs}, **parameters)


@given(data=st.data(), name=st.sampled_from([*ITERATORS]))
@settings(FEW, max_examples=150)
def test_wrong_parameters_are_refused_when_made(data, name):
    parameter, value = data.draw(st.sampled_from(ITERATORS[name][1])), data.draw(WRONG)
    assume(not (parameter == "beta" and value in (-1.0, [0.5, -1.0])))  # any number may do
    with pytest.raises(ValueError, match="expected .*; got"):
        build(name, {parameter: value})


@given(data=st.data(), name=st.sampled_from([*ITERATORS]))
@settings(FEW, max_examples=80)
def test_right_parameters_give_finite_images_or_the_iteration(data, name):
    parameters = {}
    for parameter in ITERATORS[name][1]:
        value = data.draw(RIGHT.get(parameter, st.floats(1e-6, 1e6)))
        kinds = st.sampled_from([float, torch.tensor, lambda v: torch.full((2, 1, 1, 1), v), lambda v: [v] * 4])
        parameters[parameter] = value if parameter == "eta" else data.draw(kinds)(value)
    try:
        x = build(name, parameters)(Y, dinv.physics.Denoising())
    except ValueError as error:
        assert "at iteration" in str(error)  # it diverged: the steps are large
    else:
        assert x.shape == Y.shape and x.isfinite().all()


@given(value=st.sampled_from([0, -1, 2.5, None, "3", True, math.nan]), name=st.sampled_from([*ITERATORS, "learned"]))
@FEW
def test_wrong_numbers_of_iterations(value, name):
    with pytest.raises(ValueError, match="expected max_iter .*; got"):
        LearnedPrimalDual(value, nf=2) if name == "learned" else build(name, {}, max_iter=value)
