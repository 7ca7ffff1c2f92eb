"""Both networks of a run with their optimizers and the generator's average, and one step of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gac_plugin.conjugate import ConjugateGradient
from gac_plugin.penalties import GradientPenalty
from gac_plugin.strategy import GAC, Stats
from gac_plugin.training.checkpoint import Stateful
from gac_plugin.training.config import Config
from gac_plugin.training.ema import RunningAverage
from gac_plugin.training.schedules import Schedule
from gac_plugin.update import plain


class Game:
    """What a run trains.

    Args:
        config: of the run.
        generator, discriminator: with fresh weights, the same in every process.
        accelerator: prepares both and their optimizers.

    Attributes:
        generator, discriminator: the networks themselves, without what the accelerator puts around them.
        average: the running average of the generator.
        gac: the strategy.
        skipped_in_a_row: how many steps up to the latest were left out because something was not finite.
    """

    def __init__(
        self, config: Config, generator: nn.Module, discriminator: nn.Module, accelerator: Accelerator
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.generator, self.discriminator = generator, discriminator
        self.average = RunningAverage(generator)  # before autocast and the like are put around the generator
        self.gac = _make_gac(config, generator, discriminator, accelerator)
        self.average.network.to(accelerator.device)
        self.skipped_in_a_row = 0
        self._rate = Schedule.parse(config.lr_schedule, "--lr-schedule")
        self._averaging = Schedule.parse(config.ema_schedule, "--ema-schedule")
        self._penalty = Schedule.parse(config.penalty_schedule, "--penalty-schedule")

    @property
    def parts(self) -> dict[str, Stateful]:
        """Everything with a state of its own, for a checkpoint."""
        parts: dict[str, Stateful] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "average": self.average,
            "generator_optimizer": plain(self.gac.generator_optimizer),
            "discriminator_optimizer": plain(self.gac.discriminator_optimizer),
            "gac": self.gac,
        }
        return parts if self.accelerator.scaler is None else {**parts, "scaler": self.accelerator.scaler}

    def step(self, number: int, window: Iterable[tuple[Tensor, Tensor, Mapping[str, Any]]]) -> Stats:
        """One step on all batches of a window.

        Args:
            number: of the step, from 1; it sets the rates.
            window: real samples, latents and conditions of each batch.

        Returns:
            See `GAC.step`.
        """
        self._set_rates(number)
        skipped, stats = self.gac.skipped, Stats()
        for real, z, conditions in window:
            with self.accelerator.accumulate(self.gac.generator, self.gac.discriminator):
                stats |= self.gac.step(real, z, **conditions)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.gac.skipped > skipped else 0
        weight = (1 - self.config.ema) * self._averaging.factor(number, self.config.steps)
        self.average.update(self.generator, decay=max(0.0, 1 - weight))
        return stats

    def _set_rates(self, number: int) -> None:
        config, gac = self.config, self.gac
        warm = min(1.0, number / config.warmup) if config.warmup else 1.0
        for optimizer, rate in (
            (gac.generator_optimizer, config.lr_generator),
            (gac.discriminator_optimizer, config.lr_discriminator),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * self._rate.factor(number, config.steps)
        weight = self._penalty.factor(number, config.steps)
        gac.penalty = GradientPenalty(config.r1 * weight, config.r2 * weight, config.penalty_interval)


def _make_gac(config: Config, generator: nn.Module, discriminator: nn.Module, accelerator: Accelerator) -> GAC:
    betas = (float(config.beta1), float(config.beta2))  # Adam refuses a whole number beside a fraction
    generator_optimizer: torch.optim.Optimizer
    if config.optimizer == "conjugate":
        generator_optimizer = ConjugateGradient(
            generator.parameters(),
            config.lr_generator,
            rule=config.rule,
            metric=config.metric,
            beta_max=config.beta_max,
            beta2=config.beta2,
        )
    else:
        generator_optimizer = torch.optim.Adam(generator.parameters(), config.lr_generator, betas)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), config.lr_discriminator, betas)
    prepared = accelerator.prepare(generator, discriminator, generator_optimizer, discriminator_optimizer)
    generator, discriminator, generator_optimizer, discriminator_optimizer = prepared
    return GAC(
        generator,
        discriminator,
        generator_optimizer,
        discriminator_optimizer,
        loss=config.loss,
        score=config.score,
        penalty=GradientPenalty(config.r1, config.r2, config.penalty_interval),
        schedule=config.schedule,
        accelerator=accelerator,
        max_norm=config.max_norm,
        skip_nonfinite=config.max_skipped > 0,
    )
