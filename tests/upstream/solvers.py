"""Builders, iterations, deep equilibrium, training."""

import math
import pickle

import deepinv as dinv
import torch

from deepinv_flows import FlowModel, FlowNLL, fit_patchnr, glow_flow

from . import NAN, OURS, defect

L2, TIKHONOV = dinv.optim.L2(), dinv.optim.Tikhonov()
PHYSICS = dinv.physics.Denoising()
ONES = torch.ones(2, 1, 4, 4)  # of which lambda |x|^2 / 2 makes 1 / (1 + lambda)
STEPS = {"stepsize": 0.5, "stepsize_dual": 0.5}


def build(side, name, weight, prior=TIKHONOV, max_iter=3, **options):
    return side.unfolded_builder(
        name, {"lambda": weight, **STEPS}, L2, prior, max_iter, **{"trainable_params": [], **options}
    )


def cost(side, name="PGD", weight=0.5, **options):
    """The reported cost of the first image over its objective."""
    x, metrics = build(side, name, weight, **options)(ONES, PHYSICS, compute_metrics=True)
    weight = float(torch.as_tensor(weight).flatten()[0])
    return metrics["cost"][0][-1] / (0.5 * (x[0] - ONES[0]).square().sum() + 0.5 * weight * x[0].square().sum())


@defect("cost of one of two images: reported over true", lambda found: found > 1.1, 1.0)
def cost_of_a_batch(side):
    return cost(side)


@defect(
    "cost with lambda an integer: reported over true", "AttributeError: 'int' object has no attribute 'flatten'", 1.0
)
def cost_integer(side):
    return cost(side, weight=2)


@defect("cost with lambda a tensor (1,): reported over true", "IndexError: Dimension out of range", 1.0)
def cost_tensor(side):
    return cost(side, weight=torch.tensor([0.5]))


@defect("cost with lambda a tensor (): reported over true", "TypeError: len() of a 0-d tensor", 1.0)
def cost_scalar(side):
    return cost(side, weight=torch.tensor(0.5))


@defect("cost with lambda for each image, (2, 1, 1, 1): reported over true", "ValueError: The number of elements", 1.0)
def cost_of_each(side):
    return cost(side, weight=torch.tensor([0.5, 0.7]).view(2, 1, 1, 1))


@defect("cost with lambda trained, the default: reported over true", "IndexError: Dimension out of range", 1.0)
def cost_trained(side):
    return cost(side, trainable_params=["lambda", "stepsize"])


@defect("cost by name FISTA: reported over true", "KeyError: 'a'", 1.0)
def cost_fista(side):
    return cost(side, "FISTA")


@defect("cost by the documented name PDCP: reported over true", "AttributeError: module", 1.0)
def cost_pdcp(side):
    return cost(side, "PDCP")


@defect("a cost_fn beside a denoiser: costs recorded", 0, 3)
def cost_of_the_user(side):
    prior = dinv.optim.PnP(lambda x, sigma: 0.9 * x)
    model = build(side, "PGD", 1.0, prior, cost_fn=lambda x, *args: x.flatten(1).sum(1))
    return len(model(ONES, PHYSICS, compute_metrics=True)[1].get("cost", [[]])[0])


@defect("has_cost=False beside an explicit prior: costs recorded", 3, 0)
def cost_refused(side):
    model = side.Proximal(data_fidelity=L2, prior=TIKHONOV, has_cost=False, max_iter=3)
    return len(model(ONES, PHYSICS, compute_metrics=True)[1].get("cost", [[]])[0])


@defect("Chambolle-Pock, prior first, Tikhonov of lambda = 4: mean of x, 0.2 is right", 0.5, 0.2)
def chambolle_pock(side):
    model = build(side, "CP", 4.0, g_first=True, max_iter=300)
    with torch.no_grad():
        return model(ONES, PHYSICS, init=(ONES, ONES, ONES)).mean()


@defect("Chambolle-Pock behind K: cost reported over true", lambda found: abs(found - 1) > 0.01, 1.0)
def chambolle_pock_cost(side):
    double = {"K": lambda x: 2 * x, "K_adjoint": lambda u: 2 * u, "lambda": 0.5, **STEPS, "stepsize": 0.3}
    if side is OURS:
        model = side.unfolded_builder("PDCP", double, L2, TIKHONOV, 5, g_first=True)
    else:
        model = dinv.optim.PDCP(
            params_algo={**double, "beta": 1.0}, data_fidelity=L2, prior=TIKHONOV, max_iter=5, g_first=True
        )
    x, metrics = model(ONES, PHYSICS, compute_metrics=True)
    return metrics["cost"][0][-1] / (0.5 * (x[0] - ONES[0]).square().sum() + 0.25 * (2 * x[0]).square().sum())


