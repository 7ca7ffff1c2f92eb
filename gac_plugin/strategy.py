"""`GAC`: one training step of a GAN, around networks and optimizers that stay yours.

    1 generate a batch   2 update D on it   3 D's covectors at those samples   4 pull back, ascend: update G

Two schedules. `fresh`, the default: the covectors come from the updated D, at the same samples. `fused`: they come out
of the backward pass that D's own update does anyway, and both networks move at once.

Cost in passes of one network over a batch (forward, backward to inputs, backward to parameters count 1 each):
the textbook loop D 9, G 4; `fresh` D 8, G 3; `fused` D 6, G 3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gac_plugin.checks import (
    require_alike,
    require_finite,
    require_independent_samples,
    require_no_batch_norm,
    require_range,
    require_right_gradients,
)
from gac_plugin.cotangent import (
    cotangent,
    frozen,
    keep_visible,
    logit_derivatives,
    pullback,
    reshard,
    sharded_parts,
)
from gac_plugin.errors import UsageError, resolve
from gac_plugin.losses import LOSSES, SCORES, Loss, Score, generator_objective
from gac_plugin.penalties import PENALTIES, GradientPenalty, logit_gradient
from gac_plugin.protocols import Backward, LatentSource, Logits, latent_sampler
from gac_plugin.tensors import per_sample_mean, scale_samples
from gac_plugin.update import Update, plain, spread, window_ends, without_synchronisation

SCHEDULES = ("fresh", "fused")

Stats = dict[str, Tensor]
"""Detached 0-dimensional tensors on the device; reading one on the host is what costs time, so do it rarely."""


@dataclass(frozen=True)
class Judged:
    """What the discriminator said of one real and one generated batch.

    Attributes:
        fake: the generated samples cut from the generator, shape (B, ...).
        real_logits, fake_logits: with their graphs through D, equal shapes (B, ...).
        fake_gradient: dl/dx at the generated samples, shape (B, ...), where R2 measured it.
        penalty: to be added to the mean loss, 0-dimensional, on the steps that carry it.
    """

    fake: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    fake_gradient: Tensor | None
    penalty: Tensor | None

    def stats(self, loss: Tensor) -> Stats:
        """Detached statistics of the discriminator's side; see `GAC.step`."""
        stats = {
            "loss_d": loss.detach(),
            "d_real": torch.sigmoid(self.real_logits.detach()).mean(),
            "d_fake": torch.sigmoid(self.fake_logits.detach()).mean(),
        }
        return stats if self.penalty is None else stats | {"penalty": self.penalty.detach()}


