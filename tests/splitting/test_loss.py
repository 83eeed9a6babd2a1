"""Each mistake of deepinv's class that the design lists: the outcome of deepinv, then ours."""

import io
import pickle
import weakref

import deepinv as dinv
import pytest
import torch
from deepinv.loss import (
    MCLoss,
    Neighbor2Neighbor,
    R2RLoss,
    ScoreLoss,
    SplittingLoss,
    SureGaussianLoss,
    SurePGLoss,
)
from deepinv.loss.mri import RobustSplittingLoss
from deepinv.physics.generator import GaussianMaskGenerator, GaussianSplittingMaskGenerator
from deepinv.transform import Reflect, Rotate, Shift
from splitting_cases import (
    ALPHA,
    CONSISTENCY,
    DRAWS,
    SIGMA,
    SIZE,
    Convolution,
    FixedMasks,
    Linear,
    adapted,
    biased,
    full_loss,
    gaussian,
    inpainting,
    losses_and_truths,
    masks,
    rotations,
    run,
)

from deepinv_flows import EquivariantSplittingLoss, LineSplittingMaskGenerator
from deepinv_flows.splitting.terms import Reconstruction

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
THEIRS, OURS = dinv.loss.EquivariantSplittingLoss, EquivariantSplittingLoss


class WithoutReduction(torch.nn.Module):
    """A metric of the user's that returns one number for a batch."""

    def forward(self, x_net, x):
        return (x_net - x).abs().mean()


# Line 1. The losses follow their own theory
def errors(*args, **kwargs):
    value, truth = losses_and_truths(*args, **kwargs)
    return value - truth


@pytest.fixture
def x():
    return torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(7)) + 0.2


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency_is_unbiased(name, evaluate, x):
    difference = errors(OURS, name, x, evaluate=evaluate, eval_n_samples=2)
    assert difference.shape == (DRAWS,) and not biased(difference)


@pytest.mark.parametrize("name", ["sure", "pg", "r2r"])
def test_consistency_is_unbiased_with_a_random_transform(name, x):
    assert not biased(torch.cat([errors(OURS, name, x, transform=rotations()) for _ in range(2)]))


@pytest.mark.parametrize("name", CONSISTENCY)
def test_deepinv_is_biased_or_fails(name, x):
    if name.startswith("r2r"):
        with pytest.raises(ValueError, match="Mask not generated"):
            errors(THEIRS, name, x)
    else:
        assert biased(errors(THEIRS, name, x))


def test_consistency_without_noise_is_exact(x):
    physics, model = inpainting(), Linear()
    loss = OURS(mask_generator=masks())
    model = adapted(loss, model)
    y = physics(x)
    x_net = model(y, physics, update_parameters=True)
    first = model.get_masks()[0] * physics.mask
    second = physics.mask - first
    truth = sum((m * (x_net - x) ** 2).sum() / m.sum() for m in (first, second))
    assert torch.allclose(loss(x_net, y, physics, model), truth)


def test_sure_with_a_preconditioner_ranks_reconstructors_without_bias(x):
    """The loss is unbiased up to a constant that depends on the noise, so the difference of two reconstructors is unbiased."""
    kernel = torch.tensor([[0.0, 0.1, 0], [0.1, 0.6, 0.1], [0, 0.1, 0]])[None, None]

    def blur(v):
        return torch.nn.functional.conv2d(v, kernel, padding=1)

    physics = inpainting(gaussian())
    y, values = physics(x.expand(DRAWS, *SIZE)), []
    for seed in (0, 1):
        generator = masks(rng=torch.Generator().manual_seed(3))
        loss = OURS(mask_generator=generator, consistency_loss=SureGaussianLoss(SIGMA, tau=0.5, B=blur))
        model = adapted(loss, Linear(seed=seed))
        x_net = model(y, physics, update_parameters=True)
        first = model.get_masks()[0] * physics.mask
        second = physics.mask - first
        truth = blur(first * (x_net - x)).pow(2).flatten(1).sum(1) / first.flatten(1).sum(1)
        truth = truth + (second * (x_net - x) ** 2).flatten(1).sum(1) / second.flatten(1).sum(1)
        values.append((loss(x_net, y, physics, model) - truth).detach())
    assert not biased(values[0] - values[1])


