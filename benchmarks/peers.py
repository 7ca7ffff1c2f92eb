"""What people use instead: other ways to train a GAN, and GAC, behind one interface.

    step = method.make(generator, discriminator, lr_g, lr_d)        step(batches)

A step takes as many real batches as it needs from an iterator and moves both networks once. Latents are standard
normal, of the generator's size `nz`. In the formulas theta is G, phi is D, and u(g) is an optimizer's move for the
gradient g, the sign of descent included.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from gac_plugin import GAC, LOSSES, BetaRule, ConjugateGradient, GradientPenalty, Loss
from gac_plugin.cotangent import frozen
from gac_plugin.penalties import logit_gradient
from gac_plugin.training.schedules import Schedule

Batches = Iterator[Tensor]
Step = Callable[[Batches], None]
Make = Callable[[nn.Module, nn.Module, float, float], Step]
MakeOptimizer = Callable[[Iterable[Tensor], float], Optimizer]


@dataclass(frozen=True)
class Game:
    """What the two networks minimise, as in the papers and without GAC's own code.

    Attributes:
        loss: of both networks.
        penalty: on D.
        share: of the penalty's weight at a step counted from 0.
    """

    loss: Loss
    penalty: GradientPenalty | None = None
    share: Callable[[int], float] = lambda number: 1.0

    def of_discriminator(self, discriminator: nn.Module, real: Tensor, fake: Tensor, number: int) -> Tensor:
        """D's mean loss at its step `number`, with the penalty where it is due; no graph back to G."""
        penalty = self.penalty if self.penalty is not None and self.penalty.is_due(number) else None
        real, fake = (x.detach().requires_grad_(penalty is not None) for x in (real, fake))
        real_logits, fake_logits = discriminator(real), discriminator(fake)
        loss = self.loss.discriminator(real_logits, fake_logits).mean()
        if penalty is None:
            return loss
        slopes = logit_gradient(real_logits, real), logit_gradient(fake_logits, fake)
        return loss + self.share(number) * penalty.of(*slopes)

    def of_generator(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        """G's mean loss."""
        fake_logits = discriminator(fake)
        if not self.loss.paired:
            return self.loss.generator(fake_logits, fake_logits).mean()
        with torch.no_grad():
            real_logits = discriminator(real)
        return self.loss.generator(real_logits, fake_logits).mean()


def latents(generator: nn.Module, real: Tensor) -> Tensor:
    return torch.randn(len(real), generator.nz, device=real.device)  # type: ignore[call-overload]


# ---- ways to move


def alternating(game: Game, optimizer_g: MakeOptimizer, optimizer_d: MakeOptimizer, freeze: bool = False) -> Make:
    """The textbook loop: D on one draw, then G on another.

    Args:
        game, optimizer_g, optimizer_d: what moves, and how.
        freeze: D's parameters get no gradients in G's step, in which the textbook computes them and throws them away.
    """

    def make(generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> Step:
        of_g, of_d = optimizer_g(generator.parameters(), lr_g), optimizer_d(discriminator.parameters(), lr_d)
        numbers = count()

        def step(batches: Batches) -> None:
            real = next(batches)
            fake = generator(latents(generator, real)).detach()
            descend(of_d, game.of_discriminator(discriminator, real, fake, next(numbers)))
            with frozen(discriminator) if freeze else nullcontext():
                descend(of_g, game.of_generator(discriminator, real, generator(latents(generator, real))))

        return step

    return make


def descend(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def extragradient(game: Game, optimizer: MakeOptimizer) -> Make:
    """Gidel et al. 2019, "A variational inequality perspective on generative adversarial networks", Algorithm 4.

        (theta', phi') = (theta, phi) + u(gradient at (theta, phi))
        (theta, phi)  <- (theta, phi) + u(gradient at (theta', phi'))

    Both networks move at once, and the optimizer's moments take in both gradients. Each half has a batch of its own.
    """

    def make(generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> Step:
        optimizers = optimizer(generator.parameters(), lr_g), optimizer(discriminator.parameters(), lr_d)
        parameters = [*generator.parameters(), *discriminator.parameters()]
        numbers = count()

        def step(batches: Batches) -> None:
            number, here = next(numbers), [p.detach().clone() for p in parameters]
            set_gradients(game, generator, discriminator, next(batches), number)
            for one in optimizers:
                one.step()
            set_gradients(game, generator, discriminator, next(batches), number)
            with torch.no_grad():
                torch._foreach_copy_(parameters, here)
            for one in optimizers:
                one.step()

        return step

    return make


def set_gradients(game: Game, generator: nn.Module, discriminator: nn.Module, real: Tensor, number: int) -> None:
    """The gradient of each network's loss in its own parameters, both at the present point and on one draw."""
    fake = generator(latents(generator, real))
    losses = (
        (game.of_discriminator(discriminator, real, fake, number), discriminator),
        (game.of_generator(discriminator, real, fake), generator),
    )
    for loss, network in losses:
        parameters = list(network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient


class OptimisticAdam(Adam):
    """Daskalakis et al. 2018, "Training GANs with optimism", Algorithm 1.

    theta <- theta + 2 u_t - u_(t-1), with u_t Adam's move.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        here = [p.clone() for p in parameters]
        loss = super().step(closure)
        for parameter, before in zip(parameters, here, strict=True):
            move, state = parameter - before, self.state[parameter]
            parameter += move - state.get("move", torch.zeros_like(move))
            state["move"] = move
        return loss


def lookahead(inner: Make, every: int = 5, share: float = 0.5) -> Make:
    """Chavdarova et al. 2021, "Taming GANs with lookahead-minmax", Algorithm 1; their k = 5 and alpha = 0.5.

    every k steps, both networks at once:  slow <- slow + alpha (fast - slow),  fast <- slow
    """

    def make(generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> Step:
        fast = [*generator.parameters(), *discriminator.parameters()]
        slow = [p.detach().clone() for p in fast]
        step_inner, numbers = inner(generator, discriminator, lr_g, lr_d), count(1)

        def step(batches: Batches) -> None:
            step_inner(batches)
            if next(numbers) % every == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(slow, fast, share)
                    torch._foreach_copy_(fast, slow)

        return step

    return make


def constant(beta: float) -> BetaRule:
    """d = u + beta d-, momentum; with the restart of all rules, d = u, where that would not ascend."""
    return BetaRule("constant", lambda p: torch.full_like(p.gu, beta), f"beta = {beta}", uses_change=False)


def gac(optimizer_g: MakeOptimizer | None = None, optimizer_d: MakeOptimizer | None = None, **strategy: Any) -> Make:
    """GAC with the defaults of `gac train`.

    Args:
        optimizer_g, optimizer_d: None for `conjugate()` and Adam (0, 0.99).
        strategy: arguments of `GAC`.
    """

    def make(generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> Step:
        gac = GAC(
            generator,
            discriminator,
            (optimizer_g or conjugate())(generator.parameters(), lr_g),
            (optimizer_d or adam(0.0, 0.99))(discriminator.parameters(), lr_d),
            **{"penalty": "r1+r2", **strategy},
        )

        def step(batches: Batches) -> None:
            gac.step(next(batches))

        return step

    return make


# ---- optimizers


def conjugate(rule: str | BetaRule = "none", **options: Any) -> MakeOptimizer:
    return lambda parameters, lr: ConjugateGradient(parameters, lr, rule=rule, **options)


def adam(beta1: float, beta2: float) -> MakeOptimizer:
    return lambda parameters, lr: Adam(parameters, lr, betas=(beta1, beta2))


def optimistic_adam(beta1: float, beta2: float) -> MakeOptimizer:
    return lambda parameters, lr: OptimisticAdam(parameters, lr, betas=(beta1, beta2))


def changing(make_optimizer: MakeOptimizer, settings: Callable[[float, int], dict[str, Any]]) -> MakeOptimizer:
    """What an optimizer is set to changes from step to step.

    Args:
        make_optimizer: parameters, lr -> the optimizer.
        settings: lr, number of a step counted from 1 -> the settings of that step.
    """

    def make(parameters: Iterable[Tensor], lr: float) -> Optimizer:
        optimizer, numbers = make_optimizer(parameters, lr), count(1)

        def set_next(*_: Any) -> None:
            changed = settings(lr, next(numbers))
            for group in optimizer.param_groups:
                group.update(changed)

        set_next()
        optimizer.register_step_post_hook(set_next)
        return optimizer

    return make


def falling(make_optimizer: MakeOptimizer, schedule: Schedule, steps: int) -> MakeOptimizer:
    """The rate follows a schedule over so many steps."""
    return changing(make_optimizer, lambda lr, number: {"lr": lr * schedule.factor(number, steps)})


LINEAR = Schedule("linear", 0.0)


def falling_alternating(game: Game, make_optimizer: MakeOptimizer, steps: int) -> Make:
    """The textbook loop, both rates falling linearly to zero over so many steps."""
    optimizer = falling(make_optimizer, LINEAR, steps)
    return alternating(game, optimizer, optimizer)


def r3gan_preset(steps: int) -> Make:
    """What R3GAN's preset for CIFAR-10 changes over a run: all by a cosine, f falling from 1 to 0.

    gamma = .05 (.1 + .9 f)    rates times .25 + .75 f    beta2 = .99 - .09 f
    """
    fall = Schedule("cosine", 0.0)

    def settings(lr: float, number: int) -> dict[str, Any]:
        left = fall.factor(number, steps)
        return {"lr": lr * (0.25 + 0.75 * left), "betas": (0.0, 0.99 - 0.09 * left)}

    penalty = GradientPenalty(r1=0.05, r2=0.05, interval=1)
    game = Game(LOSSES["relativistic"], penalty, lambda number: 0.1 + 0.9 * fall.factor(number + 1, steps))
    optimizer = changing(adam(0.0, 0.9), settings)
    return alternating(game, optimizer, optimizer, freeze=True)


# ---- the table


PLAIN_GAME = Game(LOSSES["bce"])
OUR_GAME = Game(LOSSES["bce"], GradientPenalty())
R3_GAME = Game(LOSSES["relativistic"], GradientPenalty(interval=1))
SCALED = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
UNSCALED, UNSCALED_D = (0.003, 0.01, 0.03, 0.1, 0.3), (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        title: how the tables call it.
        make: builds its step.
        rates: those that are tried for G and, apart, for D: as many for every method.
        other_rates: those for D, where they are others than G's.
        about: game, optimizer and source in a line.
        falling_over: builds the step with rates that fall over so many steps; None where they stay as they are.
    """

    title: str
    make: Make
    rates: tuple[float, ...] = SCALED
    about: str = ""
    falling_over: Callable[[int], Make] | None = None
    other_rates: tuple[float, ...] = ()

    @property
    def rates_d(self) -> tuple[float, ...]:
        """Those that are tried for D."""
        return self.other_rates or self.rates

    def make_over(self, steps: int) -> Make:
        """How its step is built for a run of so many steps."""
        return self.make if self.falling_over is None else self.falling_over(steps)


TEXTBOOK, OURS = "textbook", "gac-falling"
METHODS: dict[str, Method] = {
    TEXTBOOK: Method(
        "textbook Adam",
        alternating(PLAIN_GAME, adam(0.5, 0.999), adam(0.5, 0.999)),
        about="BCE, log D, no penalty, Adam (0.5, 0.999), two draws (Radford et al. 2016)",
    ),
    "gac": Method(
        "GAC, constant rates",
        gac(),
        about="as GAC, rates that stay as they are",
    ),
    "momentum": Method(
        "GAC, constant rates and momentum",
        gac(conjugate(constant(0.5))),
        about="constant rates, a beta of 0.5, momentum under the same metric, left out where d would not ascend",
    ),
    "recipe": Method(
        "our recipe, plain Adam",
        alternating(OUR_GAME, adam(0.0, 0.99), adam(0.0, 0.99)),
        about="GAC's loss, penalty and rates' scale; textbook order, two draws, Adam (0, 0.99)",
    ),
    "r3gan": Method(
        "R3GAN's recipe",
        alternating(R3_GAME, adam(0.0, 0.99), adam(0.0, 0.99), freeze=True),
        about="relativistic, R1 + R2 in every step, gamma 1, Adam (0, 0.99) (Huang et al. 2024)",
    ),
    "lookahead": Method(
        "lookahead-minmax",
        lookahead(alternating(PLAIN_GAME, adam(0.0, 0.999), adam(0.0, 0.999))),
        about="k 5, alpha 0.5 over Adam (0, 0.999), BCE, no penalty (Chavdarova et al. 2021)",
    ),
    "extragradient": Method(
        "extragradient Adam",
        extragradient(PLAIN_GAME, adam(0.5, 0.9)),
        about="Adam (0.5, 0.9), BCE, no penalty (Gidel et al. 2019)",
    ),
    "optimistic": Method(
        "optimistic Adam",
        alternating(PLAIN_GAME, optimistic_adam(0.5, 0.9), optimistic_adam(0.5, 0.9)),
        about="Adam (0.5, 0.9), BCE, no penalty (Daskalakis et al. 2018)",
    ),
    "published": Method(
        "conjugate gradient as published",
        alternating(PLAIN_GAME, conjugate("fr", metric="identity"), conjugate("fr", metric="identity")),
        UNSCALED,
        "Fletcher-Reeves, one of the seven published rules, for both networks; identity metric, |beta| at most 0.5, as "
        "published, and beta over all parameters, with a restart; BCE, no penalty (Naganuma & Iiduka 2023)",
        other_rates=UNSCALED_D,
    ),
}


def falling_gac(steps: int) -> Make:
    return gac(falling(conjugate(), LINEAR, steps), falling(adam(0.0, 0.99), LINEAR, steps))


def falling_lookahead(steps: int) -> Make:
    return lookahead(falling_alternating(PLAIN_GAME, adam(0.0, 0.999), steps))


FALLING: dict[str, Callable[[int], Make]] = {
    TEXTBOOK: partial(falling_alternating, PLAIN_GAME, adam(0.5, 0.999)),
    "gac": falling_gac,
    "recipe": partial(falling_alternating, OUR_GAME, adam(0.0, 0.99)),
    "r3gan": r3gan_preset,
    "lookahead": falling_lookahead,
    "optimistic": partial(falling_alternating, PLAIN_GAME, optimistic_adam(0.5, 0.9)),
}
METHODS |= {
    f"{name}-falling": replace(
        METHODS[name],
        title=f"{METHODS[name].title}, falling rates",
        about="the same, both rates fall linearly to zero over the run",
        falling_over=over,
    )
    for name, over in FALLING.items()
}
METHODS[OURS] = replace(
    METHODS[OURS],
    title="GAC",
    about="the defaults: BCE, log D, R1 + R2 every 4th step, `fresh`, rule `none`, metric `kronecker` for G, and rates "
    "that fall linearly to zero over the run",
)
METHODS["r3gan-falling"] = replace(
    METHODS["r3gan-falling"],
    title="R3GAN's recipe, its schedules",
    about="gamma .05 to .005, rates to a quarter, beta2 .9 to .99, all by a cosine: its authors' preset for CIFAR-10",
)
