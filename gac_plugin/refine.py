"""Refinement after training: samples or latents are moved to where the discriminator finds them more real.

    h(z) = s(l(D(G(z)))) - prior/2 ||z||^2 - proximity/2 ||z - z_0||^2

With z the only unknown and both networks held, the objective is fixed, which is where conjugacy is well defined. For
s = l, prior = 1, proximity = 0 and an optimal D, h is the log density of the latents whose samples look like the data,
up to a constant (Che et al. 2020). The methods in `REFINEMENTS` differ in h and in how they move.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gac_plugin.betas import BETAS, BetaRule
from gac_plugin.climb import Hill, Stride, Walked, climb, flow
from gac_plugin.cotangent import evaluating, frozen
from gac_plugin.errors import UsageError, resolve
from gac_plugin.losses import SCORES, Score
from gac_plugin.protocols import Logits
from gac_plugin.tensors import per_sample_norm

LATENT_PROXIMITY = 30.0
"""Of the methods that climb: so close that a discriminator as training leaves it does no harm."""


@dataclass(frozen=True)
class Refinement:
    """A method of refinement: what it climbs, and how.

    Attributes:
        name: its key in `REFINEMENTS`.
        walk: `climb` or `flow`.
        description: one line with its source.
        score: s, what of the logit it climbs.
        prior: weight of the standard normal log-prior of latents.
        proximity: weight of latents' staying near the start. Both are 0 for samples.
        rate: step length.
        rule: name of the conjugacy rule, for `climb`.
        noise: temperature, for `flow`.
        samples: whether it is defined where samples move directly.
    """

    name: str
    walk: Callable[[Hill, Stride], Walked]
    description: str
    score: Score = SCORES["logit"]
    prior: float = 0.0
    proximity: float = 0.0
    rate: float = 0.01
    rule: str = "none"
    noise: float = 0.0
    samples: bool = True


SATURATING = Score("saturating", softplus, "-log(1 - D); w = D")

REFINEMENTS: dict[str, Refinement] = {
    method.name: method
    for method in (
        Refinement(
            "conjugate",
            climb,
            "ascent along conjugate directions near the start; a step that lowers h is halved",
            proximity=LATENT_PROXIMITY,
            rate=0.7 / LATENT_PROXIMITY,
            rule="pr+",
        ),
        Refinement(
            "gradient",
            climb,
            "the same along the gradient alone",
            proximity=LATENT_PROXIMITY,
            rate=0.7 / LATENT_PROXIMITY,
        ),
        Refinement(
            "langevin",
            flow,
            "DDLS: samples the latents of density p(z) exp(l); steps of eps = 2 rate (Che et al. 2020)",
            prior=1.0,
            rate=0.005,
            noise=1.0,
            samples=False,
        ),
        Refinement("dgflow-kl", flow, "DGflow of the KL divergence: w = 1 (Ansari et al. 2021)", rate=0.1, noise=0.01),
        Refinement(
            "dgflow-js",
            flow,
            "DGflow of the Jensen-Shannon divergence: w = D (Ansari et al. 2021)",
            score=SATURATING,
            rate=0.1,
            noise=0.01,
        ),
        Refinement(
            "dgflow-logd",
            flow,
            "DGflow of the log D divergence: w = 1 - D (Ansari et al. 2021)",
            score=SCORES["log_d"],
            rate=0.1,
            noise=0.01,
        ),
    )
}


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
    rate: float | None = None,
    prior: float | None = None,
    rule: str | BetaRule | None = None,
    beta_max: float = 1.0,
    output: str = "logit",
    logits: Callable[[Any], Tensor] | None = None,
    report: Callable[[Refined], None] | None = None,
    *,
    method: str | Refinement = "conjugate",
    score: str | Score | None = None,
    proximity: float | None = None,
    noise: float | None = None,
    random: torch.Generator | None = None,
    **conditions: Any,
) -> Tensor:
    """Move latents, or samples, to where the discriminator finds them more real.

    By default by conjugate ascent near the start, in which each sample has its own direction, beta and step length, and
    its h never falls. It improves samples where the discriminator has been through `calibrate`; with one as training
    leaves it there is little to win. Parameters and buffers of both networks stay as they are, and they run in
    evaluation mode. None stands for the method's own value. Only methods with noise draw numbers.

    Args:
        generator: latents (and conditions) -> samples; None to move samples directly.
        discriminator: samples (and conditions) -> logits; see `output` and `logits`.
        z: latents, or samples where `generator` is None; shape (B, ...), floating point. Not changed.
        steps: number of iterations, at least 0. Every method takes one gradient of D for each.
        rate: first step length along d, positive.
        prior: weight of the standard normal log-prior; None means 0 for samples.
        rule: a name in `BETAS` or a `BetaRule`, for the methods that climb; "none" is plain gradient ascent.
        beta_max: bound on |beta|.
        output: "logit", or "probability" for a discriminator that ends in a sigmoid.
        logits: picks the logits out of what the discriminator returns.
        report: called at the end with a `Refined`, which says how far each sample moved.
        method: a name in `REFINEMENTS` or a `Refinement`.
        score: a name in `SCORES` or a `Score`: what of the logit is climbed.
        proximity: weight of staying near the start; None means 0 for samples. With it h has a maximum nearby: more
            steps come closer to it instead of moving on. Without it ascent seeks the mode, and trades variety (recall)
            for typical samples (precision). A rate somewhat below its inverse suits it.
        noise: temperature, at least 0, for the methods that flow.
        random: where the draws come from, which makes them repeatable; None for torch's own generator.
        conditions: passed to both networks by keyword.

    Returns:
        The refined latents or samples, of the shape of `z`.

    Raises:
        UsageError: an argument is out of range, unknown, or not for the method.
    """
    method = resolve(method, REFINEMENTS, "method")
    _require_fitting(method, generator, rule, noise)
    own_prior, own_proximity = (0.0, 0.0) if generator is None else (method.prior, method.proximity)
    weight = own_prior if prior is None else prior
    near = own_proximity if proximity is None else proximity
    stride = Stride(
        steps,
        method.rate if rate is None else rate,
        resolve(method.rule if rule is None else rule, BETAS, "rule"),
        beta_max,
        method.noise if noise is None else noise,
        random,
    )
    _require_in_range(stride, prior, near)
    if not z.is_floating_point() or z.dim() < 1:
        raise UsageError(f"refine needs a floating-point batch of shape (B, ...), got {z.dtype} {tuple(z.shape)}")
    judge = Logits(discriminator, output, logits)
    networks = [discriminator] if generator is None else [generator, discriminator]

    def logits_at(point: Tensor) -> Tensor:
        return judge(point if generator is None else generator(point, **conditions), conditions)

    start = z.detach().clone()
    wanted = resolve(method.score if score is None else score, SCORES, "score")
    with frozen(*networks), evaluating(*networks), torch.no_grad():
        point, before, after = method.walk(Hill(logits_at, start, wanted, weight, near), stride)
    if report is not None:
        report(Refined(per_sample_norm(point - start), before, after, max(steps, 1)))
    return point


def _require_fitting(
    method: Refinement, generator: nn.Module | None, rule: str | BetaRule | None, noise: float | None
) -> None:
    if generator is None and not method.samples:
        raise UsageError(f"method {method.name!r} moves latents, not samples: pass a generator, or another method")
    if rule is not None and method.walk is flow:
        raise UsageError(f"method {method.name!r} has no conjugate directions: leave out rule, got {rule!r}")
    if noise is not None and method.walk is climb:
        raise UsageError(f"method {method.name!r} draws nothing at random: leave out noise, got {noise}")


def _require_in_range(stride: Stride, prior: float | None, proximity: float) -> None:
    steps, rate, beta_max, noise = stride.steps, stride.rate, stride.beta_max, stride.noise
    if (
        steps < 0
        or not 0 < rate < math.inf
        or not beta_max >= 0
        or not math.isfinite(prior or 0.0)
        or not 0 <= proximity < math.inf
        or not 0 <= noise < math.inf
    ):
        raise UsageError(
            "refine needs steps of at least 0, beta_max of at least 0, a finite prior, proximity and noise of at least "
            f"0, and a positive rate, got steps={steps}, rate={rate}, beta_max={beta_max}, prior={prior}, "
            f"proximity={proximity}, noise={noise}"
        )
