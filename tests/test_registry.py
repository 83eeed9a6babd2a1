"""deepinv's names refer to our objects while registered, and to the same objects as before afterwards."""

import copy
import importlib
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import deepinv as dinv
import pytest
import torch

import deepinv_flows
from deepinv_flows import PatchNR, register, registered, registry, unregister

MODULES = sorted({module for _, modules in registry.GROUPS.values() for module in modules})


def snapshot():
    return {name: dict(vars(sys.modules[name])) for name in MODULES}


def same(before, after):
    return all(
        before[m].keys() == after[m].keys() and all(before[m][k] is after[m][k] for k in before[m]) for m in MODULES
    )


@pytest.fixture(autouse=True)
def clean():
    before = snapshot()
    yield
    unregister()
    assert same(before, snapshot())


def test_register_and_back():
    before = snapshot()
    register()
    assert dinv.optim.PatchNR is dinv.optim.prior.PatchNR is deepinv_flows.PatchNR
    assert dinv.optim.optim_iterators.NMAPGIteration is deepinv_flows.NMAPGIteration
    assert dinv.unfolded.unfolded_builder is deepinv_flows.unfolded_builder
    assert dinv.unfolded.DEQ_builder is deepinv_flows.DEQ_builder
    during = snapshot()
    register()
    assert same(during, snapshot())
    unregister()
    assert same(before, snapshot())
    unregister()
    assert same(before, snapshot())


@pytest.mark.parametrize("builder", ["optim_builder", "unfolded_builder"])
def test_names_are_found(builder):
    y, physics = torch.rand(2, 1, 6, 6), dinv.physics.Denoising()
    params = {"stepsize": 0.5, "lambda": 0.1}
    build = getattr(dinv.optim, builder, None) or getattr(dinv.unfolded, builder)
    with pytest.raises((AttributeError, ValueError)):
        build("NMAPG", params_algo=dict(params), data_fidelity=dinv.optim.L2(), max_iter=3)
    with registered():
        build = getattr(dinv.optim, builder, None) or getattr(dinv.unfolded, builder)
        model = build(
            "NMAPG", params_algo=dict(params), data_fidelity=dinv.optim.L2(), prior=dinv.optim.L1Prior(), max_iter=3
        )
        assert isinstance(model.fixed_point.iterator, deepinv_flows.NMAPGIteration)
    assert model(y, physics).shape == y.shape


def test_a_name_replaced_since_is_left_alone_and_named():
    theirs = dinv.optim.PatchNR
    register()
    dinv.optim.PatchNR = another = type("Another", (), {})
    with pytest.warns(UserWarning, match=r"deepinv\.optim\.PatchNR .*Another"):
        unregister()
    assert dinv.optim.PatchNR is another and dinv.optim.prior.PatchNR is theirs
    dinv.optim.PatchNR = theirs


@pytest.mark.parametrize(
    "module, name", [("deepinv.optim.prior", "PatchNR"), ("deepinv.optim.optim_iterators", "NMAPGIteration")]
)
def test_a_clash_names_both_and_changes_nothing(module, name, monkeypatch):
    another = type("Another", (), {"__module__": "another.package"})
    monkeypatch.setattr(sys.modules[module], name, another, raising=False)
    before = snapshot()
    with pytest.raises(RuntimeError, match=rf"another\.package\.Another.*deepinv_flows.*{name}"):
        register()
    assert same(before, snapshot())


def test_an_iteration_that_deepinv_has_since_is_a_clash(monkeypatch):
    theirs = type("NMAPGIteration", (), {"__module__": "deepinv.optim.optim_iterators.nmapg"})
    monkeypatch.setattr(dinv.optim.optim_iterators, "NMAPGIteration", theirs, raising=False)
    with pytest.raises(RuntimeError, match="nothing was changed"):
        register()


