"""How a setting changes over a run: a shape, and what share of its first value is left at the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from gac_plugin.errors import UsageError

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
"""progress through the run in [0, 1] -> what is left, falling from 1."""


@dataclass(frozen=True)
class Schedule:
    """f(t) = share + (1 - share) shape(t), t in [0, 1].

    Attributes:
        shape: a name in `SHAPES`.
        share: f at the end; at least 0, and above 1 for a setting that grows.
    """

    shape: str
    share: float

    @classmethod
    def parse(cls, text: str, setting: str) -> "Schedule":
        """A schedule from "constant", "linear", "cosine:0.1", ...; without a share, it falls to 0.

        Raises:
            UsageError: the text is no schedule; the message names the setting.
        """
        shape, colon, number = text.partition(":")
        try:
            share = float(number) if colon else 0.0
        except ValueError:
            share = math.nan
        if shape not in SHAPES or not 0 <= share < math.inf:
            raise UsageError(f"{setting} must be SHAPE or SHAPE:SHARE, {', '.join(SHAPES)} and 0 or more; got {text!r}")
        return cls(shape, share)

    def factor(self, step: int, steps: int) -> float:
        """f at a step counted from 1 to `steps`: 1 at the first, the share at the last."""
        if self.shape == "constant":
            return 1.0
        progress = min(1.0, (step - 1) / max(1, steps - 1))
        return self.share + (1 - self.share) * SHAPES[self.shape](progress)
