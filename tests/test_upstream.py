"""Of each defect that the README lists deepinv's outcome is the defect, and ours is right."""

import pytest
from upstream import DEFECTS, SIDES, as_expected, outcome


@pytest.mark.parametrize("name", DEFECTS)
def test_outcomes(name):
    found = {side: outcome(name, side) for side in SIDES}
    assert all(as_expected(name, side, found[side]) for side in SIDES), found