def test_the_divergence_is_that_of_the_split_held(x):
    """The divergence equals the trace of the exact Jacobian in float64, with the transform."""
    physics = inpainting(gaussian()).double()
    x = x.double()
    loss = OURS(mask_generator=masks(), consistency_loss=SureGaussianLoss(SIGMA, tau=1e-3), transform=rotations())
    model = adapted(loss, Linear(dtype=torch.float64))
    y = physics(x)
    x_net = model(y, physics, update_parameters=True)
    split, first = model.get_splits()[0], model.get_masks()[0] * physics.mask
    again = Reconstruction(model, split, first, physics)
    assert torch.equal(again(y * first), x_net)
    jacobian = torch.autograd.functional.jacobian(lambda v: first * again(v), y * first)
    trace = (jacobian.reshape(36, 36).diagonal() * first.flatten()).sum()
    m1, second = first.sum(), physics.mask - first
    exact = (first * (x_net - y)).pow(2).sum() / m1 - SIGMA**2 + 2 * SIGMA**2 * trace / m1
    exact = exact + (second * (x_net - y)).pow(2).sum() / second.sum()
    values = torch.stack([loss(x_net, y, physics, model).detach()[0] for _ in range(1000)])
    assert not biased(values - exact.detach())


def test_noise_levels_of_each_sample(x):
    """Noise models may have a sigma for each image."""
    levels = torch.tensor([0.1, 0.2, 0.3])
    physics = inpainting(dinv.physics.GaussianNoise(levels))
    loss = OURS(mask_generator=masks(), consistency_loss=R2RLoss(alpha=ALPHA))
    model = adapted(loss)
    y = torch.zeros(3, *SIZE)
    model(y, physics, update_parameters=True)
    deviation = torch.stack([model.recorruption(y, physics) for _ in range(500)]).std((0, 2, 3, 4))
    assert torch.allclose(deviation, levels * (ALPHA / (1 - ALPHA)) ** 0.5, rtol=0.05)


@pytest.mark.parametrize("consistency", [Neighbor2Neighbor(), SplittingLoss()])
def test_losses_that_have_no_sense_on_a_split_are_refused(consistency):
    with pytest.raises(TypeError, match=type(consistency).__name__):
        OURS(img_size=SIZE, consistency_loss=consistency)


def test_the_prediction_term_takes_no_noise_of_its_own():
    with pytest.raises(ValueError, match="known noise level"):
        OURS(img_size=SIZE, prediction_loss=SureGaussianLoss(0.1, unsure=True))
    with pytest.raises(ValueError, match="as consistency_loss"):
        OURS(img_size=SIZE, prediction_loss=R2RLoss())


# UNSURE
def test_unsure_ascends_with_the_backward_pass_alone(x):
    physics = inpainting(gaussian())
    inner = SureGaussianLoss(0.1, unsure=True, step_size=0.1)
    loss = OURS(mask_generator=masks(), consistency_loss=inner)
    model = adapted(loss)
    y = physics(x.expand(8, *SIZE))
    start = model.sigma2.clone()
    run(loss, model, y, physics)  # Trainer's evaluation losses: model.train(), with gradients
    model.eval()
    run(loss, model, y, physics)
    assert torch.equal(model.sigma2, start) and inner.sigma2 == start
    model.train()
    for _ in range(3):
        run(loss, model, y, physics).mean().backward()
        assert inner.sigma2.is_leaf and inner.sigma2.grad_fn is None and inner.sigma2 == model.sigma2
    assert model.sigma2 > start and not model.sigma2.requires_grad

    theirs = SureGaussianLoss(0.1, unsure=True, step_size=0.1)
    theirs_loss = THEIRS(mask_generator=masks(), consistency_loss=theirs)
    model = adapted(theirs_loss)
    run(theirs_loss, model, y, physics)
    assert theirs.sigma2 != start and theirs.sigma2.grad_fn is not None  # moved without a backward pass, graph kept