class GAC:
    """Gradient ascent along the discriminator's conjugate gradient direction, as a drop-in training step.

    Args:
        generator: latents (and conditions) -> samples (B, ...).
        discriminator: samples (and conditions) -> logits (B, ...); see `output` and `logits` for others.
        generator_optimizer: steps the generator; `ConjugateGradient` for the method in full, any other one works.
        discriminator_optimizer: steps the discriminator.
        loss: a name in `LOSSES` or a `Loss`.
        score: what the generator ascends, a name in `SCORES` or a `Score`; None for the loss's own.
        penalty: a name in `PENALTIES`, a `GradientPenalty`, or None.
        schedule: "fresh" or "fused".
        output: "logit", or "probability" for a discriminator that ends in a sigmoid.
        logits: picks the logits out of what the discriminator returns; None if it returns them alone.
        accelerator: an `accelerate.Accelerator` whose `prepare` made the networks and optimizers; None without one.
        latent: latent size, shape, or batch size -> latents; None asks the generator's `nz`, or pass z to `step`.
        max_norm: bound on the norm of each network's gradient; None for none.
        skip_nonfinite: leave out a step whose loss or gradient is not finite, in all processes together. It reads a
            number on the host in every step; without it nothing does.

    Raises:
        UsageError: an unknown name, a discriminator that the fused schedule cannot serve, or a set-up of several
            processes or of `torch.compile` under which gradients would be wrong.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        generator_optimizer: torch.optim.Optimizer,
        discriminator_optimizer: torch.optim.Optimizer,
        loss: str | Loss = "bce",
        score: str | Score | None = None,
        penalty: str | GradientPenalty | None = None,
        schedule: str = "fresh",
        output: str = "logit",
        logits: Callable[[Any], Tensor] | None = None,
        accelerator: Backward | None = None,
        latent: LatentSource | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        if schedule not in SCHEDULES:
            raise UsageError(f"unknown schedule {schedule!r}; choose one of: {', '.join(SCHEDULES)}")
        self.generator = generator
        self.discriminator = discriminator
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.loss = resolve(loss, LOSSES, "loss")
        self.score = None if score is None else resolve(score, SCORES, "score")
        self.penalty = None if penalty is None else resolve(penalty, PENALTIES, "penalty")
        self.schedule = schedule
        self.accelerator = accelerator
        self._logits = Logits(discriminator, output, logits)
        self._draw = latent_sampler(latent, generator)
        self._objective = generator_objective(self.loss, self.score)
        self._paired = self.loss.paired and self.score is None
        if max_norm is not None and not max_norm > 0:
            raise UsageError(f"max_norm must be a number above 0, got {max_norm!r}")
        self._update_d = Update(discriminator_optimizer, accelerator, max_norm, skip_nonfinite)
        self._update_g = Update(generator_optimizer, accelerator, max_norm, skip_nonfinite)
        self._spread = spread if skip_nonfinite else _unchanged
        self._discriminator_steps = 0
        self._window: list[tuple[Any, Tensor | None, Mapping[str, Any]]] = []
        self._checked = False
        require_right_gradients(generator, discriminator, accelerator, self.penalty)
        if schedule == "fused":
            require_no_batch_norm(discriminator)
            require_range(getattr(accelerator, "mixed_precision", None))
        self._sharded_g, self._sharded_d = sharded_parts(generator), sharded_parts(discriminator)
        if self.penalty is not None:  # its own backward pass leaves D's parameters gathered for the one that follows
            for part in self._sharded_d:
                part.set_reshard_after_backward(False, recurse=False)

    def step(self, real: Tensor, z: Any = None, **conditions: Any) -> Stats:
        """One step of both networks.

        Args:
            real: real samples, shape (B, ...), floating point, in the range that the generator makes.
            z: latents for B samples; None draws them.
            conditions: passed to both networks by keyword (labels, text embeddings, ...).

        Returns:
            `loss_d`, `loss_g`: mean losses. `d_real`, `d_fake`: means of D(x) and D(G(z)) = sigmoid of the logits.
            `penalty`, on the steps that carry it. `beta`, from `ConjugateGradient` with a rule other than `none`.
            `norm_d`, `norm_g`: norms of the gradients, with `max_norm` or `skip_nonfinite`. Under
            `Accelerator.accumulate`, `loss_g` and what follows come at the end of each window.

        Raises:
            UsageError: shapes do not fit, no way to draw latents is known, or, at the first step, a value is not finite
                or the schedule does not fit the discriminator.
        """
        if z is None:
            if self._draw is None:
                raise UsageError("GAC does not know the latent size; pass latent=..., or z to step")
            z = self._draw(real)
        if self.schedule == "fused":
            return self._fused_step(real, self.generator(z, **conditions), conditions)
        if self._window or not window_ends(self.accelerator):
            return self._accumulated_step(real, z, conditions)
        fake = self.generator(z, **conditions)
        stats = self.discriminator_step(real, fake, **conditions)
        return stats | self.generator_step(fake, real if self._paired else None, **conditions)

    def discriminator_step(self, real: Tensor, fake: Tensor, **conditions: Any) -> Stats:
        """Update the discriminator on real and generated samples; see `step`.

        Args:
            real, fake: of equal shape (B, ...). The graph behind `fake` is neither used nor released.
            conditions: passed to the discriminator by keyword.
        """
        judged = self._judge(real, fake, conditions)
        loss = self.loss.discriminator(judged.real_logits, judged.fake_logits).mean()
        norm = self._update_discriminator(self._spread(loss if judged.penalty is None else loss + judged.penalty))
        return judged.stats(loss) | norm

    def generator_step(self, fake: Tensor, real: Tensor | None = None, **conditions: Any) -> Stats:
        """Update the generator by ascending the score at samples it made; see `step`.

        Args:
            fake: G(z) with its graph, shape (B, ...).
            real: real samples of the same shape, for a loss that pairs them with the generated ones.
            conditions: passed to the discriminator by keyword.

        Raises:
            UsageError: `fake` has no graph, or the loss needs `real`.
        """
        loss = self._pull_back(fake, real, conditions)
        return {"loss_g": loss} | self._step_generator()

    def cotangent(self, fake: Tensor, real: Tensor | None = None, **conditions: Any) -> Tensor:
        """The covectors c_i = w_i dl/dx (x_i) of the score at the samples: what D wants changed in each of them.

        Args:
            fake: samples, shape (B, ...).
            real: real samples of the same shape, for a loss that pairs them.
            conditions: passed to the discriminator by keyword.

        Returns:
            A tensor of the shape of `fake`. For a map of patch logits the score of a sample is the mean over its map.
            D runs in the mode it is in: put it in evaluation mode first where batch norm's averages are to stay.
        """
        covector, _ = self._covector(fake, real, conditions, lambda values: per_sample_mean(values).sum())
        return -covector

    @property
    def skipped(self) -> int:
        """Number of steps left out so far because a loss or gradient was not finite."""
        return self._update_d.skipped + self._update_g.skipped

    def state_dict(self) -> dict[str, int]:
        """What GAC itself remembers; networks and optimizers save their own state."""
        return {
            "discriminator_steps": self._discriminator_steps,
            "skipped_d": self._update_d.skipped,
            "skipped_g": self._update_g.skipped,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a `state_dict`, so that lazy penalties fall on the same steps."""
        self._discriminator_steps = state["discriminator_steps"]
        self._update_d.skipped, self._update_g.skipped = state.get("skipped_d", 0), state.get("skipped_g", 0)

    def _accumulated_step(self, real: Tensor, z: Any, conditions: Mapping[str, Any]) -> Stats:
        """One batch of a window. At its end D is updated on the whole window, and only then G, at the same samples.

        The covectors of every batch are those of the updated D, as in a step on one large batch. No graph of G outlives
        its batch: the samples are made again from their latents, at the price of one more forward pass of G.
        """
        self._window.append((z, real if self._paired else None, conditions))
        with torch.no_grad():
            fake = self.generator(z, **conditions)
        stats = self.discriminator_step(real, fake, **conditions)
        if not window_ends(self.accelerator):
            return stats
        (*earlier, last), self._window = self._window, []
        losses = []
        for z, paired, conditions in earlier:
            with without_synchronisation(self.accelerator, self.generator):
                losses.append(self._pull_back(self.generator(z, **conditions), paired, conditions))
        z, paired, conditions = last
        losses.append(self._pull_back(self.generator(z, **conditions), paired, conditions))
        return stats | {"loss_g": torch.stack(losses).mean()} | self._step_generator()

    def _fused_step(self, real: Tensor, fake: Tensor, conditions: Mapping[str, Any]) -> Stats:
        """Both updates from one backward pass of D, weighted so that D's gradient and G's covector come out of it."""
        judged = self._judge(real, fake, conditions, keep_input_gradient=True)
        real_logits, fake_logits = judged.real_logits, judged.fake_logits
        if fake_logits.numel() != fake.shape[0]:
            raise UsageError(
                f"the fused schedule needs one logit for each sample, got {tuple(fake_logits.shape)} for "
                f"{fake.shape[0]} samples; use schedule='fresh'"
            )
        v_real, v_fake, w = logit_derivatives(self.loss, self._objective, real_logits, fake_logits)
        fake_logits.retain_grad()
        with torch.no_grad():
            loss_d = self.loss.discriminator(real_logits, fake_logits).mean()
            loss_g = self._objective(real_logits, fake_logits).mean()
        # the chain rule, cut at the logits: its gradient in D's parameters is that of the mean loss
        cut = (real_logits * v_real).sum() + (fake_logits * keep_visible(v_fake)).sum()
        norm = self._update_discriminator(self._spread(cut if judged.penalty is None else cut + judged.penalty))

        if judged.fake_gradient is not None:  # R2 has measured dl/dx already
            covector = scale_samples(w.reshape(-1), judged.fake_gradient.detach())
        else:  # the backward pass left v_i dl/dx at sample i, and v_i at its logit
            assert judged.fake.grad is not None
            assert fake_logits.grad is not None
            covector = scale_samples((w / fake_logits.grad).reshape(-1), judged.fake.grad)
        self._update_g.begin()
        pullback(fake, covector, self.accelerator)
        return judged.stats(loss_d) | norm | {"loss_g": loss_g} | self._step_generator()

    def _judge(
        self, real: Tensor, fake: Tensor, conditions: Mapping[str, Any], keep_input_gradient: bool = False
    ) -> Judged:
        """D's forward passes on both batches, with the penalty on the steps that carry it."""
        require_alike(real, fake)
        penalty = self.penalty if self.penalty and self.penalty.is_due(self._discriminator_steps) else None
        measure_real, measure_fake = penalty is not None and penalty.r1 > 0, penalty is not None and penalty.r2 > 0
        real = real.detach().requires_grad_(measure_real)
        fake = fake.detach().requires_grad_(measure_fake or keep_input_gradient)
        real_logits, fake_logits = self._logits(real, conditions), self._logits(fake, conditions)
        if not self._checked:
            require_finite(
                {
                    "real samples": real,
                    "generated samples": fake,
                    "discriminator's logits of the real samples": real_logits,
                    "discriminator's logits of the generated samples": fake_logits,
                }
            )
            if self.schedule == "fused":
                require_range(fake_logits.dtype)
                require_independent_samples(self._logits, real, fake, conditions)
            self._checked = True
        real_gradient = logit_gradient(real_logits, real) if measure_real else None
        fake_gradient = logit_gradient(fake_logits, fake) if measure_fake else None
        return Judged(
            fake=fake,
            real_logits=real_logits,
            fake_logits=fake_logits,
            fake_gradient=fake_gradient,
            penalty=penalty.of(real_gradient, fake_gradient) if penalty else None,
        )

    def _covector(
        self, fake: Tensor, real: Tensor | None, conditions: Mapping[str, Any], reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The covector of the generator's reduced loss at the samples, D frozen, and that loss."""
        if self._paired:
            if real is None:
                raise UsageError(f"the loss {self.loss.name!r} pairs real with generated samples; pass real= as well")
            require_alike(real, fake)
        with frozen(self.discriminator, sharded=self._sharded_d):
            with torch.no_grad():
                real_logits = self._logits(real, conditions) if self._paired and real is not None else None

            def objective(samples: Tensor) -> Tensor:
                fake_logits = self._logits(samples, conditions)
                values = self._objective(fake_logits if real_logits is None else real_logits, fake_logits)
                return self._spread(reduce(values))

            return cotangent(objective, fake, getattr(self.accelerator, "scaler", None))

    def _pull_back(self, fake: Tensor, real: Tensor | None, conditions: Mapping[str, Any]) -> Tensor:
        """Add one batch's gradient to the generator's; returns the mean loss."""
        covector, loss = self._covector(fake, real, conditions, torch.mean)
        self._update_g.begin()
        pullback(fake, covector, self.accelerator)
        return loss

    def _update_discriminator(self, loss: Tensor) -> Stats:
        self._update_d.begin()
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)
        norm = self._update_d.finish()
        reshard(self._sharded_d)
        self._discriminator_steps += window_ends(self.accelerator)
        return {} if norm is None else {"norm_d": norm}

    def _step_generator(self) -> Stats:
        if not window_ends(self.accelerator):
            return {}
        if self._update_d.left_out:  # one step is both updates: what spoiled D's is not trusted for G's
            self._update_g.discard()
            return {}
        norm = self._update_g.finish()
        reshard(self._sharded_g)
        stats = {} if norm is None else {"norm_g": norm}
        beta = getattr(plain(self.generator_optimizer), "beta", None)
        return stats if beta is None else stats | {"beta": beta}


def _unchanged(loss: Tensor) -> Tensor:
    return loss
