"""The whole road in a dozen lines, as a user writes it, with seconds for minutes."""

from pathlib import Path

import deepinv as dinv
import pytest
import torch

from deepinv_flows import console
from deepinv_flows.training import effort

README = Path(__file__).parents[2] / "README.md"
ROAD = README.read_text().split("```python\n")[2].split("```")[0]


def test_the_road(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    assert len([line for line in ROAD.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "LONG", 0.0)
    monkeypatch.setitem(effort.MINUTES, "quick", 0.02)
    monkeypatch.setattr(effort, "LEAST_STEPS", 5)
    monkeypatch.setitem(effort.SIZES, "quick", (5, lambda dim: 32, 64, 1))
    short = ROAD.replace(":128, 128:256", ":24, 160:184").replace("150:246, -96:", "150:170, -20:")
    short = short.replace("MAP(prior)", "MAP(prior, max_iter=4)")
    namespace = {}
    exec(compile(short, "road", "exec"), namespace)
    physics, y, x_net, model = (namespace[name] for name in ("physics", "y", "x_net", "model"))
    said = capsys.readouterr().out
    assert "fit_patchnr: 5 blocks of width 32 on patches of dimension 48" in said
    assert "MAP.tune: lambda_reg" in said and "(tuned on 0.655 times as many patches)" in said
    assert x_net.shape == y.shape and torch.isfinite(x_net).all()
    again = namespace["MAP"].from_checkpoint("map.safetensors", verbose=False)
    assert torch.equal(again(y, physics), x_net) and again.lambda_reg == model.lambda_reg
    assert isinstance(physics, dinv.physics.Blur)
