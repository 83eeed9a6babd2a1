r"""
Train what a YAML file describes
================================

``python examples/train.py --config examples/configs/patchnr.yaml [key=value ...]`` runs a :class:`deepinv.Trainer` whose physics, model,
losses, metrics, optimizer and data the file names by their import paths. Every key of the file can be given anew (``epochs=5``,
``optimizer.lr=1e-4``, ``data=/my/folder``), and one that it does not name added (``+trainer.early_stop=3``). With ``resume=true`` the
training goes on from its newest checkpoint. ``torchrun --nproc_per_node 2 examples/train.py ...`` shares each batch out over processes.

A file can name any function to call: run those that you trust.
"""

import argparse
import difflib
import functools
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepinv.datasets import TensorDataset
from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, RandomSampler, default_collate

from deepinv_flows import DistributedTrainer
from deepinv_flows.checkpoints import CheckpointError, read_torch
from deepinv_flows.inputs import positive_int


instantiate = functools.partial(hydra_instantiate, _convert_="all")  # lists as lists


def read_config(path: str, overrides: list[str]) -> DictConfig:
    """The file, with some of its keys given anew."""
    config = OmegaConf.load(path)
    if not OmegaConf.is_dict(config):
        raise ValueError(f"expected keys and values; got {type(config).__name__} in {path}")
    OmegaConf.set_struct(config, True)
    for override in overrides:
        key, equals, value = override.partition("=")
        known, name = keys(config), key.removeprefix("+")
        if not (name and equals):
            raise ValueError(f"expected key=value; got {override!r}")
        if name not in known and not key.startswith("+"):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(config)} or below"
            raise ValueError(f"no key {name!r} in {path}; {hint} (+{name}=... adds one)")
        value = OmegaConf.create(f"value: {value}")["value"]
        OmegaConf.update(config, name, value, merge=False, force_add=key.startswith("+"))
    return config


def keys(config: DictConfig) -> list[str]:
    """Of the file, those inside others with dots."""
    found = []
    for key in config:
        below = OmegaConf.to_container(config)[key]
        found += [
            str(key),
            *(f"{key}.{name}" for name in (keys(OmegaConf.create(below)) if isinstance(below, dict) else [])),
        ]
    return found


def newest_checkpoint(config: DictConfig) -> Path | None:
    """What to resume from; a checkpoint that an interruption cut short is passed over."""
    if not isinstance(config.resume, bool):
        return config.resume and Path(config.resume)
    paths = Path(config.save_path).glob("*/ckp_*.pth.tar") if config.resume else []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            read_torch(path)
            return path
        except CheckpointError:
            continue
    return None


def train(config: DictConfig) -> DistributedTrainer:
    """Make all that the file names, and train."""
    index = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", index) if config.device == "cuda" else torch.device(config.device)
    torch.set_default_dtype(getattr(torch, config.dtype))
    if "LOCAL_RANK" in os.environ:  # by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    checkpoint = newest_checkpoint(config)
    finished = read_torch(checkpoint)["epoch"] + 1 if checkpoint else 0

    torch.manual_seed(config.seed)
    physics = instantiate(config.physics).to(device)
    model = instantiate(config.model).to(device)
    optimizer = instantiate(config.optimizer, _partial_=True)([p for p in model.parameters() if p.requires_grad])
    scheduler = instantiate(config.scheduler, _partial_=True)(optimizer) if config.scheduler else None
    options = instantiate(config.trainer)

    def loader(data, samples_per_epoch=None):
        data = instantiate(data)
        if not options["online_measurements"]:  # measured once
            x = torch.stack(list(data)).to(device)
            data = TensorDataset(
                x=x.cpu(), y=torch.cat([physics(part) for part in x.split(16)]).cpu(), use_dict_output=True
            )

        def collate(batch):
            batch = batch if isinstance(batch, dict) else default_collate(batch)
            if isinstance(batch, dict) and not options["online_measurements"]:
                return batch
            return batch["x"] if isinstance(batch, dict) else batch

        sampler = RandomSampler(data, samples_per_epoch is not None, samples_per_epoch)
        return DataLoader(data, positive_int(batch_size=config.batch_size), sampler=sampler, collate_fn=collate)

    trainer = DistributedTrainer(
        model=model,
        physics=physics,
        losses=instantiate(config.losses),
        metrics=instantiate(config.metrics),
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loader(config.train_data, config.samples_per_epoch),
        eval_dataloader=loader(config.eval_data),
        epochs=positive_int(epochs=config.epochs),
        device=device,
        save_path=config.save_path,
        ckpt_pretrained=checkpoint,
        non_blocking_transfers=device.type == "cuda",
        **options,
    )
    torch.manual_seed(config.seed + finished)  # a resumed training draws anew
    model = trainer.train()
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError("the training diverged: weights are not finite")
    return trainer


def one_line(error: Exception) -> str:
    """What was wrong, and under which key."""
    key = re.search(r"full_key: (\S+)", str(error)) if isinstance(error, InstantiationException) else None
    cause = error.__cause__ if key and error.__cause__ else error
    kind = "" if isinstance(cause, ValueError | InstantiationException) else f"{type(cause).__name__}: "
    return f"{key[1] + ': ' if key else ''}{kind}{' '.join(str(cause).split())}"


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
