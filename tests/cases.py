"""Constructors of everything that the generic tests run over."""

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from deepinv.optim.prior import NormalizingFlow

from deepinv_flows import Reversed, allinone_flow, as_flow, glow_flow
from deepinv_flows.flows import nll


def mlp(dim_in, dim_out):
    return torch.nn.Sequential(torch.nn.Linear(dim_in, 16), torch.nn.ReLU(), torch.nn.Linear(16, dim_out))


def sequence(dim, block=Fm.GLOWCouplingBlock):
    flow = Ff.SequenceINN(dim)
    for _ in range(2):
        flow.append(block, subnet_constructor=mlp)
    return flow


def graph(dim):
    nodes = [Ff.InputNode(dim, name="input")]
    nodes.append(Ff.Node(nodes[-1], Fm.GLOWCouplingBlock, {"subnet_constructor": mlp}))
    nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {"seed": 1}))
    nodes.append(Ff.OutputNode(nodes[-1], name="output"))
    return Ff.GraphINN(nodes)


# flows made by our builders: pickle, deep-copy, save
BUILT = {
    "glow": lambda d: glow_flow(d, 2, 16),
    "glow_permuted": lambda d: glow_flow(d, 2, 16, permute=True),
    "glow_silu": lambda d: glow_flow(d, 2, 16, activation="silu"),
    "glow_gelu": lambda d: glow_flow(d, 2, 16, activation="gelu"),
    "glow_leaky_tanh": lambda d: glow_flow(d, 2, 16, activation="leaky_relu", clamp_activation="TANH"),
    "glow_atan": lambda d: glow_flow(d, 2, 16, clamp_activation="ATAN"),
    "glow_sigmoid": lambda d: glow_flow(d, 2, 16, clamp_activation="SIGMOID"),
    "glow_white": lambda d: glow_flow(d, 2, 16, permute=True, activation="silu", whiten=True),
    "realnvp": lambda d: glow_flow(d, 2, 16, coupling="realnvp"),
    "nice": lambda d: glow_flow(d, 2, 16, coupling="nice"),
    "gin": lambda d: glow_flow(d, 2, 16, coupling="gin", permute=True),
    "reversed": lambda d: Reversed(glow_flow(d, 2, 16, permute=True)),
    "allinone": lambda d: allinone_flow(d, 3, 16),
    "allinone_soft_exp": lambda d: allinone_flow(d, 3, 16, permute_soft=True, global_affine_type="EXP"),
    "allinone_sigmoid": lambda d: allinone_flow(d, 3, 16, global_affine_type="SIGMOID", global_affine_init=0.7),
    "allinone_gin": lambda d: allinone_flow(d, 3, 16, gin_block=True, affine_clamping=1.0),
    "allinone_householder": lambda d: allinone_flow(d, 2, 16, learned_householder_permutation=2),
    "allinone_reverse": lambda d: allinone_flow(d, 2, 16, reverse_permutation=True, permute_soft=True),
    "allinone_householder_reverse": lambda d: allinone_flow(
        d, 2, 16, learned_householder_permutation=1, reverse_permutation=True
    ),
}

# flows that users bring
FOREIGN = {
    "freia_sequence": sequence,
    "freia_sequence_nice": lambda d: sequence(d, Fm.NICECouplingBlock),
    "freia_graph": graph,
    "freia_block": lambda d: as_flow(Fm.GLOWCouplingBlock([(d,)], subnet_constructor=mlp)),
    "deepinv": lambda d: NormalizingFlow(d, 2, mlp),
}

FLOWS = BUILT | FOREIGN


class Around(torch.nn.Module):
    """A user's module that holds a builder's flow."""

    def __init__(self, dim):
        super().__init__()
        self.inner = glow_flow(dim, 1, 16, activation="silu")
        self.scale = torch.nn.Parameter(torch.zeros(dim))

    def forward(self, x, rev=False):
        if rev:
            z, log_det = self.inner(x * torch.exp(-self.scale), rev=True)
            return z, log_det - self.scale.sum()
        z, log_det = self.inner(x)
        return z * torch.exp(self.scale), log_det + self.scale.sum()


def prelu(dim):
    def subnet(dim_in, dim_out):
        return torch.nn.Sequential(torch.nn.Linear(dim_in, 16), torch.nn.PReLU(), torch.nn.Linear(16, dim_out))

    return as_flow(Fm.GLOWCouplingBlock([(dim,)], subnet_constructor=subnet))


def spline(dim):
    import zuko

    return as_flow(zuko.flows.NSF(dim, transforms=2, hidden_features=(16,)))


# flows of which some part is not known: left to autograd
UNKNOWN = {"zuko_spline": spline, "around": Around, "prelu": prelu}

ANY = FLOWS | UNKNOWN


def make(name: str, dim: int, dtype=torch.float64, spread: float = 0.3, seed: int = 0):
    """The flow with weights large enough that no term of it is negligible; the global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = ANY[name](dim).to(dtype)
        with torch.no_grad():
            for p in flow.parameters():
                if p.requires_grad:
                    p.add_(spread * torch.randn_like(p))
    return flow


def reference_nll(flow, x, patch_size):
    """The potential of all patches, in a single batch of plain autograd: slow, large, and obviously right."""
    patches = torch.nn.functional.unfold(x, patch_size).transpose(1, 2)
    return nll(flow, patches.reshape(-1, patches.shape[-1]), constant=False).view(patches.shape[:2]).mean(1)


@torch.no_grad()
def central_difference(loss, variable, direction, step=1e-5):
    """Derivative of ``loss()`` when ``variable`` moves along ``direction``."""
    variable.add_(step * direction)
    up = loss()
    variable.sub_(2 * step * direction)
    down = loss()
    variable.add_(step * direction)
    return (up - down) / (2 * step)