@defect("an optimizer's class with unfold=True and no more: mean of x", "RuntimeError: Could not infer dtype", 0.667)
def unfold(side):
    return side.Proximal(data_fidelity=L2, prior=TIKHONOV, max_iter=1, stepsize=0.5, unfold=True)(ONES, PHYSICS).mean()


# deep equilibrium; the gradient in lambda of the mean of 1 / (1 + lambda) is -0.444 at 0.5


def gradient_in_lambda(model):
    model(ONES, PHYSICS).mean().backward()
    return next(p.grad for name, p in model.named_parameters() if "lambda" in name)


DEQ = {"data_fidelity": L2, "prior": TIKHONOV, "max_iter": 100, "trainable_params": ["lambda"]}


def equilibrium(side, **options):
    """Of proximal gradient: deepinv's by its class, since its builder's fails altogether."""
    if side is OURS:
        return side.DEQ_builder("PGD", {"lambda": 0.5, "stepsize": 0.5}, **DEQ, **options)
    return dinv.optim.PGD(lambda_reg=0.5, stepsize=0.5, unfold=True, DEQ=True, **DEQ, **options)


@defect("DEQ_builder: gradient in lambda, -0.444 is right", "IndexError: Dimension out of range", -0.444)
def deq_builder(side):
    return gradient_in_lambda(side.DEQ_builder("PGD", {"lambda": 0.5, "stepsize": 0.5}, **DEQ))


@defect("deep equilibrium with crit_conv='cost': gradient in lambda", "KeyError: 'cost'", -0.444)
def deq_by_cost(side):
    return gradient_in_lambda(equilibrium(side, crit_conv="cost"))


@defect("deep equilibrium with get_output the negative: mean of x, -0.667 is right", 0.667, -0.667)
def deq_output(side):
    return equilibrium(side, get_output=lambda X: -X["est"][0])(ONES, PHYSICS).mean()


@defect("deep equilibrium of DRS, here DavisYin: gradient in lambda", "TypeError: can't multiply sequence", -0.444)
def deq_of_pairs(side):
    return gradient_in_lambda(side.ThreeTerms(lambda_reg=0.5, stepsize=0.5, unfold=True, DEQ=True, **DEQ))


# parameters and copies


@defect("params_algo of the user: names that a builder adds", 3, 0)
def parameters_changed(side):
    params = {"lambda_reg": 0.5, "stepsize": 0.2}
    side.unfolded_builder("PGD", params, L2, TIKHONOV)
    return len(set(params) - {"lambda_reg", "stepsize"})


@defect("a step of NaN: mean of x", NAN, "ValueError: expected stepsize to be finite and positive")
def step_of_nan(side):
    return side.Proximal(data_fidelity=L2, prior=TIKHONOV, stepsize=math.nan)(ONES, PHYSICS).mean()


@defect("trainable_params misspelt: weights to train", 0, "ValueError: expected trainable_params among")
def trainable_misspelt(side):
    return sum(p.numel() for p in build(side, "PGD", 0.5, trainable_params=["stepsizes"]).parameters())


@defect("an optimizer, pickled: mean of x", "AttributeError: Can't pickle", 0.5)
def optimizer_pickled(side):
    model = side.Proximal(data_fidelity=L2, prior=TIKHONOV, stepsize=0.5, max_iter=50)
    return pickle.loads(pickle.dumps(model))(ONES, PHYSICS).mean()


@defect("training with clipped gradients: finite weights", "AttributeError: 'Trainer' object has no attribute", True)
def clipped(side):
    """By deepinv's Trainer; ours calls it so that it clips."""
    if side is OURS:
        options = dict(patch_size=3, sub_net_size=8, num_layers=1, epochs=1, steps_per_epoch=2, batch_size=4)
        model = fit_patchnr(torch.rand(1, 1, 12, 12), **options, verbose=False)
    else:
        model, x = FlowModel(glow_flow(9, 1, 8)), torch.rand(8, 9)
        loader = torch.utils.data.DataLoader(list(zip(x, x)), batch_size=4)
        options = dict(epochs=1, losses=FlowNLL(), metrics=None, verbose=False, show_progress_bar=False, device="cpu")
        optimizer = torch.optim.Adam(model.parameters())
        dinv.Trainer(model, PHYSICS, optimizer, loader, grad_clip=1.0, save_path=None, **options).train()
    return all(bool(p.isfinite().all()) for p in model.parameters())
