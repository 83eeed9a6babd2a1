"""
Run the demos in full, one after the other, and keep a small picture of each figure for ``examples/README.md``.

    python examples/gallery.py [NAME ...] [--thumbnails]

A name is that of a demo without ``demo_`` and ``.py``; all by default. ``--thumbnails`` only reduces the figures that there are.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
WIDTH, COLOURS = 400, 96

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("names", nargs="*", help="demos to run")
parser.add_argument("--thumbnails", action="store_true", help="run nothing")
args = parser.parse_args()

(HERE / "thumbnails").mkdir(exist_ok=True)
for name in args.names or sorted(path.stem.removeprefix("demo_") for path in HERE.glob("demo_*.py")):
    if not args.thumbnails:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-W", "ignore", HERE / f"demo_{name}.py"], check=True)
    with Image.open(HERE / "output" / f"{name}.png") as figure:
        small = figure.convert("RGB").resize((WIDTH, round(WIDTH * figure.height / figure.width)), Image.LANCZOS)
    small.quantize(COLOURS).save(HERE / "thumbnails" / f"{name}.png", optimize=True)
