"""Weights that take the place of a prior's for one call, in flows outside the fast path."""

import pytest
import torch
from cases import UNKNOWN, make

from deepinv_flows import PatchNR
from deepinv_flows.patchnr import potential


@pytest.mark.parametrize("name", ["glow_silu", *UNKNOWN])
@pytest.mark.parametrize("what", ["value", "gradient"])
def test_gradients_in_the_replacing_weights(name, what, monkeypatch):
    monkeypatch.setattr(potential, "FEW", 10**6)  # also known flows by autograd
    found = []
    for chunk_size in (None, 50):
        prior = PatchNR(make(name, 9), patch_size=3, chunk_size=chunk_size)
        x = torch.rand(1, 1, 14, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        new = {key: (1.1 * p.detach()).requires_grad_(p.requires_grad) for key, p in prior.named_parameters()}

        class Gradient(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, u):
                return self.inner(u).sum() if what == "value" else self.inner.grad(u).square().sum()

        result = torch.func.functional_call(Gradient(prior), {f"inner.{key}": p for key, p in new.items()}, (x,))
        weights = [p for p in new.values() if p.requires_grad]
        found.append(torch.autograd.grad(result, weights, allow_unused=True, materialize_grads=True))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
