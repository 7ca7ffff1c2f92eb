"""One training step of a GAN, written in the ways that people use: what `cost.py` and `scale.py` measure.

Each contender takes networks and optimizers and returns a step on one real batch. D, the discriminator, minimises the
cross-entropy and G, the generator, -log D, both on logits; `r3gan` has a loss of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gac_plugin import GAC, ConjugateGradient, GradientPenalty

Step = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Game:
    """Two networks with their optimizers, and the size of a latent."""

    generator: nn.Module
    discriminator: nn.Module
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    latent: int

    def draw(self, real: Tensor) -> Tensor:
        """Latents for as many samples as there are real ones."""
        return torch.randn(real.shape[0], self.latent, device=real.device, dtype=real.dtype)


# ---- what people use


def textbook(game: Game) -> Step:
    """Two draws of G; the G step computes D's parameter gradients too, and throws them away."""
    generator, discriminator = game.generator, game.discriminator

    def step(real: Tensor) -> None:
        fake = generator(game.draw(real)).detach()
        game.optimizer_d.zero_grad()
        (softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()).backward()
        game.optimizer_d.step()

        game.optimizer_g.zero_grad()
        softplus(-discriminator(generator(game.draw(real)))).mean().backward()
        game.optimizer_g.step()

    return step


def dcgan_example(game: Game) -> Step:
    """PyTorch's DCGAN example: one draw, D's two halves backward one by one, its parameter gradients in the G step."""
    generator, discriminator = game.generator, game.discriminator

    def step(real: Tensor) -> None:
        discriminator.zero_grad()
        softplus(-discriminator(real)).mean().backward()
        fake = generator(game.draw(real))
        softplus(discriminator(fake.detach())).mean().backward()
        game.optimizer_d.step()

        generator.zero_grad()
        softplus(-discriminator(fake)).mean().backward()
        game.optimizer_g.step()

    return step


def one_stage(game: Game) -> Step:
    """One backward pass through both networks (Shen et al. 2021): between D and G sample i's gradient is rescaled by

    gamma_i = (dL_G/dl_i) / (dL_D/dl_i) = -(1 - D) / D = -exp(-l_i),    D = sigmoid(l)
    """
    generator, discriminator = game.generator, game.discriminator

    def step(real: Tensor) -> None:
        fake = generator(game.draw(real))
        real_logits, fake_logits = discriminator(real), discriminator(fake)
        gamma = -torch.exp(-fake_logits.detach()).reshape(-1, *[1] * (fake.dim() - 1))
        fake.register_hook(lambda gradient: gamma * gradient)
        game.optimizer_d.zero_grad()
        game.optimizer_g.zero_grad()
        (softplus(-real_logits) + softplus(fake_logits)).mean().backward()
        game.optimizer_d.step()
        game.optimizer_g.step()

    return step