def test_unsure_steps_as_deepinv_does():
    """With a mask that keeps all but one of many entries, the multiplier takes the same step as in deepinv."""
    physics, y = dinv.physics.Denoising(gaussian()), torch.rand(2, *SIZE)
    source = torch.Generator()
    plain = SureGaussianLoss(0.1, unsure=True, step_size=0.1, rng=source.manual_seed(0))
    mask = torch.ones(1, *SIZE)
    mask[..., 0, 0] = 0
    inner = SureGaussianLoss(0.1, unsure=True, step_size=0.1, rng=torch.Generator().manual_seed(0))
    loss = OURS(mask_generator=FixedMasks(mask), consistency_loss=inner)
    model = adapted(loss)
    run(loss, model, y, physics).mean().backward()
    base = model.model

    def on_mask(v, _):
        return base(v * mask, dinv.physics.Inpainting(SIZE, mask=mask))

    on_mask.training = True
    inpaint = dinv.physics.Inpainting(SIZE, mask=mask)
    plain(y=y * mask, x_net=on_mask(y, None), physics=inpaint, model=on_mask)
    assert torch.allclose(model.sigma2, plain.sigma2.detach(), rtol=1e-5)


def test_multipliers_are_saved():
    loss = OURS(img_size=SIZE, consistency_loss=SurePGLoss(0.2, 0.1, unsure=True))
    model = adapted(loss)
    model.sigma2.fill_(0.5)
    other = OURS(img_size=SIZE, consistency_loss=SurePGLoss(0.2, 0.1, unsure=True)).adapt_model(Linear())
    other.load_state_dict(model.state_dict())
    assert other.sigma2 == 0.5 and torch.isclose(other.gain, torch.tensor(0.1))
    theirs = adapted(THEIRS(img_size=SIZE))
    other.load_state_dict(theirs.state_dict())  # knows no multipliers: they stay
    assert other.sigma2 == 0.5


def test_checkpoints_with_multipliers_load_without():
    model = adapted(full_loss(consistency_loss=SureGaussianLoss(SIGMA, unsure=True)))
    model.sigma2.fill_(0.5)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for cls in (OURS, THEIRS):
        plain = adapted(
            cls(mask_generator=masks(), transform=rotations(), eval_transform=rotations(True)), Linear(seed=1)
        )
        plain.load_state_dict(saved)
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters()))
    other = adapted(full_loss(consistency_loss=SureGaussianLoss(SIGMA, unsure=True)))
    other.load_state_dict(saved)
    assert other.sigma2 == 0.5
    numbers = {key: torch.from_numpy(value.numpy()) for key, value in saved.items()}  # without the levels, which stay
    other.load_state_dict(numbers)
    assert other.sigma2 == 0.5
    other.load_state_dict(numbers | {"sigma2": torch.tensor(0.25)})  # as 0.1.0 wrote it
    assert other.sigma2 == 0.25


# Line 2. Prediction in evaluation
def test_each_evaluation_split_meets_its_own_target(x):
    physics = inpainting(gaussian())
    y = physics(x.expand(DRAWS, *SIZE))
    outcome = {}
    for cls in (THEIRS, OURS):
        loss = cls(mask_generator=masks(), eval_n_samples=4)
        loss.consistency_loss = type("Zero", (dinv.loss.Loss,), {"forward": lambda s, y, **k: torch.zeros(len(y))})()
        model = adapted(loss).eval()
        outcome[cls] = run(loss, model, y, physics)
        single = cls(mask_generator=masks(), eval_n_samples=1)
        single.consistency_loss = loss.consistency_loss
        outcome[cls] = outcome[cls] - run(single, adapted(single).eval(), y, physics)
    assert biased(outcome[THEIRS]) and outcome[THEIRS].mean() < 0  # the average has seen the targets
    assert not biased(outcome[OURS])


def test_evaluation_reconstructions_live_until_the_next_pass():
    physics, loss = inpainting(), OURS(img_size=SIZE)
    model, y = adapted(loss).eval(), torch.rand(2, *SIZE)
    x_net = model(y, physics, update_parameters=True)
    assert torch.allclose(x_net, sum(s.x_net for s in model.get_splits()) / 5)
    kept = weakref.ref(model.get_splits()[0].x_net)
    assert not any("x_net" in key for key in model.state_dict()) and pickle.loads(pickle.dumps(model)).splits == []
    model.train()(y, physics, update_parameters=True)
    assert kept() is None and model.get_splits()[0].x_net is None


