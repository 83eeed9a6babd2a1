"""Hamiltonian Monte Carlo on a batch of chains, each with a step size of its own."""

import math

import torch
from torch import Tensor

from ..solvers import Objective, dot, finite, per_sample
from .preconditioner import Metric

# Where momenta have the covariance of the curvature, every direction swings with frequency 1. After between 1 and 2 units of time
# it has forgotten where it began: the mean of cos(t) is 0.07.
TRAJECTORY = 2.0


class Kernel:
    """
    Chains with the density exp(-U(z)), for a potential U that is known by its value and gradient.

    :param Callable value_and_grad: maps latents (B, ...) to the values (B,) and gradients (B, ...) of U.
    :param torch.Tensor z: latents (B, ...) where the chains start; U has to be finite there.
    :param Metric metric: covariance of the momenta.
    :param int num_steps: largest number of leapfrog steps in an iteration; each chain makes as many as its trajectory needs.
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
        length = self._lengths(step)
        for k in range(int(length.max())):
            now = per_sample(step * (k < length), p)  # a chain that has arrived waits for the others
            p = p - 0.5 * now * grad
            z = z + now * self.metric.inverse(p)
            value, grad = self.value_and_grad(z)
            p = p - 0.5 * now * grad
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

    def _lengths(self, step: Tensor) -> Tensor:
        """
        Numbers of leapfrog steps (B,), between half of the trajectory and the whole.

        They are random, so that no direction returns to where it began.
        """
        source = self.generator
        part = 0.5 + 0.5 * float(torch.rand((), generator=source, device=source.device))
        return (part * (TRAJECTORY / step).clamp(max=self.num_steps)).ceil()

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
