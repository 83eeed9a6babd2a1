"""Properties of every flow, known or not, by both engines: as recognised, and with recognition switched off."""

import sys
import threading

import deepinv as dinv
import pytest
import torch
from cases import ANY, UNKNOWN, make, reference_nll
from torch.utils.checkpoint import checkpoint

from deepinv_flows import PatchNR
from deepinv_flows.patchnr import potential

UNUSED = {"allow_unused": True, "materialize_grads": True}
ENGINES = ["recognised", "autograd"]
SOME = ["glow_silu", "allinone_householder", "deepinv", *UNKNOWN]  # a flow of each kind


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    if request.param == "autograd":
        monkeypatch.setattr(potential, "steps_of", lambda *args: None)
    return request.param


def prior_of(name, **options):
    return PatchNR(make(name, 4), patch_size=2, **options)


def images(*size):
    return torch.rand(size or (2, 1, 4, 5), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(actual, expected, tolerance=1e-9):
    for a, b in zip(*((found if isinstance(found, (tuple, list)) else [found]) for found in (actual, expected))):
        torch.testing.assert_close(
            a.detach(), b.detach(), rtol=tolerance, atol=tolerance * max(1e-3, float(b.detach().abs().max()))
        )


def belongings(flow):
    """Everything that a user's module holds, object by object, and the values of its tensors."""
    held = []
    for module in flow.modules():
        for kind in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_backward_hooks", "_forward_pre_hooks"):
            held += [(id(module), kind, name, id(value)) for name, value in getattr(module, kind).items()]
        held += [(id(module), module.training)]
    tensors = [*flow.parameters(), *flow.buffers()]
    return held, [(t.requires_grad, t._version, t.data_ptr()) for t in tensors], [t.detach().clone() for t in tensors]


def unchanged(before, flow):
    after = belongings(flow)
    return before[:2] == after[:2] and all(map(torch.equal, before[2], after[2]))


def reference(flow, x, scale, direction, weights):
    """Values, first derivatives (in the image and the weights) and second derivatives by plain autograd."""
    leaf = x.clone().requires_grad_()
    value = reference_nll(flow, leaf, 2)
    (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    first = torch.autograd.grad((value * scale).sum(), [leaf, *weights], retain_graph=True, **UNUSED)
    second = torch.autograd.grad((grad * direction).sum(), [leaf, *weights], **UNUSED)
    return value, grad, first, second


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ANY)
def test_values_and_gradients_and_the_users_module(name, frozen, chunk_size, engine):
    prior = prior_of(name, chunk_size=chunk_size)
    flow, x = prior.normalizing_flow, images()
    if frozen:
        flow.requires_grad_(False)
    weights = [p for p in flow.parameters() if p.requires_grad]
    scale, direction = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.randn_like(x)
    value, grad, first, second = reference(flow, x, scale, direction, weights)
    before = belongings(flow)
    close(prior(x), value)
    close(prior.grad(x), grad)
    with torch.no_grad():
        close(prior(x), value)
        close(prior.grad(x), grad)
    leaf = x.clone().requires_grad_()
    for factor in (scale, torch.full_like(scale, 0.5), torch.full_like(scale, 0.5), scale):  # alike, then not
        found = torch.autograd.grad((prior(leaf) * factor).sum(), [leaf, *weights], **UNUSED)
        if factor is scale:
            close(found, first)
    close(torch.autograd.grad(prior(leaf).sum(), leaf), [grad])
    for found in (prior.grad(leaf), torch.autograd.grad(prior(leaf).sum(), leaf, create_graph=True)[0]):
        close(found, grad)
        close(torch.autograd.grad((found * direction).sum(), [leaf, *weights], **UNUSED), second, 1e-7)
    u = prior.prox(x, gamma=0.1).detach()
    with torch.no_grad():
        assert (0.1 * prior(u) + 0.5 * (u - x).square().flatten(1).sum(1) < 0.1 * prior(x)).all()
    prior.nll_map(x), prior.sample(2)
    assert unchanged(before, flow)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_two_threads_at_once(name, frozen, engine):
    prior = prior_of(name, chunk_size=7)
    flow, x = prior.normalizing_flow.requires_grad_(not frozen), images()
    before, found, errors = belongings(flow), {}, []

    def work(k):
        try:
            for _ in range(4):
                leaf = (x + k).requires_grad_()
                found[k] = torch.autograd.grad(prior(leaf).sum(), [leaf, *(p for p in flow.parameters() if not frozen)])
                prior.grad(x)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and unchanged(before, flow)
    for k in range(2):
        leaf = (x + k).requires_grad_()
        targets = [leaf, *(p for p in flow.parameters() if not frozen)]
        close(found[k], torch.autograd.grad(reference_nll(flow, leaf, 2).sum(), targets))


def shared_block():
    flow = make("deepinv", 4)
    flow.blocks[1] = flow.blocks[0]
    return flow


def shared_layer():
    flow = make("glow_silu", 4)
    for network in (flow[1].subnet1, flow[2].subnet1, flow[2].subnet2):
        network[2] = flow[1].subnet2[2]
    return flow


@pytest.mark.parametrize("build", [shared_block, shared_layer])
def test_shared_submodules(build, engine):
    flow, x = build(), images()
    before, weights = belongings(flow), [p for p in flow.parameters() if p.requires_grad]
    prior = PatchNR(flow, patch_size=2, chunk_size=7)
    expected = torch.autograd.grad(reference_nll(flow, x, 2).sum(), weights)
    for _ in range(2):
        close(torch.autograd.grad(prior(x).sum(), weights), expected)
    assert unchanged(before, flow)


@pytest.mark.parametrize("subset", ["uniform", "grid"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("n_patches", [-1, 5])
@pytest.mark.parametrize("name, frozen", [("glow_silu", False), ("glow_silu", True), ("prelu", False), ("prelu", True)])
def test_checkpointed_or_not(name, frozen, n_patches, reentrant, subset, engine):
    prior = prior_of(name, n_patches=n_patches, subset=subset, pad=subset == "grid")
    prior.requires_grad_(not frozen)
    flow, x = prior.normalizing_flow, images().requires_grad_()
    weights = [p for p in flow.parameters() if p.requires_grad]

    def run(call):
        prior.generator.manual_seed(3)
        total = sum((call(prior, u) * k).sum() for k, u in enumerate([x, x, 2 * x, x], 1))  # of one image several draws
        total = total + call(lambda u: prior.grad(u) * prior(u).view(-1, 1, 1, 1), x).square().sum()
        return [total, *torch.autograd.grad(total, [x, *weights])] if not reentrant else backward(total)

    def backward(total):
        for t in (x, *weights):
            t.grad = None
        total.backward()
        return [total, x.grad, *(p.grad for p in weights)]

    close(run(lambda f, u: checkpoint(f, u, use_reentrant=reentrant)), run(lambda f, u: f(u)))


def test_checkpointed_in_many_threads():
    prior, differ, errors, interval = prior_of("glow_silu", n_patches=5), [], [], sys.getswitchinterval()

    def work(k):
        def twice(u):
            values.append(prior(u))
            return values[-1].square()

        try:
            for i in range(60):
                values, x = [], (images() + k + 4 * i).requires_grad_()
                checkpoint(twice, x, use_reentrant=False).sum().backward()
                differ.extend([] if torch.equal(*values) else [(k, i)])
        except BaseException as error:
            errors.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors and not differ


def gradients_per_sample(prior, x):
    """Gradients in the weights for each image."""
    params = {name: p.detach() for name, p in prior.named_parameters()}

    def loss(params, image):
        return torch.func.functional_call(prior, params, (image[None],)).sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)


@pytest.mark.parametrize("name", [name for name in SOME if name != "zuko_spline"])  # whose search zuko does not map
@pytest.mark.parametrize("frozen", [False, True])
def test_mapped_is_looped(name, frozen, engine):
    prior = prior_of(name)
    prior.requires_grad_(not frozen)
    batches, x = images(3, 2, 1, 4, 5), images()
    padded = PatchNR(prior.normalizing_flow, patch_size=2, pad=True)
    for function in (prior, prior.grad, prior.nll_map, padded, padded.grad):
        close(torch.func.vmap(function)(batches), torch.stack([function(u) for u in batches]))
    for function in (prior, prior.grad):
        jacobians = [torch.autograd.functional.jacobian(function, x, vectorize=v) for v in (True, False)]
        close(*jacobians)
    if not frozen:
        found, weights = gradients_per_sample(prior, x), dict(prior.named_parameters())
        trained = [name for name, p in weights.items() if p.requires_grad]
        for k, image in enumerate(x):
            expected = torch.autograd.grad(prior(image[None]).sum(), [weights[n] for n in trained], **UNUSED)
            close([found[n][k] for n in trained], expected)
        eye, own = torch.eye(2, dtype=torch.float64), [weights[n] for n in trained]
        both = torch.autograd.grad(prior(x), own, eye, is_grads_batched=True, **UNUSED)
        close(both, [torch.stack(g) for g in zip(*(torch.autograd.grad(prior(x), own, e, **UNUSED) for e in eye))])


@pytest.mark.parametrize("name", ["glow_silu", "zuko_spline"])
def test_compiled_is_eager_and_compiled_once(name, recwarn):
    from torch._dynamo.utils import counters

    prior = prior_of(name, chunk_size=7)
    weights = [p for p in prior.parameters() if p.requires_grad]

    def user(x):
        return (3 * prior(2 * x)).sum() + prior.grad(x).square().sum()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(user, backend="eager", dynamic=True)
    graphs = []
    for size in ((2, 1, 4, 5), (2, 1, 6, 5), (2, 1, 7, 9), (2, 1, 5, 4)):
        x = images(*size).requires_grad_()
        found = compiled(x)
        close(found, user(x))
        close(torch.autograd.grad(found, [x, *weights]), torch.autograd.grad(user(x), [x, *weights]))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]  # no compilation for another number of patches
    assert not [w for w in recwarn if "dynamo" in str(w.message).lower() or "recompil" in str(w.message).lower()]
    torch._dynamo.reset()


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("of_prior", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["glow_silu", "around"])
def test_every_dtype_gives_the_same_or_is_refused(name, of_prior):
    prior = prior_of(name).to(of_prior)
    for dtype in DTYPES:
        for x in (images().to(dtype), images(2, 3, 4).to(dtype)):
            for method in (prior, prior.grad, prior.prox):
                if dtype == of_prior:
                    assert method(x).dtype == dtype and method(x).isfinite().all()
                else:
                    with pytest.raises(TypeError):
                        method(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_deepinvs_optimizers_and_patchprior(name, frozen, engine):
    prior = prior_of(name)
    prior.requires_grad_(not frozen)
    physics, y = dinv.physics.Denoising(), images()
    plain = dinv.optim.PatchPrior(prior, patch_size=2)
    for kind, options in ((dinv.optim.GD, {}), (dinv.optim.PGD, {})):
        common = dict(data_fidelity=dinv.optim.L2(), lambda_reg=0.05, stepsize=0.2, max_iter=3, **options)
        found = kind(prior=prior, **common)(y, physics)
        assert found.isfinite().all() and not found.requires_grad
        if kind is dinv.optim.GD:
            close(kind(prior=plain, **common)(y.clone(), physics), found)
    leaf = images()
    close(plain.grad(leaf), prior.grad(images()))
