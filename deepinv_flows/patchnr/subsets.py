"""Random subsets of patches: a new one at each call, and the same one when a call is recomputed."""

import collections

import torch
from torch import Tensor

from ..checks import transformed

REMEMBERED = 256  # calls


class Draws:
    """
    The seeds of the random subsets of the last calls.

    :func:`torch.utils.checkpoint.checkpoint` calls a prior a second time inside the backward pass. It restores the state of
    torch's global generators, but not the state of a prior's own generator. A call inside a backward pass is therefore given the
    seed of the earlier call of the same method on an equal image. If there were several such calls, the last one is repeated
    first, since a backward pass runs through the calls in reverse. A call takes one number of the generator, so that the calls
    of several threads do not mix.
    """

    def __init__(self) -> None:
        self.calls: collections.deque = collections.deque(maxlen=REMEMBERED)  # (key, seed) of each first call
        self.repeated: collections.deque = collections.deque(
            maxlen=REMEMBERED
        )  # (backward pass, key) of each repeated call

    def source(self, generator: torch.Generator, method: str, x: Tensor) -> torch.Generator:
        """
        A generator for the subset of this call alone.

        :param torch.Generator generator: the prior's own, which gives the seed of a first call.
        :param str method: name of the method that draws.
        :param torch.Tensor x: images.
        """
        if transformed(x):
            return generator
        task = torch._C._current_graph_task_id()
        key = method, x.shape, hash(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        # tuples, since other threads append meanwhile
        seeds = [seed for other, seed in tuple(self.calls) if other == key] if task >= 0 else []
        if seeds:
            before = tuple(self.repeated).count((task, key))
            self.repeated.append((task, key))
            seed = seeds[-1 - min(before, len(seeds) - 1)]
        else:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            self.calls.append((key, seed))
        return torch.Generator(generator.device).manual_seed(seed)
