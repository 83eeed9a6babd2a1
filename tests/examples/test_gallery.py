"""The gallery, shortened: ``pytest -m examples``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMOS = sorted(path.stem for path in EXAMPLES.glob("demo_*.py"))


@pytest.mark.examples
@pytest.mark.parametrize("demo", DEMOS)
def test_demo_runs(demo):
    figure = EXAMPLES / "output" / "short" / f"{demo.removeprefix('demo_')}.png"
    figure.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", EXAMPLES / f"{demo}.py"]
    run = subprocess.run(command, env={**os.environ, "DEEPINV_FLOWS_SHORT": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "seconds" in json.loads(run.stdout.splitlines()[-1])
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize("demo", DEMOS)
def test_the_gallery_shows_each_demo(demo):
    thumbnail = EXAMPLES / "thumbnails" / f"{demo.removeprefix('demo_')}.png"
    page = (EXAMPLES / "README.md").read_text()
    assert f"thumbnails/{thumbnail.name}" in page and f"python examples/{demo}.py" in page
    assert thumbnail.stat().st_size < 300_000  # 800 pixels wide, in full colour
