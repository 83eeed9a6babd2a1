"""
What deepinv 0.5.0 gets wrong and this package does not: small cases, each run with deepinv's objects and with ours.

A case is one function of a side, :data:`SIDES`, so both meet the same data. What it returns, or the type and first line of the
error it raises, is that side's outcome; :func:`defect` says what outcomes are expected.
"""

import math
import re
import warnings
from types import SimpleNamespace

import deepinv as dinv
import torch

import deepinv_flows

SIDES = {
    "deepinv": SimpleNamespace(
        PatchNR=dinv.optim.PatchNR,
        on_images=lambda prior: dinv.optim.PatchPrior(prior, patch_size=3),
        Splitting=dinv.loss.EquivariantSplittingLoss,
        unfolded_builder=dinv.unfolded.unfolded_builder,
        DEQ_builder=dinv.unfolded.DEQ_builder,
        Proximal=dinv.optim.PGD,
        ThreeTerms=dinv.optim.DRS,
    ),
    "ours": SimpleNamespace(
        PatchNR=deepinv_flows.PatchNR,
        on_images=lambda prior: prior,
        Splitting=deepinv_flows.EquivariantSplittingLoss,
        unfolded_builder=deepinv_flows.unfolded_builder,
        DEQ_builder=deepinv_flows.DEQ_builder,
        Proximal=deepinv_flows.NMAPG,
        ThreeTerms=deepinv_flows.DavisYin,
    ),
}
OURS = SIDES["ours"]
NAN = "NaN"  # JSON has no other
DEFECTS = {}


def defect(name, deepinv, ours):
    """Enters a case under ``name``, with the outcome expected of either side: a value, the start of an error, or a condition."""

    def enter(case):
        assert name not in DEFECTS, name
        DEFECTS[name] = SimpleNamespace(case=case, expected={"deepinv": deepinv, "ours": ours})
        return case

    return enter


def outcome(name, side):
    """What the case gives on one side, as JSON has it; numbers to three digits."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = DEFECTS[name].case(SIDES[side])
    except Exception as error:
        message = str(error).strip().splitlines()[:1]
        return re.sub(" at 0x[0-9a-f]+", "", ": ".join([type(error).__name__, *message]))
    if isinstance(value, torch.Size):
        return list(value)
    if torch.is_tensor(value):
        value = value.item()
    if not isinstance(value, float):
        return value
    return NAN if math.isnan(value) else float(f"{value:.3g}")


def as_expected(name, side, found):
    expected = DEFECTS[name].expected[side]
    if callable(expected):
        return isinstance(found, float) and expected(found)
    if isinstance(expected, str):
        return isinstance(found, str) and found.startswith(expected)
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=0.03, abs_tol=1e-5)
    return type(found) is type(expected) and found == expected


from . import patchnr, solvers, splitting  # noqa: E402, F401
