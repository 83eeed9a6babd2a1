"""The derivatives that are written out, and the flows for which they are used."""

import copy
import itertools
import math
import threading

import pytest
import torch
from cases import FLOWS, make, mlp, reference_nll
from torch import nn

from deepinv_flows import PatchNR, Reversed, allinone_flow, as_flow, glow_flow
from deepinv_flows.flows.contract import evaluate
from deepinv_flows.patchnr import potential
from deepinv_flows.patchnr.fused import steps, sweep
from deepinv_flows.patchnr.fused.recognise import steps_of
from deepinv_flows.patchnr.fused.workspace import Workspace
from deepinv_flows.patchnr.patches import PatchIndex

BOTH_WAYS = [(name, way) for name in FLOWS for way in ("forward", "inverse") if (name, way) != ("reversed", "inverse")]


def close(actual, expected):
    scale = max(float(expected.detach().abs().max()), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("name, way", BOTH_WAYS)
def test_value_and_all_gradients_against_autograd(name, way):
    flow = make(name, 9)
    flow = Reversed(flow) if way == "inverse" else flow
    parameters = [p for p in flow.parameters() if p.requires_grad]
    known = steps_of(flow)
    grads = [[torch.zeros_like(w, requires_grad=False) for w in step.packed] for step in known]
    space = Workspace(13, torch.float64, torch.device("cpu"), torch.float64)
    program, total = steps.Program(known, 9, space, grads=grads), [torch.zeros_like(p) for p in parameters]
    for _ in range(2):  # buffers are used again
        x = torch.rand(13, 9, dtype=torch.float64, requires_grad=True)
        weight = torch.rand(13, dtype=torch.float64)
        z, log_det = evaluate(flow, x)
        nll = 0.5 * z.square().sum(1) - log_det
        unused = {"allow_unused": True, "materialize_grads": True}
        expected = torch.autograd.grad((nll * weight).sum(), [x, *parameters], **unused)
        total = [a + b for a, b in zip(total, expected[1:])]
        with torch.no_grad():
            program.x.copy_(x.t())
            program.weight.copy_(weight)
            program.run()
            close(program.value, nll)
            close(program.grad.t(), expected[0])
    for a, b in zip(potential._in_parameters(known, grads, parameters), total):
        close(a, b)


def net(*modules):
    return lambda i, o: nn.Sequential(nn.Linear(i, 8), *modules, nn.Linear(8, o))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    flow = glow_flow(6, 1, 8)
    flow[1].subnet1[0].register_forward_hook(lambda module, args, out: 2 * out)
    return flow


def freia(subnet, **options):
    import FrEIA.modules as Fm

    return as_flow(Fm.GLOWCouplingBlock([(6,)], subnet_constructor=subnet, **options))


UNKNOWN = {
    "dropout": lambda: freia(net(nn.ReLU(), nn.Dropout(0.5))).eval(),
    "another activation": lambda: freia(net(nn.Tanh())),
    "a subclass": lambda: freia(lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.ReLU(), Doubled(8, o))),
    "another clamp": lambda: freia(mlp, clamp_activation=lambda u: torch.erf(u)),
    "hooks": hooked,
    "a condition": lambda: allinone_flow(6, 1, 8, dims_c=2),
    "half precision": lambda: glow_flow(6, 1, 8).bfloat16(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_left_to_autograd(name):
    assert steps_of(UNKNOWN[name]()) is None


def test_unknown_flows_give_their_own_values():
    for name in ("another activation", "a subclass", "another clamp", "hooks"):
        prior = PatchNR(UNKNOWN[name]().double(), patch_size=1, channels=6)
        x = torch.rand(1, 6, 4, 5, dtype=torch.float64)
        value = reference_nll(prior.normalizing_flow, leaf := x.clone().requires_grad_(), 1)
        close(prior(x), value)
        close(prior.grad(x).detach(), torch.autograd.grad(value.sum(), leaf)[0])


def optimizer_step(prior, x):
    optimizer = torch.optim.SGD(prior.parameters(), lr=0.1)
    prior(x).sum().backward()
    optimizer.step()


def through_data(prior, x):
    for p in prior.parameters():
        p.data.mul_(1.1)


def new_data(prior, x):
    for p in prior.parameters():
        p.data = 1.1 * p.data


CHANGES = {
    "optimizer": optimizer_step,
    "data in place": through_data,
    "data replaced": new_data,
    "load_state_dict": lambda prior, x: prior.load_state_dict(
        {k: 1.1 * v for k, v in floats(prior).items()}, strict=False
    ),
    "assign": lambda prior, x: prior.load_state_dict({k: 1.1 * v for k, v in floats(prior).items()}, False, True),
    "module replaced": lambda prior, x: setattr(prior, "normalizing_flow", make("glow", 9, seed=5)),
}


def floats(prior):
    return {k: v for k, v in prior.state_dict().items() if not k.endswith("perm")}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change):
    prior = PatchNR(make("glow", 9), patch_size=3)
    x = torch.rand(1, 1, 7, 8, dtype=torch.float64)
    before = prior.grad(x).detach()
    CHANGES[change](prior, x)
    value = reference_nll(prior.normalizing_flow, leaf := x.clone().requires_grad_(), 3)
    after = prior.grad(x).detach()
    close(after, torch.autograd.grad(value.sum(), leaf)[0])
    assert not torch.allclose(after, before)
    close(
        prior.float().grad(x.float()).detach().double(),
        PatchNR(copy.deepcopy(prior.normalizing_flow), patch_size=3).grad(x.float()).double(),
    )


def test_threads_give_the_same_and_leave_their_number():
    flow = make("glow", 9).requires_grad_(False)
    x = torch.rand(2, 1, 30, 31, dtype=torch.float64)
    index = PatchIndex(x.shape, 3)
    alone = sweep.patch_sums(steps_of(flow), x, index, 100, weights=True)
    torch.set_num_threads(3)
    try:
        shared = [sweep.patch_sums(steps_of(flow), x, index, 100, weights=True) for _ in range(2)]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    close(shared[0].grad, alone.grad)
    close(shared[0].value, alone.value)
    for a, b in zip(shared[0].grads[1], alone.grads[1]):
        close(a, b)
    assert torch.equal(shared[0].grad, shared[1].grad) and torch.equal(shared[0].value, shared[1].value)


def test_an_error_in_a_thread_is_raised_here():
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            sweep.in_threads(lambda a, b: 1 / 0, [(0, 1), (1, 2)], threading.Event())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["glow", "realnvp", "nice", "glow_gelu", "allinone_soft_exp", "reversed"])
def test_bfloat16_products_are_near(name):
    flow = make(name, 9, torch.float32, spread=0.1)
    x = torch.rand(1, 1, 20, 20)
    index = PatchIndex(x.shape, 3)
    exact = sweep.patch_sums(steps_of(flow), x, index, 100, weights=True)
    rough = sweep.patch_sums(steps_of(flow), x, index, 100, torch.bfloat16, weights=True)
    torch.testing.assert_close(rough.value, exact.value, rtol=1e-2, atol=0)
    assert (rough.grad - exact.grad).norm() <= 3e-2 * exact.grad.norm()
    assert not torch.equal(rough.grad, exact.grad)
    for near, right in zip(*(itertools.chain(*found.grads) for found in (rough, exact))):
        assert (near - right).norm() <= 5e-2 * right.norm() + 1e-4


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_bad_weights_are_not_rectified_away(layer, bad):
    """A NaN of negative sign is a negative integer."""
    flow = glow_flow(9, 1, 16).requires_grad_(False)
    next(m for m in flow.modules() if isinstance(m, nn.Sequential))[layer].weight[0, 0] = bad
    x = torch.rand(1, 1, 20, 20)
    found = sweep.patch_sums(steps_of(flow), x, PatchIndex(x.shape, 3), 100, torch.bfloat16)
    assert not found.value.isfinite().any()


