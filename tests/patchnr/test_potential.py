"""Evaluation in chunks against a naive loop, and each way to a gradient against plain autograd."""

import copy

import pytest
import torch
from cases import ANY, make, reference_nll
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinv_flows import PatchNR
from deepinv_flows.flows import nll
from deepinv_flows.patchnr.patches import PatchIndex
from deepinv_flows.patchnr.potential import PatchPotential

CHUNKS = [7, 10_000]
UNUSED = {"allow_unused": True, "materialize_grads": True}  # the global scale of a GIN block


def close(actual, expected):
    """Equal up to 1e-10 times the largest entry, or times 1e-3 if that is larger, for tensors that vanish in exact arithmetic."""
    scale = max(float(expected.detach().abs().max()), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale)


def trainable(flow):
    return [p for p in flow.parameters() if p.requires_grad]


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    patch_size=st.integers(1, 4),
    extra=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    stride=st.integers(1, 4),
    pad=st.sampled_from([False, True, "constant", "circular", "replicate"]),
    chunk_size=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradient_against_a_naive_loop(batch, channels, patch_size, extra, stride, pad, chunk_size):
    stride, dim = min(stride, patch_size), channels * patch_size**2
    if dim < 2:
        channels, dim = 2, 2
    flow = make("glow_silu", dim)
    prior = PatchNR(flow, patch_size=patch_size, channels=channels, stride=stride, pad=pad, chunk_size=chunk_size)
    x = torch.rand(
        batch, channels, patch_size + extra[0], patch_size + extra[1], dtype=torch.float64, requires_grad=True
    )

    width, mode = patch_size - 1, "reflect" if pad is True else pad
    padded = torch.nn.functional.pad(x, [width] * 4, mode=mode) if pad else x
    height, length = padded.shape[2] - width, padded.shape[3] - width
    rows = sorted({*range(0, height, stride), height - 1})
    cols = sorted({*range(0, length, stride), length - 1})
    expected = []
    for image in padded:
        patches = [image[:, i : i + patch_size, j : j + patch_size].reshape(-1) for i in rows for j in cols]
        z, log_det = flow(torch.stack(patches))
        expected.append((0.5 * (z**2).sum(1) - log_det).mean())
    expected = torch.stack(expected)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with torch.no_grad():
        close(prior(x), expected)
        close(prior.grad(x), gradient)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", ANY)
def test_all_paths_agree_with_whole_image_autograd(name, chunk_size):
    flow = make(name, 9)
    x = torch.rand(2, 1, 8, 7, dtype=torch.float64, requires_grad=True)
    index = PatchIndex(x.shape, 3)
    value = reference_nll(flow, x, 3)
    weights = trainable(flow)
    scale = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    direction = torch.randn_like(x)
    first = torch.autograd.grad((value * scale).sum(), [x, *weights], retain_graph=True, **UNUSED)
    second = torch.autograd.grad((gradient * direction).sum(), [x, *weights], **UNUSED)

    potential = PatchPotential(flow, index, chunk_size)
    fast_value, fast_gradient = potential.value_and_grad(x.detach())
    close(fast_value, value)
    close(fast_gradient, gradient)

    value_ = potential.value(x)
    for a, b in zip(torch.autograd.grad((value_ * scale).sum(), [x, *weights], **UNUSED), first):
        close(a, b)
    value_ = potential.value(x)
    (gradient_,) = torch.autograd.grad(value_.sum(), x, create_graph=True)
    for a, b in zip(torch.autograd.grad((gradient_ * direction).sum(), [x, *weights], **UNUSED), second):
        close(a, b)
    gradient_ = potential.grad(x)
    close(gradient_, gradient)
    for a, b in zip(torch.autograd.grad((gradient_ * direction).sum(), [x, *weights], **UNUSED), second):
        close(a, b)

    flow.requires_grad_(False)
    frozen = potential.value(x)
    close(frozen, value)
    close(torch.autograd.grad((frozen * scale).sum(), x, retain_graph=True)[0], first[0])
    (gradient_,) = torch.autograd.grad(frozen.sum(), x, create_graph=True)
    close(torch.autograd.grad((gradient_ * direction).sum(), x)[0], second[0])


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", ANY)
def test_weights_gradients_of_single_patches_that_count_alike_or_not(name, equal):
    flow = make(name, 12)
    prior = PatchNR(flow, patch_size=2, channels=3, chunk_size=7)
    patches = torch.rand(2, 9, 12, dtype=torch.float64, requires_grad=True)
    counts = torch.full((2, 9), 0.3, dtype=torch.float64) if equal else torch.rand(2, 9, dtype=torch.float64)
    plain = nll(flow, patches.flatten(0, 1), constant=False).view(2, 9)
    targets = [patches, *trainable(flow)]
    expected = torch.autograd.grad((plain * counts).sum(), targets, **UNUSED)
    for a, b in zip(torch.autograd.grad((prior(patches) * counts).sum(), targets, **UNUSED), expected):
        close(a, b)


