"""Zero-centred gradient penalties on the discriminator: R1 on real samples, R2 on generated ones, applied lazily."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.tensors import per_sample_inner


@dataclass(frozen=True)
class GradientPenalty:
    """R1 and R2, every `interval`-th discriminator step, `interval` times as strong.

        R1 = r1/2 E_x ||dl/dx (x)||^2       R2 = r2/2 E_z ||dl/dx (G(z))||^2

    Source: R1 and R2 from Mescheder et al. 2018, the lazy interval from Karras et al. 2020.

    Attributes:
        r1: weight gamma of the penalty at real samples; 0 leaves it out.
        r2: weight gamma of the penalty at generated samples; 0 leaves it out.
        interval: number of discriminator steps from one penalty to the next, at least 1.

    Raises:
        UsageError: a weight is negative or the interval is below 1.
    """

    r1: float = 1.0
    r2: float = 1.0
    interval: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.r1 < math.inf and 0 <= self.r2 < math.inf):
            raise UsageError(f"penalty weights are numbers of at least 0, got r1={self.r1}, r2={self.r2}")
        if self.interval < 1:
            raise UsageError(f"the penalty's interval is at least 1 step, got {self.interval}")

    def is_due(self, step: int) -> bool:
        """Whether the discriminator's step number `step`, counted from 0, carries the penalty; never without weight."""
        return (self.r1 > 0 or self.r2 > 0) and step % self.interval == 0

    def of(self, real_gradient: Tensor | None, fake_gradient: Tensor | None) -> Tensor:
        """The penalty to add to the discriminator's mean loss: 0-dimensional, differentiable.

        Args:
            real_gradient: dl/dx at the real samples, shape (B, ...), or None where r1 is 0.
            fake_gradient: dl/dx at the generated samples, shape (B, ...), or None where r2 is 0.
        """
        terms = [
            0.5 * gamma * self.interval * per_sample_inner(gradient, gradient).mean()
            for gamma, gradient in ((self.r1, real_gradient), (self.r2, fake_gradient))
            if gradient is not None
        ]
        return torch.stack(terms).sum()


PENALTIES: dict[str, GradientPenalty] = {
    "r1": GradientPenalty(r2=0.0),
    "r2": GradientPenalty(r1=0.0),
    "r1+r2": GradientPenalty(),
}


def logit_gradient(logits: Tensor, samples: Tensor) -> Tensor:
    """dl/dx at each sample, differentiable again: the quantity that R1 and R2 measure.

    Args:
        logits: D(samples), shape (B, ...); where a sample has several logits, l is their sum.
        samples: the samples that the logits were computed from, shape (B, ...), requiring a gradient.

    Returns:
        A tensor of the shape of `samples`.
    """
    return torch.autograd.grad(logits.sum(), samples, create_graph=True)[0]
