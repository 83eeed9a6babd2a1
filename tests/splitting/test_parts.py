"""The entries that a split keeps: for several coils, for one mask of a whole batch, and only where something was measured."""

import deepinv as dinv
import pytest
import torch
from deepinv.loss import R2RLoss
from deepinv.physics.generator import PhysicsGenerator
from splitting_cases import SIZE, Convolution, FixedMasks, adapted, gaussian, inpainting, masks, run

from deepinv_flows import EquivariantSplittingLoss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def mask(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(1)).lt(0.6).float()


def maps(*size):
    return torch.ones(size, dtype=torch.complex64)


COILS = {
    "multicoil": (dinv.physics.MultiCoilMRI(mask=mask(1, 1, 8, 8), coil_maps=maps(1, 3, 8, 8)), (2, 8, 8)),
    "multicoil_3d": (
        dinv.physics.MultiCoilMRI(
            mask=mask(1, 1, 4, 8, 8), coil_maps=maps(1, 3, 4, 8, 8), three_d=True, img_size=(4, 8, 8)
        ),
        (2, 4, 8, 8),
    ),
    "dynamic": (dinv.physics.DynamicMRI(mask=mask(2, 4, 8, 8)), (2, 4, 8, 8)),
    "single": (dinv.physics.MRI(mask=mask(1, 1, 8, 8)), (2, 8, 8)),
}


@pytest.mark.parametrize("name", COILS)
def test_the_size_is_that_of_the_measurements(name):
    """``img_size`` is that of the measurements, whatever dimensions the operator's mask lacks; all coils are split alike."""
    physics, size = COILS[name]
    y = physics(torch.rand(2, *size))
    loss = EquivariantSplittingLoss(img_size=tuple(y.shape[1:]))
    model = adapted(loss, Convolution(2))
    assert torch.isfinite(run(loss, model, y, physics)).all()
    (kept,) = model.get_masks()
    assert kept.shape == (2, *physics.mask.shape[1:]) and (kept <= physics.mask).all()
    assert loss.mask_generator.img_size == tuple(y.shape[1:])


def test_a_size_that_does_not_fit_says_which_would():
    physics, _ = COILS["multicoil"]
    y = physics(torch.rand(2, 2, 8, 8))
    loss = EquivariantSplittingLoss(mask_generator=FixedMasks(torch.ones(1, 2, 4, 8, 8)))
    with pytest.raises(ValueError, match=r"make the mask_generator with img_size=\(2, 8, 8\)"):
        run(loss, adapted(loss, Convolution(2)), y, physics)


class OneMask(PhysicsGenerator):
    """A generator of one mask for all samples, which ignores the observed entries."""

    def step(self, batch_size=1, **kwargs):
        return {"mask": torch.rand(1, *SIZE, generator=self.rng).lt(0.7).float()}


def test_one_mask_serves_a_batch():
    physics, y = inpainting(), torch.rand(3, *SIZE)
    loss = EquivariantSplittingLoss(mask_generator=OneMask())
    model = adapted(loss)
    assert run(loss, model, y, physics).shape == (3,)
    (kept,) = model.get_masks()
    assert kept.shape == (3, *SIZE) and (kept == kept[:1]).all()


def test_nothing_enters_where_nothing_was_measured():
    """R2R adds noise to all entries, and this generator keeps unobserved ones."""
    physics, seen = inpainting(gaussian()), []

    class Watch(dinv.models.Reconstructor):
        def forward(self, y, physics, **kwargs):
            seen.append((y, physics.A(torch.ones(1, *SIZE))))
            return physics.A_adjoint(y)

    loss = EquivariantSplittingLoss(mask_generator=OneMask(), consistency_loss=R2RLoss())
    run(loss, adapted(loss, Watch()), physics(torch.rand(2, *SIZE)), physics)
    for y, operator in seen:
        assert (y[:, physics.mask[0] == 0] == 0).all() and (operator[:, physics.mask[0] == 0] == 0).all()
    assert (y != 0).any()


def test_a_generator_of_measurements_keeps_its_size_after_an_error():
    physics, _ = COILS["multicoil"]
    generator = masks((2, 3, 8, 8))
    generator.batch_step = None  # fails inside
    loss = EquivariantSplittingLoss(mask_generator=generator)
    with pytest.raises(TypeError):
        run(loss, adapted(loss, Convolution(2)), physics(torch.rand(2, 2, 8, 8)), physics)
    assert generator.img_size == (2, 3, 8, 8)
