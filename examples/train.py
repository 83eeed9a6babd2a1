r"""
Train what a YAML file describes
================================

``python examples/train.py --config examples/configs/patchnr.yaml [key=value ...]`` runs a :class:`deepinv.Trainer`. The file
names its physics, model, losses, metrics, optimizer and data by their import paths. The command line can change every key of the
file (``epochs=5``, ``optimizer.lr=1e-4``, ``data=/my/folder``) and add new ones (``+trainer.early_stop=3``).

A terminal shows one bar for the whole training, a file a line an epoch; ``trainer.verbose=false`` is quiet.

With ``resume=true`` the training continues from its newest checkpoint, as if it had not been interrupted; more epochs or another
learning rate apply from there on. ``mode=test [test_data=/my/folder]`` evaluates the best checkpoint of the newest run, or the
checkpoint that ``resume=`` names, with the settings of that run, and writes images to a folder beside it; each image of
``test_data`` is used once. ``torchrun --nproc_per_node 2 examples/train.py ...``
divides each batch between two processes, with the losses of a single process.

A file can name any function to be called, so run only files that you trust.
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
from torchvision.utils import save_image

from deepinv_flows import DistributedTrainer, FlowModel
from deepinv_flows.checks import check_choice, positive_int
from deepinv_flows.training import Resumes, Watched
from deepinv_flows.weights import CheckpointError, guarded, read_torch

PATHS = ("data", "test_data", "save_path", "resume")
instantiate = functools.partial(hydra.utils.instantiate, _convert_="all")  # lists become lists, not ListConfig


def read_config(path: str, overrides: list[str]) -> DictConfig:
    """The file, with the changes that the command line makes."""
    config = OmegaConf.load(path)
    if not OmegaConf.is_dict(config):
        raise ValueError(f"expected keys and values; got {type(config).__name__} in {path}")
    for override in overrides:
        key, equals, value = override.partition("=")
        plain = OmegaConf.to_container(config)
        name, known = key.removeprefix("+"), keys(plain)
        if not (name and equals):
            raise ValueError(f"expected key=value; got {override!r}")
        if name not in known and name == key:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(str, config))}"
            raise ValueError(f"no key {name!r} in {path}; {hint} (+{name}=... adds one)")
        OmegaConf.update(
            config, name, read_value(value, name in PATHS or isinstance(at(plain, name), str)), merge=False
        )
    return config


def read_value(text: str, is_text: bool):
    """The value of an override. It is read as YAML, but a path or another text is taken literally."""
    if is_text and not re.match(r"""\s*([\[{"']|(null|~|true|false)?\s*$)""", text):
        return text
    value = OmegaConf.create(f"value: {text}")["value"]
    return text if isinstance(value, str) and not re.match(r"""\s*["']""", text) else value


def at(node, name: str):
    """The value under a key of a file, or ``None``."""
    for part in name.split("."):
        if isinstance(node, list):
            node = node[int(part)] if part.isdecimal() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node


def keys(node) -> list[str]:
    """All keys of a file; the keys of nested nodes are joined by dots."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [name for key, below in items for name in (str(key), *(f"{key}.{name}" for name in keys(below)))]


def newest_checkpoint(config: DictConfig) -> Path | None:
    """The checkpoint to resume from or to test. Files that an interruption cut short are skipped."""
    testing = config.get("mode") == "test"
    if config.resume and not isinstance(config.resume, bool):
        with guarded(config.resume):
            read_torch(config.resume)
        return Path(config.resume)
    if not config.resume and not testing:
        return None
    asked = "mode=test" if testing else "resume=true"
    if not config.save_path:
        raise ValueError(f"{asked} needs save_path, the folder of the training, or resume=<path of a checkpoint>")
    paths = sorted(Path(config.save_path).glob("*/ckp_*.pth.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    if testing:  # the best of the newest run
        paths = [path.parent / "ckp_best.pth.tar" for path in paths[:1]] + paths
    for path in paths:
        with contextlib.suppress(CheckpointError, OSError):
            read_torch(path)
            return path
    raise ValueError(
        f"{asked}: no readable checkpoint under {config.save_path}" + ("; resume=false starts anew" * (not testing))
    )


def only_x(batch) -> torch.Tensor:
    """The images or patches alone, which the Trainer measures."""
    return batch_as_dict(batch if isinstance(batch, dict) else default_collate(batch))["x"]


@torch.no_grad()
def measured(data: Dataset, physics, device: torch.device) -> Dataset:
    """The images with their measurements, which are made once."""
    batches = [(x, physics(x.to(device)).cpu()) for x in DataLoader(data, 16, collate_fn=only_x)]
    x, y = map(torch.cat, zip(*batches))
    return TensorDataset(x=x, y=y, use_dict_output=True)


class ResumingTrainer(Watched, Resumes, DistributedTrainer):
    """A trainer that writes the config beside its checkpoints, with one bar in place of deepinv's two for each epoch."""

    config: DictConfig | None = None

    def setup_train(self, train: bool = True, **kwargs):
        super().setup_train(train, **kwargs)
        if train and self.show_progress_bar:
            self.bar, self.verbose = self.verbose, False
        if self.save_path and self.config is not None:
            OmegaConf.save(self.config, Path(self.save_path) / "config.yaml")


def generators(*things) -> tuple[torch.Generator, ...]:
    """All generators of random numbers that modules and data hold, after the global generator of torch."""
    parts = [part for thing in things for part in (thing.modules() if isinstance(thing, torch.nn.Module) else [thing])]
    found = [value for part in parts for value in vars(part).values() if isinstance(value, torch.Generator)]
    return torch.default_generator, *{id(generator): generator for generator in found}.values()


def device_of(config: DictConfig) -> torch.device:
    """The device of this process, which may be one of those of torchrun."""
    device = torch.device(config.device)
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def whole_folder(node) -> None:
    """Use all images of the data in this node, each once, not the held-out part alone."""
    for key, below in list(node.items()) if OmegaConf.is_dict(node) else ():
        if key == "part":
            node[key] = None
            if "number" in node:
                node["number"] = None
        whole_folder(below)


def of_the_run(config: DictConfig, overrides: list[str]) -> DictConfig:
    """For ``mode=test`` the config that the run left beside its checkpoint, with the changes of the command line."""
    if config.get("mode") != "test" or not (config.resume or config.save_path):
        return config
    checkpoint = newest_checkpoint(config)
    left = checkpoint.parent / "config.yaml"
    return read_config(str(left), [*overrides, f"resume={checkpoint}"]) if left.is_file() else config


def run(config: DictConfig) -> ResumingTrainer:
    """Make all that the file names, and train or test the model."""
    check_choice("dtype", config.dtype, ("float32", "float64"))
    check_choice("mode", config.get("mode", "train"), ("train", "test"))
    testing = config.get("mode") == "test"
    if config.get("test_data"):
        if not testing:
            raise ValueError(f"test_data is for mode=test; got {config.test_data!r} with mode={config.get('mode')}")
        config.data = config.test_data
        whole_folder(config.eval_data)
    torch.set_default_dtype(getattr(torch, config.dtype))
    device = device_of(config)
    checkpoint = newest_checkpoint(config)

    torch.manual_seed(config.seed)
    physics = instantiate(config.physics).to(device)
    model = instantiate(config.model).to(device)
    losses = instantiate(config.losses)
    optimizer = instantiate(config.optimizer, _partial_=True)([p for p in model.parameters() if p.requires_grad])
    scheduler = instantiate(config.scheduler, _partial_=True)(optimizer) if config.scheduler else None
    options = instantiate(config.trainer)
    if testing and not sys.stderr.isatty():
        options["show_progress_bar"] = False  # a bar of deepinv's own, a line for each step in a file

    def loader(node: DictConfig, shuffle: bool, samples_per_epoch: int | None = None) -> DataLoader:
        data, collate = instantiate(node), only_x
        if not options.get("online_measurements"):
            data, collate = measured(data, physics, device), None
        sampler = RandomSampler(data, samples_per_epoch is not None, samples_per_epoch) if shuffle else None
        return DataLoader(data, positive_int(batch_size=config.batch_size), sampler=sampler, collate_fn=collate)

    eval_data = loader(config.eval_data, False)
    trainer = ResumingTrainer(
        model=model,
        physics=physics,
        losses=losses,
        metrics=instantiate(config.metrics),
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=eval_data if testing else loader(config.train_data, True, config.samples_per_epoch),
        eval_dataloader=eval_data,
        epochs=positive_int(epochs=config.epochs),
        device=device,
        save_path=None if testing else config.save_path,
        ckpt_pretrained=checkpoint,
        non_blocking_transfers=device.type == "cuda",
        **options,
    )
    trainer.config = config
    trainer.generators = generators(physics, model, losses, trainer.train_dataloader.dataset)
    if testing:
        test(trainer, eval_data, checkpoint.parent / "test", options.get("compare_no_learning", False))
    else:
        torch.manual_seed(config.seed)  # the order of the samples depends on it, also when the training is resumed
        train(trainer)
    return trainer


def train(trainer: ResumingTrainer) -> None:
    model = trainer.train()
    histories = [*trainer.loss_history.values(), *trainer.eval_metrics_history.values()]
    if not all(bool(p.isfinite().all()) for p in [*model.parameters(), *map(torch.tensor, histories)]):
        raise ValueError("the training diverged: a weight, loss or metric is not finite")


def test(trainer: ResumingTrainer, data: DataLoader, folder: Path, compare_no_learning: bool) -> None:
    """Print metrics and write images: measured, reconstructed and true ones, or samples of a flow."""
    folder.mkdir(exist_ok=True)
    if not isinstance(trainer.model, FlowModel):
        trainer.test(data, folder, compare_no_learning)
    else:
        trainer.test(data, None, False)
        with torch.no_grad():
            x, _ = trainer.model.flow(
                torch.randn(64, *only_x([data.dataset[0]])[0].shape, device=trainer.device), rev=True
            )
        if x.ndim == 2:  # patches
            side, channels = trainer.config.patch_size, trainer.config.channels
            x = x.view(-1, channels, side, side)
        save_image(x.clamp(0, 1), folder / "samples.png")
    print(f"images: {folder}")


def one_line(error: Exception) -> str:
    """The cause of an error and the key of the file where it arose, in one line."""
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the file to change, or with + to add"
    )
    start, dtype = time.perf_counter(), torch.get_default_dtype()
    try:
        args = parser.parse_intermixed_args(argv)
        trainer = run(of_the_run(read_config(args.config, args.overrides), args.overrides))
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
