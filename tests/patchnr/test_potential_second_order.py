"""Second derivatives of PatchNR, and ways to differentiate other than backward()."""

import types

import FrEIA.modules as Fm
import pytest
import torch
from cases import make, reference_nll
from torch import nn
from torch.autograd import forward_ad

from deepinv_flows import PatchNR, allinone_flow, glow_flow
from deepinv_flows.patchnr.fused.recognise import steps_of

CHUNKS = [None, 10]


def prior_and_reference(chunk_size):
    prior = PatchNR(glow_flow(9, 1, 8, activation="silu"), patch_size=3, chunk_size=chunk_size).double()
    return prior, lambda x: reference_nll(prior.normalizing_flow, x, 3)


def image():
    return torch.rand(2, 1, 6, 7, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def one_step(function, x):
    """The value after a step of descent that is itself differentiated, as in meta-learning."""
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return function(x - 0.5 * grad).sum()


USES = {
    "square": lambda f, x, w: f(x).square().sum(),
    "image depends on the weights": lambda f, x, w: f(x + w.sum()).sum(),
    "scale depends on the weights": lambda f, x, w: (f(x) * w.sum()).sum(),
    "meta-learning": lambda f, x, w: one_step(f, x),
}


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("use", USES)
def test_weights_gradients_with_a_graph(use, chunk_size):
    prior, reference = prior_and_reference(chunk_size)
    weights = [p for p in prior.parameters() if p.requires_grad]
    x = image().requires_grad_()
    found = []
    for function in (prior, reference):
        first = torch.autograd.grad(USES[use](function, x, weights[0]), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *weights])
        found.append([*first, *second])
    for actual, expected in zip(*found):
        close(actual, expected)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_third_derivatives(chunk_size):
    prior, reference = prior_and_reference(chunk_size)
    prior.requires_grad_(False)
    x = image().requires_grad_()
    found = []
    for function in (prior, reference):
        value = function(2 * x).square().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.square().sum()
        found.append(grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("by", ("image", "weights"))
def test_weights_changed_before_a_second_derivative_are_noticed(chunk_size, by):
    prior, _ = prior_and_reference(chunk_size)
    prior.requires_grad_(by == "weights")
    x = image().requires_grad_(by == "image")
    gradient = prior.grad(x)
    with torch.no_grad():
        for p in prior.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(gradient.sum(), x if by == "image" else [p for p in prior.parameters() if p.requires_grad])


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_forward_mode_and_function_transforms(chunk_size):
    prior, reference = prior_and_reference(chunk_size)
    x, v = image(), image()
    for trainable in (True, False):
        prior.requires_grad_(trainable)
        tangent = torch.func.jvp(reference, (x,), (v,))[1]
        close(torch.func.jvp(prior, (x,), (v,))[1], tangent)
        close(torch.func.grad(lambda u: prior(u).sum())(x), torch.func.grad(lambda u: reference(u).sum())(x))
        with forward_ad.dual_level():
            dual = prior(forward_ad.make_dual(x, v))
            close(forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_functional_call_with_a_graph(chunk_size):
    prior, reference = prior_and_reference(chunk_size)
    new = {name: (1.1 * p).detach().requires_grad_(p.requires_grad) for name, p in prior.named_parameters()}
    weights = [p for p in new.values() if p.requires_grad]
    x = image()
    value = torch.func.functional_call(prior, new, (x,))
    found = torch.autograd.grad(value.square().sum(), weights, create_graph=True)
    prior.load_state_dict(new, strict=False)
    own = [p for p in prior.parameters() if p.requires_grad]
    for actual, expected in zip(found, torch.autograd.grad(reference(x).square().sum(), own)):
        close(actual, expected)


def test_hooks_of_weights_run_once():
    prior, reference = prior_and_reference(None)
    weight = next(p for p in prior.parameters() if p.requires_grad)
    weight.register_hook(lambda g: 2 * g)
    x = image()
    close(torch.autograd.grad(prior(x).sum(), weight)[0], torch.autograd.grad(reference(x).sum(), weight)[0])


class LearnedClamp(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, u):
        return self.scale * torch.tanh(u)


def block(**options):
    def subnet(i, o):
        return nn.Sequential(nn.Linear(i, 8), nn.SiLU(), nn.Linear(8, o))

    return Fm.GLOWCouplingBlock([(9,)], subnet_constructor=subnet, **options).double()


CLAMPS = {
    "learned function": lambda: block(clamp_activation=LearnedClamp()),
    "learned bound": lambda: block(clamp=nn.Parameter(torch.tensor(2.0, dtype=torch.float64))),
    "no bound": lambda: block(clamp=0.0),
    "far from zero": lambda: block(clamp_activation=lambda u: 0.636 * torch.atan(u.clamp(-12, 12))),
}


@pytest.mark.parametrize("clamp", CLAMPS)
def test_unusual_clamps_are_left_to_autograd(clamp):
    prior = PatchNR(CLAMPS[clamp](), patch_size=3)
    x = image()
    weights = [p for p in prior.parameters() if p.requires_grad]
    value, expected = prior(x), reference_nll(prior.normalizing_flow, x, 3)
    close(value, expected)
    for actual, truth in zip(
        torch.autograd.grad(value.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True
    ):
        close(actual, truth)


def replaced_forward(layer):
    layer.forward = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), layer)


CHANGES = {
    "forward": replaced_forward,
    "forward hook": lambda layer: layer.register_forward_hook(lambda m, args, out: 2 * out),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda m, g: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_were_changed_are_left_to_autograd(change):
    flow = make("glow", 9)
    assert steps_of(flow) is not None
    CHANGES[change](next(m for m in flow.modules() if isinstance(m, nn.Linear)))
    assert steps_of(flow) is None


def test_global_hooks_leave_all_to_autograd():
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        assert steps_of(make("glow", 9)) is None
    finally:
        handle.remove()


def test_only_a_weight_without_effect_is_trainable():
    flow = allinone_flow(9, 2, 8, gin_block=True).double().requires_grad_(False)
    weight = flow[0].global_scale.requires_grad_(True)
    value = PatchNR(flow, patch_size=3)(image()).sum()
    assert not torch.autograd.grad(value, weight)[0].any()


def test_images_made_in_inference_mode():
    prior, _ = prior_and_reference(None)
    with torch.inference_mode():
        x = image()
    close(prior.requires_grad_(False).grad(x), prior.grad(x.clone()))


def test_many_patches_with_trainable_weights():
    prior, _ = prior_and_reference(10)
    patches = torch.rand(2, 25, 9, dtype=torch.float64)
    weights = [p for p in prior.parameters() if p.requires_grad]
    value = prior(patches)
    with torch.no_grad():
        close(value.detach(), prior(patches))
    assert len(torch.autograd.grad(value.sum(), weights)) == len(weights)
