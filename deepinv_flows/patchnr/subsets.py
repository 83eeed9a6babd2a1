"""Random subsets of patches: drawn anew at each call, and drawn again as before when a call is recomputed."""

import collections

import torch
from torch import Tensor

from ..checks import transformed


class Draws:
    """
    What the random subsets of the last calls were drawn from.

    :func:`torch.utils.checkpoint.checkpoint` calls a prior a second time inside the backward pass, and restores the state of
    torch's generators, but not that of a prior's own. A call inside a backward pass, of the same method for an equal image,
    is therefore given the state of that earlier call; of several, the last first, as a backward pass goes.
    """

    def __init__(self) -> None:
        self.calls: collections.deque = collections.deque(maxlen=256)  # of (key, state)
        self.replays: tuple[int, collections.Counter] = (-1, collections.Counter())

    def source(self, generator: torch.Generator, method: str, x: Tensor) -> torch.Generator:
        """
        The generator to draw from: the one given, or one in the state of the call that is recomputed.

        :param torch.Generator generator: the prior's own.
        :param str method: name of the method that draws.
        :param torch.Tensor x: images.
        """
        if transformed(x):
            return generator
        task = torch._C._current_graph_task_id()
        key = method, x.shape, hash(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        states = [state for other, state in self.calls if other == key] if task >= 0 else []
        if not states:
            self.calls.append((key, generator.get_state()))
            return generator
        if self.replays[0] != task:
            self.replays = task, collections.Counter()
        self.replays[1][key] += 1
        again = torch.Generator(generator.device)
        again.set_state(states[-min(self.replays[1][key], len(states))])
        return again
