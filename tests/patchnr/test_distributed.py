"""PatchNR over two and three processes gives what PatchNR in one process gives."""

import copy
import itertools
import pickle
from datetime import timedelta

import deepinv as dinv
import pytest
import torch
import torch.distributed as dist
from cases import make
from deepinv.distributed import DistributedContext, distribute

from deepinv_flows import NMAPG, DistributedPatchNR, PatchNR
from deepinv_flows.patchnr.patches import PatchIndex

SIZE = (2, 2, 14, 9)
# of the image, of the prior
CASES = {
    "plain": {},
    "stride": {"stride": 2},
    "reflect": {"pad": True},
    "circular_stride": {"pad": "circular", "stride": 3},
    "subset": {"n_patches": 7},
    "one_patch": {"n_patches": 1},
    "grid": {"n_patches": 12, "subset": "grid"},
    "chunks": {"chunk_size": 10},
}


def both(group=None, dtype=torch.float64, flow="glow_silu", **options):
    """The prior in one process and the one over all processes, with equal weights and random subsets."""
    flow = make(flow, 18, dtype, spread=0.2)
    seeds = [torch.Generator().manual_seed(3 + (dist.get_rank() if k and dist.is_initialized() else 0)) for k in (0, 1)]
    common = dict(patch_size=3, channels=2, **options)
    alone = PatchNR(flow, generator=seeds[0], **common)
    return alone, DistributedPatchNR(copy.deepcopy(flow), generator=seeds[1], group=group, **common)


def everything(prior, x, direction):
    """The value, the gradient, and by autograd the first and second derivatives in the image and in the weights."""
    weights = [p for p in prior.parameters() if p.requires_grad]
    found = {"value": prior(x), "grad": prior.grad(x).detach()}
    leaf = x.clone().requires_grad_()
    found["backward"] = torch.autograd.grad((prior(leaf) * torch.arange(1, len(x) + 1)).sum(), [leaf, *weights])
    grad = prior.grad(leaf)
    found["second"] = torch.autograd.grad((grad * direction).sum(), [leaf, *weights])
    return found


def compare(alone, shared, x):
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    scale = 10 if x.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(
        everything(shared, x, direction), everything(alone, x, direction), rtol=1e-6 * scale, atol=1e-6 * scale
    )


def check_everything(x):
    for options in CASES.values():
        compare(*both(**options), x)
    compare(*both(flow="glow_sigmoid", chunk_size=20), x)  # by autograd
    compare(*both(dtype=torch.float32), x.float())
    for height in (3, 4):  # rows of patches for one or two processes
        compare(*both(), x[:, :, :height])
    compare(*both(n_patches=2), x[:, :, :4])


def check_optimizers(group, x):
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    common = dict(data_fidelity=dinv.optim.L2(), lambda_reg=0.3, max_iter=3)
    for kind, options in [(dinv.optim.GD, {}), (dinv.optim.PGD, {}), (NMAPG, {"g_first": True})]:
        priors = both(group)
        found = [kind(prior=p, stepsize=0.5, **common, **options)(y, dinv.physics.Denoising()) for p in priors]
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    for prior in (priors := both(group, n_patches=20)):
        unfolded = dict(max_iter=2, unfold=True, trainable_params=["stepsize"])
        model = dinv.optim.GD(prior=prior, stepsize=0.5, **common | unfolded).double()
        model(y, dinv.physics.Denoising()).square().sum().backward()
    for alone, shared in zip(*(p.parameters() for p in priors)):
        torch.testing.assert_close(shared.grad, alone.grad)


def cost(x, data_fidelity, prior, params, y, physics):
    # deepinv 0.5.0's distributed data fidelity cannot be called, so the cost that optimizers make up fails
    return data_fidelity.fn(x, y, physics) + params["lambda"] * prior(x)


def check_beside_distributed_physics(x):
    """The operators are distributed by deepinv, as those of a large problem are."""
    masks = [torch.ones(SIZE[1:]).tril(k) for k in (0, 2, 9)]
    physics = dinv.physics.StackedLinearPhysics([dinv.physics.Inpainting(SIZE[1:], mask=m).double() for m in masks])
    y = physics(x)
    alone, shared = both()
    common = dict(lambda_reg=0.3, stepsize=0.3, max_iter=3, cost_fn=cost)
    fidelity = dinv.optim.StackedPhysicsDataFidelity([dinv.optim.L2()] * 3)
    expected = dinv.optim.GD(data_fidelity=fidelity, prior=alone, **common)(y, physics)
    with DistributedContext(cleanup=False) as ctx:
        physics = distribute(physics, ctx, dtype=torch.float64)
        fidelity = distribute(dinv.optim.L2(), ctx, dtype=torch.float64)
        found = dinv.optim.GD(data_fidelity=fidelity, prior=shared, **common)(y, physics)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def check_refusals(x):
    _, shared = both()
    with pytest.raises(ValueError, match="expected the same image on all 3 processes"):
        shared(x + 0.1 * dist.get_rank())
    with pytest.raises(ValueError, match="expected the same image"):
        shared.prox(x.roll(dist.get_rank(), -1))


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=3, timeout=timedelta(minutes=2))
    x = torch.rand(SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pair = dist.new_group([0, 1])
    for group in (None, pair):
        if group is None or rank < 2:
            compare(*both(group), x)
            check_optimizers(group, x)
        else:
            with pytest.raises(ValueError, match="expected a process of the group; process 2 is not in it"):
                both(group)[1](x)
    check_everything(x)
    check_beside_distributed_physics(x)
    check_refusals(x)
    dist.destroy_process_group()


def test_two_and_three_processes(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=3)


def test_without_a_group():
    alone, shared = both(n_patches=5)
    compare(alone, shared, torch.rand(SIZE, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected images \(B, 2, H, W\); got shape \(1, 3, 18\)"):
        shared(torch.rand(1, 3, 18, dtype=torch.float64))
    x = torch.rand(SIZE, dtype=torch.float64)
    for twin in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert type(twin) is DistributedPatchNR
        assert torch.equal(twin(x), copy.deepcopy(shared)(x))


@pytest.mark.parametrize("height", [3, 4, 10, 11])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("subset", [{}, {"n_patches": 5}, {"n_patches": 5, "subset": "grid"}])
@pytest.mark.parametrize("stride", [1, 2])
def test_shares_are_all_patches_once(height, n, subset, stride):
    shape = (2, 2, height, 6)
    pixels = torch.arange(2 * 2 * height * 6).view(shape)
    whole = PatchIndex(shape, 3, stride, generator=torch.Generator(), **subset)

    def patches(index, x):
        return {tuple(patch) for patch in x.reshape(-1)[index(torch.arange(len(index)))[1]].tolist()}

    parts = [whole.share(k, n) for k in range(n)]
    counted = [patches(part, pixels[:, :, rows]) for part, rows in parts if part.weight]
    assert set().union(*counted) == patches(whole, pixels)
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(counted, 2))
    assert all(part.weight in (0, whole.weight) and len(part) for part, _ in parts)
