"""
One evaluation of LatentMAP's objective and gradient, and its memory, against a FrEIA ``GraphINN`` as a user would write it.

    python tests/benchmarks/latent_speed.py [--side 32] [--repeats 10] [--device cuda]

The graph has the same blocks and weights, on one level (a GraphINN takes no condition from a node of its own). Its user reverses
it, takes the data fidelity and calls ``backward``. L-BFGS costs evaluations and little else, so equal evaluations are equal
steps: steps of torch's LBFGS on the graph and of LatentMAP are timed too, per evaluation. Peak memory of one gradient, in
fresh processes, at two depths. The last line is one JSON object.
"""

import argparse
import json
import time

import deepinv as dinv
import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from common import in_turns, memory_of, peak_over, table, versions

from deepinv_flows import LatentMAP, image_flow

NOISE = 0.1


def make_flow(side: int, steps: int, device: str = "cpu"):
    flow = image_flow((3, side, side), num_levels=1, num_steps=steps, hidden=64).to(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a new flow is linear: give its couplings something to do
        for p in flow.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator).to(device))
    return flow


class Wrapped(Fm.InvertibleModule):
    """A block that exists, as a node of a graph."""

    def __init__(self, dims_in, dims_c=None, block=None):
        super().__init__(dims_in, dims_c)
        self.block = block

    def forward(self, x, c=(), rev=False, jac=True):
        return self.block(x, c=list(c or ()), rev=rev)

    def output_dims(self, input_dims):
        return self.block.output_dims(input_dims)


def graph_of(flow) -> Ff.GraphINN:
    nodes = [Ff.InputNode(*flow.img_size)]
    for block in flow.levels[0]:
        nodes.append(Ff.Node(nodes[-1], Wrapped, {"block": block}))
    return Ff.GraphINN([*nodes, Ff.OutputNode(nodes[-1])])


def user_gradient(graph, flow, z, y, physics):
    """Decode by the graph, and backward."""
    for p in graph.parameters():
        p.grad = None
    leaf = z.detach().requires_grad_()
    x, _ = graph(leaf.view(len(z), *flow.levels[0][-1].dims_in[0]), rev=True)
    value = dinv.optim.L2()(x, y, physics).sum()
    value.backward()
    return value.detach(), leaf.grad


def torch_steps(graph, flow, y, physics, z, steps):
    """Steps of torch's LBFGS on the graph; returns evaluations."""
    z, count = z.clone(), 0
    optimizer = torch.optim.LBFGS(
        [z], max_iter=steps, max_eval=10 * steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure():
        nonlocal count
        count += 1
        value, z.grad = user_gradient(graph, flow, z, y, physics)
        return value

    optimizer.step(closure)
    return count


def our_steps(model, y, physics, z, steps):
    count, plain = 0, LatentMAP.value_and_grad

    def counted(*args):
        nonlocal count
        count += 1
        return plain(model, *args)

    model.value_and_grad, model.max_iter = counted, steps
    model(y, physics, init=z)
    del model.value_and_grad
    return count


def measure_memory(way: str, side: int, steps: int) -> float:
    torch.set_num_threads(1)
    flow = make_flow(side, steps)
    physics, y, z = dinv.physics.Denoising(), torch.rand(4, 3, side, side), torch.randn(4, 3, side, side)
    flow.memory_efficient = way == "memory_efficient"
    graph, model = graph_of(flow), LatentMAP(flow)

    def call(k):
        if way == "graph":
            return user_gradient(graph, flow, z[:k], y[:k], physics)
        return model.value_and_grad(z[:k], y[:k], physics)

    return peak_over(lambda: call(1), lambda: call(4))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "SIDE", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_memory(args.measure[0], *map(int, args.measure[1:]))))
        return
    flow, shape = make_flow(args.side, 16, args.device), (4, 3, args.side, args.side)
    graph, model, physics = graph_of(flow), LatentMAP(flow, early_stop=False), dinv.physics.Denoising()
    z, y = torch.randn(shape, device=args.device), torch.rand(shape, device=args.device)
    theirs, ours = user_gradient(graph, flow, z, y, physics), model.value_and_grad(z, y, physics)
    torch.testing.assert_close(ours[0].sum(), theirs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4)

    def rebuilding():
        flow.memory_efficient = True
        model.value_and_grad(z, y, physics)
        flow.memory_efficient = False

    ways = {
        "GraphINN and backward": lambda: user_gradient(graph, flow, z, y, physics),
        "LatentMAP": lambda: model.value_and_grad(z, y, physics),
        "LatentMAP, memory_efficient": rebuilding,
    }
    seconds = in_turns(ways, args.repeats)
    table(seconds, f"one gradient, {shape}, {args.device}")
    result = {name: round(min(values), 4) for name, values in seconds.items()}
    result["ratio"] = round(result["GraphINN and backward"] / result["LatentMAP"], 2)

    zero = torch.zeros(shape, device=args.device)
    per_evaluation = {}
    for name, steps in (
        ("torch's LBFGS on the graph", lambda: torch_steps(graph, flow, y, physics, zero, 5)),
        ("LatentMAP's", lambda: our_steps(model, y, physics, zero, 5)),
    ):
        start = time.perf_counter()
        count = steps()
        per_evaluation[name] = round((time.perf_counter() - start) / count, 4)
        print(f"{name}: 5 iterations, {count} evaluations, {per_evaluation[name] * 1e3:.1f} ms each")
    result["seconds_per_evaluation"] = per_evaluation

    if args.device == "cpu":
        for way in ("graph", "plain", "memory_efficient"):
            peaks = [memory_of(__file__, "--measure", way, str(args.side), str(steps)) for steps in (8, 24)]
            result[f"peak_MB_{way}"] = {"8 steps": round(peaks[0], 1), "24 steps": round(peaks[1], 1)}
            print(f"{way}: peak {peaks[0]:.0f} MB at 8 steps, {peaks[1]:.0f} MB at 24")
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