def test_r2r_in_evaluation_uses_its_own_corruption(x):
    physics = inpainting(gaussian())
    loss = OURS(mask_generator=masks(), consistency_loss=R2RLoss(alpha=ALPHA, eval_n_samples=2), eval_n_samples=3)
    model = adapted(loss)
    y = physics(x)
    run(loss, model, y, physics)
    before = model.get_splits()[0].y
    model.eval()
    assert torch.isfinite(run(loss, model, y, physics)).all()
    inputs = [split.y for split in model.get_splits()]
    assert len(inputs) == 6 and not any(torch.equal(v, before) for v in inputs)

    theirs = R2RLoss()
    model = theirs.adapt_model(Linear()).eval()
    with pytest.raises(AttributeError):
        run(theirs, model, y, physics)
    run(theirs, model.train(), y, physics)
    before = model.get_corruption()
    run(theirs, model.eval(), y, physics)
    assert model.get_corruption() is before  # the last training corruption, in silence


# Line 3. Masks that keep all or nothing
def test_a_missing_term_is_left_out_with_one_warning():
    size = (1, 2, 2)
    good, nothing, everything = (torch.tensor(v).view(1, *size) for v in ([1.0, 1, 1, 0], [0.0] * 4, [1.0] * 4))
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.0))
    y = torch.rand(3, *size)
    mixed = torch.cat([good, nothing, everything])
    loss = OURS(mask_generator=FixedMasks(mixed))
    model = adapted(loss, Linear(size))
    with pytest.warns(UserWarning, match="keep all or none") as record:
        x_net = model(y, physics, update_parameters=True)
        value = loss(x_net, y, physics, model)
        value.mean().backward()
        run(loss, model, y, physics)
    assert sum("keep all or none" in str(w.message) for w in record) == 1
    error = ((x_net - y) ** 2).flatten(1)
    assert torch.allclose(value[0], error[0, :3].mean() + error[0, 3])
    assert torch.allclose(value[1:], error[1:].mean(1))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    theirs = THEIRS(mask_generator=FixedMasks(torch.cat([nothing])))
    assert run(theirs, adapted(theirs, Linear(size)), y, physics).isnan().any()


@pytest.mark.parametrize("ratio, what", [(1.0, "everything"), (0.0, "nothing")])
def test_a_generator_that_never_splits_is_an_error(ratio, what):
    loss = OURS(mask_generator=masks(ratio=ratio))
    with pytest.raises(ValueError, match=f"always keep {what}.*split_ratio"):
        adapted(loss)(torch.rand(2, *SIZE), inpainting(), update_parameters=True)


# The split is that of the last pass
def test_a_stale_split_is_refused():
    loss, physics, y = full_loss(consistency_loss=R2RLoss(alpha=ALPHA)), inpainting(gaussian()), torch.rand(2, *SIZE)
    model = adapted(loss)
    x_net = model(y, physics, update_parameters=True)
    assert torch.isfinite(loss(x_net.clone(), y.clone(), physics, model)).all()  # equal numbers will do
    with pytest.raises(ValueError, match="expected y to be that of the last pass"):
        loss(x_net, y + 1, physics, model)
    with pytest.raises(ValueError, match=r"expected x_net to be .*; got another one, of shape \(2, 1, 6, 6\)"):
        loss(model(y, physics), y, physics, model)
    with pytest.raises(ValueError, match=r"expected y to be .*; got another one, of shape \(1, 1, 6, 6\)"):
        loss(x_net[:1], y[:1], physics, model)
    assert torch.isfinite(loss(x_net, y, physics, model)).all()


