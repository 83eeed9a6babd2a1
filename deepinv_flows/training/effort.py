"""
How large a PatchNR is trained and for how long, from the minutes that a user wants to spend and the speed of the machine.

Sizes follow from the dimension of a patch alone, so that a training can be resumed on another machine; the number of steps,
and the number of threads, from a few steps that are timed first. On a machine that others use too, two threads can be many
times slower than one: OpenMP's threads wait for one another by spinning, and spin on after the system has given the core of
the one they wait for to another program. (Here a step took 0.79 s by two threads, 0.09 s with ``GOMP_SPINCOUNT=0``, 0.06 s by
one.) How threads wait cannot be changed once OpenMP is loaded, but how many there are can.

The number of steps is not changed during a training: one that begins while the machine is busy has fewer, and ends sooner than
said if the machine becomes free. Where the user, or the training that is resumed, says how many there are, the number of threads
is chosen all the same, unless the training is short.
"""

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checks import check_choice, positive_int
from ..patchnr import Asked, patch_nll
from ..weights import CheckpointError

Step = Callable[[nn.Module, dict[str, Any], Any], Tensor]
MINUTES = {"quick": 2.0, "standard": 10.0, "thorough": 60.0}
# blocks, width of their networks by the dimension of a patch, patches in a batch, epochs; "standard" has the sizes of 0.1.0
SIZES: dict[str, tuple[int, Callable[[int], int], int, int]] = {
    "quick": (5, lambda dim: _near(18 * math.sqrt(dim)), 512, 12),
    "standard": (5, lambda dim: 256, 1024, 40),
    "thorough": (8, lambda dim: max(256, _near(32 * math.sqrt(dim))), 1024, 100),
}
LEAST_STEPS, MOST_STEPS = 200, 200_000
SHORT = 30.0  # seconds of a training in which threads that are chosen well would not repay their choice
FILE = "effort.json"


@dataclass
class Plan:
    """
    What is trained, and for how long.

    :param str effort: ``"quick"``, ``"standard"`` or ``"thorough"``.
    :param int num_layers: coupling blocks of a new flow.
    :param int sub_net_size: width of their networks.
    :param int batch_size: patches in a batch.
    :param int epochs: number of epochs.
    :param int steps_per_epoch: batches in an epoch; 0 until it is known.
    :param float seconds_per_step: measured, 0 if nothing was.
    :param int threads: of torch, chosen by measurement; 0 leaves them alone.
    :param dict timed: seconds of a step by each number of threads.
    """

    effort: str
    num_layers: int
    sub_net_size: int
    batch_size: int
    epochs: int
    steps_per_epoch: int = 0
    seconds_per_step: float = 0.0
    threads: int = 0
    timed: dict[int, float] = field(default_factory=dict)

    @property
    def minutes(self) -> float:
        return self.epochs * self.steps_per_epoch * self.seconds_per_step / 60

    @property
    def chosen(self) -> dict[str, Any]:
        """What is stored."""
        return {name: value for name, value in asdict(self).items() if name != "timed"}


def plan(
    effort: str | None,
    dim: int,
    save_path: str | Path | None = None,
    resume: bool = False,
    new: bool = True,
    **given: int | None,
) -> Plan:
    """
    Sizes for patches of a dimension; those given win, and a training that is resumed keeps its own.

    :param str effort: ``"quick"``, ``"standard"`` or ``"thorough"``; ``None`` is that of the training that is resumed, or
        ``"standard"``.
    :param int dim: dimension of a patch.
    :param str save_path: folder of the training.
    :param bool resume: whether it continues one that is there.
    :param bool new: whether a flow is made; one that is given has its own sizes, which the plan calls 0.
    :param given: fields of a :class:`Plan`, ``None`` for those that the user leaves to us.
    :raises ValueError: for another effort than that of the training that is resumed.
    """
    if effort is not None:
        check_choice("effort", effort, MINUTES)
    saved = _stored(save_path) if resume else {}
    if effort is not None and effort != saved.get("effort", effort):
        raise ValueError(
            f"expected effort={saved['effort']!r}, with which the training in {save_path} began; got {effort!r}: leave it out, "
            "and pass more epochs for a longer training"
        )
    name = effort or saved.get("effort", "standard")
    layers, width, batch, epochs = SIZES[name]
    found = Plan(**{**asdict(Plan(name, layers, width(dim), batch, epochs)), **saved})
    for name, value in given.items():
        if value is not None:
            setattr(found, name, positive_int(**{name: value}))
    if not new:
        found.num_layers = found.sub_net_size = 0
    return found


