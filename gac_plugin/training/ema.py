"""The running average of the generator, which makes the samples and is what gets saved."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn


class RunningAverage:
    """theta_ema <- decay theta_ema + (1 - decay) theta; the first update copies. Buffers are copied in every update.

    Args:
        network: what to average; left as it is.

    Attributes:
        network: the average, a network of its own that takes no part in autograd.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = deepcopy(network).requires_grad_(False)
        self._updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Take the network's parameters in.

        Args:
            network: built like the one averaged.
            decay: in [0, 1); 0 makes the average a copy.
        """
        weight = 1 - decay if self._updates else 1.0
        self._updates += 1
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), weight)
        for average, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """The average's own state, and how many updates it has seen."""
        return {"network": self.network.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.network.load_state_dict(state["network"])
        self._updates = state["updates"]