# Line 4. Normalisation by sample
@pytest.mark.parametrize(
    "make",
    [
        MCLoss,  # torch.nn.MSELoss, one number for a batch
        lambda: MCLoss(metric=dinv.metric.MSE()),
        lambda: MCLoss(metric=torch.nn.L1Loss(reduction="none")),
        lambda: MCLoss(metric=torch.nn.HuberLoss(delta=0.1)),
        lambda: MCLoss(metric=WithoutReduction()),
        lambda: SureGaussianLoss(SIGMA, rng=torch.Generator().manual_seed(0)),
    ],
)
def test_a_batch_is_the_mean_of_its_images(make):
    size = (1, 8, 8)  # of a multiple of 16 numbers, which torch draws image after image
    each = torch.zeros(2, *size)
    each[0, :, :1], each[1, :, :6] = 1, 1
    y, physics = torch.rand(2, *size), dinv.physics.Denoising(gaussian())
    inner = make()

    def values(images, each):
        loss = OURS(mask_generator=FixedMasks(each), consistency_loss=inner, prediction_loss=MCLoss())
        return run(loss, adapted(loss, Linear(size)), images, physics)

    batch = values(y, each)
    if isinstance(inner, SureGaussianLoss):
        inner.rng.manual_seed(0)
    assert torch.allclose(batch, torch.cat([values(y[:1], each[:1]), values(y[1:], each[1:])]), rtol=1e-4)
    theirs = THEIRS(mask_generator=FixedMasks(each))
    assert not torch.allclose(run(theirs, adapted(theirs, Linear(size)), y, physics).mean(), batch.mean(), rtol=1e-3)


def test_metrics_of_torch_are_called_once_for_a_batch(monkeypatch):
    """A metric of the user's is called once for the batch and once for each sample, in each term of each split."""
    calls = []
    for metric in (torch.nn.MSELoss, WithoutReduction):
        monkeypatch.setattr(metric, "forward", lambda self, x_net, x: calls.append(len(x)) or (x_net - x).abs().mean())
        loss = OURS(mask_generator=masks(), consistency_loss=MCLoss(metric()), prediction_loss=MCLoss(metric()))
        run(loss, adapted(loss).eval(), torch.rand(8, *SIZE), inpainting())
    assert calls == 2 * loss.eval_n_samples * [8, *8 * [1]]


def test_a_sum_stays_a_sum():
    """Metrics of torch are called once for a batch and keep their reduction."""
    y, physics, loss = torch.rand(3, *SIZE), inpainting(), OURS(mask_generator=masks())
    loss.consistency_loss = loss.prediction_loss = MCLoss(metric=torch.nn.MSELoss(reduction="sum"))
    model = adapted(loss)
    x_net = model(y, physics, update_parameters=True)
    first = model.get_masks()[0]
    truth = sum((m * (x_net - y) ** 2).flatten(1).sum(1) / m.flatten(1).mean(1) for m in (first, physics.mask - first))
    assert torch.allclose(loss(x_net, y, physics, model), truth)
    assert loss.consistency_loss.metric.reduction == "sum" and isinstance(
        loss.consistency_loss.metric, torch.nn.MSELoss
    )


def test_a_loss_of_one_number_is_refused():
    one = type("One", (dinv.loss.Loss,), {"forward": lambda self, y, **kwargs: y.mean()})()
    loss = OURS(img_size=SIZE, consistency_loss=one)
    with pytest.raises(ValueError, match="one value per sample"):
        run(loss, adapted(loss), torch.rand(2, *SIZE), inpainting())


# Line 7 and errors at the boundary
def test_robust_splitting_beside_it_is_refused_in_either_order():
    """deepinv's RobustSplittingLoss wraps the model instead of sharing its splits; the message names the wrapper."""
    size = (2, 16, 16)
    splits, original = (
        GaussianSplittingMaskGenerator(size, split_ratio=0.6),
        GaussianMaskGenerator(size, acceleration=2),
    )
    physics = dinv.physics.MRI(img_size=size, noise_model=gaussian(), **original.step(batch_size=1))
    y = physics(torch.rand(2, *size))
    ours, robust = OURS(mask_generator=splits), RobustSplittingLoss(splits, original)
    wrapped = robust.adapt_model(ours.adapt_model(Convolution(2)))
    x_net = wrapped(y, physics, update_parameters=True)
    with pytest.raises(RuntimeError, match="got RobustSplittingModel around it, .* remove that loss"):
        ours(x_net, y, physics, wrapped)
    with pytest.raises(ValueError, match="leave out any other loss that adapts the model"):
        ours.adapt_model(robust.adapt_model(Convolution(2)))


