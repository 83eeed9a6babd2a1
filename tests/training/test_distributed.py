"""The trainer of several processes, as far as one process shows it; two train in ``test_train.py``."""

import deepinv as dinv
import pytest
import torch
import torch.distributed as dist
from deepinv.physics.generator import SigmaGenerator
from deepinv.utils import TensorList

from deepinv_flows import DistributedTrainer
from deepinv_flows.training import distributed


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trainer(cls, path=None, **options):
    torch.manual_seed(0)
    model = dinv.models.ArtifactRemoval(dinv.models.DnCNN(1, 1, depth=2, nf=4, pretrained=None))
    x = torch.rand(8, 1, 8, 8)
    loader = torch.utils.data.DataLoader([{"x": image, "y": image} for image in x], batch_size=4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    defaults = dict(
        epochs=3, eval_dataloader=loader, early_stop=1, compute_eval_losses=True, save_path=path, device="cpu"
    )
    return cls(model, dinv.physics.Denoising(), optimizer, loader, verbose=False, **defaults, **options)


def test_a_group_of_one_trains_as_deepinv(group, tmp_path):
    ours, theirs = trainer(DistributedTrainer, tmp_path), trainer(dinv.Trainer)
    found, expected = ours.train().state_dict(), theirs.train().state_dict()
    assert ours.loss_history == theirs.loss_history and ours.eval_metrics_history == theirs.eval_metrics_history
    saved = torch.load(next(tmp_path.glob("*/ckp_2.pth.tar")), weights_only=False)["state_dict"]
    for key, value in expected.items():
        assert torch.equal(found[key], value) and torch.equal(saved[key], value)
    assert type(ours.model) is type(theirs.model)
    last = ours.eval_metrics_history["PSNR"][-1]
    assert ours.test(ours.eval_dataloader, compare_no_learning=True)["PSNR"] == last


def test_one_physics_for_all_samples(group):
    with pytest.raises(ValueError, match="expected one physics for all samples"):
        trainer(DistributedTrainer, physics_generator=SigmaGenerator(), online_measurements=True).train()


def test_shares_cover_a_batch(monkeypatch):
    monkeypatch.setattr(distributed, "_world", lambda: 3)
    y = torch.arange(6)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(distributed._share(TensorList([y, 2 * y])))
    assert torch.equal(torch.cat([share[0] for share in shares]), y)
    assert torch.equal(torch.cat([share[1] for share in shares]), 2 * y)
    assert distributed._share(None) is None
    with pytest.raises(ValueError, match="expected batches of a multiple of 3 samples.*; got one of 4"):
        distributed._share(y[:4])