def test_precision_is_used_where_the_hardware_has_it(monkeypatch):
    x = torch.rand(1, 1, 4, 4)
    for has, expected in (({}, None), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert potential._product_dtype(x, "bfloat16") == expected
        assert potential._product_dtype(x, None) is None
        assert potential._product_dtype(x.double(), "bfloat16") is None
        with torch.autocast("cpu", torch.bfloat16):
            assert potential._product_dtype(x, None) == expected


def test_under_autocast_values_and_gradients_are_near():
    prior = PatchNR(make("glow", 9, torch.float32, spread=0.1), patch_size=3)
    x = torch.rand(1, 1, 12, 12)
    expected = prior(x).detach()
    for trainable in (True, False):
        prior.requires_grad_(trainable)
        with torch.autocast("cpu", torch.bfloat16):
            leaf = x.clone().requires_grad_()
            value = prior(leaf)
        value.sum().backward()
        torch.testing.assert_close(value.detach(), expected, rtol=3e-2, atol=3e-2)
        assert leaf.grad.isfinite().all()


def test_hessian_vector_products_are_those_of_autograd():
    flow = make("glow_silu", 9)
    prior = PatchNR(flow, patch_size=3, chunk_size=20)
    x = torch.rand(1, 1, 12, 13, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(reference_nll(flow, x, 3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad((gradient * v).sum(), x)
    for trainable in (True, False):
        prior.requires_grad_(trainable)
        (gradient,) = torch.autograd.grad(prior(x).sum(), x, create_graph=True)
        close(torch.autograd.grad((gradient * v).sum(), x)[0], expected)
        close(torch.autograd.functional.hvp(lambda u: prior(u).sum(), x, v)[1], expected)


@pytest.mark.parametrize("name", ["allinone_soft_exp", "allinone_householder", "glow"])
def test_under_autocast_weights_are_read_and_added_up_in_full_precision(name):
    prior = PatchNR(make(name, 9, torch.float32, spread=0.1), patch_size=3, chunk_size=32)
    x, weights = torch.rand(1, 1, 60, 60), list(prior.parameters())
    expected = torch.autograd.grad(prior(x).sum(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        value = prior(x).sum()
        found = torch.autograd.grad(value, weights)
    assert value.dtype == torch.float32
    for near, right in zip(found, expected):
        assert (near - right).norm() <= 2e-2 * right.norm() + 1e-3