def test_errors():
    loss, physics, y = full_loss(), inpainting(), torch.rand(2, *SIZE)
    model = adapted(loss)
    with pytest.raises(ValueError, match="update_parameters=True"):
        loss(model(y, physics), y, physics, model)
    with pytest.raises(RuntimeError, match="adapt_model"):
        loss(y, y, physics, Linear())
    for other in (R2RLoss(noise_model=gaussian()), ScoreLoss(gaussian(), 10)):
        wrapped = other.adapt_model(adapted(loss))
        x_net = wrapped(y, physics, **({"update_parameters": True} if isinstance(other, R2RLoss) else {}))
        with pytest.raises(RuntimeError, match=f"{type(wrapped).__name__} around it, .* update_parameters"):
            loss(x_net, y, physics, wrapped)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 6, 6\).*shape \(2, 1, 5, 6\)"):
        adapted(OURS(mask_generator=FixedMasks(torch.ones(1, 1, 5, 6))))(y, physics)
    with pytest.raises(ValueError, match="on cpu.*on meta"):
        adapted(OURS(mask_generator=FixedMasks(torch.ones(1, *SIZE, device="meta"))))(y, physics)
    with pytest.raises(ValueError, match="zeros and ones"):
        adapted(OURS(mask_generator=FixedMasks(torch.full((1, *SIZE), 0.5))))(y, physics)
    stacked = dinv.physics.StackedLinearPhysics([physics, physics])
    with pytest.raises(TypeError, match="TensorList of StackedLinearPhysics"):
        model(stacked(y), stacked)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        loss.adapt_model(lambda y, physics: y)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(img_size=8), r"shape of the measurements without batch, such as \(1, 64, 64\).*; got 8"),
        (dict(img_size=()), r"got \(\)"),
        (dict(img_size=SIZE, transform=[Rotate()]), "expected transform to be a deepinv Transform; got list.*by \\*"),
        (dict(img_size=SIZE, transform=Shift(), eval_transform=[]), "expected eval_transform to be .*; got list"),
        (dict(img_size=SIZE, consistency_loss=[MCLoss()]), "expected consistency_loss to be a deepinv Loss; got list"),
        (dict(img_size=SIZE, prediction_loss="mc"), "expected prediction_loss to be a deepinv Loss; got str"),
        (dict(mask_generator=SIZE), "expected mask_generator to be a deepinv PhysicsGenerator; got tuple"),
    ],
)
def test_arguments_of_another_kind_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        OURS(**options)


@pytest.mark.parametrize("physics", [dinv.physics.Denoising(), inpainting()])
def test_a_size_without_channels_is_refused(physics):
    with pytest.raises(ValueError, match=r"img_size=\(6, 6\)|img_size=\(1, 6, 6\)"):
        run(OURS(img_size=(6, 6)), adapted(OURS(img_size=(6, 6))), torch.rand(2, *SIZE), physics)


def test_it_prints_what_it_is():
    loss = full_loss(consistency_loss=R2RLoss(alpha=ALPHA), eval_n_samples=3)
    assert "img_size=(1, 6, 6), split_ratio=0.7, eval_n_samples=3" in repr(loss) and "R2RLoss" in repr(loss)
    assert f"eval_n_samples=3, recorruption=Recorruption(alpha={ALPHA}" in repr(adapted(loss))
    assert "sigma2=0.09" in repr(adapted(full_loss(consistency_loss=SureGaussianLoss(SIGMA, unsure=True))))


@pytest.mark.parametrize("cls", [THEIRS, OURS])
def test_interface_is_deepinvs(cls):
    with pytest.raises(ValueError, match="Either `mask_generator` or `img_size`"):
        cls()
    with pytest.raises(ValueError, match="transform must also be specified"):
        cls(img_size=SIZE, eval_transform=rotations())
    with pytest.warns(UserWarning, match="`img_size`.* is ignored"):
        cls(img_size=SIZE, mask_generator=masks())
    with pytest.raises(TypeError):
        cls(masks())
    loss = cls(img_size=SIZE, transform=(transform := rotations()))
    generator = loss.mask_generator
    assert (generator.split_ratio, generator.pixelwise, loss.eval_n_samples) == (0.9, True, 5)
    assert loss.eval_transform is transform and isinstance(loss.consistency_loss, MCLoss)


# Physics
NOISE = dinv.physics.GaussianNoise(0.1)


