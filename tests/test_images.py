"""Images of folders and of scikit-image, pieces of images, and phantoms."""

import numpy as np
import pytest
import torch
from PIL import Image

from deepinv_flows.images import crops, load_images, phantoms


@pytest.fixture
def folder(tmp_path):
    """Seven images, whose grey levels are their numbers."""
    (tmp_path / "more").mkdir()
    for k in range(7):
        Image.fromarray(np.full((10, 12), k, np.uint8)).save(tmp_path / ("more" if k > 4 else "") / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def levels(images):
    return [round(255 * float(image.mean())) for image in images]


def test_folders_are_read_in_order_and_held_out_images_are_not_learned(folder):
    assert levels(load_images(folder)) == list(range(7))
    assert levels(load_images(folder, part="train")) == [0, 1, 2, 3, 5, 6] and levels(
        load_images(folder, part="eval")
    ) == [4]
    assert levels(load_images([folder / "0.png", folder / "3.png"], part="eval")) == [3]
    (image,) = load_images(folder / "2.png", channels=3)
    assert image.shape == (3, 10, 12) and image.dtype == torch.float32
    assert torch.equal(image, torch.full_like(image, 2 / 255))


def test_of_one_image_the_lowest_rows_are_held_out():
    (image,) = load_images("camera")
    (upper,), (lower,) = load_images("camera", part="train"), load_images("camera", part="eval")
    assert torch.equal(torch.cat([upper, lower], 1), image) and lower.shape[1] == 512 // 5
    assert load_images("camera", part="eval", min_size=200)[0].shape[1] == 200


def test_colours_and_their_grey():
    (colour,), (grey,) = load_images("astronaut", channels=3), load_images("astronaut")
    expected = torch.tensor([0.299, 0.587, 0.114]) @ colour.flatten(1)
    torch.testing.assert_close(grey.flatten(), expected, rtol=0, atol=1 / 255)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda path: load_images(path / "none"), "expected a folder of images, a file, or the name"),
        (lambda path: load_images("../data/camera"), "expected a folder of images, a file, or the name"),
        (lambda path: load_images(path / "more" / "empty"), "expected data to name images"),
        (lambda path: load_images(None), "expected data to name images; got None"),
        (lambda path: load_images(path, min_size=11), r"at least 11 x 11 pixels; got \(1, 10, 12\)"),
        (lambda path: load_images(path / "deep.png"), "expected an image of 8 bits; got mode I;16 .*deep.png"),
        (lambda path: load_images(path / "dark.npy"), r"in \[0, 1\]; got float64 of shape \(2, 3, 4\)"),
        (lambda path: load_images(path, part="test"), "expected part to be one of"),
        (lambda path: load_images(path, channels=2), "expected channels to be one of"),
        (lambda path: crops(path, size=8, number=0), "expected number to be an integer >= 1; got 0"),
        (lambda path: crops(path, size=12, number=1), "at least 12 x 12 pixels"),
    ],
)
def test_faults(call, message, folder):
    (folder / "more" / "empty").mkdir()
    Image.fromarray(np.full((10, 12), 9, np.uint16)).save(folder / "deep.png")
    np.save(folder / "dark.npy", -np.ones((2, 3, 4)))
    if "min_size" in message or "11" in message or "12 x 12" in message:
        (folder / "deep.png").unlink(), (folder / "dark.npy").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(folder)


def test_crops_are_pieces_of_the_image():
    state = torch.get_rng_state()
    (image,) = load_images("gravel", part="train")
    pieces = crops("gravel", size=5, number=20, part="train")
    assert torch.equal(state, torch.get_rng_state())
    windows = image[0].unfold(0, 5, 1).unfold(1, 5, 1)
    assert all((windows == piece[0]).flatten(2).all(2).any() for piece in pieces)
    assert torch.equal(pieces, crops("gravel", size=5, number=20, part="train"))
    assert not torch.equal(pieces, crops("gravel", size=5, number=20, part="train", seed=1))


def test_crops_use_every_image_before_one_again(tmp_path):
    images = torch.arange(5.0).view(5, 1, 1).expand(5, 6, 6).numpy() / 10
    np.save(tmp_path / "five.npy", images)
    found = crops(tmp_path / "five.npy", size=6, number=13)[:, 0, 0, 0].mul(10).round().tolist()
    assert sorted(found[:5]) == sorted(found[5:10]) == [0, 1, 2, 3, 4] and len(set(found[10:])) == 3
    assert len(crops(tmp_path / "five.npy", size=3, number=None)) == 5


def test_phantoms_of_training_and_evaluation_differ():
    train, held_out = (crops("phantoms", size=16, number=4, part=part) for part in ("train", "eval"))
    assert train.shape == (4, 1, 16, 16) and train.min() == 0 and train.max() <= 1 and not torch.equal(train, held_out)


def test_a_phantom_is_the_sum_of_its_ellipses():
    """The phantoms equal those made pixel by pixel and ellipse by ellipse."""
    found = phantoms(2, 12, ellipses=3, generator=torch.Generator().manual_seed(5))
    u0, v0, a, b, angle, value = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(5)).double()
    grid = torch.linspace(-1, 1, 12).double()
    for n, row, column in np.ndindex(2, 12, 12):
        level = 0.0
        for k in range(3):
            du, dv = grid[column] - 1.1 * u0[n, k] + 0.55, grid[row] - 1.1 * v0[n, k] + 0.55
            cos, sin = torch.cos(torch.pi * angle[n, k]), torch.sin(torch.pi * angle[n, k])
            along, across = cos * du + sin * dv, cos * dv - sin * du
            if (along / (0.1 + 0.35 * a[n, k])) ** 2 + (across / (0.1 + 0.35 * b[n, k])) ** 2 < 1:
                level += 0.5 * value[n, k]
        assert abs(found[n, 0, row, column] - min(level, 1)) < 1e-5


def test_colour_read_as_grey_is_said(folder, recwarn):
    assert len(load_images(folder)) == 7 and not recwarn.list  # grey, also where a file holds three equal channels
    Image.fromarray(np.full((10, 12, 3), 5, np.uint8)).save(folder / "equal.png")
    load_images(folder)
    assert not recwarn.list
    Image.fromarray(np.dstack([np.full((10, 12), k, np.uint8) for k in (1, 2, 3)])).save(folder / "colour.png")
    with pytest.warns(
        UserWarning, match="1 of 9 files of .* are in colour and are read as grey; channels=3 keeps the colours"
    ):
        load_images(folder)
    assert len(load_images(folder, channels=3)) == 9
