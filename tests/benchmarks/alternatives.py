r"""
One patch prior by several libraries: what each costs and what it gives, after the same seconds of training.

    python tests/benchmarks/alternatives.py [--seconds 60] [--size 256] [--side 128]

Affine couplings of two hidden layers of width 128, ten half-steps with permutations between them (deepinv's has none), trained by
one loop on the patches of rows 0 to 191 of the photograph *gravel* (batch 1024, Adam, a rate that falls along a cosine); EPLL's
mixture is fitted to the same rows. Then

- ``nll``: held-out negative log-likelihood of a 6x6 patch (rows 192 to 255; nats, without the constant);
- ``ms``, ``MB``: value and image gradient on all patches of a ``size`` x ``size`` image, weights frozen, as a user writes it:
  unfold, density, ``backward``; memory in fresh processes;
- ``psnr``: superresolution by 4 of ``side`` x ``side`` unseen pixels, Adam, strength chosen on the held-out rows.

Needs normflows beside the test extra; a library that is missing is left out. Times are those of the process on one thread. The
last line is one JSON object.
"""

import argparse
import importlib.util
import json
import math
import time

import deepinv as dinv
import skimage.data
import torch
from common import check_apart, memory_of, peak_over, versions
from torch.nn import functional as F

from deepinv_flows import PatchNR, glow_flow

DIM, LAYERS, WIDTH, NOISE, PATCH = 36, 5, 128, 0.01, 6
L2 = dinv.optim.L2()


def patches(x):
    return F.unfold(x, PATCH).transpose(1, 2).flatten(0, 1)


class Unfolded(torch.nn.Module):
    """What a user of a flow library writes: the mean of -log p over all patches of an image."""

    def __init__(self, flow, log_prob):
        super().__init__()
        self.flow, self.log_prob = flow, log_prob

    def nll(self, p):
        return -self.log_prob(self.flow, p) - DIM / 2 * math.log(2 * math.pi)

    def forward(self, x):
        return self.nll(patches(x)).mean()[None]


class Ours(PatchNR):
    def nll(self, p):
        return super().forward(p[None])[0]


def with_normal_latent(flow, x):
    z, log_det = flow(x)
    return log_det - z.pow(2).sum(1) / 2 - DIM / 2 * math.log(2 * math.pi)


def by_deepinv():
    return Unfolded(
        dinv.optim.PatchNR(patch_size=PATCH, channels=1, sub_net_size=WIDTH).normalizing_flow, with_normal_latent
    )


def by_freia():
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    def subnet(c_in, c_out):
        layers = torch.nn.Linear(c_in, WIDTH), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, c_out)
        return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])

    flow = Ff.SequenceINN(DIM)
    for k in range(LAYERS):
        flow.append(Fm.GLOWCouplingBlock, subnet_constructor=subnet, clamp=1.6)
        flow.append(Fm.PermuteRandom, seed=k)
    return Unfolded(flow, with_normal_latent)


def by_zuko():
    import zuko

    flow = zuko.flows.RealNVP(DIM, transforms=2 * LAYERS, randmask=True, hidden_features=(WIDTH, WIDTH))
    return Unfolded(flow, lambda flow, x: flow().log_prob(x))


