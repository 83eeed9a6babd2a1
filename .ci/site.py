"""
The built site: each demo has a notebook that holds its picture, and one of them runs. In a headless Chromium text and figures are
there, no error is on the console, and no request leaves the machine.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SITE = Path(sys.argv[1]).resolve()
# a page, and what its text holds once scripts have run
PAGES = {
    "index.html": "Normalizing-flow priors",
    "api/deepinv_flows.PatchNR.html": "mjx-container",  # a formula that MathJax has set
    "gallery/demo_patchnr_superresolution.html": "Superresolution with a PatchNR",
}
# what Chromium asks for by itself, whatever page is open
ITS_OWN = (
    r"https?://((accounts|clients\d|www)\.google\.com|(optimizationguide-pa|update|content-autofill)\.googleapis\.com)/"
)
FLAGS = [
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--virtual-time-budget=10000", "--enable-logging=stderr"),
]


def notebooks() -> dict[str, str]:
    """The code of each demo's notebook, by name; each is offered on its page and needs no file beside it."""
    found = {}
    for page in sorted((SITE / "gallery").glob("demo_*.html")):
        (link,) = re.findall(r'href="([^"]+[.]ipynb)"', page.read_text())
        text = (page.parent / html.unescape(link)).read_text()
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
        assert "data:image/png;base64," in text and "file://" not in text, (
            f"{page.stem}: a picture is not in its notebook"
        )
        found[page.stem] = "\n".join(source for source, kind in cells if kind == "code")
        compile(found[page.stem], page.stem, "exec")
    assert found, "expected demos in the gallery"
    return found


def run_notebook(code: str) -> None:
    """As a notebook does, without a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", "import sys; exec(sys.stdin.read(), {'__doc__': ''})"]
        short = {**os.environ, "DEEPINV_FLOWS_SHORT": "1"}
        subprocess.run(command, input=code, text=True, env=short, cwd=folder, check=True, capture_output=True)


def visit(chromium: str, page: str, folder: Path) -> tuple[str, list[str], set[str]]:
    """The page's elements after its scripts, the errors on its console, and the addresses it asked for."""
    net_log = folder / "net.json"
    command = [chromium, *FLAGS, f"--user-data-dir={folder}/profile", f"--log-net-log={net_log}", "--dump-dom"]
    run = subprocess.run([*command, (SITE / page).as_uri()], capture_output=True, text=True, timeout=120)
    console = [
        line for line in run.stderr.splitlines() if "CONSOLE" in line and re.search("error|Uncaught", line, re.I)
    ]
    asked = {url for url in re.findall(r'"url":"(https?://[^"]+)"', net_log.read_text()) if not re.match(ITS_OWN, url)}
    return run.stdout, console, asked


def main() -> None:
    codes = notebooks()
    run_notebook(codes["demo_learned_primal_dual"])  # the shortest
    print(json.dumps({"notebooks": len(codes)}))
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("skipped: there is no Chromium here (Debian's package chromium)")
        return
    for page, text in PAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            elements, console, asked = visit(chromium, page, Path(folder))
        assert text in elements, f"{page}: expected {text!r}"
        assert not console, f"{page}: {console}"
        assert not asked, f"{page} asked for {sorted(asked)}"
        figures = re.findall(r'<img[^>]* src="([^"]+)"', elements)
        assert all((SITE / page).parent.joinpath(figure).is_file() for figure in figures), (page, figures)
        print(json.dumps({"page": page, "figures": len(figures), "characters": len(elements)}))


if __name__ == "__main__":
    main()
