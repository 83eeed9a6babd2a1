"""Imports run one way, cost nothing, and change nothing in deepinv; what is public is documented."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import deepinv_flows

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deepinv_flows"
# each module may import those of the rooms before its own
ROOMS = [
    {"inputs"},
    {"contract", "iterators.base", "lbfgs", "parallel", "patches", "portable", "splitting_masks", "workspace"},
    {"images", "iterators.optimizer", "iterators.search", "networks", "splitting_model"},
    {"steps"},
    {"recognise", "sweep"},
    {
        "iterators.condat_vu",
        "iterators.davis_yin",
        "iterators.ipiano",
        "iterators.nmapg",
        "iterators.latent_gd",
        "iterators.learned_primal_dual",
    },
    {"_freia", "iterators", "splitting_terms"},
    {"builders", "flows", "splitting"},
    {"image_flows"},
    {"building"},
    {"dialects", "patchwise", "proximal"},
    {"checkpoints", "likelihood"},
    {"flow_prior", "latent", "runs", "samples", "weights_io"},
    {"denoiser", "patchnr"},
    {"distributed", "training"},
    {"registry"},
    {"__init__"},
]


def module_name(path: Path) -> str:
    """As in ROOMS: the package's own ``__init__`` by that name, a folder by the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def local_imports(path: Path) -> set[str]:
    folder = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*above, name]) for name in names}
    return found


def test_imports_run_one_way():
    modules = {module_name(path): local_imports(path) for path in PACKAGE.rglob("*.py")}
    assert set(modules) == set().union(*ROOMS)
    for level, room in enumerate(ROOMS):
        earlier = set().union(*ROOMS[:level])
        for name in room:
            assert modules[name] <= earlier, f"{name} imports {modules[name] - earlier}"


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


def test_nothing_but_the_package_imports_the_registry():
    users = {module_name(path) for path in PACKAGE.rglob("*.py") if "registry" in local_imports(path)}
    assert users == {"__init__"}


@pytest.mark.parametrize("name", deepinv_flows.__all__)
def test_public_names_have_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(deepinv_flows, name).__doc__)


def test_all_is_complete():  # and sorted, says ruff
    public = {n for n, v in vars(deepinv_flows).items() if getattr(v, "__module__", "").startswith("deepinv_flows")}
    assert set(deepinv_flows.__all__) == public


def test_the_readme_script_runs():
    script = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    namespace = {}
    exec(compile(script, "README.md", "exec"), namespace)
    psnr, x, y, x_net = namespace["dinv"].metric.PSNR(), *(namespace[name] for name in ("x", "y", "x_net"))
    assert psnr(x_net, x) > psnr(y, x) + 1


def test_the_readme_names_everything_public():
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}" in readme for name in deepinv_flows.__all__)
