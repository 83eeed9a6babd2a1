"""
Run the demos in full, build the site, keep figures that a script prints.

    python examples/gallery.py [NAME ...] [--thumbnails]
    python examples/gallery.py --site [FOLDER]
    python examples/gallery.py --keep NAME COMMAND ...

Without an option the demos run one after the other, and a picture of each figure is kept in ``examples/thumbnails``. A NAME
is that of a demo without ``demo_`` and ``.py``. ``--thumbnails`` only makes the pictures again. ``--site`` builds the site
offline, in about a minute, with the pictures of the last full run. ``--keep`` runs a benchmark and writes the JSON of its last
line, with the command, the machine and the date, to ``examples/site/results/NAME.json``, from which the site makes tables.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 800


def thumbnails(names: list[str], run: bool) -> None:
    """Pictures of the figures, 800 pixels wide."""
    from PIL import Image

    (HERE / "thumbnails").mkdir(exist_ok=True)
    for name in names or sorted(path.stem.removeprefix("demo_") for path in HERE.glob("demo_*.py")):
        if run:
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-W", "ignore", HERE / f"demo_{name}.py"], check=True)
        with Image.open(HERE / "output" / f"{name}.png") as figure:
            small = figure.convert("RGB").resize((WIDTH, round(WIDTH * figure.height / figure.width)), Image.BOX)
        small.save(HERE / "thumbnails" / f"{name}.png", optimize=True)


def site(folder: Path) -> None:
    """The site as HTML; a broken reference or any other warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html", HERE / "site", folder]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    print(f"open {folder}/index.html")


def keep(name: str, command: list[str]) -> None:
    """The JSON line that a script prints last, and where it comes from."""
    script = [sys.executable, "-W", "ignore", *command[1:]] if command[0] == "python" else command
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line
    if process.wait():
        raise SystemExit(process.returncode)
    told = ["DIR" if before == "--data" else part for before, part in zip(["", *command], command)]
    kept = {
        "command": " ".join(told),
        "machine": f"{os.cpu_count()} cores{', ' + _processor() if _processor() else ''}",
        "date": datetime.date.today().isoformat(),
        "result": json.loads(last, parse_constant=lambda name: None),  # NaN and Infinity are not JSON
    }
    path = HERE / "site" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")


def _processor() -> str:
    import torch

    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = {"amx_bf16": "AMX", "avx512_f": "AVX-512", "avx2": "AVX2"}
    return next((name for key, name in names.items() if found.get(key)), "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="demos to run")
    parser.add_argument("--thumbnails", action="store_true", help="run nothing")
    parser.add_argument("--site", nargs="?", const=HERE / "site" / "build", type=Path, metavar="FOLDER")
    parser.add_argument("--keep", nargs=argparse.REMAINDER, metavar="NAME COMMAND")
    args = parser.parse_args()
    if args.keep:
        keep(args.keep[0], args.keep[1:])
    elif args.site:
        site(args.site)
    else:
        thumbnails(args.names, run=not args.thumbnails)
