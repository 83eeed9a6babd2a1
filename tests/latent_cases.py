"""Small priors and generators of images, for the tests of reconstruction in latent space."""

import torch

from deepinv_flows import FlowPrior, image_flow

SIZE = (1, 4, 8)


def image_prior(spread=0.1, dtype=torch.float64, **options):
    flow = image_flow(SIZE, num_levels=2, num_steps=1, hidden=4, activation="silu").to(dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(spread * torch.randn_like(p))
    return FlowPrior(flow, **options)


class Gaussian(torch.nn.Module):
    """The flow z = (x - mean) / std on images, for which posteriors are known."""

    def __init__(self, mean=0.4, std=0.3):
        super().__init__()
        self.mean, self.std = mean, torch.nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, x, rev=False):
        log_det = -x[0].numel() * self.std.log().expand(len(x))
        return (x * self.std + self.mean, -log_det) if rev else ((x - self.mean) / self.std, log_det)


class Around(torch.nn.Module):
    """A conditional flow, whose condition is the mean of the image."""

    def forward(self, x, c, rev=False):
        return (x + c[0], torch.zeros(len(x)).double()) if rev else (x - c[0], torch.zeros(len(x)).double())


class Narrow(torch.nn.Module):
    """A generator that is not a flow, from 3 numbers to an image."""

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(3, 32).double()

    def forward(self, z):
        return self.map(z).view(-1, *SIZE)
