"""From gradients to the step of one network: gathered over a window of batches, clipped, and skipped if not finite.

A window is what `accelerate.Accelerator.accumulate` makes of several batches; without it, every batch is one.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gac_plugin.protocols import Backward


def window_ends(accelerator: Backward | None) -> bool:
    """Whether the batch at hand is the last one of its window, so that gradients are synchronised and used."""
    return getattr(accelerator, "sync_gradients", True)


def without_synchronisation(accelerator: Backward | None, network: nn.Module) -> AbstractContextManager[Any]:
    """Within the block the network's gradients stay in this process."""
    no_sync = getattr(accelerator, "no_sync", None)
    return nullcontext() if no_sync is None else no_sync(network)


def spread(loss: Tensor) -> Tensor:
    """The same loss, with a gradient that is not a number if the loss is infinite or not a number.

    The average of gradients over the processes then carries the news to all of them, and they skip the step together.
    """
    return loss * (1 + 0 * loss.detach())


class Update:
    """One network's gradients and what becomes of them.

    Args:
        optimizer: of the network; its parameter groups tell whose gradients count.
        accelerator: an `accelerate.Accelerator`, or None.
        max_norm: bound on the Euclidean norm of the gradient, all parameters taken as one vector; None for none.
        skip_nonfinite: leave out a step whose gradient is not finite. It reads one number on the host in every step.

    Attributes:
        skipped: number of steps left out so far.
        left_out: whether the latest step was one of them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accelerator: Backward | None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite
        self.skipped = 0
        self.left_out = False
        self._window_starts = True

    def release(self) -> None:
        """Before a window, drop gradients that are used up, for their memory; `begin` clears what has come since."""
        if self._window_starts:
            plain(self.optimizer).zero_grad()

    def begin(self) -> None:
        """Clear the gradients at the start of a window; what other code has left in them does not count."""
        if self._window_starts:
            plain(self.optimizer).zero_grad()
            self._window_starts = False

    def finish(self) -> Tensor | None:
        """At the end of a window, step.

        Returns:
            The norm of the gradient before clipping, 0-dimensional, where it was measured.
        """
        if not window_ends(self.accelerator):
            return None
        self._window_starts = True
        scaler = getattr(self.accelerator, "scaler", None)
        norm = self._norm(scaler) if self.max_norm is not None or self.skip_nonfinite else None
        self.left_out = self.skip_nonfinite and scaler is None and norm is not None and not bool(torch.isfinite(norm))
        if not self.left_out:
            self.optimizer.step()
        if self.skip_nonfinite and scaler is not None:  # it leaves out steps by itself, and lowers its scale when asked
            self.left_out = self.optimizer.step_was_skipped  # type: ignore[attr-defined]
        self.skipped += self.left_out
        return norm

    def discard(self) -> None:
        """End a window, and forget its gradients without a step."""
        self._window_starts = True

    def _norm(self, scaler: Any) -> Tensor:
        if scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)  # type: ignore[union-attr]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded parameters
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return norm


def plain(optimizer: Any) -> Any:
    """The optimizer itself, out of what `accelerate` wraps it in."""
    return getattr(optimizer, "optimizer", optimizer)
