"""Transforms, masks and noise models are compared by how they were made, not by what they have drawn since."""

import copy
import pickle

import deepinv as dinv
import pytest
import torch
from deepinv.loss import R2RLoss
from deepinv.transform import Reflect, Rotate, Shift
from splitting_cases import SIZE, Linear, gaussian, inpainting, masks, rotations, run

from deepinv_flows import EquivariantSplittingLoss, LineSplittingMaskGenerator
from deepinv_flows.splitting.pickling import recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LOSSES = {
    "choice": lambda: dict(mask_generator=masks(), transform=Shift() | Reflect()),
    "nested": lambda: dict(mask_generator=masks(), transform=Rotate(multiples=90) * (Shift() | Reflect())),
    "random_ratio": lambda: dict(
        mask_generator=masks(random_split_ratio=True, min_split_ratio=0.5, max_split_ratio=0.8), transform=rotations()
    ),
    "lines": lambda: dict(mask_generator=LineSplittingMaskGenerator(SIZE, 0.7)),
    "r2r": lambda: dict(mask_generator=masks(), consistency_loss=R2RLoss(noise_model=gaussian())),
    "list_size": lambda: dict(mask_generator=masks(list(SIZE))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_an_equal_loss_takes_the_model_of_a_used_one(name):
    """A second loss of equal settings shares the model after a pass, in a test by two losses and after loading."""
    first, physics, y = EquivariantSplittingLoss(**LOSSES[name]()), inpainting(gaussian()), torch.rand(2, *SIZE)
    model = first.adapt_model(Linear())
    for _ in range(3):
        run(first, model, y, physics)
    for used in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        second = EquivariantSplittingLoss(**LOSSES[name]())
        assert second.adapt_model(used) is used
        assert torch.isfinite(run(second, used, y, physics)).all()
    again = second.adapt_model(Linear())
    assert first.adapt_model(again) is again


DIFFERENT = [
    lambda: masks(ratio=0.6),
    lambda: masks(ratio=0.7),
    lambda: masks(ratio=0.7, pixelwise=False),
    lambda: masks(random_split_ratio=True, min_split_ratio=0.5),
    lambda: masks(random_split_ratio=True, min_split_ratio=0.6),
    lambda: LineSplittingMaskGenerator(SIZE, 0.7),
    lambda: LineSplittingMaskGenerator(SIZE, 0.7, dim=-2),
    Shift,
    lambda: Shift(shift_max=0.5),
    lambda: Shift() | Reflect(),
    lambda: Reflect() | Shift(),
    lambda: Shift() * Reflect(),
    lambda: Reflect(dim=[-1]),
    lambda: Reflect(dim=[-2]),
    lambda: Rotate(multiples=90),
    lambda: Rotate(multiples=90, n_trans=2),
    gaussian,
    lambda: dinv.physics.GaussianNoise(0.1),
    lambda: dinv.physics.PoissonNoise(0.1),
]


def test_recipes_tell_laws_apart():
    recipes = [recipe(make()) for make in DIFFERENT]
    assert all(recipes[i] != recipes[k] for i in range(len(recipes)) for k in range(i))
    assert recipes == [recipe(make()) for make in DIFFERENT]
