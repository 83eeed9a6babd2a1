"""Cases that the tests of the trainer run in one process and in two. Each trains, and returns what has to agree."""

import importlib.util
import os
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
import torch.distributed as dist
from config_cases import TINY
from deepinv.loss import Loss, R2RLoss, SupLoss, SureGaussianLoss, SurePoissonLoss
from splitting_cases import full_loss

from deepinv_flows import DistributedTrainer, EquivariantSplittingLoss

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE, EPOCHS = (1, 6, 6), 2
RANK = 0
FEWER = "eval_data.number=2 +losses.eval_n_samples=1"
SMALL = TINY | {name: f"{TINY[name]} {FEWER}" for name in ("splitting_noiseless", "splitting_noisy")}
SINGLE = ("image_flow", "learned_primal_dual")  # FrEIA's blocks and deepinv's tomography take no other precision


class Network(dinv.models.Reconstructor):
    def __init__(self, unused=False):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.unused = torch.nn.Linear(2, 2) if unused else None

    def forward(self, y, physics, **kwargs):
        return self.layer(physics.A_adjoint(y))


class Numbered(torch.utils.data.Dataset):
    """Images that are rotated at random whenever they are asked for."""

    def __init__(self, n=32, physics=None):
        x = torch.rand(n, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
        self.x, self.y = x, x if physics is None else physics(x)
        self.parameters = None

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        turns = int(torch.randint(4, ()))
        sample = {"x": torch.rot90(self.x[i], turns, (1, 2)), "y": torch.rot90(self.y[i], turns, (1, 2))}
        return sample if self.parameters is None else sample | {"params": {k: v[i] for k, v in self.parameters.items()}}


class Restless(Loss):
    """A loss whose number of random draws depends on the data, as in rejection sampling, and which notes the samples it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x_net, x, y, **kwargs):
        torch.rand(int(1000 * float(x.sum())) % 17)
        self.seen += [round(float(each.sum()), 9) for each in x]
        return (x_net - x).pow(2).flatten(1).mean(1)


def fit(losses, data, physics, unused=False, **options):
    torch.manual_seed(0)
    np.random.seed(RANK)  # as processes do that nobody seeded alike
    model = Network(unused).double()
    loaders = [torch.utils.data.DataLoader(d, 8, shuffle=True) for d in (data if isinstance(data, list) else [data])]
    trainer = DistributedTrainer(
        model=model,
        physics=physics,
        optimizer=torch.optim.Adam(model.parameters(), 1e-2),
        train_dataloader=loaders,
        losses=losses,
        metrics=None,
        epochs=EPOCHS,
        log_train_batch=True,
        save_path=None,
        device="cpu",
        verbose=False,
        **options,
    )
    model = trainer.train()
    levels = {k: v.tolist() for k, v in model.named_buffers() if "sigma2" in k or "gain" in k}
    weights = [p.tolist() for p in model.parameters()]
    return {"losses": trainer.loss_history, "weights": weights, "levels": levels}


def inpainting(noise=None):
    mask = torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(5)).lt(0.8).double()
    return dinv.physics.Inpainting(SIZE, mask=mask, noise_model=noise)


def restless():
    loss, data = Restless(), Numbered()
    result = fit(loss, data, dinv.physics.Denoising())
    return result | {"seen": loss.seen, "all": [round(float(x.sum()), 9) for x in data.x]}


def splitting(loss, noise):
    physics = inpainting(noise)
    torch.manual_seed(1)
    return fit(loss, Numbered(physics=physics), physics)


def few_entries():
    """Masks that keep nothing of most samples; they are drawn again until one of them splits."""
    splits = dinv.physics.generator.BernoulliSplittingMaskGenerator(SIZE, 0.005)
    return fit(EquivariantSplittingLoss(mask_generator=splits), Numbered(), dinv.physics.Denoising())


def own_parameters():
    """Each sample has its own mask and noise level."""
    physics = inpainting(dinv.physics.GaussianNoise(0.1))
    torch.manual_seed(1)
    data = Numbered(physics=physics)
    data.parameters = {
        "mask": torch.rand(32, *SIZE, generator=torch.Generator().manual_seed(2)).lt(0.7).double(),
        "sigma": torch.linspace(0.05, 0.2, 32, dtype=torch.float64),
    }
    loss = full_loss(consistency_loss=R2RLoss())
    return fit([SupLoss(metric=dinv.metric.MSE()), loss], data, physics)


def tested():
    torch.manual_seed(0)
    model, data = Network().double(), Numbered(n=8)
    trainer = DistributedTrainer(
        model,
        inpainting(dinv.physics.GaussianNoise(0.1)),
        None,
        None,
        device="cpu",
        verbose=False,
        online_measurements=True,
    )
    loader = torch.utils.data.DataLoader(data, 4)
    report = trainer.test(loader, metrics=dinv.metric.MSE(), compare_no_learning=True, log_raw_metrics=True)
    return {k: v for k, v in report.items() if k.startswith("MSE")}


def config(name):
    """A case that trains a small version of a file of ``examples/configs`` and returns what its checkpoint holds."""

    def case(folder):
        spec = importlib.util.spec_from_file_location("train", EXAMPLES / "train.py")
        train = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(train)
        assert train.main(arguments(name, folder)) == 0
        return read_checkpoint(folder, name) if RANK == 0 else {}  # written by the first process alone

    return case


def arguments(name, folder):
    """Arguments of ``train.py``. In single precision the steps are plain gradient steps, as Adam would amplify the rounding."""
    precision = "optimizer._target_=torch.optim.SGD optimizer.lr=1e-4" if name in SINGLE else "dtype=float64"
    overrides = f"{SMALL[name]} {precision} +trainer.compute_eval_losses=true +trainer.log_train_batch=true"
    where = ["--config", str(EXAMPLES / "configs" / f"{name}.yaml"), f"save_path={folder}/{name}"]
    return [*where, *overrides.split(), f"epochs={EPOCHS}"]


def read_checkpoint(folder, name):
    """The numbers of the newest checkpoint that have to agree between one process and two."""
    newest = max(Path(f"{folder}/{name}").glob("*/ckp_[0-9]*"), key=lambda file: file.stat().st_mtime)
    found = torch.load(newest, weights_only=False)
    weights = {k: v.tolist() for k, v in found["state_dict"].items() if v.is_floating_point()}
    return {"weights": weights} | {k: found[k] for k in ("loss", "eval_loss", "eval_metrics")}


CASES = {name: config(name) for name in SMALL} | {
    "restless": lambda folder: restless(),
    "r2r": lambda folder: splitting(full_loss(consistency_loss=R2RLoss()), dinv.physics.GaussianNoise(0.1)),
    "r2r_poisson": lambda folder: splitting(full_loss(consistency_loss=R2RLoss()), dinv.physics.PoissonNoise(0.1)),
    "sure": lambda folder: splitting(
        full_loss(consistency_loss=SureGaussianLoss(0.1)), dinv.physics.GaussianNoise(0.1)
    ),
    "sure_poisson": lambda folder: splitting(
        full_loss(consistency_loss=SurePoissonLoss(0.1)), dinv.physics.PoissonNoise(0.1)
    ),
    "unsure": lambda folder: splitting(
        full_loss(consistency_loss=SureGaussianLoss(0.1, unsure=True, step_size=0.1)), dinv.physics.GaussianNoise(0.1)
    ),
    "few_entries": lambda folder: few_entries(),
    "own_parameters": lambda folder: own_parameters(),
    "two_loaders": lambda folder: fit(Restless(), [Numbered(), Numbered(16)], [dinv.physics.Denoising()] * 2),
    "unused_weights": lambda folder: fit(
        Restless(), Numbered(), inpainting(), unused=True, ddp_options={"find_unused_parameters": True}
    ),
    "tested": lambda folder: tested(),
}


def work(rank, world, folder):
    """Run all cases as one of several processes. At the end, all processes but the first die."""
    global RANK
    RANK = rank
    torch.set_num_threads(1)
    outcome = {}
    for name, case in CASES.items():
        dist.init_process_group("gloo", f"file://{folder}/store_{name}", rank=rank, world_size=world)
        outcome[name] = case(folder)
        if dist.is_initialized():  # train.main ends it by itself
            dist.destroy_process_group()
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(outcome, f"{folder}/outcome_{rank}.pt")
    try:
        fit(Mortal(rank), Numbered(), inpainting())
    except RuntimeError as error:
        Path(f"{folder}/last_words_{rank}").write_text(str(error))


class Mortal(Restless):
    """A loss that ends all processes but the first in their third step."""

    def __init__(self, rank):
        super().__init__()
        self.left = 3 if rank else 1000

    def forward(self, *args, **kwargs):
        self.left -= 1
        if not self.left:
            os._exit(0)
        return super().forward(*args, **kwargs)
