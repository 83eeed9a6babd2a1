"""All priors and data fidelities of deepinv: a batch with a step and a weight for each sample equals the samples one by one."""

import deepinv as dinv
import pytest
import torch
from iterator_cases import F64, random

from deepinv_flows import NMAPG, CondatVu, DavisYin, IPiano
from deepinv_flows.iterators.terms import DataTerm, PriorTerm, square, unchanged
from deepinv_flows.solvers import dot

optim = dinv.optim
SHAPE = (3, 2, 8, 8)
STEPS = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
WEIGHTS = torch.tensor([0.3, 0.7, 0.2], dtype=F64)


def denoiser(x, sigma):
    return 0.9 * x


PRIORS = {
    "Tikhonov": optim.Tikhonov,
    "L1Prior": optim.L1Prior,
    "L12Prior": lambda: optim.L12Prior(l2_axis=1),
    "WaveletPrior": lambda: optim.WaveletPrior(level=1, wv="db2"),
    "WaveletPrior, clamped": lambda: optim.WaveletPrior(level=2, wv="haar", clamp_min=0.1, clamp_max=0.8),
    "WaveletPrior, dictionary": lambda: optim.WaveletPrior(level=1, wv=["db2", "db4"]),
    "TVPrior": lambda: optim.TVPrior(n_it_max=300),
    "TVL1Prior": lambda: optim.TVL1Prior(n_it_max=300),
    "SmoothedTVPrior": optim.SmoothedTVPrior,
    "RDP": optim.RDP,
    "PnP": lambda: optim.PnP(denoiser),
    "RED": lambda: optim.RED(denoiser),
    "ZeroPrior": optim.prior.ZeroPrior,
}
# tolerances of proximity operators that iterate until the whole batch has converged
TOLERANCES = {
    "WaveletPrior, dictionary": 0.02,
    "TVPrior": 1e-3,
    "TVL1Prior": 0.02,
    "SmoothedTVPrior": 0.1,
    "RDP": 0.02,
    "RED": 0.01,
}
FIDELITIES = {
    "L2": optim.L2,
    "L1": optim.L1,
    "IndicatorL2": lambda: optim.IndicatorL2(radius=0.5),
    "PoissonLikelihood": lambda: optim.PoissonLikelihood(bkg=0.1, denormalize=False),
    "LogPoissonLikelihood": optim.LogPoissonLikelihood,
    "ZeroFidelity": optim.data_fidelity.ZeroFidelity,
}
PHYSICS = {
    "denoising": lambda: dinv.physics.Denoising(),
    "inpainting": lambda: dinv.physics.Inpainting(SHAPE[1:], mask=torch.ones(SHAPE[1:]).tril().double()),
    "blur": lambda: dinv.physics.BlurFFT(
        SHAPE[1:], filter=dinv.physics.functional.gaussian_blur(sigma=(1.0, 1.0))
    ).double(),
}
X = random(*SHAPE).abs()


def one(i):
    return slice(i, i + 1)


@pytest.mark.parametrize("name", PRIORS)
def test_priors_of_a_batch_are_those_of_each_sample(name):
    tolerance = TOLERANCES.get(name, 1e-10)
    steps = STEPS.view(3, 1, 1, 1)
    term = PriorTerm(PRIORS[name](), WEIGHTS)
    whole, conjugate = term.prox(X, steps), term.prox_conjugate(X, steps)
    for i in range(3):
        alone = PriorTerm(PRIORS[name](), float(WEIGHTS[i]))
        assert torch.allclose(whole[one(i)], alone.prox(X[one(i)], float(STEPS[i])), atol=tolerance)
        assert torch.allclose(conjugate[one(i)], alone.prox_conjugate(X[one(i)], float(STEPS[i])), atol=3 * tolerance)
        if alone.explicit:
            assert torch.allclose(term.value(X)[i], alone.value(X[one(i)]).to(X))


@pytest.mark.parametrize("name", FIDELITIES)
@pytest.mark.parametrize("kind", PHYSICS)
def test_data_fidelities_of_a_batch_are_those_of_each_sample(name, kind):
    physics, x = PHYSICS[kind](), X + 0.1
    y = physics.A(random(*SHAPE, seed=1).abs() + 0.1)
    tolerance = 1e-3 if kind == "blur" else 1e-6
    term = DataTerm(FIDELITIES[name](), y, physics)
    whole = term.prox(x, STEPS.view(3, 1, 1, 1))
    for i in range(3):
        alone = DataTerm(FIDELITIES[name](), y[one(i)], physics)
        found = alone.prox(x[one(i)], float(STEPS[i]))
        if not name.endswith("PoissonLikelihood"):  # their inner descent stops when the whole batch has converged
            assert torch.allclose(whole[one(i)], found, atol=tolerance)
        assert torch.allclose(term.value(x)[i].to(x), alone.value(x[one(i)]).to(x))


@pytest.mark.parametrize("kind", [NMAPG, IPiano, DavisYin, CondatVu])
@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_in_a_batch_of_three(name, kind):
    y, physics = X[:, :1], dinv.physics.Denoising()
    if name.startswith("L12"):
        y = X
    options = {"backtracking": False} if name in ("PnP", "RED") and kind in (NMAPG, IPiano) else {}
    if kind is CondatVu:
        options["stepsize_dual"] = 0.4
    model = kind(optim.L2(), PRIORS[name](), lambda_reg=WEIGHTS, stepsize=0.5, max_iter=6, **options)
    x = model(y, physics)
    for i in range(3):
        alone = kind(optim.L2(), PRIORS[name](), lambda_reg=float(WEIGHTS[i]), stepsize=0.5, max_iter=6, **options)
        assert torch.allclose(x[one(i)], alone(y[one(i)], physics), atol=3 * TOLERANCES.get(name, 1e-8))


def test_wavelet_prior_descends_its_own_cost():
    prior, y = optim.WaveletPrior(level=1, wv="haar"), X
    x = PriorTerm(prior, 0.2).prox(y, 1.0)

    def cost(x):
        return 0.5 * square(x - y) + 0.2 * prior(x)

    for k in range(20):
        assert (cost(x) <= cost(x + 1e-3 * random(*SHAPE, seed=k))).all()


def test_inner_products_of_complex_tensors_are_real():
    a, b = torch.complex(random(3, 4), random(3, 4, seed=1)), torch.complex(random(3, 4, seed=2), random(3, 4, seed=3))
    expected = (torch.view_as_real(a) * torch.view_as_real(b)).flatten(1).sum(1)
    assert torch.allclose(dot(a, b), expected) and torch.allclose(square(a), a.abs().pow(2).sum(1))


def test_terms_are_the_same_if_their_numbers_are():
    prior = optim.Tikhonov()
    same = [PriorTerm(prior, torch.tensor(0.5)), PriorTerm(prior, torch.tensor(0.5))]
    assert unchanged(same[0].identity, same[1].identity)
    weight = torch.tensor(0.5)
    before = PriorTerm(prior, weight).identity
    weight.fill_(0.6)
    assert not unchanged(before, PriorTerm(prior, weight).identity)
    assert not unchanged(same[0].identity, PriorTerm(optim.Tikhonov(), 0.5).identity)
    assert unchanged(PriorTerm(None).identity, PriorTerm(None).identity)
