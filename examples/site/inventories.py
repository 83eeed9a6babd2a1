"""
Where the pages of other projects' objects are, without asking the network: ``inventories/NAME.txt`` as intersphinx inventories.

A line names a domain's type, an object, and its page: ``py:class torch.Tensor tensors.html#torch.Tensor``; a page that ends in
``$`` goes on with the name of the object. The first line is the address of the project.
"""

import tempfile
import zlib
from pathlib import Path

HERE = Path(__file__).parent / "inventories"


def mapping() -> dict[str, tuple[str, str]]:
    """The value of ``intersphinx_mapping``."""
    folder = Path(tempfile.gettempdir()) / "deepinv_flows_inventories"
    folder.mkdir(exist_ok=True)
    return {path.stem: _inventory(path, folder / f"{path.stem}.inv") for path in sorted(HERE.glob("*.txt"))}


def _inventory(source: Path, target: Path) -> tuple[str, str]:
    address, *lines = [line for line in source.read_text().splitlines() if line]
    body = ""
    for line in lines:
        kind, name, page = line.split()
        body += f"{name} {kind} 1 {page} -\n"
    head = [
        "# Sphinx inventory version 2",
        f"# Project: {source.stem}",
        "# Version:",
        "# The rest is compressed using zlib.",
    ]
    target.write_bytes("".join(f"{line}\n" for line in head).encode() + zlib.compress(body.encode()))
    return address, str(target)