def test_context_restores_on_exceptions_and_nests():
    before = snapshot()
    with pytest.raises(ZeroDivisionError), registered():
        1 / 0  # noqa: B018
    assert same(before, snapshot())
    with registered():
        with registered():
            pass
        assert dinv.optim.PatchNR is deepinv_flows.PatchNR
    assert same(before, snapshot())
    register()
    with registered():
        pass
    assert dinv.optim.PatchNR is deepinv_flows.PatchNR


def test_reload_registers_again():
    # in a separate process, since a reload replaces the classes of all priors of deepinv
    code = """
import importlib, deepinv as dinv, deepinv_flows
old = dinv.optim.PatchNR
deepinv_flows.register()
importlib.reload(dinv.optim.prior)
new = dinv.optim.prior.PatchNR
assert new is not deepinv_flows.PatchNR and new is not old
deepinv_flows.register()
assert dinv.optim.prior.PatchNR is dinv.optim.PatchNR is deepinv_flows.PatchNR
deepinv_flows.unregister()
assert dinv.optim.prior.PatchNR is new and dinv.optim.PatchNR is old
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_other_processes_unpickle_without_registering(tmp_path):
    with registered():
        prior = dinv.optim.PatchNR(patch_size=3, num_layers=1, sub_net_size=8)
        model = dinv.unfolded.unfolded_builder("NMAPG", data_fidelity=dinv.optim.L2(), prior=prior, g_first=True)
        x, physics = torch.rand(1, 1, 8, 8), dinv.physics.Denoising()
        torch.save((x, model(x, physics).detach()), tmp_path / "expected.pt")
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = f"""
import pathlib, pickle, torch
folder = pathlib.Path({str(tmp_path)!r})
model = pickle.loads((folder / "model.pkl").read_bytes())
import deepinv as dinv, deepinv_flows
x, expected = torch.load(folder / "expected.pt", weights_only=True)
assert torch.allclose(model(x, dinv.physics.Denoising()), expected, atol=1e-6)
assert dinv.optim.PatchNR is not deepinv_flows.PatchNR
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_optimizers_and_iterations_are_where_deepinvs_are():
    with registered():
        for name in ("NMAPG", "CondatVu", "DavisYin", "IPiano", "LatentGD", "LearnedPrimalDual"):
            ours = getattr(deepinv_flows, name)
            assert getattr(dinv.optim, name) is ours and getattr(dinv.optim.optimizers, name) is ours
            iteration = getattr(deepinv_flows, f"{name}Iteration")
            for module in (dinv.optim, dinv.optim.optim_iterators):
                assert getattr(module, f"{name}Iteration") is iteration
        assert dinv.unfolded.unfolded.unfolded_builder is deepinv_flows.unfolded_builder
        assert dinv.unfolded.deep_equilibrium.DEQ_builder is deepinv_flows.DEQ_builder
        assert not hasattr(dinv.unfolded.unfolded, "DEQ_builder")
    assert not hasattr(dinv.optim, "NMAPG") and not hasattr(dinv.optim, "NMAPGIteration")


def test_overlapping_contexts_restore_when_the_last_one_leaves():
    before = snapshot()
    first, second = registered(), registered()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dinv.optim.PatchNR is deepinv_flows.PatchNR and hasattr(dinv.optim, "NMAPG")
    second.__exit__(None, None, None)
    assert same(before, snapshot())


def test_contexts_overlap_in_threads():
    before, inside, leave, seen = snapshot(), threading.Event(), threading.Event(), []

    def other():
        with registered():
            inside.set()
            leave.wait(10)
            seen.append(dinv.optim.PatchNR is deepinv_flows.PatchNR)

    thread = threading.Thread(target=other)
    with registered():
        thread.start()
        inside.wait(10)
    assert dinv.optim.PatchNR is deepinv_flows.PatchNR
    leave.set()
    thread.join()
    assert seen == [True] and same(before, snapshot())


