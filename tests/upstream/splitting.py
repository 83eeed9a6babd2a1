"""EquivariantSplittingLoss."""

import contextlib
import copy
import functools
import gc
import pickle
import weakref

import deepinv as dinv
import torch
from deepinv.loss import SplittingLoss, SureGaussianLoss, SurePGLoss
from deepinv.transform import Rotate, Shift
from splitting_cases import (
    SIGMA,
    SIZE,
    FixedMasks,
    Linear,
    adapted,
    gaussian,
    inpainting,
    losses_and_truths,
    masks,
    rotations,
    run,
)

from . import NAN, defect


def splitting(side, **options):
    """A loss, the reconstructor adapted to it, measurements of two images, their physics."""
    loss = side.Splitting(**{"mask_generator": masks(), **options})
    return loss, adapted(loss), torch.rand(2, *SIZE), inpainting(gaussian())


# what it estimates, over the supervised loss that it stands for


def estimate(side, name):
    x = torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(7)) + 0.2
    value, truth = losses_and_truths(side.Splitting, name, x, draws=1000)
    return value.mean() / truth.mean()


for title, name, found in [
    ("SureGaussianLoss", "sure", 0.81),
    ("SureGaussianLoss(unsure=True)", "unsure", 0.81),
    ("SurePoissonLoss", "poisson", 0.95),
    ("SurePGLoss", "pg", 0.81),
    ("SurePGLoss(unsure=True)", "pg_unsure", 0.81),
    ("R2RLoss", "r2r", "ValueError: Mask not generated"),
    ("R2RLoss, Poisson", "r2r_poisson", "ValueError: Mask not generated"),
    ("R2RLoss, Gamma", "r2r_gamma", "ValueError: Mask not generated"),
]:
    defect(f"consistency by {title}: estimate over truth", found, 1.0)(functools.partial(estimate, name=name))


@defect(
    "SureGaussianLoss with a random transform: spread of the estimate",
    lambda found: found > 1,
    lambda found: found < 0.2,
)
def spread(side):
    """The divergence is a difference over tau = 0.01, which two transforms would amplify."""
    loss, model, _, physics = splitting(side, consistency_loss=SureGaussianLoss(SIGMA), transform=rotations())
    return run(loss, model, physics(torch.rand(1, *SIZE).expand(400, *SIZE)), physics).std()


class Zero(dinv.loss.Loss):
    def forward(self, y, **kwargs):
        return torch.zeros(len(y))


@defect("prediction term in evaluation, four splits over one", lambda found: found < 0.7, 1.0)
def leak(side):
    x = torch.rand(1, *SIZE) + 0.2
    values = []
    for n in (4, 1):
        loss, model, _, physics = splitting(side, consistency_loss=Zero(), eval_n_samples=n)
        values.append(run(loss, model.eval(), physics(x.expand(3000, *SIZE)), physics).mean())
    return values[0] / values[1]


@defect("images with masks of two sizes: loss of the batch over that of each", 1.12, 1.0)
def batch(side):
    mask, y = torch.zeros(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    mask[0, :, :1], mask[1, :, :6] = 1, 1
    values = []
    for part in (slice(0, 2), slice(0, 1), slice(1, 2)):
        values.append(loss_of(side, y[part], mask[part]).mean())
    return 2 * values[0] / (values[1] + values[2])


def loss_of(side, y, *each):
    """Of measurements without noise, for these masks one after another."""
    loss = side.Splitting(mask_generator=FixedMasks(*each))
    model = adapted(loss, Linear(y.shape[1:]))
    return run(loss, model, y, dinv.physics.Denoising(dinv.physics.GaussianNoise(0.0)))


@defect("a mask that happens to keep nothing: loss", NAN, 0.0174)
def nothing_kept(side):
    return loss_of(side, torch.rand(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.eye(2)[None, None])


@defect("a split_ratio of 1: loss", NAN, "ValueError: expected a mask_generator that splits")
def never_split(side):
    return run(*splitting(side, mask_generator=masks(ratio=1.0))).mean()


@defect(
    "a sum of transforms", "RuntimeError: The size of tensor a", "ValueError: expected a transform that keeps the batch"
)
def sum_of_transforms(side):
    return run(*splitting(side, transform=Rotate() + Shift())).mean()


# UNSURE


def after_an_evaluation(side):
    """The inner loss and the model, after the evaluation loss as Trainer takes it, model.train() and no backward pass."""
    inner = SureGaussianLoss(0.1, unsure=True, step_size=0.1)
    loss, model, y, physics = splitting(side, consistency_loss=inner)
    run(loss, model, y, physics)
    return inner, model


@defect("UNSURE: a noise level of 0.1 after an evaluation", lambda found: abs(found - 0.1) > 0.01, 0.1)
def level_moves(side):
    return after_an_evaluation(side)[0].sigma2.sqrt()


@defect("UNSURE: its noise level keeps the graph of the last call", True, False)
def level_keeps_a_graph(side):
    return after_an_evaluation(side)[0].sigma2.grad_fn is not None


@defect("UNSURE: its noise level is in checkpoints of the model", False, True)
def level_is_saved(side):
    model = after_an_evaluation(side)[1]
    saved, again = copy.deepcopy(model.state_dict()), after_an_evaluation(side)[1]
    if not hasattr(again, "sigma2"):
        return False
    again.sigma2.fill_(0.5)
    again.load_state_dict(saved)
    return bool(again.sigma2 == model.sigma2)


@defect("UNSURE by SurePGLoss, evaluated under no_grad: finite", "RuntimeError: element 0 of tensors", True)
def without_gradients(side):
    loss, model, y, physics = splitting(side, consistency_loss=SurePGLoss(0.2, 0.1, unsure=True))
    with torch.no_grad():
        return bool(run(loss, model.eval(), y, physics).isfinite().all())


# the adapted model


def works(copier, side):
    loss, model, y, physics = splitting(side)
    return bool(run(loss, copier(model), y, physics).isfinite().all())


@contextlib.contextmanager
def lone_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@defect("the adapted model in DistributedDataParallel: a finite loss", "RuntimeError: Unregistered model", True)
def distributed(side):
    with lone_process():
        return works(torch.nn.parallel.DistributedDataParallel, side)


for title, copier, found in [
    ("deep-copied", copy.deepcopy, "RuntimeError: Unregistered model"),
    ("pickled", lambda model: pickle.loads(pickle.dumps(model)), "PicklingError"),
    ("compiled", functools.partial(torch.compile, backend="eager"), "RuntimeError: Unregistered model"),
]:
    defect(f"the adapted model, {title}: a finite loss", found, True)(functools.partial(works, copier))


@defect("the adapted model is freed when dropped", False, True)
def freed(side):
    loss = side.Splitting(mask_generator=masks())
    dropped = weakref.ref(adapted(loss))
    gc.collect()
    return dropped() is None


@defect("a model adapted to two losses: splits of each measurement", 2, 1)
def nested(side):
    model = Linear()
    for _ in range(2):
        model = side.Splitting(mask_generator=masks()).adapt_model(model)
    return sum(isinstance(module, SplittingLoss.SplittingModel) for module in model.modules())
