"""`GAC`: one training step of a GAN, around networks and optimizers that stay yours.

    1 generate a batch   2 update D on it   3 D's covectors at those samples   4 pull back, ascend: update G

Two schedules. `fresh`, the default: the covectors come from the updated D, at the same samples. `fused`: they come out
of the backward pass that D's own update does anyway, and both networks move at once.

Cost in passes of one network over a batch (forward, backward to inputs, backward to parameters count 1 each):
the textbook loop D 9, G 4; `fresh` D 8, G 3; `fused` D 6, G 3.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gac_plugin.checks import (
    require_alike,
    require_finite,
    require_independent_samples,
    require_no_batch_norm,
    require_one_logit_each,
    require_range,
    require_right_gradients,
    require_tensor,
)
from gac_plugin.cotangent import (
    cotangent,
    frozen,
    keep_visible,
    pullback,
    reshard,
    sharded_parts,
)
from gac_plugin.diagnostics import Walk, accuracies, covector_norm
from gac_plugin.errors import UsageError, resolve
from gac_plugin.losses import LOSSES, SCORES, Loss, Objective, Score, generator_objective
from gac_plugin.penalties import PENALTIES, GradientPenalty, logit_gradient
from gac_plugin.protocols import Backward, Heads, LatentSource, Logits, latent_sampler
from gac_plugin.tensors import per_sample_mean, scale_samples
from gac_plugin.update import Update, plain, spread, window_ends, without_synchronisation

SCHEDULES = ("fresh", "fused")

Stats = dict[str, Tensor]
"""Detached 0-dimensional tensors on the device; reading one on the host is what costs time, so do it rarely."""

Conditions = Mapping[str, Any]
"""Keyword arguments of a network beside latents or samples: labels, images, text embeddings."""


@dataclass(frozen=True)
class Judged:
    """What the discriminator said of one real and one generated batch.

    Attributes:
        fake: the generated samples cut from the generator, shape (B, ...).
        real_logits, fake_logits: of each head, with their graphs through D, pairwise equal shapes (B, ...).
        fake_gradient: dl/dx at the generated samples, shape (B, ...), where R2 measured it.
        penalty: to be added to the mean loss, 0-dimensional, on the steps that carry it.
    """

    fake: Tensor
    real_logits: Heads
    fake_logits: Heads
    fake_gradient: Tensor | None
    penalty: Tensor | None

    def stats(self, loss: Tensor, measured: bool) -> Stats:
        """Detached statistics of the discriminator's side; see `GAC.step`.

        Args:
            loss: D's mean loss.
            measured: with D's accuracies.
        """
        stats = {
            "loss_d": loss.detach(),
            "d_real": _mean([torch.sigmoid(head.detach()).mean() for head in self.real_logits]),
            "d_fake": _mean([torch.sigmoid(head.detach()).mean() for head in self.fake_logits]),
        }
        if self.penalty is not None:
            stats["penalty"] = self.penalty.detach()
        if measured:
            with torch.no_grad():
                stats |= accuracies(self.real_logits, self.fake_logits)
        return stats


@dataclass(frozen=True)
class Batch:
    """What the generator makes a batch of samples from, and what the discriminator judges them with.

    Attributes:
        z: the latents.
        paired: the real samples that the generated ones are paired with; None for a loss that pairs none.
        to_generator, to_discriminator: the conditions of each network.
    """

    z: Any
    paired: Tensor | None
    to_generator: Conditions
    to_discriminator: Conditions


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
        logits: picks the logits out of what the discriminator returns, or a list of them, one for each head; None if it
            returns a tensor, or a list of vectors and one-channel maps. Of several heads every loss and score is the
            mean over heads of the mean over a head's logits, and a penalty measures the gradient of the sum of all.
        accelerator: an `accelerate.Accelerator` whose `prepare` made the networks and optimizers; None without one.
        latent: latent size, shape, or batch size -> latents, which are brought to the real batch's device and floating-
            point type; None asks the generator's `nz`, or pass z to `step`.
        max_norm: bound on the norm of each network's gradient; None for none.
        skip_nonfinite: leave out a step whose loss or gradient is not finite, in all processes together. It reads a
            number on the host in every step; without it nothing does.
        diagnose_every: steps from one measurement of the diagnostics (see `step`) to the next, beside the first step;
            0 for none.

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
        logits: Callable[[Any], Any] | None = None,
        accelerator: Backward | None = None,
        latent: LatentSource | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        diagnose_every: int = 0,
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
        self._walk = Walk(plain(generator_optimizer), diagnose_every)
        self._spread = spread if skip_nonfinite else _unchanged
        self._discriminator_steps = 0
        self._window: list[Batch] = []
        self._checked = False
        require_right_gradients(generator, discriminator, accelerator, self.penalty)
        if schedule == "fused":
            require_no_batch_norm(discriminator)
            require_range(getattr(accelerator, "mixed_precision", None))
        self._sharded_g, self._sharded_d = sharded_parts(generator), sharded_parts(discriminator)
        if self.penalty is not None:  # its own backward pass leaves D's parameters gathered for the one that follows
            for part in self._sharded_d:
                part.set_reshard_after_backward(False, recurse=False)

    def step(
        self,
        real: Tensor,
        z: Any = None,
        *,
        generator_conditions: Conditions | None = None,
        discriminator_conditions: Conditions | None = None,
        **conditions: Any,
    ) -> Stats:
        """One step of both networks.

        Args:
            real: real samples, shape (B, ...), floating point, in the range that the generator makes.
            z: latents for B samples, the generator's first argument as it is: a tensor, tuple, dictionary, ...; None
                draws them.
            generator_conditions: passed by keyword to the generator alone, under any name, `real` and `z` among them.
            discriminator_conditions: likewise to the discriminator alone.
            conditions: passed to both networks by keyword (labels, text embeddings, ...).

        Returns:
            `loss_d`, `loss_g`: mean losses. `d_real`, `d_fake`: means of D(x) and D(G(z)) = sigmoid of the logits.
            `penalty`, on the steps that carry it. `beta`, from `ConjugateGradient` with a rule other than `none`.
            `norm_d`, `norm_g`: norms of the gradients, with `max_norm` or `skip_nonfinite`. Under
            `Accelerator.accumulate`, `loss_g` and what follows come at the end of each window.
            On the steps that `diagnose_every` names, also `accuracy_real` and `accuracy_fake`, D's before its update;
            `norm_c`, mean norm of the covectors that G ascends; `norm_g`; `update`, the length of G's step relative to
            its parameters; and `cosine`, between it and the step before. See `gac_plugin.diagnostics`.

        Raises:
            UsageError: samples are no tensors or their shapes differ, no way to draw latents is known, or, at the
                first step, a value is not finite or the schedule does not fit the discriminator.
        """
        require_tensor(real, "step was given")
        if z is None:
            if self._draw is None:
                raise UsageError("GAC does not know the latent size; pass latent=..., or z to step")
            z = self._draw(real)
        batch = Batch(
            z,
            real if self._paired else None,
            to_generator={**conditions, **(generator_conditions or {})},
            to_discriminator={**conditions, **(discriminator_conditions or {})},
        )
        if self.schedule == "fused":
            gather = self._fused
        elif self._window or not window_ends(self.accelerator):
            gather = self._accumulated
        else:
            gather = self._fresh
        with self._forgetting_failures():
            stats = gather(real, batch)  # samples, covectors and graphs are gone when G's optimizer takes its memory
            return stats | self._step_generator()

    def discriminator_step(self, real: Tensor, fake: Tensor, **conditions: Any) -> Stats:
        """Update the discriminator on real and generated samples; see `step`.

        Args:
            real, fake: of equal shape (B, ...). The graph behind `fake` is neither used nor released.
            conditions: passed to the discriminator by keyword.
        """
        with self._forgetting_failures():
            return self._discriminator_step(real, fake, conditions)

    def generator_step(self, fake: Tensor, real: Tensor | None = None, **conditions: Any) -> Stats:
        """Update the generator by ascending the score at samples it made; see `step`.

        Args:
            fake: G(z) with its graph, shape (B, ...).
            real: real samples of the same shape, for a loss that pairs them with the generated ones.
            conditions: passed to the discriminator by keyword.

        Raises:
            UsageError: `fake` has no graph, or the loss needs `real`.
        """
        with self._forgetting_failures():
            return self._pull_back(fake, real, conditions) | self._step_generator()

    def cotangent(self, fake: Tensor, real: Tensor | None = None, **conditions: Any) -> Tensor:
        """The covectors c_i = w_i dl/dx (x_i) of the score at the samples: what D wants changed in each of them.

        Args:
            fake: samples, shape (B, ...).
            real: real samples of the same shape, for a loss that pairs them.
            conditions: passed to the discriminator by keyword.

        Returns:
            A tensor of the shape of `fake`. For a map of patch logits the score of a sample is the mean over its map,
            for several heads the mean over heads of that. D runs in the mode it is in: put it in evaluation mode first
            where batch norm's averages are to stay.
        """
        covector, _ = self._covector(fake, real, conditions, lambda values: per_sample_mean(values).sum())
        return -covector

    @property
    def diagnose_every(self) -> int:
        """Steps from one measurement of the diagnostics to the next; 0 for none."""
        return self._walk.every

    @diagnose_every.setter
    def diagnose_every(self, steps: int) -> None:
        self._walk.every = steps

    @property
    def skipped(self) -> int:
        """Number of steps left out so far because a loss or gradient was not finite."""
        return self._update_d.skipped + self._update_g.skipped

    def state_dict(self) -> dict[str, Any]:
        """What GAC itself remembers; networks and optimizers save their own state."""
        return {
            "discriminator_steps": self._discriminator_steps,
            "skipped_d": self._update_d.skipped,
            "skipped_g": self._update_g.skipped,
            "walk": self._walk.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, so that lazy penalties and diagnostics fall on the same steps."""
        self._discriminator_steps = state["discriminator_steps"]
        self._walk.load_state_dict(state.get("walk", {"steps": self._discriminator_steps, "previous": []}))
        self._update_d.skipped, self._update_g.skipped = state.get("skipped_d", 0), state.get("skipped_g", 0)

    @contextmanager
    def _forgetting_failures(self) -> Iterator[None]:
        """Gradients of a step that fails, out of memory for example, do not count in the next one."""
        try:
            yield
        except BaseException:
            self._window.clear()
            self._update_d.discard()
            self._update_g.discard()
            raise

    def _fresh(self, real: Tensor, batch: Batch) -> Stats:
        """Update D; then G's gradient by the covectors of the updated D at the same samples."""
        self._update_g.release()
        fake = self._generate(batch)
        stats = self._discriminator_step(real, fake, batch.to_discriminator)
        return stats | self._pull_back(fake, batch.paired, batch.to_discriminator)

    def _accumulated(self, real: Tensor, batch: Batch) -> Stats:
        """One batch of a window. At its end update D on the whole window; only then G's gradient, at the same samples.

        The covectors of every batch are those of the updated D, as in a step on one large batch. No graph of G outlives
        its batch: the samples are made again from their latents, at the price of one more forward pass of G.
        """
        self._window.append(batch)
        with torch.no_grad():
            fake = self._generate(batch)
        stats = self._discriminator_step(real, fake, batch.to_discriminator)
        if not window_ends(self.accelerator):
            return stats
        (*earlier, last), self._window = self._window, []
        ascents = []
        for batch in earlier:
            with without_synchronisation(self.accelerator, self.generator):
                ascents.append(self._pull_back(self._generate(batch), batch.paired, batch.to_discriminator))
        ascents.append(self._pull_back(self._generate(last), last.paired, last.to_discriminator))
        means = {name: torch.stack([ascent[name] for ascent in ascents]).mean() for name in ascents[0]}
        return stats | means

    def _fused(self, real: Tensor, batch: Batch) -> Stats:
        """Update D; G's gradient by what D's own backward pass leaves at the samples, weighted anew."""
        self._update_g.release()
        fake = self._generate(batch)
        judged = self._judge(real, fake, batch.to_discriminator, keep_input_gradient=True)
        (real_logits,), (fake_logits,) = judged.real_logits, judged.fake_logits
        w, loss_g = cotangent(lambda logits: self._objective(real_logits.detach(), logits).mean(), fake_logits)
        fake_logits.retain_grad()
        loss_d = keep_visible(self.loss.discriminator(real_logits, fake_logits).mean(), fake_logits)
        stats = judged.stats(loss_d, self._measures_discriminator) | self._update_discriminator(loss_d, judged.penalty)

        if judged.fake_gradient is not None:  # R2 has measured dl/dx already
            covector = scale_samples(w.reshape(-1), judged.fake_gradient.detach())
        else:  # the backward pass left v_i dl/dx at sample i, and v_i at its logit
            assert judged.fake.grad is not None
            assert fake_logits.grad is not None
            covector = scale_samples((w / fake_logits.grad).reshape(-1), judged.fake.grad)
        self._update_g.begin()
        pullback(fake, covector, self.accelerator)
        return stats | self._ascent_stats(loss_g, covector)

    def _generate(self, batch: Batch) -> Tensor:
        fake = self.generator(batch.z, **batch.to_generator)
        require_tensor(fake, "the generator returned")
        return fake

    def _discriminator_step(self, real: Tensor, fake: Tensor, conditions: Conditions) -> Stats:
        judged = self._judge(real, fake, conditions)
        loss = _mean_over_heads(self.loss.discriminator, judged.real_logits, judged.fake_logits)
        stats = judged.stats(loss, self._measures_discriminator)
        return stats | self._update_discriminator(loss, judged.penalty)

    def _judge(self, real: Tensor, fake: Tensor, conditions: Conditions, keep_input_gradient: bool = False) -> Judged:
        """D's forward passes on both batches, with the penalty on the steps that carry it."""
        require_alike(real, fake)
        penalty = self.penalty if self.penalty and self.penalty.is_due(self._discriminator_steps) else None
        measure_real, measure_fake = penalty is not None and penalty.r1 > 0, penalty is not None and penalty.r2 > 0
        real = real.detach().requires_grad_(measure_real)
        fake = fake.detach().requires_grad_(measure_fake or keep_input_gradient)
        real_logits, fake_logits = self._logits.heads(real, conditions), self._logits.heads(fake, conditions)
        if not self._checked:
            self._check_first_step(real, fake, real_logits, fake_logits, conditions)
            self._checked = True
        real_gradient = logit_gradient(_all_logits(real_logits), real) if measure_real else None
        fake_gradient = logit_gradient(_all_logits(fake_logits), fake) if measure_fake else None
        return Judged(
            fake=fake,
            real_logits=real_logits,
            fake_logits=fake_logits,
            fake_gradient=fake_gradient,
            penalty=penalty.of(real_gradient, fake_gradient) if penalty else None,
        )

    def _check_first_step(
        self, real: Tensor, fake: Tensor, real_logits: Heads, fake_logits: Heads, conditions: Conditions
    ) -> None:
        """Before anything has moved: what would spoil the run, and what the schedule cannot serve."""
        require_finite(
            {
                "real samples": real,
                "generated samples": fake,
                "discriminator's logits of the real samples": _all_logits(real_logits),
                "discriminator's logits of the generated samples": _all_logits(fake_logits),
            }
        )
        if self.schedule == "fused":
            require_one_logit_each(fake_logits, fake.shape[0])
            require_range(fake_logits[0].dtype)
            require_independent_samples(self._logits, real, fake, conditions)

    def _covector(
        self, fake: Tensor, real: Tensor | None, conditions: Conditions, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The covector of the generator's reduced loss at the samples, D frozen, and that loss."""
        if self._paired:
            if real is None:
                raise UsageError(f"the loss {self.loss.name!r} pairs real with generated samples; pass real= as well")
            require_alike(real, fake)
        with frozen(self.discriminator, sharded=self._sharded_d):
            with torch.no_grad():
                real_logits = self._logits.heads(real, conditions) if self._paired and real is not None else None

            def objective(samples: Tensor) -> Tensor:
                fake_logits = self._logits.heads(samples, conditions)
                beside = fake_logits if real_logits is None else real_logits
                return self._spread(_mean_over_heads(self._objective, beside, fake_logits, reduce))

            return cotangent(objective, fake, getattr(self.accelerator, "scaler", None))

    def _pull_back(self, fake: Tensor, real: Tensor | None, conditions: Conditions) -> Stats:
        """Add one batch's gradient to the generator's; returns the statistics of that batch."""
        covector, loss = self._covector(fake, real, conditions, torch.mean)
        self._update_g.begin()
        pullback(fake, covector, self.accelerator)
        return self._ascent_stats(loss, covector)

    def _ascent_stats(self, loss: Tensor, covector: Tensor) -> Stats:
        stats = {"loss_g": loss}
        return stats | {"norm_c": covector_norm(covector)} if self._walk.measures_next else stats

    @property
    def _measures_discriminator(self) -> bool:
        return self._walk.is_due(self._discriminator_steps + 1)

    def _update_discriminator(self, loss: Tensor, penalty: Tensor | None) -> Stats:
        loss = self._spread(loss if penalty is None else loss + penalty)
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
            self._walk.forget()
            return {}
        stats = self._walk.step(self._update_g.finish)
        reshard(self._sharded_g)
        beta = getattr(plain(self.generator_optimizer), "beta", None)
        return stats if beta is None else stats | {"beta": beta}


def _mean_over_heads(
    objective: Objective, real: Heads, fake: Heads, reduce: Callable[[Tensor], Tensor] = torch.mean
) -> Tensor:
    # (1/H) sum_h reduce(objective(l_r, l_f) of head h)
    return _mean([reduce(objective(r, f)) for r, f in zip(real, fake, strict=True)])


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def _all_logits(heads: Heads) -> Tensor:
    """One head's logits as they are, those of several side by side, shape (B, n)."""
    return heads[0] if len(heads) == 1 else torch.cat([head.reshape(head.shape[0], -1) for head in heads], dim=1)


def _unchanged(loss: Tensor) -> Tensor:
    return loss
