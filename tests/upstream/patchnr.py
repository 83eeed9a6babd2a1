"""PatchNR, alone and in PatchPrior."""

import contextlib
import copy
import math
import pickle
import tempfile
from pathlib import Path

import deepinv as dinv
import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from cases import mlp

from deepinv_flows import allinone_flow, glow_flow

from . import NAN, OURS, defect

SIZES = {"patch_size": 3, "num_layers": 2, "sub_net_size": 16}


def theirs(**changes):
    return dinv.optim.PatchNR(**{**SIZES, **changes})


def patchnr(side):
    """A prior of 3 x 3 patches, of equal weights on both sides."""
    prior = side.PatchNR(**SIZES)
    prior.load_state_dict(theirs().state_dict())
    return prior


def on_images(side):
    return side.on_images(patchnr(side))


# what it evaluates


@defect("PatchNR of images (2, 1, 20, 20): shape", "RuntimeError: The size of tensor a", [2])
def images(side):
    return patchnr(side)(torch.rand(2, 1, 20, 20)).shape


@defect("PatchNR of images (2, 1, 3, 3): shape", [2, 1], [2])  # read as one row of patches
def images_of_a_patch(side):
    return patchnr(side)(torch.rand(2, 1, 3, 3)).shape


@defect("PatchNR.explicit_prior, without which optimizers have no cost", False, True)
def explicit(side):
    return patchnr(side).explicit_prior


@defect("non-contiguous patches: error of their values", "RuntimeError: view size", 0.0)
def non_contiguous(side):
    prior, patches = patchnr(side), torch.rand(9, 5, 2).permute(2, 1, 0)
    return (prior(patches) - prior(patches.contiguous())).abs().max()


@defect("an image of NaN", NAN, "ValueError: the input of shape (1, 1, 5, 5) holds NaN")
def nan(side):
    return on_images(side)(torch.full((1, 1, 5, 5), math.nan))


@defect("an image of three channels", "RuntimeError: The size of tensor a (23)", "ValueError: expected 1 channels")
def channels(side):
    return on_images(side)(torch.rand(1, 3, 9, 9))


@defect(
    "an image smaller than a patch", "RuntimeError: cannot reshape", "ValueError: expected an image of at least 3 x 3"
)
def smaller_than_a_patch(side):
    return on_images(side)(torch.rand(1, 1, 2, 9))


@defect("an empty batch", "RuntimeError: cannot reshape", "ValueError: expected a non-empty batch")
def empty(side):
    return on_images(side)(torch.rand(0, 1, 9, 9))


@defect("all patches evaluated: the user's random stream moves", True, False)
def random_stream(side):
    prior, x = on_images(side), torch.rand(1, 1, 8, 8)
    before = torch.get_rng_state()
    prior(x)
    return not torch.equal(before, torch.get_rng_state())


@defect("MB kept for the gradient of a 64 x 64 image", lambda found: found > 50, lambda found: found < 10)
def memory(side):
    prior = side.on_images(side.PatchNR(patch_size=3))
    parameters = {p.data_ptr() for p in prior.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes() / 2**20
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = prior(torch.rand(1, 1, 64, 64).requires_grad_())
    value.backward()
    return sum(kept.values())


# gradient and proximity operator


@defect("grad under no_grad: its argument asks for gradients afterwards", True, False)
def grad_marks_its_argument(side):
    x = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        on_images(side).grad(x)
    return x.requires_grad


@defect("grad under no_grad: its result keeps a graph", True, False)
def grad_keeps_a_graph(side):
    with torch.no_grad():
        return on_images(side).grad(torch.rand(1, 1, 8, 8)).requires_grad


@defect("prox at gamma = 100: its objective over that of the start", NAN, lambda found: found < 1)
def prox(side):
    prior, x = on_images(side).double(), torch.rand(1, 1, 6, 6, dtype=torch.float64)

    def objective(u):
        return 100 * prior(u) + 0.5 * (u - x).square().sum()

    return objective(prior.prox(x.clone(), gamma=100.0)) / objective(x)


# flows and checkpoints


@defect("a bare FrEIA block as flow: shape", "IndexError", [1, 2])
def freia_block(side):
    block = Fm.GLOWCouplingBlock([(9,)], subnet_constructor=mlp)
    return side.PatchNR(block, patch_size=3)(torch.rand(1, 2, 9)).shape


def survives(copier, side, block, ours, **options):
    """Whether a copy of a prior around FrEIA's flow, or the same by our builder, evaluates as it does."""
    flow = Ff.SequenceINN(9)
    flow.append(block, subnet_constructor=mlp, **options)
    prior = side.PatchNR(ours(9, 1, 16, **options) if side is OURS else flow, patch_size=3)
    x = torch.rand(1, 2, 9)
    expected = prior(x)
    return torch.equal(copier(prior)(x), expected)


@defect("a prior around a FrEIA flow, pickled", "AttributeError: Can't pickle", True)
def pickled(side):
    return survives(lambda prior: pickle.loads(pickle.dumps(prior)), side, Fm.GLOWCouplingBlock, glow_flow)


@defect(
    "a prior around a FrEIA flow with reflections, deep-copied",
    "RuntimeError: Only Tensors created explicitly",
    True,
)
def copied(side):
    return survives(copy.deepcopy, side, Fm.AllInOneBlock, allinone_flow, learned_householder_permutation=2)


def from_file(side, state):
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, path := Path(folder) / "weights.pt")
        return side.PatchNR(**SIZES, pretrained=str(path))


@defect("a checkpoint of deepinv's Trainer: error of the values", "RuntimeError: Error(s) in loading", 0.0)
def checkpoint_of_trainer(side):
    prior, x = theirs(), torch.rand(1, 4, 9)
    state = {"epoch": 1, "state_dict": prior.normalizing_flow.state_dict(), "optimizer": {}}
    return (from_file(side, state)(x) - prior(x)).abs().max()


@defect("a checkpoint of deepinv 0.4.0: error of the values", "RuntimeError: Error(s) in loading", 0.0)
def checkpoint_of_an_earlier_version(side):
    def subnet(dim_in, dim_out):
        hidden = (torch.nn.Linear(dim_in, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU())
        return torch.nn.Sequential(*hidden, torch.nn.Linear(16, dim_out))

    flow, x = Ff.SequenceINN(9), torch.rand(1, 4, 9)
    for _ in range(2):
        flow.append(Fm.GLOWCouplingBlock, subnet_constructor=subnet, clamp=1.6)
    z, log_det = flow(x[0])
    state = {f"normalizing_flow.{name}": value for name, value in flow.state_dict().items()}
    return (from_file(side, state)(x)[0] - 0.5 * z.square().sum(1) + log_det).abs().max()


@defect("a checkpoint that holds NaN: value", NAN, "CheckpointError")
def checkpoint_of_nan(side):
    prior, state = patchnr(side), theirs().state_dict()
    next(iter(state.values())).fill_(math.nan)
    prior.load_state_dict(state)
    return prior(torch.rand(1, 1, 9))


@defect("a checkpoint that does not fit: tensors changed before it is refused", 23, 0)
def checkpoint_half_loaded(side):
    prior, state = patchnr(side), {name: value + 1 for name, value in theirs().state_dict().items()}
    before = copy.deepcopy(prior.state_dict())
    state[list(state)[-1]] = torch.zeros(1)
    with contextlib.suppress(RuntimeError, ValueError):
        prior.load_state_dict(state)
    return sum(not torch.equal(value, before[name]) for name, value in prior.state_dict().items())
