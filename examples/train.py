r"""
Train what a YAML file describes
================================

``python examples/train.py --config examples/configs/patchnr.yaml [key=value ...]`` runs a :class:`deepinv.Trainer` whose physics,
model, losses, metrics, optimizer and data the file names by their import paths. Every key of the file can be given anew
(``epochs=5``, ``optimizer.lr=1e-4``, ``data=/my/folder``), and one that it has not can be added (``+trainer.early_stop=3``). With
``resume=true`` the training goes on from its newest checkpoint. ``torchrun --nproc_per_node 2 examples/train.py ...`` shares each
batch out over two processes, with the losses of one.

A file can name any function to call: run those that you trust.
"""

import argparse
import contextlib
import difflib
import functools
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import hydra.utils
import torch
import torch.distributed as dist
from deepinv.datasets import TensorDataset
from deepinv.datasets.base import batch_as_dict
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from deepinv_flows import DistributedTrainer
from deepinv_flows.checks import check_choice, positive_int
from deepinv_flows.weights import CheckpointError, guarded, read_torch

instantiate = functools.partial(hydra.utils.instantiate, _convert_="all")  # lists as lists


def read_config(path: str, overrides: list[str]) -> DictConfig:
    """The file, with some of its keys given anew."""
    config = OmegaConf.load(path)
    if not OmegaConf.is_dict(config):
        raise ValueError(f"expected keys and values; got {type(config).__name__} in {path}")
    for override in overrides:
        key, equals, value = override.partition("=")
        name, known = key.removeprefix("+"), keys(OmegaConf.to_container(config))
        if not (name and equals):
            raise ValueError(f"expected key=value; got {override!r}")
        if name not in known and name == key:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(str, config))}"
            raise ValueError(f"no key {name!r} in {path}; {hint} (+{name}=... adds one)")
        OmegaConf.update(config, name, OmegaConf.create(f"value: {value}")["value"], merge=False)
    return config


def keys(node) -> list[str]:
    """All keys of a file, those below others after dots."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [name for key, below in items for name in (str(key), *(f"{key}.{name}" for name in keys(below)))]


def newest_checkpoint(config: DictConfig) -> tuple[Path | None, int]:
    """What to resume from, and the epochs that it has behind it; one that an interruption cut short is passed over."""
    if config.resume and not isinstance(config.resume, bool):
        with guarded(config.resume):
            return Path(config.resume), read_torch(config.resume)["epoch"] + 1
    paths = Path(config.save_path).glob("*/ckp_*.pth.tar") if config.resume else []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(CheckpointError):
            return path, read_torch(path)["epoch"] + 1
    return None, 0


def only_x(batch) -> torch.Tensor:
    """The images or patches alone: the Trainer measures them."""
    return batch_as_dict(batch if isinstance(batch, dict) else default_collate(batch))["x"]


@torch.no_grad()
def measured(data: Dataset, physics, device: torch.device) -> Dataset:
    """Each image with its measurement, made once."""
    batches = [(x, physics(x.to(device)).cpu()) for x in DataLoader(data, 16, collate_fn=only_x)]
    x, y = map(torch.cat, zip(*batches))
    return TensorDataset(x=x, y=y, use_dict_output=True)


def train(config: DictConfig) -> DistributedTrainer:
    """Make all that the file names, and train."""
    check_choice("dtype", config.dtype, ("float32", "float64"))
    torch.set_default_dtype(getattr(torch, config.dtype))
    device = torch.device(config.device)
    if "LOCAL_RANK" in os.environ:  # by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    checkpoint, epoch = newest_checkpoint(config)

    torch.manual_seed(config.seed)
    physics = instantiate(config.physics).to(device)
    model = instantiate(config.model).to(device)
    optimizer = instantiate(config.optimizer, _partial_=True)([p for p in model.parameters() if p.requires_grad])
    scheduler = instantiate(config.scheduler, _partial_=True)(optimizer) if config.scheduler else None
    options = instantiate(config.trainer)

    def loader(node: DictConfig, shuffle: bool, samples_per_epoch: int | None = None) -> DataLoader:
        data, collate = instantiate(node), only_x
        if not options.get("online_measurements"):
            data, collate = measured(data, physics, device), None
        sampler = RandomSampler(data, samples_per_epoch is not None, samples_per_epoch) if shuffle else None
        return DataLoader(data, positive_int(batch_size=config.batch_size), sampler=sampler, collate_fn=collate)

    trainer = DistributedTrainer(
        model=model,
        physics=physics,
        losses=instantiate(config.losses),
        metrics=instantiate(config.metrics),
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loader(config.train_data, True, config.samples_per_epoch),
        eval_dataloader=loader(config.eval_data, False),
        epochs=positive_int(epochs=config.epochs),
        device=device,
        save_path=config.save_path,
        ckpt_pretrained=checkpoint,
        non_blocking_transfers=device.type == "cuda",
        **options,
    )
    torch.manual_seed(config.seed + epoch)  # a resumed training draws anew
    model = trainer.train()
    histories = [*trainer.loss_history.values(), *trainer.eval_metrics_history.values()]
    if not all(bool(p.isfinite().all()) for p in [*model.parameters(), *map(torch.tensor, histories)]):
        raise ValueError("the training diverged: a weight, loss or metric is not finite")
    return trainer


def one_line(error: Exception) -> str:
    """What was wrong, and under which key."""
    key = re.search(r"full_key: (\S+)", str(error)) if isinstance(error, InstantiationException) else None
    cause = error.__cause__ if key and error.__cause__ else error
    kind = "" if isinstance(cause, ValueError | InstantiationException) else f"{type(cause).__name__}: "
    return f"{key[1] + ': ' if key else ''}{kind}{textwrap.shorten(str(cause), 500)}"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the file, given anew")
    start, dtype = time.perf_counter(), torch.get_default_dtype()
    try:
        args = parser.parse_intermixed_args(argv)
        trainer = train(read_config(args.config, args.overrides))
        if trainer.save_path:
            print(f"{time.perf_counter() - start:.1f} s; checkpoints: {trainer.save_path}")
    except Exception as error:
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        print(f"train.py: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        torch.set_default_dtype(dtype)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
