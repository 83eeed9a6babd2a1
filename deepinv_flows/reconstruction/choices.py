"""What a user may choose, checked."""

from collections.abc import Sequence
from numbers import Real

import torch
from deepinv.optim import DataFidelity, Prior
from deepinv.optim.data_fidelity import L2, IndicatorL2
from torch import Tensor

from ..checks import check_choice
from .objective import Box, Objective
from .strength import RULES


def checked_weight(lambda_reg: float | Tensor | str) -> float | Tensor | str:
    """A weight, or the name of a way to find it."""
    if isinstance(lambda_reg, str):
        check_choice("lambda_reg", lambda_reg, RULES)
        return lambda_reg
    if isinstance(lambda_reg, bool) or not isinstance(lambda_reg, Real | Tensor):
        raise TypeError(f"expected lambda_reg to be a number, a tensor or one of {RULES}; got {lambda_reg!r}")
    weight = torch.as_tensor(lambda_reg)
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError(f"expected a finite lambda_reg >= 0; got {lambda_reg}")
    return lambda_reg


def checked_fidelity(data_fidelity: DataFidelity | None) -> DataFidelity:
    """A data fidelity with a gradient; ``L2()`` if it is ``None``."""
    if isinstance(data_fidelity, IndicatorL2):
        raise ValueError("expected a data fidelity with a gradient; got IndicatorL2, which is 0 or infinite")
    return L2() if data_fidelity is None else data_fidelity


def as_constraint(constraint: Prior | str | Sequence[float] | None) -> Prior | None:
    """A constraint as a prior known by its proximity operator."""
    if constraint is None or (isinstance(constraint, Prior) and constraint.explicit_prior):
        return constraint
    if isinstance(constraint, str):
        check_choice("constraint", constraint, ("nonnegative",))
        return Box(0.0)
    if isinstance(constraint, Sequence) and len(constraint) == 2:
        return Box(*map(float, constraint))
    raise TypeError(
        f'expected constraint to be "nonnegative", bounds (low, high) or a prior with a value; got {constraint!r}'
    )


def check_fits(name: str, objective: Objective) -> None:
    """Refuse an algorithm that the terms of an objective do not allow."""
    most = {"lbfgs": 0, "nmapg": 1, "ipiano": 1}.get(name)
    if most is not None and len(objective.proximable) > most:
        raise ValueError(
            f"solver={name!r} takes at most {most} terms known by their proximity operators; this objective has "
            f"{len(objective.proximable)}"
        )
    if name == "davis_yin" and not objective.proximable:
        raise ValueError(
            "solver='davis_yin' needs a constraint, or a prior known by its proximity operator; got neither"
        )
