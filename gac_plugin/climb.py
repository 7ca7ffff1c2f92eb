"""How a refinement moves a batch of latents, or of samples: by ascent that never falls, or by a noisy gradient flow.

    h(z) = s(l(D(G(z)))) - prior/2 ||z||^2 - proximity/2 ||z - z_0||^2

with the score s of the logit l, the start z_0, and both networks held. Every sample has an h of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gac_plugin.betas import BetaRule, InnerProducts, conjugate_beta
from gac_plugin.losses import Score
from gac_plugin.tensors import per_sample_inner, per_sample_mean, scale_samples


class Slope(NamedTuple):
    """At a batch of points: h, shape (B,); its gradient, of the points' shape; and D's logit, shape (B,)."""

    h: Tensor
    gradient: Tensor
    logit: Tensor


@dataclass(frozen=True)
class Hill:
    """What is climbed.

    Attributes:
        logits: points (B, ...) -> D's logits there, shape (B, ...), with their graph.
        start: z_0, shape (B, ...).
        score, prior, proximity: see the module.
    """

    logits: Callable[[Tensor], Tensor]
    start: Tensor
    score: Score
    prior: float
    proximity: float

    def height(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """h and D's logit, shapes (B,): one value of D."""
        logits, away = self.logits(point), point - self.start
        score = per_sample_mean(self.score.value(logits))
        h = score - 0.5 * self.prior * per_sample_inner(point, point)
        return h - 0.5 * self.proximity * per_sample_inner(away, away), per_sample_mean(logits).detach()

    def slope(self, point: Tensor) -> Slope:
        """One gradient of D."""
        leaf = point.detach().requires_grad_(True)
        with torch.enable_grad():
            h, logit = self.height(leaf)
            (gradient,) = torch.autograd.grad(h.sum(), leaf)
        return Slope(h.detach(), gradient, logit)


@dataclass(frozen=True)
class Stride:
    """How the points move.

    Attributes:
        steps: iterations.
        rate: step length.
        rule, beta_max: of the conjugate directions, for `climb`.
        noise, random: temperature, and where its draws come from (None: torch's own), for `flow`.
    """

    steps: int
    rate: float
    rule: BetaRule
    beta_max: float
    noise: float
    random: torch.Generator | None


class Walked(NamedTuple):
    """Where the points ended, and D's logits at the start and there, shapes (B,)."""

    point: Tensor
    before: Tensor
    after: Tensor


def climb(hill: Hill, stride: Stride) -> Walked:
    """Conjugate ascent, every sample with its own direction, beta and step length.

        z <- z + rate d,   d = grad h + beta d_previous

    A step that would lower a sample's h is not taken: its step length is halved and its direction restarts from the
    gradient, so h never falls.
    """
    point = hill.start
    lengths = point.new_full((point.shape[0],), stride.rate)
    h, g, logit = hill.slope(point)
    before, d = logit, g
    for step in range(1, stride.steps + 1):
        proposal = point + scale_samples(lengths, d)
        if step < stride.steps:
            h_new, g_new, logit_new = hill.slope(proposal)
        else:
            (h_new, logit_new), g_new = hill.height(proposal), g
        better = h_new >= h
        d_new = _direction(stride, g_new, g, d)
        point, g = _choose(better, proposal, point), _choose(better, g_new, g)
        d = _choose(better, d_new, g)
        h, logit = torch.where(better, h_new, h), torch.where(better, logit_new, logit)
        lengths = torch.where(better, lengths, 0.5 * lengths)
    return Walked(point, before, logit)


def flow(hill: Hill, stride: Stride) -> Walked:
    """Euler-Maruyama steps of dz = grad h dt + sqrt(2 noise) dw, whose stationary density is exp(h / noise).

    z <- z + rate grad h + sqrt(2 rate noise) xi,   xi standard normal
    """
    point = hill.start
    _, g, logit = hill.slope(point)
    before = logit
    for step in range(1, stride.steps + 1):
        point = point + stride.rate * g + math.sqrt(2 * stride.rate * stride.noise) * _normal(point, stride.random)
        if step < stride.steps:
            _, g, logit = hill.slope(point)
        else:
            logit = hill.height(point)[1]
    return Walked(point, before, logit)


def _direction(stride: Stride, g: Tensor, g_previous: Tensor, d_previous: Tensor) -> Tensor:
    # d = g + beta d-, with inner products over each sample alone
    if stride.rule.formula is None:
        return g
    products = InnerProducts(
        inner=per_sample_inner,
        sharp=lambda a: a,
        g=g,
        u=g,
        y=g - g_previous,
        d_previous=d_previous,
        gu_previous=per_sample_inner(g_previous, g_previous),
    )
    return g + scale_samples(conjugate_beta(stride.rule, products, stride.beta_max), d_previous)


def _choose(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(better.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def _normal(point: Tensor, random: torch.Generator | None) -> Tensor:
    device = point.device if random is None else random.device
    return torch.randn(point.shape, generator=random, dtype=point.dtype, device=device).to(point.device)
