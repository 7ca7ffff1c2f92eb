"""Refinement after training: conjugate ascent of samples or latents along the discriminator, per sample.

    h(z) = l(D(G(z))) - prior/2 ||z||^2        z <- z + rate d,   d = grad h + beta d_previous

With z the only unknown and both networks held, the objective is fixed, which is where conjugacy is well defined. For
prior = 1 and an optimal D, h is the log density of the latents whose samples look like the data, up to a constant
(Che et al. 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gac_plugin.betas import BETAS, BetaRule, InnerProducts, conjugate_beta
from gac_plugin.cotangent import evaluating, frozen
from gac_plugin.errors import UsageError, resolve
from gac_plugin.protocols import Logits
from gac_plugin.tensors import per_sample_inner, per_sample_mean, per_sample_norm, scale_samples

LATENT_PRIOR = 0.3


@dataclass(frozen=True)
class Refined:
    """What a refinement did.

    Attributes:
        moved: Euclidean distance of each latent (or sample) from where it started, shape (B,).
        logit_before, logit_after: D's logit of each sample, shape (B,).
        evaluations: how often D's gradient was computed for the batch; one more value without a gradient follows.
    """

    moved: Tensor
    logit_before: Tensor
    logit_after: Tensor
    evaluations: int


def refine(
    generator: nn.Module | None,
    discriminator: nn.Module,
    z: Tensor,
    steps: int = 10,
    rate: float = 0.01,
    prior: float | None = None,
    rule: str | BetaRule = "fr",
    beta_max: float = 1.0,
    output: str = "logit",
    logits: Callable[[Any], Tensor] | None = None,
    report: Callable[[Refined], None] | None = None,
    **conditions: Any,
) -> Tensor:
    """Move latents, or samples, to where the discriminator finds them more real.

    Each sample has its own direction, beta and step length. A step that would lower its h is not taken: the step length
    is halved and the direction restarts from the gradient, so h never falls. Parameters and buffers of both networks
    stay as they are, and they run in evaluation mode. Nothing is random.

    Args:
        generator: latents (and conditions) -> samples; None to move samples directly.
        discriminator: samples (and conditions) -> logits; see `output` and `logits`.
        z: latents, or samples where `generator` is None; shape (B, ...), floating point. Not changed.
        steps: number of iterations, at least 0.
        rate: first step length along d, positive.
        prior: weight of the standard normal log-prior; None means 0.3 for latents and 0 for samples. Ascent seeks the
            mode: more steps, longer ones or a larger weight trade variety (recall) for typical samples (precision).
        rule: a name in `BETAS` or a `BetaRule`; "none" is plain gradient ascent. With steps of a fixed length
            instead of a line search, "pr+" hardly ever differs from it, and "fr" climbs far faster.
        beta_max: bound on |beta|.
        output: "logit", or "probability" for a discriminator that ends in a sigmoid.
        logits: picks the logits out of what the discriminator returns.
        report: called at the end with a `Refined`, which says how far each sample moved.
        conditions: passed to both networks by keyword.

    Returns:
        The refined latents or samples, of the shape of `z`.

    Raises:
        UsageError: an argument is out of range, or unknown.
    """
    rule = resolve(rule, BETAS, "rule")
    if steps < 0 or not 0 < rate < math.inf or not beta_max >= 0 or not math.isfinite(prior or 0.0):
        raise UsageError(
            "refine needs steps of at least 0, beta_max of at least 0, a finite prior and a positive rate, "
            f"got steps={steps}, rate={rate}, beta_max={beta_max}, prior={prior}"
        )
    if not z.is_floating_point() or z.dim() < 1:
        raise UsageError(f"refine needs a floating-point batch of shape (B, ...), got {z.dtype} {tuple(z.shape)}")
    weight = prior if prior is not None else (0.0 if generator is None else LATENT_PRIOR)
    judge = Logits(discriminator, output, logits)
    networks = [discriminator] if generator is None else [generator, discriminator]

    def height(point: Tensor) -> tuple[Tensor, Tensor]:
        samples = point if generator is None else generator(point, **conditions)
        logit = per_sample_mean(judge(samples, conditions))
        return logit - 0.5 * weight * per_sample_inner(point, point), logit.detach()

    def slope(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = point.detach().requires_grad_(True)
        with torch.enable_grad():
            h, logit = height(leaf)
            (gradient,) = torch.autograd.grad(h.sum(), leaf)
        return h.detach(), gradient, logit

    with frozen(*networks), evaluating(*networks), torch.no_grad():
        point, lengths = z.detach().clone(), z.new_full((z.shape[0],), rate)
        h, g, logit = slope(point)
        before, d = logit, g
        for step in range(1, steps + 1):
            proposal = point + scale_samples(lengths, d)
            if step < steps:
                h_new, g_new, logit_new = slope(proposal)
            else:
                (h_new, logit_new), g_new = height(proposal), g
            better = h_new >= h
            d_new = _direction(rule, g_new, g, d, beta_max)
            point, g = _choose(better, proposal, point), _choose(better, g_new, g)
            d = _choose(better, d_new, g)
            h, logit = torch.where(better, h_new, h), torch.where(better, logit_new, logit)
            lengths = torch.where(better, lengths, 0.5 * lengths)
    if report is not None:
        report(Refined(per_sample_norm(point - z.detach()), before, logit, max(steps, 1)))
    return point


def _direction(rule: BetaRule, g: Tensor, g_previous: Tensor, d_previous: Tensor, beta_max: float) -> Tensor:
    # d = g + beta d-, with inner products over each sample alone
    if rule.formula is None:
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
    return g + scale_samples(conjugate_beta(rule, products, beta_max), d_previous)


def _choose(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(better.reshape(-1, *[1] * (new.dim() - 1)), new, old)
