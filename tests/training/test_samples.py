"""Images as training samples."""

import numpy as np
import pytest
import torch

from deepinv_flows.training.samples import PatchSamples, RandomBatches, image_list, subset
from deepinv_flows.training.streams import derived, source


@pytest.mark.parametrize("augment", [False, True])
def test_samples_are_the_patches(augment):
    images = [torch.rand(2, 5, 7), torch.rand(2, 4, 4)]
    data = PatchSamples(images, 3, augment=augment)
    expected = [p for im in images for p in torch.nn.functional.unfold(im[None], 3)[0].T]
    assert len(data) == len(expected) == 19
    batch = data.__getitems__(list(range(19)))["x"]
    for got, patch in zip(batch, expected):
        if augment:
            square = patch.view(2, 3, 3)
            turned = [torch.rot90(s, k, (1, 2)).reshape(-1) for s in (square, square.flip(2)) for k in range(4)]
            assert any(torch.equal(got, t) for t in turned)
        else:
            assert torch.equal(got, patch)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8, 9, 12, 17, 64])
def test_a_batch_of_any_size_shows_all_symmetries(size):
    """A patch that is not symmetric appears under all eight symmetries, batch after batch."""
    square = torch.arange(9.0).view(1, 3, 3)
    data = PatchSamples([square], 3, augment=True)
    seen = {tuple(x.tolist()) for _ in range(100 if size < 8 else 1) for x in data.__getitems__([0] * size)["x"]}
    expected = {tuple(torch.rot90(s, k, (1, 2)).flatten().tolist()) for s in (square, square.flip(2)) for k in range(4)}
    assert seen == expected


def test_symmetries_of_small_batches_are_the_generators():
    draws = []
    for _ in range(2):
        data = PatchSamples([torch.arange(9.0).view(1, 3, 3)], 3, True, torch.Generator().manual_seed(3))
        draws.append(torch.stack([data[0]["x"] for _ in range(20)]))
    assert torch.equal(*draws)


def test_numbers_in_a_tensor_are_numbers():
    data, numbers = PatchSamples([torch.rand(1, 5, 7)], 3), torch.tensor([3, 0, 7, 3])
    assert torch.equal(data.__getitems__(numbers)["x"], data.__getitems__(numbers.tolist())["x"])


def test_batches_are_drawn_evenly_from_their_generator():
    batches, again = (RandomBatches(5, 1000, 20, torch.Generator().manual_seed(1)) for _ in range(2))
    drawn = torch.stack(list(batches))
    assert len(batches) == 20 and drawn.shape == (20, 1000)
    counts = drawn.flatten().bincount(minlength=5)
    error = (0.2 * 0.8 * drawn.numel()) ** 0.5
    assert len(counts) == 5 and ((counts - drawn.numel() / 5).abs() < 4 * error).all()
    assert torch.equal(drawn, torch.stack(list(again)))
    assert not torch.equal(drawn, torch.stack(list(batches)))  # the next epoch


def test_a_generator_serves_where_it_is():
    generator = torch.Generator().manual_seed(2)
    assert derived(generator, torch.device("cpu")) is generator and source(generator) is generator
    assert torch.equal(source(None).get_state(), source(None).get_state())


def test_a_subset_is_even():
    assert [int(x) for x in subset(range(100), 5)] == [0, 24, 49, 74, 99]
    assert len(subset(range(3), 5)) == 3


@pytest.mark.parametrize(
    "images, message",
    [
        (
            np.zeros((8, 9, 3), np.uint8),
            r"\(8, 9, 3\): pass \[torch.from_numpy\(images\).permute\(2, 0, 1\).float\(\) / 255\]$",
        ),
        (np.zeros((8, 9)), r"\(8, 9\): pass \[torch.from_numpy\(images\)\[None\].float\(\)\]$"),
        (np.zeros((5, 8, 9)), r"got ndarray of shape \(5, 8, 9\)$"),
        (
            [np.zeros((8, 9, 3), np.uint8)],
            r"\(8, 9, 3\): pass torch.from_numpy\(image\).permute\(2, 0, 1\).float\(\) / 255$",
        ),
        ([[1.0]], "got list$"),
    ],
)
def test_arrays_are_refused_with_the_conversion(images, message):
    with pytest.raises(TypeError, match=message):
        image_list(images, 3)
    if "pass" in message:
        name, images_ = message.rpartition("pass ")[2].rstrip("$").replace("\\", ""), images
        converted = eval(name, {"torch": torch, "images": images_, "image": images_[0]})
        assert image_list(converted if isinstance(converted, list) else [converted], 3)[0].shape[1:] == (8, 9)


def test_bytes_are_refused_with_the_conversion():
    with pytest.raises(ValueError, match=r"got torch.uint8 of shape \(3, 8, 8\): pass image.float\(\) / 255$"):
        image_list([torch.zeros(3, 8, 8, dtype=torch.uint8)], 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_becomes_single(dtype):
    (image,) = image_list([torch.rand(1, 8, 8).to(dtype)], 3)
    assert image.dtype == (dtype if dtype in (torch.float32, torch.float64) else torch.float32)
