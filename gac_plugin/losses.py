"""GAN losses and generator scores on logits, per sample.

Every callable takes both logits, `(real, fake)`, tensors of equal shape (B, ...), and returns values of that shape:
the caller takes the mean. The discriminator minimises `loss.discriminator`; the generator minimises `loss.generator`,
that is, it ascends the score `-loss.generator`, or another score chosen apart from the discriminator's loss.

In the formulas l_r, l_f are the logits of real and generated samples and D = sigmoid(l).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """What the discriminator and the generator minimise.

    Attributes:
        name: its key in `LOSSES`.
        discriminator: (real logits, fake logits) -> values to minimise, shape of the logits.
        generator: (real logits, fake logits) -> values to minimise, shape of the logits.
        description: one line with the formula and its source.
        paired: whether the generator's value depends on the real logits.
    """

    name: str
    discriminator: Objective
    generator: Objective
    description: str
    paired: bool = False


@dataclass(frozen=True)
class Score:
    """What the generator ascends, chosen apart from the discriminator's loss.

    Attributes:
        name: its key in `SCORES`.
        value: fake logits -> values to maximise, shape of the logits.
        description: one line with the formula and the weight w = d value / dl that it gives the cotangent.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    description: str


def _cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    # -log D(x) - log(1 - D(G(z))); -log sigmoid(l) = softplus(-l)
    return softplus(-real) + softplus(fake)


def _non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    # -log D(G(z)); w = 1 - D
    return softplus(-fake)


def _minimax(real: Tensor, fake: Tensor) -> Tensor:
    # log(1 - D(G(z))); w = D
    return -softplus(fake)


def _least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    # ((l_r - 1)^2 + l_f^2) / 2
    return 0.5 * ((real - 1).square() + fake.square())


def _least_squares_generator(real: Tensor, fake: Tensor) -> Tensor:
    # (l_f - 1)^2 / 2; w = 1 - l
    return 0.5 * (fake - 1).square()


def _hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    # max(0, 1 - l_r) + max(0, 1 + l_f)
    return relu(1 - real) + relu(1 + fake)


def _critic_generator(real: Tensor, fake: Tensor) -> Tensor:
    # -l_f; w = 1
    return -fake


def _wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    # l_f - l_r
    return fake - real


def _relativistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    # -log sigmoid(l_r - l_f)
    return softplus(fake - real)


def _relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    # -log sigmoid(l_f - l_r); w = sigmoid(l_r - l_f)
    return softplus(real - fake)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            "bce",
            _cross_entropy,
            _non_saturating,
            "D: -log D(x) - log(1 - D(G(z))); G: -log D(G(z)), non-saturating (Goodfellow et al. 2014)",
        ),
        Loss(
            "minimax",
            _cross_entropy,
            _minimax,
            "D as bce; G: log(1 - D(G(z))), which saturates where D wins (Goodfellow et al. 2014)",
        ),
        Loss(
            "mse",
            _least_squares_discriminator,
            _least_squares_generator,
            "least squares on the logit: D: ((l_r - 1)^2 + l_f^2) / 2; G: (l_f - 1)^2 / 2 (Mao et al. 2017)",
        ),
        Loss(
            "hinge",
            _hinge_discriminator,
            _critic_generator,
            "D: max(0, 1 - l_r) + max(0, 1 + l_f); G: -l_f (Lim & Ye 2017)",
        ),
        Loss(
            "wasserstein",
            _wasserstein_discriminator,
            _critic_generator,
            "D: l_f - l_r; G: -l_f; needs a penalty or a Lipschitz D (Arjovsky et al. 2017)",
        ),
        Loss(
            "relativistic",
            _relativistic_discriminator,
            _relativistic_generator,
            "pairs samples: D: -log sigmoid(l_r - l_f); G: -log sigmoid(l_f - l_r) (Jolicoeur-Martineau 2019)",
            paired=True,
        ),
    )
}

SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("log_d", lambda fake: -softplus(-fake), "log D, the ascent form of -log D; w = 1 - D"),
        Score("logit", lambda fake: fake, "the logit l itself; w = 1"),
        Score("probability", torch.sigmoid, "D itself, grad_G of the method taken literally; w = D (1 - D)"),
    )
}


def generator_objective(loss: Loss, score: Score | None) -> Objective:
    """What the generator minimises: minus `score` if one is given, the loss's own generator values otherwise."""
    if score is None:
        return loss.generator
    return lambda real, fake: -score.value(fake)