def random_mask(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(1)).lt(0.6).float()


def blur_filter():
    return dinv.physics.functional.gaussian_blur(sigma=(1, 1))


# physics, image size, measurement size; masks of another kind
PHYSICS = {
    "inpainting": lambda: (dinv.physics.Inpainting((3, 8, 8), random_mask(1, 1, 8, 8), noise_model=NOISE), (3, 8, 8)),
    "inpainting_entries": lambda: (
        dinv.physics.Inpainting((3, 8, 8), random_mask(1, 3, 8, 8), noise_model=NOISE),
        (3, 8, 8),
    ),
    "inpainting_of_each": lambda: (
        dinv.physics.Inpainting((3, 8, 8), random_mask(2, 3, 8, 8), noise_model=NOISE),
        (3, 8, 8),
    ),
    "denoising": lambda: (dinv.physics.Denoising(NOISE), (1, 8, 8)),
    "demosaicing": lambda: (dinv.physics.Demosaicing((3, 8, 8), noise_model=NOISE), (3, 8, 8)),
    "mri": lambda: (dinv.physics.MRI(mask=random_mask(1, 1, 8, 8), noise_model=NOISE), (2, 8, 8)),
    "multicoil_mri": lambda: (
        dinv.physics.MultiCoilMRI(
            mask=random_mask(1, 1, 8, 8), coil_maps=torch.ones(1, 3, 8, 8, dtype=torch.complex64), noise_model=NOISE
        ),
        (2, 8, 8),
    ),
    "dynamic_mri": lambda: (dinv.physics.DynamicMRI(mask=random_mask(2, 4, 8, 8), noise_model=NOISE), (2, 4, 8, 8)),
    "tomography": lambda: (dinv.physics.Tomography(angles=10, img_width=8, noise_model=NOISE), (1, 8, 8)),
    "compressed_sensing": lambda: (
        dinv.physics.CompressedSensing(m=30, img_size=(1, 8, 8), noise_model=NOISE),
        (1, 8, 8),
    ),
    "fast_compressed_sensing": lambda: (
        dinv.physics.CompressedSensing(m=30, img_size=(1, 8, 8), fast=True, noise_model=NOISE),
        (1, 8, 8),
    ),
    "single_pixel": lambda: (dinv.physics.SinglePixelCamera(m=30, img_size=(1, 8, 8), noise_model=NOISE), (1, 8, 8)),
    "blur": lambda: (dinv.physics.Blur(filter=blur_filter(), padding="circular", noise_model=NOISE), (1, 8, 8)),
    "masked_blur": lambda: (
        dinv.physics.Inpainting((1, 8, 8), random_mask(1, 1, 8, 8), noise_model=NOISE)
        * dinv.physics.Blur(filter=blur_filter(), padding="circular"),
        (1, 8, 8),
    ),
}


def generator_for(name, y):
    if name == "tomography":
        return LineSplittingMaskGenerator(y.shape[1:], 0.7)
    return masks(tuple(y.shape[1:]), 0.6, pixelwise=y.ndim > 2)


@pytest.mark.parametrize(
    "consistency", [MCLoss(), R2RLoss(noise_model=NOISE), SureGaussianLoss(0.1)], ids=["mc", "r2r", "sure"]
)
@pytest.mark.parametrize("name", PHYSICS)
def test_physics(name, consistency):
    """The loss runs and backpropagates, and the operators of the split observe what its two masks keep."""
    physics, size = PHYSICS[name]()
    y = physics(torch.rand(2, *size))
    loss = OURS(
        mask_generator=generator_for(name, y), consistency_loss=consistency, transform=rotations(), eval_n_samples=2
    )
    model = adapted(loss, Convolution(size[0]))
    value = run(loss, model, y, physics)
    value.mean().backward()
    assert value.shape == (2,) and torch.isfinite(value).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(run(loss, model.eval(), y, physics)).all()


