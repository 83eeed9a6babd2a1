"""What writes each dialect of checkpoint, and what the flow that wrote it says of patches."""

import copy

import deepinv as dinv
import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch

from deepinv_flows import PatchNR

LAYERS, WIDTH = 3, 24


def subnet(dim_in, dim_out):
    hidden = [torch.nn.Linear(dim_in, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    return torch.nn.Sequential(*hidden, torch.nn.Linear(WIDTH, dim_out))


def enlarge(module):
    """Weights large enough to tell one clamp from the other."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return module


def nll(flow, rev=False):
    """What the flow that wrote the weights says of patches, in float64: large weights amplify float32's rounding."""
    flow = copy.deepcopy(flow).double()

    def truth(patches):
        z, log_det = flow(patches.double(), rev=rev)
        return 0.5 * (z**2).sum(1) - log_det

    return truth


def deepinv_now(patch_size, channels):
    prior = enlarge(dinv.optim.PatchNR(patch_size=patch_size, channels=channels, num_layers=LAYERS, sub_net_size=WIDTH))
    return prior.state_dict(), nll(prior.normalizing_flow)


def deepinv_trainer(patch_size, channels):
    """What deepinv's Trainer saves of ``prior.normalizing_flow``."""
    state, truth = deepinv_now(patch_size, channels)
    state = {key.removeprefix("normalizing_flow."): value for key, value in state.items()}
    history = {"loss": {"NFLoss": [torch.tensor(1.5).numpy().mean()]}, "eval_loss": {}, "scheduler": None}
    return {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}, **history}, truth


def deepinv_040(patch_size, channels):
    flow = Ff.SequenceINN(channels * patch_size**2)
    for _ in range(LAYERS):
        flow.append(Fm.GLOWCouplingBlock, subnet_constructor=subnet, clamp=1.6)
    enlarge(flow)
    return {f"normalizing_flow.{key}": value for key, value in flow.state_dict().items()}, nll(flow)


def paper(patch_size, channels):
    nodes = [Ff.InputNode(channels * patch_size**2, name="input")]
    for k in range(LAYERS):
        coupling = {"subnet_constructor": subnet, "clamp": 1.6}
        nodes.append(Ff.Node(nodes[-1], Fm.GLOWCouplingBlock, coupling, name=f"coupling_{k}"))
        nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {"seed": k + 1}, name=f"permute_flow_{k}"))
    nodes.append(Ff.OutputNode(nodes[-1], name="output"))
    flow = enlarge(Ff.GraphINN(nodes))
    return {"net_state_dict": flow.state_dict()}, nll(flow, rev=True)


DIALECTS = {"deepinv": deepinv_now, "trainer": deepinv_trainer, "deepinv_040": deepinv_040, "paper": paper}


def ours(patch_size, channels):
    return PatchNR(patch_size=patch_size, channels=channels, num_layers=LAYERS, sub_net_size=WIDTH)
