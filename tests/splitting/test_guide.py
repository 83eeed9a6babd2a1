"""The guide's lines for a folder of images with dead pixels, run as a user copies them, on fewer images."""

import copy
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

GUIDE = (Path(__file__).parents[2] / "examples" / "site" / "guides" / "splitting.rst").read_text()
LINES = textwrap.dedent(
    GUIDE.split("From a folder of images")[1].split(".. code-block:: python\n")[1].split("\nNorm")[0]
)


def test_training_from_a_folder_of_images_with_dead_pixels(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    draw = torch.Generator().manual_seed(0)
    living = torch.rand(1, 32, 32, generator=draw) < 0.5
    (tmp_path / "measurements").mkdir()
    for k in range(9):
        pixels = living * torch.randint(1, 256, (1, 32, 32), generator=draw)
        image.fromarray(pixels[0].byte().numpy()).save(tmp_path / "measurements" / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile(LINES.replace("epochs=20", "epochs=2"), "guide", "exec"), namespace)
    network = namespace["dinv"].models.ArtifactRemoval(copy.deepcopy(namespace["network"]), mode="adjoint")
    again = namespace["loss"].adapt_model(network)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(torch.load("model.pth", weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), namespace["model"].parameters()))
    mask, y, x_net = (namespace[name] for name in ("mask", "y", "x_net"))
    assert torch.equal(mask, living[None].float()) and x_net.shape == y.shape and torch.isfinite(x_net).all()
    assert np.isfinite(namespace["trainer"].loss_history["EquivariantSplittingLoss"]).all()
