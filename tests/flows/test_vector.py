"""The flow contract for every flow, and the mathematics of the builders."""

import copy
import json
import math
import pickle

import deepinv as dinv
import FrEIA.modules as Fm
import numpy as np
import pytest
import torch
from cases import BUILT, FLOWS, make, mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinv_flows import Reversed, allinone_flow, as_flow, build_flow, glow_flow, image_flow
from deepinv_flows.flows import Given, evaluate


@pytest.mark.parametrize("dim", [2, 9, 12])
@pytest.mark.parametrize("name", FLOWS)
def test_inverse_and_log_det(name, dim):
    flow, x = make(name, dim), torch.randn(5, dim, dtype=torch.float64)
    z, log_det = evaluate(flow, x)
    back, log_det_back = evaluate(flow, z, rev=True)
    assert z.shape == x.shape and log_det.shape == (5,)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-9, atol=1e-9)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: flow(v[None])[0][0]))(x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUILT)
def test_copies_and_pickles_after_a_forward_pass(name, dtype):
    flow, x = make(name, 6, dtype), torch.randn(4, 6, dtype=dtype)
    z, log_det = flow(x)
    (z.sum() + log_det.sum()).backward()
    rebuilt = build_flow(flow.config).to(dtype)
    rebuilt.load_state_dict(flow.state_dict())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), rebuilt):
        assert all(torch.equal(a, b) for a, b in zip(other(x), (z, log_det)))
    assert z.dtype == dtype and log_det.dtype == dtype


@pytest.mark.parametrize("name", BUILT)
def test_freezing_and_thawing_sets_no_rotation_free(name):
    flow = make(name, 6)
    trainable = [key for key, p in flow.named_parameters() if p.requires_grad]
    flow.requires_grad_(False).requires_grad_(True)
    assert [key for key, p in flow.named_parameters() if p.requires_grad] == trainable


@pytest.mark.parametrize("name", BUILT)
def test_second_backward(name):
    flow = make(name, 6)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def grad(x):
        z, log_det = flow(x)
        return torch.autograd.grad((z**2).sum() - log_det.sum(), x, create_graph=True)[0]

    w, step = torch.randn_like(x), 1e-6
    (hessian_vector,) = torch.autograd.grad((grad(x) * w).sum(), x)
    difference = (grad(x + step * w) - grad(x - step * w)).detach() / (2 * step)
    torch.testing.assert_close(hessian_vector, difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [4, 9, 27])
def test_default_flow_is_deepinvs(dim):
    patch = {"patch_size": 2, "channels": 1} if dim == 4 else {"patch_size": 3, "channels": dim // 9}
    torch.manual_seed(3)
    theirs = dinv.optim.PatchNR(**patch, num_layers=3, sub_net_size=32).normalizing_flow.double()
    torch.manual_seed(3)
    ours = glow_flow(dim, 3, 32).double()
    x = torch.randn(20, dim, dtype=torch.float64)
    for rev in (False, True):
        for a, b in zip(ours(x, rev=rev), theirs(x, rev=rev)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gin", "nice", "allinone_gin"])
def test_volume_preserving(name):
    _, log_det = make(name, 8)(torch.randn(5, 8, dtype=torch.float64))
    assert log_det.abs().max() < 1e-10


def test_conditional_allinone():
    flow = allinone_flow(6, 3, 16, dims_c=2).double()
    x, c = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    z, log_det = flow(x, c=[c])
    torch.testing.assert_close(flow(z, c=[c], rev=True)[0], x)
    assert not torch.allclose(flow(x, c=[c + 1])[0], z)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v, k: flow(v[None], c=[k[None]])[0][0]))(x, c)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)


@given(
    dim=st.integers(2, 20), layers=st.integers(1, 3), width=st.integers(1, 9), coupling=st.sampled_from(["glow", "gin"])
)
@settings(max_examples=25, deadline=None)
def test_any_dimension(dim, layers, width, coupling):
    flow = glow_flow(dim, layers, width, coupling=coupling, permute=True).double()
    x = torch.rand(2, dim, dtype=torch.float64)
    torch.testing.assert_close(flow(flow(x)[0], rev=True)[0], x)


@pytest.mark.parametrize("builder", [glow_flow, allinone_flow])
def test_refusals(builder):
    with pytest.raises(ValueError, match="dim >= 2; got 1"):
        builder(1)
    with pytest.raises(ValueError, match="expected num_layers to be an integer >= 1; got 0"):
        builder(4, num_layers=0)
    with pytest.raises(ValueError, match="expected activation to be one of 'relu'"):
        builder(4, activation="sine")
    with pytest.raises(ValueError, match="expected coupling to be one of 'glow', 'realnvp', 'nice', 'gin'; got 'x'"):
        glow_flow(4, coupling="x")
    with pytest.raises(ValueError, match="expected global_affine_type"):
        allinone_flow(4, global_affine_type="TANH")
    with pytest.raises(ValueError, match="below 10"):
        allinone_flow(4, global_affine_type="SIGMOID", global_affine_init=10.0)
    with pytest.raises(ValueError, match="0 < split_len < dim = 4; got 4"):
        glow_flow(4, split_len=4)
    with pytest.raises(ValueError, match="reversed twice is the flow itself"):
        Reversed(Reversed(glow_flow(4)))
    with pytest.raises(ValueError, match="expected builder"):
        build_flow({"dim": 4})
    with pytest.raises(ValueError, match="not an architecture that glow_flow builds"):
        build_flow({"builder": "glow_flow", "dim": 4, "depth": 3})