def _stored(save_path: str | Path | None) -> dict[str, Any]:
    """The plan that :func:`store` wrote, but for what belongs to the machine that it was made on."""
    if save_path is None or not (Path(save_path) / FILE).is_file():
        return {}
    saved = json.loads((Path(save_path) / FILE).read_text())
    return {part.name: saved[part.name] for part in fields(Plan)[:-3] if saved.get(part.name)}  # 0 is a given prior's


def _near(width: float) -> int:
    return min(max(32 * round(width / 32), 64), 512)


def mean_nll(flow: nn.Module, batch: dict[str, Any], device) -> Tensor:
    return patch_nll(flow, batch["x"].to(device), Asked(weights=True)).mean()


def measured(found: Plan, module: nn.Module, samples: Dataset, device, loss: Step = mean_nll, size: int = 1) -> Plan:
    """
    Time a few steps of a copy of a module by each number of threads, and fill in what follows.

    ``loss(module, batch, device)`` is what a step descends on; a sample counts as ``size`` patches.

    Where it is known how many steps are taken, they are timed unless they take less than :data:`SHORT` seconds.
    """
    step = _step(copy.deepcopy(module).to(device), samples, max(1, found.batch_size // size), device, loss)
    if found.steps_per_epoch and found.epochs * found.steps_per_epoch * _once(step, device) < SHORT:
        return found
    before = torch.get_num_threads()
    numbers = [1] if torch.device(device).type != "cpu" else sorted({1, *_halvings(before)})
    try:
        for number in numbers:
            torch.set_num_threads(number)
            found.timed[number] = _seconds(step, device)
    finally:
        torch.set_num_threads(before)
    fastest = min(found.timed, key=found.timed.__getitem__)
    found.seconds_per_step = found.timed[fastest]
    found.threads = fastest if len(numbers) > 1 else 0
    if found.steps_per_epoch:
        return found
    # a tenth for evaluations, and for what the first steps do not show
    steps = 0.9 * 60 * MINUTES[found.effort] / found.seconds_per_step
    found.steps_per_epoch = max(1, round(min(max(steps, LEAST_STEPS), MOST_STEPS) / found.epochs))
    return found


def _halvings(number: int) -> list[int]:
    return [number, *(_halvings(number // 2) if number > 1 else [])]


def _step(module: nn.Module, samples: Any, batch_size: int, device, loss: Step) -> Callable[[], None]:
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=0.0)
    numbers = torch.linspace(0, len(samples) - 1, batch_size).long().tolist()

    def step() -> None:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(module, samples.__getitems__(numbers), device).backward()
        optimizer.step()

    return step


def _seconds(step: Callable[[], None], device, repeats: int = 7, least: float = 1.0, limit: float = 4.0) -> float:
    """
    Median time of a step after the first, over at least a second, as another program may keep the machine busy for a part of one.

    Of fewer steps where they take long.
    """
    step()
    times: list[float] = []
    while (len(times) < repeats or sum(times) < least) and (sum(times) < limit or not times):
        times.append(_once(step, device))
    return sorted(times)[len(times) // 2]


def _once(step: Callable[[], None], device) -> float:
    began = time.perf_counter()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def describe(found: Plan, dim: int) -> str:
    """What will be trained and how long it will take, in a line."""
    steps = found.epochs * found.steps_per_epoch
    flow = f"{found.num_layers} blocks of width {found.sub_net_size}" if found.num_layers else "the prior given,"
    text = f"fit_patchnr: {flow} on patches of dimension {dim}, {steps} steps of {found.batch_size} patches"
    if found.seconds_per_step:
        text += f": about {found.minutes / 0.9:.1f} minutes ({1000 * found.seconds_per_step:.0f} ms a step"
        text += f", {found.threads} of {max(found.timed)} threads)" if found.threads else ")"
    return text


def store(found: Plan, save_path: str | Path | None) -> None:
    """Keep a plan beside the checkpoints, for a training that is resumed."""
    if save_path is None:
        return
    try:
        Path(save_path).mkdir(parents=True, exist_ok=True)
        (Path(save_path) / FILE).write_text(json.dumps(found.chosen, indent=1))
    except OSError as error:
        raise CheckpointError(f"{save_path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def carried_out(found: Plan, dim: int, verbose: bool) -> Iterator[None]:
    """Say the plan, if it was timed and so is long; inside, the number of torch's threads is the plan's."""
    if verbose and found.seconds_per_step:
        print(describe(found, dim), flush=True)
    before = torch.get_num_threads()
    if found.threads:
        torch.set_num_threads(found.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
