"""Hamiltonian Monte Carlo on a batch of chains, each with a step size of its own."""

import math

import torch
from torch import Tensor

from ..solvers import Objective, dot, finite, per_sample
from .preconditioner import Metric


class Kernel:
    """
    Chains with the density exp(-U(z)), for a potential U that is known by its value and gradient.

    :param Callable value_and_grad: maps latents (B, ...) to the values (B,) and gradients (B, ...) of U.
    :param torch.Tensor z: latents (B, ...) where the chains start; U has to be finite there.
    :param Metric metric: covariance of the momenta.
    :param int num_steps: largest number of leapfrog steps in an iteration.
    :param float acceptance: acceptance rate to which the step sizes are adapted.
    :param torch.Generator generator: source of all random numbers.
    """

    def __init__(
        self,
        value_and_grad: Objective,
        z: Tensor,
        metric: Metric,
        num_steps: int,
        acceptance: float,
        generator: torch.Generator,
    ):
        self.value_and_grad, self.z, self.metric, self.num_steps = value_and_grad, z, metric, num_steps
        self.acceptance, self.generator = acceptance, generator
        self.value, self.grad = value_and_grad(z)
        # in d dimensions of unit curvature, leapfrog steps longer than about d^(-1/4) are mostly rejected
        self.log_step = torch.full_like(self.value, -0.25 * math.log(z[0].numel()))
        self.average, self.error, self.count = self.log_step.clone(), torch.zeros_like(self.value), 0
        self.anchor = self.log_step + math.log(10)

    def step(self, adapt: bool) -> Tensor:
        """One iteration of each chain; returns the acceptance probabilities (B,)."""
        step = (self.log_step if adapt else self.average).exp()
        p = self.metric.root(self._normal())
        energy = self.value + 0.5 * dot(p, self.metric.inverse(p))
        z, value, grad = self.z, self.value, self.grad
        low = (self.num_steps + 1) // 2
        length = int(torch.randint(low, self.num_steps + 1, (), generator=self.generator, device=self.generator.device))
        for _ in range(length):
            p = p - 0.5 * per_sample(step, p) * grad
            z = z + per_sample(step, z) * self.metric.inverse(p)
            value, grad = self.value_and_grad(z)
            p = p - 0.5 * per_sample(step, p) * grad
        change = energy - value - 0.5 * dot(p, self.metric.inverse(p))
        change = torch.where(finite(value, grad) & ~change.isnan(), change, torch.full_like(change, -torch.inf))
        probability = change.clamp(max=0).exp()
        accept = self._uniform() < probability
        keep = per_sample(accept, z)
        self.z, self.grad = torch.where(keep, z, self.z), torch.where(keep, grad, self.grad)
        self.value = torch.where(accept, value, self.value)
        if adapt:
            self._adapt(probability)
        return probability

    def _adapt(self, probability: Tensor) -> None:
        """Dual averaging of the log step sizes, with the constants of Hoffman & Gelman (2014)."""
        self.count += 1
        weight = 1 / (self.count + 10)
        self.error = (1 - weight) * self.error + weight * (self.acceptance - probability)
        self.log_step = self.anchor - self.count**0.5 / 0.05 * self.error
        rate = self.count**-0.75
        self.average = rate * self.log_step + (1 - rate) * self.average

    def _normal(self) -> Tensor:
        source = self.generator
        return torch.randn(self.z.shape, generator=source, device=source.device, dtype=self.z.dtype).to(self.z.device)

    def _uniform(self) -> Tensor:
        source, like = self.generator, self.value
        return torch.rand(like.shape, generator=source, device=source.device, dtype=like.dtype).to(like.device)