@pytest.mark.parametrize("trained", [False, True])
def test_float32_is_no_further_from_the_truth_than_three_times_plain_autograd(trained):
    prior = PatchNR(pretrained="gravel" if trained else None).requires_grad_(False)
    x = torch.nn.functional.avg_pool2d(torch.rand(8, 1, 44, 44), 5, 1)
    exact = copy.deepcopy(prior).double()
    leaf, leaf64 = x.clone().requires_grad_(), x.double().requires_grad_()
    (plain,) = torch.autograd.grad(reference_nll(prior.normalizing_flow, leaf, 6).sum(), leaf)
    (truth,) = torch.autograd.grad(reference_nll(exact.normalizing_flow, leaf64, 6).sum(), leaf64)
    own_error, plain_error = (prior.grad(x).double() - truth).abs(), (plain.double() - truth).abs()
    # near a kink of a ReLU rounding decides: there one or the other is off, as chance has it
    assert own_error.median() <= 3 * plain_error.median()
    assert own_error.norm() <= 1e-3 * truth.norm()


def test_subset_is_part_of_the_grid_without_repetition():
    everything = PatchIndex((2, 1, 9, 8), 3)
    subset = PatchIndex((2, 1, 9, 8), 3, n_patches=10, generator=torch.Generator().manual_seed(1))
    image, pixels = subset(torch.arange(len(subset)))
    corners = pixels[:, 0].tolist()
    every_corner = set(everything(torch.arange(len(everything)))[1][:, 0].tolist())
    assert len(set(corners)) == 20 and set(corners) <= every_corner
    assert image.tolist() == [0] * 10 + [1] * 10
    assert [c - 72 for c in corners[10:]] == corners[:10]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("n_patches", [1, 5, 11, 30])
@pytest.mark.parametrize("subset", ["uniform", "grid"])
def test_every_position_is_equally_likely(subset, n_patches, stride):
    generator = torch.Generator().manual_seed(0)
    index = PatchIndex((1, 1, 9, 10), 3, stride)
    everything = index(torch.arange(len(index)))[1][:, 0]
    seen = torch.zeros(90, dtype=torch.float64)
    draws = 4000
    for _ in range(draws):
        drawn = PatchIndex((1, 1, 9, 10), 3, stride, n_patches, generator, subset=subset)
        seen[drawn(torch.arange(len(drawn)))[1][:, 0]] += drawn.weight
    # each draw adds weight or nothing, with mean 1 / (number of positions)
    share, mean = seen[everything] / draws, 1 / len(everything)
    deviation = (mean * (drawn.weight - mean) / draws) ** 0.5
    assert ((share - mean).abs() <= 4.5 * deviation + 1e-12).all()
    assert seen.sum() == pytest.approx(float(seen[everything].sum()))


@pytest.mark.parametrize("subset", ["uniform", "grid"])
def test_random_subsets_are_unbiased(subset):
    prior = PatchNR(
        make("glow", 9), patch_size=3, n_patches=8, subset=subset, generator=torch.Generator().manual_seed(0)
    )
    whole = PatchNR(prior.normalizing_flow, patch_size=3)
    x = torch.rand(1, 1, 8, 9, dtype=torch.float64)
    with torch.no_grad():
        values = torch.stack([prior(x) for _ in range(2000)])
        gradients = torch.stack([prior.grad(x) for _ in range(2000)])
        expected = whole.grad(x)
    offsets = 6  # 42 positions: every second row, every third column
    assert (len(values.unique()) <= offsets) == (subset == "grid")
    for draws, truth in ((values, whole(x)), (gradients, expected)):
        error = (draws.mean(0) - truth) / (draws.std(0) / len(draws) ** 0.5)
        assert error.abs().max() < 4.5  # of 73 standard errors


def test_gradients_do_not_depend_on_what_was_asked_before():
    """The forward pass computes in advance what the last backward pass asked for, or leaves it to the next."""
    prior = PatchNR(patch_size=3, num_layers=2, sub_net_size=8).double()
    x = torch.rand(4, 1, 14, 14, dtype=torch.float64)
    ones, factors, others = torch.ones(4), torch.rand(4), torch.rand(4)

    def right(scale):
        fresh = copy.deepcopy(prior)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(fresh(leaf) @ scale.double(), [leaf, *fresh.parameters()])

    def asked(scale, *what):
        return torch.autograd.grad(value @ scale.double(), what, retain_graph=True)

    for first in (ones, factors, ones, factors, factors):
        leaf = x.clone().requires_grad_()
        value = prior(leaf)
        weights = list(prior.parameters())
        torch.testing.assert_close(asked(first, *weights), right(first)[1:])  # leaves a gradient in the image behind
        torch.testing.assert_close(asked(others, leaf), right(others)[:1])
        torch.testing.assert_close(asked(first, leaf, *weights), right(first))
