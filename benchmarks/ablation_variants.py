"""The pieces of GAC that the ablation changes, one factor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers import (
    Batches,
    Make,
    MakeOptimizer,
    Step,
    adam,
    conjugate,
    constant,
    falling,
    gac,
    latents,
    lookahead,
)
from gac_plugin import BETAS, GAC, ConjugateGradient, GradientPenalty, Metric, Score, kronecker
from gac_plugin.cotangent import pullback
from gac_plugin.metric import as_matrix
from gac_plugin.training import Config
from gac_plugin.training.schedules import Schedule

RATES = (2e-3, 4e-3, 8e-3)
DEFAULT = "default"
BASE = {"lr_schedule": "constant"}
"""Rates stay as they are, for a short run says nothing of what they should do in a long one."""


@dataclass(frozen=True)
class Variant:
    """The default recipe at constant rates, with one factor changed.

    Attributes:
        factor: what is changed, and to what (`value`), in words.
        settings: of `Config`, if it has them; then a winner can become the default.
        make: (settings of the run, steps) -> how the networks are trained.
        rates: of the generator that are tried.
    """

    factor: str
    value: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Config, int], Make] | None = None
    rates: tuple[float, ...] = RATES

    @property
    def config(self) -> Config:
        return Config(**{**BASE, **self.settings})

    def recipe(self, steps: int) -> Make:
        return (self.make or recipe)(self.config, steps)


def recipe(
    config: Config,
    steps: int,
    rule: Any = None,
    metric: Metric | None = None,
    score: Any = None,
    optimizer_d: MakeOptimizer | None = None,
) -> Make:
    """What `gac train` does under a configuration."""
    schedule = Schedule.parse(config.lr_schedule, "--lr-schedule")
    options = {"metric": metric or config.metric, "beta_max": config.beta_max, "beta2": config.beta2}
    return gac(
        falling(conjugate(rule or config.rule, **options), schedule, steps),
        falling(optimizer_d or adam(float(config.beta1), config.beta2), schedule, steps),
        loss=config.loss,
        score=score or config.score,
        penalty=penalty_of(config),
        schedule=config.schedule,
    )


def penalty_of(config: Config) -> GradientPenalty:
    return GradientPenalty(config.r1, config.r2, config.penalty_interval)


def momentum(beta: float) -> Callable[[Config, int], Make]:
    return lambda config, steps: recipe(config, steps, rule=constant(beta))


def under(metric: Metric) -> Callable[[Config, int], Make]:
    return lambda config, steps: recipe(config, steps, metric=metric)


def left_alone(metric: Metric) -> Metric:
    """`kronecker` with the output side of each matrix turned, and the input side as it is written."""

    def init(parameter: Tensor) -> dict[str, Tensor]:
        return {name: kept for name, kept in metric.init(parameter).items() if not name.startswith("right")}

    return replace(metric, init=init)


def scored(score: Score) -> Callable[[Config, int], Make]:
    return lambda config, steps: recipe(config, steps, score=score)


def new_gac(config: Config, generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> GAC:
    return GAC(
        generator,
        discriminator,
        ConjugateGradient(
            generator.parameters(), lr_g, config.rule, config.metric, beta_max=config.beta_max, beta2=config.beta2
        ),
        torch.optim.Adam(discriminator.parameters(), lr_d, betas=(float(config.beta1), config.beta2)),
        penalty=penalty_of(config),
    )


def pullbacks(times: int) -> Callable[[Config, int], Make]:
    """G takes several steps towards one target in sample space: the same covectors, pulled back where G then is."""

    def of(config: Config, _: int) -> Make:
        def make(generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> Step:
            strategy = new_gac(config, generator, discriminator, lr_g, lr_d)

            def step(batches: Batches) -> None:
                real = next(batches)
                z = latents(generator, real)
                fake = generator(z)
                strategy.discriminator_step(real, fake)
                covector = strategy.cotangent(fake) / len(real)
                for number in range(times):
                    strategy.generator_optimizer.zero_grad()
                    pullback(generator(z) if number else fake, -covector)
                    strategy.generator_optimizer.step()

            return step

        return make

    return of


def common_batch(config: Config, _: int) -> Make:
    """beta from two gradients on one batch and one D: y = g(theta_t) - g(theta_(t-1)), without the noise between draws.

    The rule's own g- and <g-, u-> are replaced before each step by those at the parameters before, for the latents and
    the discriminator of now.
    """

    def make(generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> Step:
        strategy = new_gac(config, generator, discriminator, lr_g, lr_d)
        optimizer, names = strategy.generator_optimizer, [name for name, _ in generator.named_parameters()]
        parameters, before = list(generator.parameters()), list[Tensor]()

        def step(batches: Batches) -> None:
            real = next(batches)
            z = latents(generator, real)
            fake = generator(z)
            strategy.discriminator_step(real, fake)
            if before:
                fake_before = functional_call(generator, dict(zip(names, before, strict=True)), (z,))
                covector = strategy.cotangent(fake_before) / len(real)
                for parameter, g in zip(parameters, torch.autograd.grad(fake_before, before, -covector), strict=True):
                    state = optimizer.state[parameter]
                    state["covector"].copy_(g)
                    state["inner"].copy_(length_squared(g, state, config.beta2))
            before[:] = [parameter.detach().clone().requires_grad_() for parameter in parameters]
            strategy.generator_step(fake)

        return step

    return make


def length_squared(g: Tensor, state: Mapping[str, Any], beta2: float) -> Tensor:
    """<g, M^-1 g> under the metric `kronecker` as it stands."""
    turned = as_matrix(g)
    if "left_basis" in state:
        turned = state["left_basis"].mT @ turned
    if "right_basis" in state:
        turned = turned @ state["right_basis"]
    m = (as_matrix(state["second_moment"]) / (1 - beta2 ** state["step"])).sqrt() + 1e-8
    return (turned**2 / m).sum()


def turned_for_both(config: Config, steps: int) -> Make:
    """D moves under the metric of G."""
    return recipe(config, steps, optimizer_d=conjugate(metric=config.metric, beta2=config.beta2))


def looking_ahead(config: Config, steps: int) -> Make:
    return lookahead(recipe(config, steps))


def variants() -> dict[str, Variant]:
    """All of them by name; the first is the default itself."""
    saturating = Score("minimax", lambda fake: nn.functional.softplus(fake), "-log(1 - D); w = D")
    root = Score("root", lambda fake: 2 * (fake / 2).clamp(max=10).exp(), "2 exp(l / 2); w = exp(l / 2)")
    rules = [name for name in BETAS if name != "none"]
    found = [
        Variant(DEFAULT, "", {}),
        Variant("schedule", "fused", {"schedule": "fused"}),
        *(Variant("rule", f"{name}, cap 0.5", {"rule": name}) for name in rules),
        Variant("rule", "pr+, cap 0.9", {"rule": "pr+", "beta_max": 0.9}),
        Variant("rule", "pr+, cap 0.2", {"rule": "pr+", "beta_max": 0.2}),
        Variant("rule", "hs, cap 0.2", {"rule": "hs", "beta_max": 0.2}),
        *(Variant("rule", f"constant {beta:g}", make=momentum(beta)) for beta in (0.5, 0.25, -0.1, -0.3)),
        Variant("rule", "pr+ on a common batch", {"rule": "pr+"}, common_batch),
        Variant("rule", "hs on a common batch", {"rule": "hs"}, common_batch),
        Variant("metric", "adam", {"metric": "adam"}, rates=(1e-3, 2e-3, 4e-3)),
        Variant("metric", "spectral", {"metric": "spectral"}, rates=(0.003, 0.01, 0.03)),
        Variant("metric", "identity", {"metric": "identity"}, rates=(0.03, 0.1, 0.3)),
        *(Variant("metric", f"kronecker, sides to {side}", make=under(kronecker(side))) for side in (128, 400)),
        *(Variant("metric", f"kronecker, turned every {n}", make=under(kronecker(interval=n))) for n in (1, 40)),
        Variant("metric", "kronecker, output sides alone", make=under(left_alone(kronecker()))),
        *(Variant("beta2", f"{value:g}", {"beta2": value}) for value in (0.9, 0.95, 0.999)),
        *(Variant("loss", name, {"loss": name}) for name in ("mse", "hinge", "wasserstein", "relativistic")),
        *(Variant("score", name, {"score": name}) for name in ("logit", "probability")),
        Variant("score", "minimax", make=scored(saturating)),
        Variant("score", "exp(l / 2)", make=scored(root)),
        Variant("penalty", "none", {"r1": 0.0, "r2": 0.0}),
        Variant("penalty", "R1 alone", {"r2": 0.0}),
        Variant("penalty", "R2 alone", {"r1": 0.0}),
        *(Variant("penalty weight", f"{w:g}", {"r1": w, "r2": w}) for w in (0.1, 0.3, 3.0)),
        *(Variant("penalty interval", f"{n}", {"penalty_interval": n}) for n in (1, 2, 8, 16)),
        *(Variant("running average", f"{decay:g}", {"ema": decay}) for decay in (0.0, 0.98, 0.99, 0.998)),
        *(Variant("rates over the run", name, {"lr_schedule": name}) for name in ("linear", "cosine:0.1")),
        Variant("D's momentum", "0.5", {"beta1": 0.5}),
        Variant("D's metric", "kronecker", make=turned_for_both),
        *(Variant("steps of G for one D", f"{n} pullbacks of the same covectors", make=pullbacks(n)) for n in (2, 3)),
        Variant("slow weights", "lookahead-minmax around it", make=looking_ahead),
    ]
    return {f"{one.factor} {one.value}".strip().replace("/", "over"): one for one in found}


VARIANTS = variants()