@pytest.mark.parametrize("builder", [glow_flow, lambda d, **k: allinone_flow(d, permute_soft=True, **k)])
def test_randomness(builder):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = builder(6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    second = builder(6, generator=torch.Generator().manual_seed(1))
    other = builder(6, generator=torch.Generator().manual_seed(2))
    x = torch.rand(3, 6)
    assert torch.equal(first(x)[0], second(x)[0]) and not torch.equal(first(x)[0], other(x)[0])
    builder(6)
    assert (numpy_state == np.random.get_state()[1]).all()


def test_zuko_flow_satisfies_the_contract():
    zuko = pytest.importorskip("zuko")
    flow = as_flow(zuko.flows.MAF(features=4, transforms=2, hidden_features=[16])).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    z, log_det = evaluate(flow, x)
    torch.testing.assert_close(evaluate(flow, z, rev=True)[0], x)
    nll = 0.5 * (z**2).sum(1) - log_det + 2 * np.log(2 * np.pi)
    torch.testing.assert_close(nll, -flow.module().log_prob(x))


def test_zuko_flows_over_another_base_are_refused():
    zuko = pytest.importorskip("zuko")
    with pytest.raises(TypeError, match="over a standard normal base; NCSF has"):
        as_flow(zuko.flows.NCSF(features=4))


def test_as_flow_takes_modules_only_and_keeps_flows():
    flow = glow_flow(4, 1, 8)
    assert as_flow(flow) is flow
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module as normalizing flow; got function"):
        as_flow(lambda x: x)
    network = make("freia_sequence", 4)
    network.force_tuple_output = True
    assert evaluate(as_flow(network), torch.rand(2, 4).double())[0].shape == (2, 4)
    assert evaluate(as_flow(Fm.NICECouplingBlock([(4,)], subnet_constructor=mlp)), torch.rand(2, 4))[1].shape == (2,)


def test_broken_contract_is_named():
    class Bad(torch.nn.Module):
        def forward(self, x, rev=False):
            return self.out(x)

    flow = Bad()
    flow.out = lambda x: x
    with pytest.raises(TypeError, match=r"return \(z, log_det\); got Tensor"):
        evaluate(flow, torch.rand(2, 4))
    flow.out = lambda x: (x[:, :2], torch.zeros(2))
    with pytest.raises(ValueError, match="8 numbers"):
        evaluate(flow, torch.rand(2, 4))
    flow.out = lambda x: (x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"log_det of shape \(2,\)"):
        evaluate(flow, torch.rand(2, 4))


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda flow: torch.compile(flow, backend="eager")])
def test_wrapped_flows_keep_the_contract(wrap):
    flow, x, c = allinone_flow(8, 2, 16, dims_c=2), torch.rand(5, 8), torch.rand(5, 2)
    assert torch.equal(Given(wrap(flow), c)(x)[0], flow(x, c=[c])[0])

    class Density(torch.nn.Module):
        def forward(self, x):
            return 2 * x, x.new_full((len(x), 1), 8 * math.log(2))

    z, log_det = evaluate(wrap(Density()), x)
    assert torch.equal(z, 2 * x) and log_det.shape == (5,)
    with pytest.raises(TypeError, match="gives densities only"):
        evaluate(wrap(Density()), x, rev=True)


@pytest.mark.parametrize(
    "build",
    [
        lambda i, f: glow_flow(i(4), i(1), i(8), f(1.6), split_len=i(2)),
        lambda i, f: allinone_flow(
            i(4), i(1), i(8), dims_c=i(2), affine_clamping=f(2), learned_householder_permutation=i(1)
        ),
        lambda i, f: image_flow(
            (i(1), i(4), i(4)), i(1), i(1), i(4), affine_clamping=f(2), dims_c=[(i(1), i(4), i(4))]
        ),
    ],
)
def test_sizes_of_numpy_are_written_as_numbers(build):
    config = build(np.int64, np.float64).config
    assert json.loads(json.dumps(config)) == config == build(int, float).config


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: glow_flow(4.0), ValueError, "expected dim to be an integer >= 1; got 4.0"),
        (lambda: glow_flow(4, split_len=1.5), ValueError, "expected split_len to be an integer"),
        (lambda: allinone_flow(4, dims_c=-1), ValueError, "expected dims_c to be an integer >= 1; got -1"),
        (lambda: allinone_flow(4, learned_householder_permutation=-1), ValueError, "expected learned_householder"),
        (lambda: Reversed("flow"), TypeError, "expected a torch.nn.Module as flow; got str"),
    ],
)
def test_sizes_are_refused_before_anything_is_built(call, error, message):
    with pytest.raises(error, match=message):
        call()