def test_noise_is_charged_on_observed_entries_only():
    """For R = 0 and y = 0, SURE is -sigma^2, however few entries the operator observes."""
    for name in ("inpainting", "mri", "multicoil_mri", "masked_blur", "blur"):
        physics, size = PHYSICS[name]()
        y = 0 * physics(torch.rand(2, *size))
        loss = OURS(mask_generator=generator_for(name, y), consistency_loss=SureGaussianLoss(0.1))
        model = Convolution(size[0])
        torch.nn.init.zeros_(model.layer.weight), torch.nn.init.zeros_(model.layer.bias)
        assert torch.allclose(run(loss, adapted(loss, model), y, physics), torch.tensor(-0.01)), name


TRANSFORMS = {
    "rotate": Rotate,
    "reflect": lambda: Reflect(dim=[-1]),
    "shift": Shift,
    "product": lambda: Rotate(multiples=90) * Shift(),
    "choice": lambda: Reflect() | Shift(),
    "diffeomorphism": lambda: pytest.importorskip("libcpab") and dinv.transform.CPABDiffeomorphism(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_held_and_their_random_states_kept(name):
    transform, physics, y = TRANSFORMS[name](), inpainting(gaussian()), torch.rand(2, *SIZE)
    loss = OURS(mask_generator=masks(), consistency_loss=SureGaussianLoss(SIGMA), transform=transform)
    model = adapted(loss)
    x_net = model(y, physics, update_parameters=True)
    split = model.get_splits()[0]
    before = transform.rng.get_state(), torch.get_rng_state()
    again = Reconstruction(model, split, split.mask * physics.mask, physics)
    assert torch.equal(again(y), x_net)
    assert all(torch.equal(a, b) for a, b in zip(before, (transform.rng.get_state(), torch.get_rng_state())))
    assert torch.isfinite(loss(x_net, y, physics, model)).all()


def test_transforms_that_no_model_can_hold_are_refused():
    with pytest.raises(ValueError, match="keeps the batch size"):
        OURS(img_size=SIZE, transform=Rotate() + Shift())
    with pytest.raises(TypeError, match=r"unhashable type: 'Similarity'"):
        OURS(img_size=SIZE, transform=dinv.transform.projective.Similarity() * Reflect())


def test_lines():
    observed = torch.ones(1, 3, 10)
    observed[..., 4:] = 0
    generator = LineSplittingMaskGenerator((1, 3, 10), 0.5)
    kept = torch.stack([generator.step(3, input_mask=observed[None])["mask"] for _ in range(20)]).flatten(0, 1)
    assert (kept.sum((1, 2, 3)) == 6).all() and (kept == kept[:, :, :1]).all() and (kept[..., 4:] == 0).all()
    assert (kept[..., :4].mean(0) > 0).all()
    rows = LineSplittingMaskGenerator((1, 4, 5), 0.99, dim=-2).step(2)["mask"]
    assert (rows == rows[..., :1]).all() and (rows.sum((1, 2, 3)) == 15).all()
    with pytest.raises(ValueError, match="in \\(0, 1\\)"):
        LineSplittingMaskGenerator((1, 4, 5), 1.0)


def test_sure_in_half_precision_is_that_of_full(x):
    """Under autocast, a divergence by differences is computed in full precision."""
    physics = inpainting(gaussian())
    y = physics(x.expand(500, *SIZE))
    values = []
    for enabled in (False, True):
        rng = torch.Generator().manual_seed(0)
        loss = OURS(
            mask_generator=masks(rng=torch.Generator().manual_seed(0)),
            consistency_loss=SureGaussianLoss(SIGMA, rng=rng),
        )
        model = adapted(loss)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(run(loss, model, y, physics).detach().float())
    assert (values[0] - values[1]).abs().max() < 0.05


def test_deepinvs_docstring_example():
    """deepinv's example without the downloaded weights."""
    source = "\n".join(
        line.strip()[4:] for line in THEIRS.__doc__.splitlines() if line.strip().startswith((">>>", "..."))
    )
    source = source.replace("dinv.models.RAM(pretrained=True)", "dinv.models.RAM(pretrained=False)")
    assert "EquivariantSplittingLoss" in source
    namespace = {}
    original = dinv.loss.EquivariantSplittingLoss
    dinv.loss.EquivariantSplittingLoss = OURS
    try:
        exec(source, namespace)
    finally:
        dinv.loss.EquivariantSplittingLoss = original
    assert isinstance(namespace["loss"], OURS) and namespace["l"].item() > 0
