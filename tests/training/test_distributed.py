"""Training by several processes: two train as one does, on one machine or on two, and end together."""

import socket
import subprocess
import sys

import deepinv as dinv
import pytest
import torch
import torch.distributed as dist
from deepinv.physics.generator import SigmaGenerator
from deepinv.utils import TensorList
from distributed_cases import CASES, EXAMPLES, SINGLE, SMALL, arguments, config, read_checkpoint, work

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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (2, str(folder)), nprocs=2)
    return folder


def numbers(outcome):
    """All numbers in nested dicts and lists."""
    if isinstance(outcome, dict):
        outcome = [value for key, value in sorted(outcome.items())]
    if isinstance(outcome, list | tuple):
        return [number for value in outcome for number in numbers(value)]
    return [float(outcome)]


def test_there_is_a_case_for_every_config():
    assert {path.stem for path in (EXAMPLES / "configs").glob("*.yaml")} == set(SMALL)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, two, tmp_path):
    """The losses of every step, the metrics, the noise levels of UNSURE and the weights are equal in every process."""
    dtype = torch.get_default_dtype()
    one = CASES[name](tmp_path)
    assert torch.get_default_dtype() == dtype
    for rank in range(2):
        found = torch.load(two / f"outcome_{rank}.pt", weights_only=False)[name]
        expected = {key: value for key, value in one.items() if key in found and key != "seen"}
        assert expected.keys() or (rank and name in SMALL)
        found = {key: found[key] for key in expected}
        tolerance = dict(rel=1e-3, abs=1e-5) if name in SINGLE else dict(rel=1e-8, abs=1e-11)
        assert numbers(found) == pytest.approx(numbers(expected), **tolerance)


def test_every_sample_is_seen_once_an_epoch(two):
    """What the loss draws does not matter. When the order followed the global stream, 22 to 25 of 32 samples were seen."""
    one, other = (torch.load(two / f"outcome_{rank}.pt", weights_only=False)["restless"] for rank in range(2))
    for epoch in range(2):
        part = slice(16 * epoch, 16 * (epoch + 1))
        assert sorted(one["seen"][part] + other["seen"][part]) == pytest.approx(sorted(one["all"]))


def test_a_process_that_dies_ends_the_others_with_one_line(two):
    assert (two / "last_words_0").read_text() == (
        "process 0 of 2 stops, since another process of its group has ended early"
    )


def test_two_machines(tmp_path):
    """``torchrun`` is called as on two machines that meet at a port of the first one."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "test"]
    command += [str(EXAMPLES / "train.py"), *arguments("patchnr", tmp_path / "two")]
    machines = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    found = read_checkpoint(tmp_path / "two", "patchnr")
    assert numbers(found) == pytest.approx(numbers(config("patchnr")(tmp_path / "one")), rel=1e-8, abs=1e-11)


def test_what_is_drawn_outside_changes_nothing_about_the_data(tmp_path):
    """The order depends on the seed and the epoch alone, and drawing it does not change the global random state."""
    seen = []
    for wasted in (0, 5):
        order = []
        t = trainer(DistributedTrainer)
        t.eval_dataloader, t.early_stop = None, None
        t.train_dataloader = torch.utils.data.DataLoader(
            [{"x": x, "y": x} for x in torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 8, 8)], 4, shuffle=True
        )

        class Wasting(dinv.loss.Loss):
            def forward(self, x, x_net, wasted=wasted, order=order, **kwargs):
                torch.rand(wasted)
                order += x[:, 0, 0, 0].tolist()
                return (x_net - x).pow(2).flatten(1).mean(1)

        t.losses, before = Wasting(), torch.get_rng_state()
        t.train()
        assert wasted or torch.equal(before, torch.get_rng_state())
        seen.append(order)
    assert seen[0] == seen[1] and seen[0][:8] != seen[0][8:16] != seen[0][16:]


def test_a_resumed_training_has_the_order_of_one_that_ran_through(tmp_path):
    def order(epochs, **options):
        t = trainer(DistributedTrainer, tmp_path / str(len(options)), **options)
        t.train_dataloader = torch.utils.data.DataLoader(t.train_dataloader.dataset, 4, shuffle=True)
        t.epochs, t.early_stop = epochs, None
        return t.train().state_dict()

    whole = order(4)
    (tmp_path / "0").rename(tmp_path / "first")
    order(2)
    resumed = order(4, ckpt_pretrained=str(next((tmp_path / "0").glob("*/ckp_1.pth.tar"))))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