def r3gan(game: Game) -> Step:
    """R3GAN (Huang et al. 2024): relativistic pairing, R1 and R2 every step, two draws of G, D frozen in the G step."""
    generator, discriminator = game.generator, game.discriminator

    def squared_slope(logits: Tensor, samples: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
        return slope.square().flatten(1).sum(1)

    def step(real: Tensor) -> None:
        with torch.no_grad():
            fake = generator(game.draw(real))
        real, fake = real.detach().requires_grad_(), fake.requires_grad_()
        real_logits, fake_logits = discriminator(real), discriminator(fake)
        r1, r2 = squared_slope(real_logits, real), squared_slope(fake_logits, fake)
        game.optimizer_d.zero_grad()
        (softplus(fake_logits - real_logits).flatten() + 0.5 * (r1 + r2)).mean().backward()
        game.optimizer_d.step()

        discriminator.requires_grad_(False)
        fake_logits, real_logits = discriminator(generator(game.draw(real))), discriminator(real.detach())
        game.optimizer_g.zero_grad()
        softplus(real_logits - fake_logits).mean().backward()
        game.optimizer_g.step()
        discriminator.requires_grad_(True)

    return step


# ---- GAC's arithmetic in a flat loop


def flat_fresh(game: Game) -> Step:
    """What `fresh` does, by hand: G by the gradient of the updated D at the same samples, D frozen."""
    generator, discriminator = game.generator, game.discriminator

    def step(real: Tensor) -> dict[str, Tensor]:
        fake = generator(game.draw(real))
        game.optimizer_d.zero_grad()
        loss_d = (softplus(-discriminator(real)) + softplus(discriminator(fake.detach()))).mean()
        loss_d.backward()
        game.optimizer_d.step()

        discriminator.requires_grad_(False)
        samples = fake.detach().requires_grad_()
        loss_g = softplus(-discriminator(samples)).mean()
        (covector,) = torch.autograd.grad(loss_g, samples)
        discriminator.requires_grad_(True)
        game.optimizer_g.zero_grad()
        fake.backward(covector)
        game.optimizer_g.step()
        return {"loss_d": loss_d.detach(), "loss_g": loss_g.detach()}

    return step


def flat_fused(game: Game) -> Step:
    """What `fused` does, by hand: G by w dl/dx, w = dL_G/dl, out of the v dl/dx, v = dL_D/dl, of D's backward pass."""
    generator, discriminator = game.generator, game.discriminator

    def step(real: Tensor) -> dict[str, Tensor]:
        fake = generator(game.draw(real))
        samples = fake.detach().requires_grad_()
        real_logits, fake_logits = discriminator(real), discriminator(samples)
        fake_logits.retain_grad()
        game.optimizer_d.zero_grad()
        loss_d = (softplus(-real_logits) + softplus(fake_logits)).mean()
        loss_d.backward()
        game.optimizer_d.step()

        with torch.no_grad():
            loss_g = softplus(-fake_logits).mean()
            w = -torch.sigmoid(-fake_logits) / fake_logits.numel()
            scale = (w / fake_logits.grad).reshape(-1, *[1] * (fake.dim() - 1))
        game.optimizer_g.zero_grad()
        fake.backward(scale * samples.grad)
        game.optimizer_g.step()
        return {"loss_d": loss_d.detach(), "loss_g": loss_g}

    return step


# ---- GAC


def gac(schedule: str, game: Game, interval: int = 0, conjugate: bool = False, metric: str = "adam") -> Step:
    """GAC through its public interface.

    Args:
        schedule: "fresh" or "fused".
        game: networks and optimizers.
        interval: of the penalty R1 + R2; 0 for none.
        conjugate: `ConjugateGradient` with rule `none` for G, in place of the game's optimizer.
        metric: of it.
    """
    if conjugate:
        rate = game.optimizer_g.param_groups[0]["lr"]
        game = replace(game, optimizer_g=ConjugateGradient(game.generator.parameters(), rate, "none", metric))
    penalty = GradientPenalty(interval=interval) if interval else None
    networks = game.generator, game.discriminator, game.optimizer_g, game.optimizer_d
    return GAC(*networks, latent=game.latent, schedule=schedule, penalty=penalty).step


LAZY = 4
"""Steps from one penalty to the next."""

CONTENDERS: dict[str, Callable[[Game], Step]] = {
    "textbook": textbook,
    "dcgan example": dcgan_example,
    "one-stage": one_stage,
    "r3gan": r3gan,
    "flat fresh": flat_fresh,
    "fresh": partial(gac, "fresh"),
    "flat fused": flat_fused,
    "fused": partial(gac, "fused"),
    "fresh, CG": partial(gac, "fresh", conjugate=True),
    "fused, CG": partial(gac, "fused", conjugate=True),
    "fresh, lazy": partial(gac, "fresh", interval=LAZY),
    "fused, lazy": partial(gac, "fused", interval=LAZY),
    "fresh, CG, lazy": partial(gac, "fresh", interval=LAZY, conjugate=True),
    "fused, CG, lazy": partial(gac, "fused", interval=LAZY, conjugate=True),
    "fresh, penalty every step": partial(gac, "fresh", interval=1),
}

DEFAULT = "default"
"""What `gac train` does; apart from the others, since the metric's bases turn in every tenth step alone."""


def default(game: Game) -> Step:
    return gac("fresh", game, interval=LAZY, conjugate=True, metric="kronecker")
