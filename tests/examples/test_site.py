"""Tables of the site: one number a cell, from the JSON of the benchmarks; what is not kept is absent."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("docutils")
ROOT = Path(__file__).parents[2]
SITE = ROOT / "examples" / "site"
spec = importlib.util.spec_from_file_location("results", SITE / "results.py")
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)
PAGE = (SITE / "benchmarks.rst").read_text()
ABOUT = {"versions": {"torch": "2.14.1", "threads": 1}}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def keep(name, result):
        about = {"command": f"python tests/benchmarks/{name}.py", "machine": "2 cores", "date": "2026-01-01"}
        (tmp_path / f"{name}.json").write_text(json.dumps({**about, "result": {**result, **ABOUT}}))

    return keep


@pytest.fixture
def page():
    """The text of the page as docutils renders it, with sections and tables told apart."""
    from docutils.core import publish_doctree
    from docutils.parsers.rst import directives

    for name, directive in (("kept", results.Kept), ("results", results.Results)):
        directives.register_directive(name, directive)

    def render():
        tree = publish_doctree(PAGE, settings_overrides={"report_level": 2, "halt_level": 2})
        tables = [
            [[cell.astext() for cell in row.children] for row in found.findall(lambda node: node.tagname == "row")]
            for found in tree.findall(lambda node: node.tagname == "table")
        ]
        return [section[0].astext() for section in tree.findall(lambda node: node.tagname == "section")], tables, tree

    return render


def test_what_is_not_kept_is_absent(kept, page):
    sections, tables, _ = page()
    assert sections == tables == []
    kept("ct_iteration", {"ms physics": 12.5, "ratio_iteration": 1.5})
    sections, tables, tree = page()
    assert sections == ["One iteration of tomography"]
    assert tables == [[["", "value"], ["ms physics", "12.5"], ["ratio_iteration", "1.5"]]]
    assert "python tests/benchmarks/ct_iteration.py, 2 cores, 1 thread, 2026-01-01; torch 2.14.1." in tree.astext()


def test_every_result_that_is_shown_has_a_script_and_every_script_that_is_kept_is_shown():
    shown = set(re.findall(r"^\.\. kept:: (\w+)$", PAGE + (SITE / "differences.rst").read_text(), re.M))
    scripts = {path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py")}
    assert shown <= scripts | {"bsd68"}
    assert {path.stem for path in (SITE / "results").glob("*.json")} <= shown


MEAN = {"mean": 1.5, "se": 0.25}
SHAPES = {
    "splitting_inpainting": (
        {
            "clean, ours": dict.fromkeys(("psnr", "ssim", "equivariance", "seconds"), MEAN),
            "paired_psnr": {"clean, ours - MC": MEAN},
            "steps": 3000,
        },
        [
            [["clean, ours", "1.5", "0.25", "1.5", "0.25", "1.5", "0.25", "1.5"]],
            [["clean, ours - MC", "1.5", "0.25"]],
        ],
    ),
    "splitting_speed": (
        {"small, MCLoss(), training": dict(deepinv_ms=3.0, ours_ms=2.0, ratio=0.5, ratio_of_medians=0.75), "batch": 32},
        [[["small, MCLoss(), training", "3", "2", "0.5", "0.75"]]],
    ),
    "solvers": (
        {
            "worst_ratio": 1.2,
            "where": "a",
            "rows": {"blur from 0": {"seconds": {"GD": None, "recommended": 0.5}, "finals": {"GD": 1.0}}},
        },
        [[["blur from 0", "0.5", ""]]],
    ),
    "patch_scaling": (
        {"ours": {"64": dict(seconds=1.0, processor_seconds=2.0, us_per_patch=3.0, mb=4.0)}, "spread": 1.0},
        [[["ours", "64", "3", "4", "1", "2"]]],
    ),
    "training_speed": (
        {"patches_per_s_32": {"deepinv": 100, "ours": 150}, "training_ratio_32": 1.5, "device": "cpu"},
        [[["patches_per_s_32", "100", "150"]]],
    ),
    "time_to_quality": (
        {"levels": {"27.5 dB": 27.5}, "EPLL": {"best": 28.0, "27.5 dB": 3.5}},
        [[["EPLL", "28", "3.5"]]],
    ),
    "latent_speed": (
        {"ratio": 1.5, "seconds_per_evaluation": {"LatentMAP's": 0.5}, "peak_MB_graph": {"8 steps": 1.0}},
        [[["ratio", "1.5"], ["seconds_per_evaluation, LatentMAP's", "0.5"], ["peak_MB_graph, 8 steps", "1"]]],
    ),
    "faces_recovery": (
        {"denoising": {"0.1": {"TV": dict(psnr=30.0, error=0.5, seconds=2.0)}}, "published": {"denoising": {}}},
        [[["0.1", "TV", "30", "0.5", "2"]]],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_one_number_a_cell(name, kept, page):
    result, expected = SHAPES[name]
    kept(name, result)
    _, tables, _ = page()
    assert [rows[1:] for rows in tables] == expected
