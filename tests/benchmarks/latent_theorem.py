r"""
The error of latent recovery with a linear generator, against the theorem of Asim et al. (2020).

    python tests/benchmarks/latent_theorem.py [--trials 2000]

For x = G z with z ~ N(0, I), m Gaussian measurements y = A x, and the most likely xhat with A xhat = y, they prove

    sum_{i>m} s_i^2 <= E|xhat - x|^2 <= m sum_{i>m-2} s_i^2

with the singular values s_i of G. G is an invertible flow of ``allinone_flow`` with its couplings at zero, n = 60, m = 20;
xhat is what LatentMAP finds from z = 0 without a penalty. Spectra 1/i, 0.8^(i-1), and flat, where the mean is exactly n - m.
The exact xhat, by a pseudo-inverse, is computed beside it. The last line is one JSON object.
"""

import argparse
import json

import deepinv as dinv
import torch
from common import versions

from deepinv_flows import LatentMAP, allinone_flow

N, M = 60, 20
SPECTRA = {
    "1/i": 1 / torch.arange(1, N + 1, dtype=torch.float64),
    "0.8^(i-1)": 0.8 ** torch.arange(N, dtype=torch.float64),
    "flat": torch.ones(N, dtype=torch.float64),
}


def linear_flow(singular_values: torch.Tensor, seed: int = 0) -> torch.nn.Module:
    """Flow whose inverse G has these singular values: a rotation, scales 1/s, and another rotation."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(sub_net_size=4, permute_soft=True, global_affine_type="EXP", generator=generator)
    flow = allinone_flow(len(singular_values), num_layers=2, **options).double()
    with torch.no_grad():
        for block in flow:
            block.subnet[-1].weight.zero_()
            block.subnet[-1].bias.zero_()
        flow[1].global_scale.copy_(-singular_values.log()[None])
    return flow.requires_grad_(False)


def generator_matrix(flow: torch.nn.Module, n: int = N) -> torch.Tensor:
    return flow(torch.eye(n, dtype=torch.float64), rev=True)[0].T


def errors(flow, trials: int, m: int = M, batch: int = 50, seed: int = 1, n: int = N) -> dict[str, torch.Tensor]:
    """|xhat - x|^2 of each trial: of LatentMAP, a new A for each ``batch`` of z, and of the exact xhat."""
    generator = torch.Generator().manual_seed(seed)
    model = LatentMAP(flow, max_iter=300, thres_conv=1e-10, history=40, latent_shape=(n,))
    G, found = generator_matrix(flow, n), {"LatentMAP": [], "exact": []}
    for _ in range(trials // batch):
        A = torch.randn(m, n, generator=generator, dtype=torch.float64) / m**0.5
        physics = dinv.physics.LinearPhysics(A=lambda x, A=A: x @ A.T, A_adjoint=lambda y, A=A: y @ A)
        x = torch.randn(batch, n, generator=generator, dtype=torch.float64) @ G.T
        exact = x @ A.T @ torch.linalg.pinv(A @ G).T @ G.T
        for name, x_net in (("LatentMAP", model(x @ A.T, physics)), ("exact", exact)):
            found[name].append(((x_net - x) ** 2).sum(1))
    return {name: torch.stack(values) for name, values in found.items()}


def bounds(s: torch.Tensor, m: int = M) -> tuple[float, float]:
    s = s.sort(descending=True).values
    return float((s[m:] ** 2).sum()), float(m * (s[m - 2 :] ** 2).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    args = parser.parse_args()
    result = {"n": N, "m": M, "trials": args.trials}
    print(
        f"{'spectrum':<12}{'lower':>12}{'LatentMAP':>12}{'+-':>10}{'exact':>12}{'upper':>12}{'largest difference':>20}"
    )
    for name, s in SPECTRA.items():
        found = errors(linear_flow(s), args.trials)
        means = {way: values.mean(1) for way, values in found.items()}  # trials that share A are not independent
        lower, upper = bounds(s)
        mean, exact = (float(means[way].mean()) for way in ("LatentMAP", "exact"))
        error = float(means["LatentMAP"].std() / len(means["LatentMAP"]) ** 0.5)
        apart = float((found["LatentMAP"] - found["exact"]).abs().max())
        print(f"{name:<12}{lower:>12.4g}{mean:>12.4g}{error:>10.2g}{exact:>12.4g}{upper:>12.4g}{apart:>20.2g}")
        result[name] = dict(lower=lower, mean=mean, standard_error=error, exact=exact, upper=upper)
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
