"""The adapted model behaves like any other module: copies, checkpoints, processes, Trainer."""

import copy
import gc
import io
import pickle
import weakref

import deepinv as dinv
import pytest
import torch
from deepinv.loss import EILoss, MCLoss, R2RLoss, SplittingLoss, SureGaussianLoss
from splitting_cases import (
    ALPHA,
    SIGMA,
    SIZE,
    Convolution,
    Linear,
    adapted,
    full_loss,
    gaussian,
    inpainting,
    masks,
    rotations,
    run,
)

from deepinv_flows import EquivariantSplittingLoss
from deepinv_flows.splitting.terms import Reconstruction

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
THEIRS, OURS = dinv.loss.EquivariantSplittingLoss, EquivariantSplittingLoss


# Line 5. The adapted model behaves like any other module
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch": lambda m: torch.load(_saved(m), weights_only=False),
}


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
def test_copies_work_on_their_own(copier):
    loss = full_loss(consistency_loss=SureGaussianLoss(SIGMA))
    model, physics, y = adapted(loss), inpainting(), torch.rand(2, *SIZE)
    run(loss, model, y, physics)
    other = copier(copier(model))
    assert loss.adapt_model(other) is other
    for m in (model, other):
        m.mask_generator.rng.manual_seed(0)
    assert torch.equal(other.eval()(y, physics), model.eval()(y, physics))
    run(loss, other.train(), y, physics).mean().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_deepinv_does_not_copy(copier):
    loss = THEIRS(mask_generator=masks(), transform=rotations())
    with pytest.raises((RuntimeError, AttributeError, pickle.PicklingError)):
        run(loss, COPIES[copier](adapted(loss)), torch.rand(2, *SIZE), inpainting())


@pytest.mark.parametrize("transform", [None, rotations()])
def test_state_dicts_are_deepinvs(transform):
    theirs = adapted(THEIRS(mask_generator=masks(), transform=transform), Linear(seed=1))
    ours = adapted(OURS(mask_generator=masks(), transform=transform))
    prefix = "model." if transform is None else "model.model."
    assert set(ours.state_dict()) == {prefix + "weight", prefix + "bias", "mask_generator.initial_random_state"}
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    y, physics = torch.rand(2, *SIZE), inpainting()
    for model in (ours, theirs):
        model.mask_generator.reset_rng()
    if transform is None:
        assert torch.allclose(ours.eval()(y, physics), theirs.eval()(y, physics))


def test_dropped_models_are_freed():
    loss = full_loss(consistency_loss=SureGaussianLoss(SIGMA, unsure=True))
    model = adapted(loss)
    run(loss, model, torch.rand(2, *SIZE), inpainting()).mean().backward()
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    theirs = THEIRS(mask_generator=masks())
    alive = weakref.ref(adapted(theirs))
    gc.collect()
    assert alive() is not None


def test_compiled():
    loss = full_loss(consistency_loss=SureGaussianLoss(SIGMA))
    model, y, physics = adapted(loss), torch.rand(2, *SIZE), inpainting()
    compiled = torch.compile(model, backend="eager")
    x_net = compiled(y, physics, update_parameters=True)
    split = model.get_splits()[0]
    assert torch.allclose(Reconstruction(model, split, split.mask * physics.mask, physics)(y), x_net, atol=1e-6)
    loss(x_net, y, physics, compiled).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def _in_process(rank, world, port, weights, x, outcome):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    loss, model, physics = _distributed_setup(weights)
    for _ in range(rank):  # the masks of the batches before its own
        model.mask_generator.step(2, input_mask=physics.mask)
    model = torch.nn.parallel.DistributedDataParallel(model)
    y = physics.A(x[2 * rank : 2 * rank + 2])
    run(loss, model, y, physics).mean().backward()
    outcome[rank] = [p.grad.clone() for p in model.parameters()]
    torch.distributed.destroy_process_group()


def _distributed_setup(weights):
    loss = OURS(mask_generator=masks())
    model = Linear()
    model.load_state_dict(weights)
    return loss, loss.adapt_model(model), inpainting()


