"""Maximum likelihood by deepinv's Trainer: known densities and entropies."""

import math

import deepinv as dinv
import pytest
import torch
from cases import make

from deepinv_flows import BitsPerDim, FlowModel, FlowNLL, allinone_flow, glow_flow
from deepinv_flows.flows import nll


def samples(x):
    return torch.utils.data.StackDataset(x=x, y=x)  # of a list Trainer's check formats every number, twice


def trainer(model, x, **options):
    loader = torch.utils.data.DataLoader(samples(x), batch_size=256, shuffle=True)
    defaults = dict(
        losses=FlowNLL(), metrics=None, compute_train_metrics=False, save_path=None, device="cpu", verbose=False
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return dinv.Trainer(model, dinv.physics.Denoising(), optimizer, loader, **{**defaults, **options})


def test_nll_is_the_density(tmp_path):
    flow = make("glow", 6)
    x = torch.randn(7, 6, dtype=torch.float64)
    z, log_det = flow(x)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(FlowModel(flow, dequantise=0)(x), -normal.log_prob(z).sum(1) - log_det)


def test_density_integrates_to_one():
    flow = make("glow_silu", 2, spread=0.2)
    grid = torch.cartesian_prod(*[torch.linspace(-12, 12, 601, dtype=torch.float64)] * 2)
    with torch.no_grad():
        mass = (-FlowModel(flow, dequantise=0)(grid)).exp().sum() * (24 / 600) ** 2
    assert abs(mass - 1) < 1e-3


def test_known_correlated_gaussian_is_learned():
    """The loss on held-out samples is within 0.01 nats per dimension of the entropy."""
    dim = 4
    mixing = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.5, 0, 0], [-0.3, 0.4, 0.7, 0], [0.5, 0.5, 0.5, 0.2]])
    entropy = 0.5 * dim * (1 + math.log(2 * math.pi)) + torch.linalg.slogdet(mixing).logabsdet.item()
    x, fresh = (torch.randn(n, dim) @ mixing.T for n in (20_000, 100_000))
    model = FlowModel(glow_flow(dim, 3, 32, activation="silu"), dequantise=0)
    for lr in (3e-3, 1e-3, 1e-4):
        training = trainer(model, x, epochs=5)
        training.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        training.train()
    with torch.no_grad():
        excess = (model(fresh).mean().item() - entropy) / dim
        exact = -torch.distributions.MultivariateNormal(torch.zeros(dim), mixing @ mixing.T).log_prob(fresh).mean()
    assert abs((exact - entropy) / dim) < 0.005
    assert abs(excess) < 0.01


def test_allinone_trains_and_reports_bits():
    x = torch.rand(512, 4)
    model = FlowModel(allinone_flow(4, 3, 16, permute_soft=True))
    options = dict(metrics=BitsPerDim(), eval_dataloader=torch.utils.data.DataLoader(samples(x), 128), epochs=3)
    training = trainer(model, x, **options)
    training.train()
    history = training.eval_metrics_history["BitsPerDim"]
    assert len(history) == 3 and history[-1] < history[0]
    # uniform on [0, 1]: no less than log2(255) bits
    assert history[-1] > math.log2(255) - 0.1


def test_bits_per_dim_of_a_known_density():
    flow = glow_flow(4, 1, 4)
    with torch.no_grad():
        for p in flow.parameters():
            if p.requires_grad:
                p.zero_()
    x = torch.zeros(3, 4)
    bits = BitsPerDim(bin_width=0.25)(FlowModel(flow, 0)(x), x)
    torch.testing.assert_close(bits, torch.full((3,), 0.5 * math.log2(2 * math.pi) + 2))


def test_loss_refuses_images():
    with pytest.raises(ValueError, match=r"negative log-likelihoods of a FlowModel; got shape \(2, 1, 4, 4\)"):
        FlowNLL()(torch.rand(2, 1, 4, 4))


def test_dequantisation_noise_is_uniform_and_centred():
    seen = []
    model = FlowModel(glow_flow(2, 1, 4), dequantise=0.5)
    model.flow.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    state = torch.get_rng_state()
    model(torch.ones(10_000, 2))
    assert torch.equal(state, torch.get_rng_state())
    noise = seen[0] - 1
    assert noise.min() >= -0.25 and noise.max() <= 0.25
    assert abs(noise.mean()) < 0.005 and abs(noise.var() - 0.25 / 12) < 0.001


def test_mixed_precision():
    x = torch.randn(512, 4)
    with pytest.warns(UserWarning):
        training = trainer(FlowModel(glow_flow(4, 2, 16), 0), x, epochs=2, mixed_precision="bfloat16")
    assert FlowNLL()(training.train()(x)).isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_written_out_gradients_are_those_of_autograd(activation):
    model = FlowModel(glow_flow(9, 2, 8, activation=activation, permute=True).double(), dequantise=0)
    x = torch.rand(1100, 9, dtype=torch.float64)
    factors = torch.rand(1100, dtype=torch.float64)
    for weights in (torch.ones_like(factors) / 1100, factors):
        found = torch.autograd.grad((model(x) * weights).sum(), list(model.parameters()))
        expected = torch.autograd.grad((nll(model.flow, x) * weights).sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model(x), nll(model.flow, x))


def test_training_in_bfloat16_is_near_that_in_full_precision():
    x = torch.randn(512, 9) @ torch.randn(9, 9)
    found = []
    for low in (False, True):
        model = FlowModel(glow_flow(9, 2, 32, generator=torch.Generator().manual_seed(0)), dequantise=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = model(x).mean()
            loss.backward()
            optimizer.step()
        assert {p.dtype for p in model.parameters()} == {loss.dtype} == {torch.float32}
        found.append(float(model(x).mean().detach()))
    assert found[1] == pytest.approx(found[0], abs=0.1)


@pytest.mark.parametrize("n", [4, 1100])
def test_samples_that_do_not_fit_are_refused_whatever_their_number(n):
    model = FlowModel(glow_flow(9, 1, 8), dequantise=0)
    for wrong in (torch.rand(n, 9).double(), torch.rand(n, 12)):
        with pytest.raises((RuntimeError, ValueError)):
            model(wrong)
