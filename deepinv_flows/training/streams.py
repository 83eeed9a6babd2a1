"""Random numbers of data loaders: the order of the samples depends on a seed and the epoch alone."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def derived(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator on a device, seeded by the next number of another; that one itself if it is there already."""
    if generator.device.type == device.type:
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(seed))


def source(generator: torch.Generator | None) -> torch.Generator:
    """The generator of a training, on the CPU, as data loaders take no other; with a fixed seed if it is ``None``."""
    return torch.Generator() if generator is None else derived(generator, torch.device("cpu"))


@contextlib.contextmanager
def unchanged(generator: torch.Generator) -> Iterator[None]:
    """Afterwards the generator is where it was before."""
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)


class Stream:
    """
    A context with random numbers of its own in torch, numpy and python: it neither depends on the random states outside nor
    changes them. When it is entered again, it continues where it was left.

    :param torch.device device: device whose random state is exchanged besides that of the CPU.
    :param int key: integers that seed the stream together.
    """

    def __init__(self, device: torch.device, *key: int):
        self.device = device
        first, second = (int(seed) for seed in np.random.SeedSequence(key).generate_state(2))
        self.state: tuple[Any, ...] = (
            torch.Generator().manual_seed(first).get_state(),
            torch.Generator(device).manual_seed(first).get_state() if device.type == "cuda" else None,
            np.random.RandomState(second).get_state(),
            random.Random(second).getstate(),
        )

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *exception) -> None:
        self._exchange()

    def _exchange(self) -> None:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        outside = torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()
        torch.set_rng_state(self.state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.state[1], self.device)
        np.random.set_state(self.state[2])
        random.setstate(self.state[3])
        self.state = outside


class InStep:
    """
    A data loader whose order of samples, workers and augmentations follow a stream that a key and the epoch seed.

    :param loader: data loader with a length and ``drop_last``.
    :param torch.device device: device of the training.
    :param int epoch: number of the first epoch; each iteration over the loader is an epoch.
    :param tuple key: integers that seed the stream beside the epoch.
    """

    def __init__(self, loader, device: torch.device, epoch: int, key: tuple[int, ...]):
        self.loader, self.device, self.epoch, self.key = loader, device, epoch, key
        self.drop_last = loader.drop_last

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> "Batches":
        stream = Stream(self.device, *self.key, self.epoch)
        self.epoch += 1
        with stream:
            return Batches(iter(self.loader), stream)


class Batches:
    """The batches of one epoch, drawn within its stream. The noise of their measurements may be drawn from the stream too."""

    def __init__(self, iterator: Iterator, stream: Stream):
        self.iterator, self.stream = iterator, stream

    def __iter__(self) -> "Batches":
        return self

    def __next__(self):
        with self.stream:
            return next(self.iterator)
