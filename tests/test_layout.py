"""Imports run one way between folders, cost nothing, and change nothing in deepinv; what is public is documented."""

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import deepinv_flows

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deepinv_flows"
# What the modules of a folder, or a module on top, may import beside one another: the faces of these folders. Iterators may use
# the arithmetic of batches in `solvers` and the generators in `flows`, both of which know nothing of optimizers, so that
# neither is written twice. They do not use the priors: an iteration takes any prior.
MAY_IMPORT = {
    "checks": set(),
    "console": set(),
    "images": {"checks"},
    "flows": {"checks"},
    "weights": {"checks", "flows"},
    "solvers": {"checks", "flows"},
    "patchnr": {"checks", "flows", "weights", "solvers"},
    "latent": {"checks", "console", "flows", "weights", "solvers"},
    "splitting": {"checks"},
    "iterators": {"checks", "console", "flows", "solvers"},
    "reconstruction": {"checks", "console", "flows", "weights", "solvers", "patchnr", "latent", "iterators"},
    "training": {"checks", "console", "flows", "weights", "solvers", "patchnr", "latent", "reconstruction"},
    "registry": {"iterators", "patchnr", "splitting"},
    "__main__": {"weights", "__version__"},
}
# tests that are not a folder's
ON_TOP = {"benchmarks", "examples", "upstream"}


def imports(path: Path) -> set[tuple[str, ...]]:
    """What a module imports of the package: the parts of each module's name."""
    here = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(*above, *name.split(".")) for name in names}
    return found


def folder(parts: tuple[str, ...]) -> str:
    return parts[0]


def test_imports_run_one_way_and_through_faces():
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts
        if here == ("__init__",):
            continue
        others = {name for name in imports(path) if folder(name) != folder(here)}
        assert {folder(name) for name in others} <= MAY_IMPORT[folder(here)], path
        assert all(len(name) == 1 for name in others), f"{path} reaches behind a face: {others}"


def test_a_folder_below_imports_its_parent_at_one_place():
    inner = {name for path in (PACKAGE / "patchnr" / "fused").glob("*.py") for name in imports(path)}
    assert {name for name in inner if name[:2] != ("patchnr", "fused")} <= {("patchnr", "patches"), ("checks",)}


def test_every_folder_is_a_room_with_a_face():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms | modules == MAY_IMPORT.keys()
    for room in rooms:
        face = (PACKAGE / room / "__init__.py").read_text()
        assert ast.get_docstring(ast.parse(face)) and "__all__" in face


@pytest.mark.parametrize("path", PACKAGE.rglob("*.py"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_are_short(path):
    source = path.read_text()
    assert source.count("\n") <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{node.name} has {lines} lines"


def test_tests_mirror_the_rooms():
    rooms = {path.relative_to(PACKAGE).parent for path in PACKAGE.rglob("*.py")}
    tests = ROOT / "tests"
    for path in tests.rglob("test_*.py"):
        where = path.relative_to(tests).parent
        assert where in rooms or where.parts[0] in ON_TOP, path
    for room in rooms:
        assert list((tests / room).glob("test_*.py")), f"no tests of {room}"


UNPICKLING = {"torch.load", "load_state_dict_from_url"}
RUNS_CODE = {"pickle.load", "pickle.loads", "numpy.load", "torch.jit.load", "torch.hub.load", "eval", "exec"}


def test_files_never_run_code():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):  # else the names below would not be found
                assert not {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}, path
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert name not in RUNS_CODE, f"{path}: {name}"
                assert name not in UNPICKLING or options.get("weights_only") == "True", f"{path}: {name}"
                assert name != "np.load" or options.get("allow_pickle") == "False", f"{path}: {name}"
                seen.add(name)
    assert seen >= UNPICKLING


def test_import_changes_nothing():
    code = """
import sys, torch, numpy, deepinv
before = {name: dict(vars(sys.modules[name])) for name in list(sys.modules) if name.startswith("deepinv.")}
state, numpy_state = torch.get_rng_state(), numpy.random.get_state()[1].copy()
import deepinv_flows
after = {name: dict(vars(sys.modules[name])) for name in before}
assert all(before[n].get(k) is v for n in before for k, v in after[n].items()), "deepinv changed"
assert torch.equal(state, torch.get_rng_state()) and (numpy_state == numpy.random.get_state()[1]).all()
assert not any(name.split(".")[0] in ("FrEIA", "zuko", "skimage") for name in sys.modules), "imported too early"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("name", deepinv_flows.__all__)
def test_public_names_have_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(deepinv_flows, name).__doc__)


@pytest.mark.parametrize("name", deepinv_flows.__all__)
def test_public_parameters_have_types(name):
    public = getattr(deepinv_flows, name)
    members = {name: public} if inspect.isfunction(public) else inspect.getmembers(public, inspect.isfunction)
    for method, function in dict(members).items():
        ours = function.__module__.startswith("deepinv_flows") and (method == "__init__" or not method.startswith("_"))
        for parameter in inspect.signature(function).parameters.values() if ours else []:
            if parameter.name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            assert parameter.annotation is not parameter.empty, f"{name}.{method}({parameter.name})"


def test_all_is_complete():  # and sorted, says ruff
    held = {n: v for n, v in vars(deepinv_flows).items() if getattr(v, "__module__", "").startswith("deepinv_flows")}
    assert set(deepinv_flows.__all__) == held.keys() - {"__dir__"}
    assert dir(deepinv_flows) == sorted([*deepinv_flows.__all__, "__version__"])


def test_the_readme_script_runs():
    script = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    namespace = {}
    exec(compile(script, "README.md", "exec"), namespace)
    psnr, x, y, x_net = namespace["dinv"].metric.PSNR(), *(namespace[name] for name in ("x", "y", "x_net"))
    assert psnr(x_net, x) > psnr(y, x) + 1


def test_the_api_page_names_everything_public():
    lines = (ROOT / "examples" / "site" / "api.rst").read_text().splitlines()
    named = [line.strip() for line in lines if line.startswith("   ") and line.strip().isidentifier()]
    assert sorted(named) == sorted(deepinv_flows.__all__)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
