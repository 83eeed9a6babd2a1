"""Images as training samples."""

import numpy as np
import pytest
import torch

from deepinv_flows.training.samples import PatchSamples, image_list, subset


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
