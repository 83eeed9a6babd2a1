"""The built site in a headless Chromium: text and figures are there, no error on the console, no request leaves the machine."""

import json
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