def by_normflows():
    import normflows as nf

    steps = []
    for _ in range(2 * LAYERS):
        network = nf.nets.MLP([DIM // 2, WIDTH, WIDTH, DIM], init_zeros=True)
        steps += [nf.flows.AffineCouplingBlock(network, scale_map="sigmoid_inv"), nf.flows.Permute(DIM, mode="shuffle")]
    return Unfolded(
        nf.NormalizingFlow(nf.distributions.DiagGaussian(DIM, trainable=False), steps), lambda flow, x: flow.log_prob(x)
    )


def by_us():
    return Ours(glow_flow(DIM, LAYERS, WIDTH, permute=True), patch_size=PATCH, channels=1)


WAYS = {"deepinv 0.5.0": by_deepinv, "FrEIA alone": by_freia, "zuko": by_zuko, "normflows": by_normflows, "here": by_us}
NEEDS = {"zuko": "zuko", "normflows": "normflows"}


def make(name):
    torch.manual_seed(0)
    return WAYS[name]()


def train(prior, samples, seconds) -> int:
    optimizer, generator = torch.optim.Adam(prior.parameters(), lr=1e-3, fused=True), torch.Generator().manual_seed(0)
    steps, start = 0, time.process_time()
    while (spent := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 1e-3 * math.cos(math.pi * spent / 2) ** 2
        batch = samples[torch.randint(len(samples), (1024,), generator=generator)]
        batch = batch + (torch.rand(batch.shape, generator=generator) - 0.5) / 255
        optimizer.zero_grad()
        prior.nll(batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 100.0)
        optimizer.step()
        steps += 1
    return steps


def gradient(prior, x):
    leaf = x.detach().requires_grad_()
    prior(leaf).sum().backward()
    return leaf.grad


def milliseconds(call, repeats=5):
    call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return round(min(seconds) * 1e3)


def measure_memory(name, size):
    prior = make(name).requires_grad_(False)
    x = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    print(json.dumps(round(peak_over(lambda: gradient(prior, x[..., :32, :32]), lambda: gradient(prior, x)))))


def problem(x, seed):
    kernel = dinv.physics.functional.gaussian_blur(sigma=(2.0, 2.0))
    noise = dinv.physics.GaussianNoise(NOISE, rng=torch.Generator().manual_seed(seed))
    physics = dinv.physics.Downsampling(x.shape[1:], filter=kernel, factor=4, padding="circular", noise_model=noise)
    y = physics(x)
    at = torch.arange(y.shape[-1]).repeat_interleave(4).float() + torch.arange(4).repeat(y.shape[-1]) / 4
    at = at / (y.shape[-1] - 1) * 2 - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="ij")[::-1], -1)[None]
    return physics, y, F.grid_sample(y, grid, mode="bicubic", padding_mode="border", align_corners=True)


def by_adam(prior, physics, y, start, strength, iterations=100):
    x, weight = start.clone().requires_grad_(), strength * NOISE**2 * start.numel() / PATCH**2
    optimizer = torch.optim.Adam([x], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        (L2(x, y, physics) + weight * prior(x)).sum().backward()
        optimizer.step()
        schedule.step()
    return x.detach()


def by_epll(model, physics, y, start, strength):
    betas = [strength * beta / NOISE**2 for beta in (1.0, 4.0, 8.0, 16.0, 32.0, 32.0, 32.0, 32.0)]
    with torch.no_grad():
        return model(y, physics, sigma=NOISE, x_init=start, betas=betas, batch_size=20_000)


def quality(reconstruct, grid, held_out, test) -> dict:
    psnr, tuning = dinv.metric.PSNR(), problem(held_out, seed=0)
    tried = {s: round(float(psnr(reconstruct(*tuning, s).clamp(0, 1), held_out)), 2) for s in grid}
    best, start = max(tried, key=tried.get), time.process_time()
    x = reconstruct(*problem(test, seed=1), best)
    return {
        "psnr": round(float(psnr(x.clamp(0, 1), test)), 2),
        "seconds": round(time.process_time() - start, 1),
        "tried": tried,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--size", type=int, default=256, help="side of the image of ms and MB")
    parser.add_argument("--side", type=int, default=128, help="side of the image reconstructed, a multiple of 4")
    parser.add_argument("--only", nargs="+", choices=[*WAYS, "EPLL"], default=[*WAYS, "EPLL"])
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        return measure_memory(args.memory, args.size)
    image = torch.from_numpy(skimage.data.gravel()).float()[None, None] / 255
    learn, held_out, test = (
        image[..., :192, :],
        image[..., 192:256, 192:256],
        image[..., 256 : 256 + args.side, : args.side],
    )
    check_apart(learn, test, step=4)
    samples, held_out_patches = patches(learn), patches(image[..., 192:256, :])
    x, rows = torch.rand(1, 1, args.size, args.size, generator=torch.Generator().manual_seed(0)), {}
    for name in [n for n in args.only if n != "EPLL"]:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            print(f"{name}: not installed")
            continue
        prior = make(name)
        row = {"steps": train(prior, samples, args.seconds)}
        prior.requires_grad_(False)
        with torch.no_grad():
            row["nll"] = round(float(prior.nll(held_out_patches).mean()), 2)
        row["ms"] = milliseconds(lambda prior=prior: gradient(prior, x))
        row["MB"] = memory_of(__file__, "--memory", name, "--size", str(args.size))
        row |= quality(lambda *problem, prior=prior: by_adam(prior, *problem), [0.05, 0.1, 0.2], held_out, test)
        rows[name] = row
        print(f"{name:<16}{row}", flush=True)
    if "EPLL" in args.only:
        torch.manual_seed(0)
        start, model = (
            time.process_time(),
            dinv.optim.EPLL(n_components=100, pretrained=None, patch_size=PATCH, channels=1),
        )
        chosen = samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:50_000]]
        model.GMM.fit(torch.utils.data.DataLoader(chosen, batch_size=10_000), max_iters=20)
        row = {"fit": round(time.process_time() - start)}
        row |= quality(lambda *problem: by_epll(model, *problem), [0.25, 1.0, 4.0], held_out, test)
        rows["EPLL"] = row
        print(f"{'EPLL':<16}{row}", flush=True)
    start = problem(test, seed=1)[2]
    rows["bicubic"] = {"psnr": round(float(dinv.metric.PSNR()(start.clamp(0, 1), test)), 2)}
    finite = {name: {k: None if v != v else v for k, v in row.items()} for name, row in rows.items()}  # JSON has no NaN
    print(json.dumps({**finite, "versions": versions()}))


if __name__ == "__main__":
    main()
