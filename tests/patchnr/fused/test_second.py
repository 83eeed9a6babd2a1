"""Second derivatives that are written out: Hessian-vector products, and gradients of gradients in the weights."""

import gc

import pytest
import torch
from cases import FLOWS, make, reference_nll
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepinv_flows import PatchNR, Reversed, glow_flow
from deepinv_flows.patchnr import by_autograd, potential
from deepinv_flows.patchnr.fused import second, twice_differentiable
from deepinv_flows.patchnr.fused.activations import leaky_relu, relu, silu
from deepinv_flows.patchnr.fused.recognise import steps_of

UNUSED = {"allow_unused": True, "materialize_grads": True}  # the global scale of a GIN block
WRITTEN = [name for name in FLOWS if twice_differentiable(steps_of(make(name, 9)))]


def close(actual, expected, tolerance=1e-10):
    scale = max(float(expected.detach().abs().max()), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture
def no_autograd(monkeypatch):
    def fail(*args):
        raise AssertionError("expected derivatives that are written out")

    for name in ("gradients", "direct", "derivatives"):
        monkeypatch.setattr(by_autograd, name, fail)


def images(*size):
    return torch.rand(size or (2, 1, 8, 7), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expected(flow, x, direction, scale):
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((reference_nll(flow, leaf, 3) * scale).sum(), leaf, create_graph=True)
    weights = [p for p in flow.parameters() if p.requires_grad]
    return grad.detach(), torch.autograd.grad((grad * direction).sum(), [leaf, *weights], **UNUSED)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("chunk_size", [7, 10_000])
@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize("name", WRITTEN)
def test_against_autograd(name, way, chunk_size, kept, monkeypatch, no_autograd):
    monkeypatch.setattr(second, "MEMORY", 2**40 if kept else 0)
    monkeypatch.setattr(potential, "_fused_chunk", lambda *args: chunk_size)
    flow = make(name, 9)
    flow = Reversed(flow) if way == "inverse" and name != "reversed" else flow
    prior, x = PatchNR(flow, patch_size=3), images()
    weights = [p for p in flow.parameters() if p.requires_grad]
    for _ in range(2):  # buffers are used again
        direction, ones = torch.randn_like(x), torch.ones(2, dtype=torch.float64)
        grad, (in_image, *in_weights) = expected(flow, x, direction, ones)
        leaf = x.clone().requires_grad_()
        found = prior.grad(leaf)
        close(found.detach(), grad)
        close(torch.autograd.grad(found, leaf, direction, retain_graph=True)[0], in_image)
        both = torch.autograd.grad(found, [leaf, *weights], direction, retain_graph=True, **UNUSED)
        for a, b in zip(both, [in_image, *in_weights]):
            close(a, b)
        if weights:
            for a, b in zip(torch.autograd.grad(found, weights, -direction, retain_graph=True, **UNUSED), in_weights):
                close(-a, b)
        close(torch.autograd.grad(found, leaf, 2 * direction)[0], 2 * in_image)


@pytest.mark.parametrize("activation", [relu(), leaky_relu(0.2), silu()])
def test_derivatives_of_activations(activation):
    a = torch.linspace(-6, 6, 101, dtype=torch.float64)[:, None]
    h, first, bend = a.clone(), torch.ones_like(a), torch.zeros_like(a)

    def do(operation, *args, **kwargs):
        operation(*args, **kwargs)

    if activation.in_place:
        activation.apply(do, h, h)
        activation.backward(do, first, h)
    else:
        activation.derivatives(do, a, h, first, bend)
    leaf = a.clone().requires_grad_()
    value = activation.function(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    (twice,) = torch.autograd.grad(slope.sum() + 0 * leaf.square().sum(), leaf)
    for found, wanted in ((h, value), (first, slope), (bend, twice)):
        close(found, wanted)


def test_an_activation_without_written_derivatives_is_left_to_autograd():
    flow = glow_flow(9, 1, 8, activation="silu").double()
    assert twice_differentiable(steps_of(flow))
    for block in flow.modules():
        if isinstance(block, nn.Sequential):
            block[1] = nn.GELU()
    assert not twice_differentiable(steps_of(flow))
    prior, x = PatchNR(flow, patch_size=3), images().requires_grad_()
    direction = torch.randn_like(x)
    _, (in_image, *_) = expected(flow, x, direction, torch.ones(2, dtype=torch.float64))
    close(torch.autograd.grad(prior.grad(x), x, direction)[0], in_image)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_may_change_between_the_gradient_and_its_derivatives(threads):
    flow, x = make("glow_silu", 9), images(2, 1, 30, 30)
    prior, direction = PatchNR(flow, patch_size=3, chunk_size=None), torch.randn_like(x)
    _, (in_image, *in_weights) = expected(flow, x, direction, torch.ones(2, dtype=torch.float64))
    weights, leaf, before = (
        [p for p in flow.parameters() if p.requires_grad],
        x.clone().requires_grad_(),
        torch.get_num_threads(),
    )
    try:
        torch.set_num_threads(threads)
        found = prior.grad(leaf)
        torch.set_num_threads(3 - threads)
        for a, b in zip(torch.autograd.grad(found, [leaf, *weights], direction, **UNUSED), [in_image, *in_weights]):
            close(a, b)
    finally:
        torch.set_num_threads(before)


def test_scaled_images(no_autograd):
    flow, x = make("glow_silu", 9), images()
    scale, direction = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.randn_like(x)
    _, (in_image, *_) = expected(flow, x, direction, scale)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((PatchNR(flow, patch_size=3)(leaf) * scale).sum(), leaf, create_graph=True)
    close(torch.autograd.grad(grad, leaf, direction)[0], in_image)


def test_float32_is_as_near_to_the_truth_as_autograd():
    prior, x = PatchNR(glow_flow(9, 2, 32, activation="silu"), patch_size=3), torch.rand(2, 1, 12, 12)
    direction = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    ours = torch.autograd.grad(prior.grad(leaf), leaf, direction)[0].double()
    (grad,) = torch.autograd.grad(reference_nll(prior.normalizing_flow, leaf, 3).sum(), leaf, create_graph=True)
    plain = torch.autograd.grad(grad, leaf, direction)[0].double()
    truth = expected(prior.double().normalizing_flow, x.double(), direction.double(), torch.ones(2).double())[1][0]
    assert (ours - truth).norm() <= 2 * (plain - truth).norm() + 1e-7 * truth.norm()


def test_what_is_kept_is_freed_by_the_backward_pass():
    prior, x = PatchNR(make("glow_silu", 9), patch_size=3), images().requires_grad_()
    before = second._alive.bytes
    found = prior.requires_grad_(False).grad(x)
    assert second._alive.bytes > before
    torch.autograd.grad(found.square().sum(), x)
    assert second._alive.bytes == before and found is not None


def test_what_all_calls_keep_together_is_bounded(monkeypatch):
    prior, x = PatchNR(make("glow_silu", 9), patch_size=3).requires_grad_(False), images().requires_grad_()
    first = prior.grad(x)
    kept = second._alive.bytes
    monkeypatch.setattr(second, "MEMORY", 2 * kept)
    more = [prior.grad(x) for _ in range(5)]
    assert second._alive.bytes == 2 * kept
    for grad in more:  # whether they are kept or not
        for a, b in zip(*(torch.autograd.grad(g.square().sum(), x, retain_graph=True) for g in (first, grad))):
            close(a, b)


def test_kept_of_a_gradient_whose_direction_leads_to_it_is_freed():
    prior, x = PatchNR(make("glow_silu", 9), patch_size=3), images().requires_grad_()
    weights, before = [p for p in prior.parameters() if p.requires_grad], second._alive.bytes
    for _ in range(3):
        found = prior.grad(x)
        torch.autograd.grad(found, weights, found)
    del found
    gc.collect()
    assert second._alive.bytes == before


@pytest.mark.parametrize("kept", [False, True])
def test_tensors_that_are_saved_elsewhere(kept, monkeypatch):
    prior, x = PatchNR(make("glow_silu", 9), patch_size=3), images().requires_grad_()
    targets = [x, *(p for p in prior.parameters() if p.requires_grad)]
    plain = torch.autograd.grad(prior.grad(x).square().sum(), targets)
    if not kept:  # for this call, though it would fit
        monkeypatch.setattr(second._alive, "bytes", second.MEMORY)
    with torch.autograd.graph.save_on_cpu():
        found = prior.grad(x).square().sum()
    for a, b in zip(torch.autograd.grad(found, targets), plain):
        close(a, b)


@pytest.mark.parametrize("by", ["gradient", "value"])
def test_a_direction_that_changes_in_place_is_another_direction(by):
    prior, x = PatchNR(make("glow_silu", 9), patch_size=3), images().requires_grad_()
    weights, direction = [p for p in prior.parameters() if p.requires_grad], torch.tensor([1.0, 2.0], dtype=x.dtype)
    torch.autograd.grad(prior(x), weights, direction)  # so that the next values are left to the backward pass
    found = prior(x)
    if by == "gradient":
        found, direction = prior.grad(x), torch.randn_like(x)
    (before,) = torch.autograd.grad(found, x, -3 * direction, retain_graph=True)
    torch.autograd.grad(found, weights, direction, retain_graph=True)
    direction.mul_(-3)
    close(torch.autograd.grad(found, x, direction)[0], before)


def test_batched_directions_do_not_leave_a_graph():
    prior, x = PatchNR(make("glow_silu", 9), patch_size=3), images().requires_grad_()
    directions = torch.randn(3, *x.shape, dtype=x.dtype)
    grad = prior.grad(x)
    found = torch.autograd.grad(grad, x, directions, retain_graph=True, is_grads_batched=True)[0]
    assert not found.requires_grad
    for direction, one in zip(directions, found):
        close(one, torch.autograd.grad(grad, x, direction, retain_graph=True)[0])


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("threads", [(1, 1), (1, 2), (2, 1)])
def test_within_a_checkpoint(threads, image):
    prior, x = PatchNR(make("glow_silu", 9), patch_size=3), images(2, 1, 40, 40).requires_grad_(image)
    prior._asked.second = True  # as in a training by second derivatives
    targets = [*([x] if image else []), *(p for p in prior.parameters() if p.requires_grad)]
    plain = torch.autograd.grad(prior.grad(x).square().sum(), targets)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads[0])
        found = checkpoint(prior.grad, x, use_reentrant=False)
        torch.set_num_threads(threads[1])
        for a, b in zip(torch.autograd.grad(found.square().sum(), targets), plain):
            close(a, b)
    finally:
        torch.set_num_threads(before)