def test_register_is_one_holder_beside_the_contexts():
    before = snapshot()
    with registered():
        register()
        register()
    assert dinv.optim.PatchNR is deepinv_flows.PatchNR
    with registered():
        unregister()
        assert dinv.optim.PatchNR is deepinv_flows.PatchNR  # the block still holds it
    assert same(before, snapshot())


def test_a_reload_of_the_registry_forgets_nothing():
    before = snapshot()
    with registered():
        importlib.reload(registry)
        assert dinv.optim.PatchNR is deepinv_flows.PatchNR
    assert same(before, snapshot())
    register()
    importlib.reload(registry)
    registry.unregister()
    assert same(before, snapshot())


def test_the_clash_of_two_copies_of_our_own_class_says_so(monkeypatch):
    reloaded = type("PatchNR", (), {"__module__": "deepinv_flows.patchnr.prior"})
    monkeypatch.setattr(dinv.optim.prior, "PatchNR", reloaded)
    before = snapshot()
    with pytest.raises(RuntimeError, match=r"another copy of our own class.*nothing was changed"):
        register()
    assert same(before, snapshot())


def test_deepinvs_own_objects_pickle_before_during_and_after():
    theirs = dinv.optim.PatchNR(patch_size=3, num_layers=1, sub_net_size=4)
    patches, kind = torch.rand(1, 5, 9), type(theirs)
    expected, early = theirs(patches), pickle.dumps(theirs)
    with registered():
        during = pickle.dumps(theirs)
        for found in (pickle.loads(early), pickle.loads(during), copy.deepcopy(theirs), copy.copy(theirs)):
            assert type(found) is kind and torch.equal(found(patches), expected)
        model = pickle.loads(pickle.dumps(dinv.optim.GD(data_fidelity=dinv.optim.L2(), prior=theirs).prior))
        assert type(model[0]) is kind
        ours = deepinv_flows.PatchNR(patch_size=3, num_layers=1, sub_net_size=4)
        assert type(pickle.loads(pickle.dumps(ours))) is deepinv_flows.PatchNR
        ours_pickled = pickle.dumps(ours)
    for pickled in (early, during, pickle.dumps(theirs)):
        found = pickle.loads(pickled)
        assert type(found) is kind and torch.equal(found(patches), expected)
    assert torch.equal(pickle.loads(ours_pickled)(patches), ours(patches))


def test_entry_points_are_in_step():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    listed = {group: set(names.items()) for group, names in project["entry-points"].items()}
    ours = {
        group: {(obj.__name__, f"deepinv_flows:{obj.__name__}") for obj in objects}
        for group, (objects, _) in registry.GROUPS.items()
    }
    assert listed == ours
    for group, names in listed.items():
        for _, target in names:
            module, name = target.split(":")
            assert getattr(importlib.import_module(module), name) in registry.GROUPS[group][0]


def test_our_classes_are_afterwards_what_they_were():
    ours = {obj for objects, _ in registry.GROUPS.values() for obj in objects if isinstance(obj, type)}
    before = {obj: dict(vars(obj)) for obj in ours}
    with registered(), registered():
        pass
    register()
    unregister()
    for obj in ours:
        assert vars(obj).keys() == before[obj].keys() and all(vars(obj)[k] is v for k, v in before[obj].items()), obj


def test_a_pickle_of_deepinvs_own_class_is_one_of_deepinvs_while_ours_is_registered():
    theirs = dinv.optim.PatchNR(patch_size=3, num_layers=1, sub_net_size=4)
    before = pickle.dumps(theirs)
    with registered():
        assert type(pickle.loads(before)) is type(theirs)
        assert type(pickle.loads(pickle.dumps(theirs))) is type(theirs)
    ours = PatchNR(patch_size=3, num_layers=1, sub_net_size=4)
    assert type(pickle.loads(pickle.dumps(ours))) is PatchNR and pickle.loads(pickle.dumps(ours)).image_range is None