def test_two_processes_share_gradients(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    x, weights = torch.rand(4, *SIZE), Linear(seed=3).state_dict()
    loss, model, physics = _distributed_setup(weights)
    run(loss, model, physics.A(x), physics).mean().backward()
    with torch.multiprocessing.Manager() as manager:
        outcome = manager.dict()
        torch.multiprocessing.spawn(_in_process, (2, port, weights, x, outcome), nprocs=2)
        for gradients in dict(outcome).values():
            assert all(torch.allclose(g, p.grad, atol=1e-6) for g, p in zip(gradients, model.parameters()))


# Line 6. Adaptation
def test_adaptation_is_idempotent_and_repeatable():
    loss, base = full_loss(), Linear()
    model = loss.adapt_model(base)
    assert loss.adapt_model(model) is model and full_loss().adapt_model(model) is model
    again = loss.adapt_model(base)
    assert again is not model and again.model.model is base
    y, physics = torch.rand(2, *SIZE), inpainting()
    assert all(torch.isfinite(run(loss, m, y, physics)).all() for m in (model, again))


def splitting_models(model):
    return [m for m in model.modules() if isinstance(m, SplittingLoss.SplittingModel)]


def test_two_losses_nest_in_deepinv():
    model = Linear()
    for _ in range(2):
        model = THEIRS(mask_generator=masks()).adapt_model(model)
    assert len(splitting_models(model)) == 2
    model = Linear()
    for _ in range(2):
        model = OURS(mask_generator=masks()).adapt_model(model)
    assert len(splitting_models(model)) == 1


def test_deepinv_does_not_know_wrapped_models():
    y, physics = torch.rand(2, *SIZE), inpainting()
    for loss, known in ((THEIRS(mask_generator=masks()), False), (OURS(mask_generator=masks()), True)):
        model = adapted(loss)
        x_net, wrapped = model(y, physics, update_parameters=True), torch.compile(model, backend="eager")
        if known:
            assert torch.isfinite(loss(x_net, y, physics, wrapped)).all()
        else:
            with pytest.raises(RuntimeError, match="Unregistered model"):
                loss(x_net, y, physics, wrapped)


def test_two_losses_share_a_model_or_say_why_not():
    first, second = full_loss(), full_loss(consistency_loss=SureGaussianLoss(SIGMA, unsure=True))
    model = second.adapt_model(adapted(first))
    y, physics = torch.rand(2, *SIZE), inpainting()
    x_net = model(y, physics, update_parameters=True)
    total = sum(loss(x_net, y, physics, model).mean() for loss in (first, second))
    total.backward()
    for other, word in [
        (
            OURS(mask_generator=masks(ratio=0.5), transform=rotations(), eval_transform=rotations(True)),
            "mask_generator",
        ),
        (OURS(mask_generator=masks()), "transform"),
        (full_loss(eval_n_samples=2), "eval_n_samples"),
        (full_loss(consistency_loss=R2RLoss()), "R2RLoss"),
    ]:
        with pytest.raises(ValueError, match=f"same {word}"):
            other.adapt_model(model)
    for foreign in (SplittingLoss(), R2RLoss()):
        with pytest.raises(ValueError, match="nest"):
            first.adapt_model(foreign.adapt_model(Linear()))
    assert SplittingLoss().adapt_model(model) is model


# Trainer
def trainer(tmp_path, losses, model=None, **kwargs):
    x = torch.rand(8, *SIZE, generator=torch.Generator().manual_seed(0))
    physics = inpainting(gaussian())
    samples = [{"x": x_i, "y": y_i} for x_i, y_i in zip(x, physics(x))]
    model = Convolution() if model is None else model
    loader = torch.utils.data.DataLoader(samples, batch_size=4)
    options = dict(
        epochs=2,
        eval_dataloader=loader,
        compute_eval_losses=True,
        early_stop=1,
        early_stop_on_losses=True,
        metrics=None,
    )
    return dinv.Trainer(
        model,
        physics,
        torch.optim.Adam(model.parameters(), 1e-2),
        loader,
        losses=losses,
        save_path=tmp_path,
        device="cpu",
        verbose=False,
        **options | kwargs,
    )


@pytest.mark.parametrize("precision", [False, torch.bfloat16])
@pytest.mark.parametrize(
    "consistency",
    [MCLoss, lambda: R2RLoss(alpha=ALPHA), lambda: SureGaussianLoss(SIGMA, unsure=True)],
    ids=["mc", "r2r", "unsure"],
)
def test_trainer(tmp_path, consistency, precision):
    loss = full_loss(consistency_loss=consistency())
    first = trainer(tmp_path, [EILoss(rotations()), loss], mixed_precision=precision)
    model = first.train()
    assert all(torch.isfinite(torch.tensor(h)).all() for h in first.eval_loss_history.values())
    saved = sorted(tmp_path.rglob("ckp_1.pth.tar"))[-1]
    resumed = trainer(tmp_path / "b", full_loss(consistency_loss=consistency()), epochs=2, ckpt_pretrained=saved)
    resumed.setup_train()
    assert resumed.epoch_start == 2
    theirs, ours = model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    report = resumed.test(first.eval_dataloader, metrics=dinv.metric.PSNR(), compare_no_learning=False)
    assert report["PSNR"] > 0


def test_trainer_leaves_the_multiplier_alone_in_evaluation(tmp_path):
    loss = full_loss(consistency_loss=SureGaussianLoss(SIGMA, unsure=True, step_size=0.1))
    t = trainer(tmp_path, loss)
    t.setup_train(train=False)
    t.reset_metrics()
    x = torch.rand(4, *SIZE)
    start = t.model.sigma2.clone()
    t.compute_loss(t.physics[0], x, t.physics[0](x), train=False, epoch=0)
    assert torch.equal(t.model.sigma2, start)
    t.compute_loss(t.physics[0], x, t.physics[0](x), train=True, epoch=0, step=True)
    assert not torch.equal(t.model.sigma2, start)
