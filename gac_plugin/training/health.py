"""The health of the game: a generator that has collapsed, a discriminator that overpowers it, steps left out."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gac_plugin.losses import Loss

ALIKE = 0.1
"""Samples count as collapsed when their typical distance to the nearest other one is below this share of the data's."""
BEATEN = 0.05
"""D overpowers G when its loss is below this share of what it is for a D that cannot tell real from generated."""
IN_A_ROW = 3
"""An alarm needs the sign in so many observations in a row."""


def nearest_distance(samples: Tensor) -> Tensor:
    """Median over the samples of the distance to the nearest other one: 0-dimensional.

    Args:
        samples: floating point, shape (N, ...), N at least 2.
    """
    flat = samples.float().flatten(1)
    distances = torch.cdist(flat, flat)
    return distances.fill_diagonal_(torch.inf).min(dim=1).values.median()


def diversity(generated: Tensor, real_distance: Tensor) -> Tensor:
    """How far apart generated samples are, as a share of how far apart real ones are; 0 for copies of one sample.

    Args:
        generated: shape (N, ...).
        real_distance: `nearest_distance` of as many real samples.
    """
    return nearest_distance(generated) / real_distance.clamp_min(1e-12)


def blind_loss(loss: Loss) -> float:
    """The loss of a D that cannot tell real from generated samples."""
    level = torch.zeros(1, 1)
    return float(loss.discriminator(level, level).mean())


class Health:
    """Watches logged figures and says once, for as long as it lasts, what is wrong with the game.

    Args:
        loss: the discriminator's, for what its value means.
        say: told of an alarm, in one line.
    """

    def __init__(self, loss: Loss, say: Callable[[str], None]) -> None:
        self.blind_loss = blind_loss(loss)
        self.say = say
        self._seen = {"collapsed": 0, "overpowering": 0}

    def observe(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Look at the figures of a step.

        Args:
            step: its number, for the message.
            figures: `loss_d`, and `diversity` where it was measured.

        Returns:
            The alarms in force: "collapsed" (the generator), "overpowering" (the discriminator).
        """
        signs = {
            "collapsed": "diversity" in figures and figures["diversity"] < ALIKE,
            # a loss without a floor, such as wasserstein, has the value 0 there and says nothing
            "overpowering": self.blind_loss > 0 and figures["loss_d"] < BEATEN * self.blind_loss,
        }
        texts = {
            "collapsed": "the generator has collapsed: its samples are {diversity:.0%} as far apart as real ones; "
            "raise --r1 and --r2, or lower --lr-generator",
            "overpowering": "the discriminator overpowers the generator: its loss is {loss_d:.2g}; "
            "raise --r1 and --r2, or lower --lr-discriminator",
        }
        for name, sign in signs.items():
            self._seen[name] = self._seen[name] + 1 if sign else 0
            if self._seen[name] == IN_A_ROW:
                self.say(f"step {step}: " + texts[name].format(**figures))
        return [name for name, seen in self._seen.items() if seen >= IN_A_ROW]

    def state_dict(self) -> dict[str, int]:
        """How long each sign has been there."""
        return dict(self._seen)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a `state_dict`."""
        self._seen.update(state)
