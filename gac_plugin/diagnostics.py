"""Diagnostics of a training step: how sure D is, how loud its covectors are, how far G moves and whether it turns back.

    accuracy    share of the real logits above, of the generated ones below m = (mean l_r + mean l_f) / 2
    norm_c      (1/B) sum_i |c_i|
    update      |d_t| / |theta_(t-1)|                   d_t = theta_t - theta_(t-1)
    cosine      <d_t, d_(t-1)> / (|d_t| |d_(t-1)|)

d_t is what the optimizer made of its direction and rate, so any optimizer can be looked at. A cosine near 1 means that
G walks straight on, near -1 that each step takes back the one before.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Heads
from gac_plugin.tensors import inner, per_sample_norm


def accuracies(real: Heads, fake: Heads) -> dict[str, Tensor]:
    """How well D tells real from generated samples: 1 without a mistake, 0.5 for a D that guesses.

    The border lies half-way between the mean logits, and not at D(x) = 1/2, because several losses (relativistic,
    wasserstein, least squares) do not put it there.

    Args:
        real, fake: logits of each head, shapes (B, ...).

    Returns:
        `accuracy_real`, `accuracy_fake`, 0-dimensional: the shares on their side of the border, mean over heads.
    """
    borders = [(r.mean() + f.mean()) / 2 for r, f in zip(real, fake, strict=True)]
    return {
        "accuracy_real": _mean_share([r > border for r, border in zip(real, borders, strict=True)]),
        "accuracy_fake": _mean_share([f < border for f, border in zip(fake, borders, strict=True)]),
    }


def covector_norm(covector: Tensor) -> Tensor:
    """(1/B) sum_i |c_i| of the covector c_i / B, shape (B, ...), of a mean over the samples: 0-dimensional."""
    return per_sample_norm(covector).sum()


def step_figures(update: list[Tensor], previous: list[Tensor], points: list[Tensor]) -> dict[str, Tensor]:
    """Figures of one step in parameter space, 0-dimensional; see the head of the module.

    Args:
        update: d_t.
        previous: d_(t-1), of the same shapes; empty where it is not known.
        points: theta_(t-1).

    Returns:
        `update`, and `cosine` where `previous` is known; 0 where nothing moved.
    """
    length = _norm(update)
    tiny = torch.finfo(length.dtype).tiny
    figures = {"update": length / _norm(points).clamp_min(tiny)}
    if len(previous) == len(update):
        figures["cosine"] = inner(update, previous) / (length * _norm(previous)).clamp_min(tiny)
    return figures


class Walk:
    """Looks at some of an optimizer's steps: the first one, every k-th, and the one before each for its direction.

    At those it holds two copies of the parameters, at others none (with k = 1, always one). Nothing waits for the
    device, and what the optimizer does is not changed.

    Args:
        optimizer: whose parameters are looked at.
        every: k; 0 to look at none.

    Attributes:
        steps: taken so far.

    Raises:
        UsageError: `every` is negative.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, every: int = 0) -> None:
        if every < 0:
            raise UsageError(f"diagnose_every must be at least 0, got {every}")
        self.optimizer = optimizer
        self.every = every
        self.steps = 0
        self._previous: list[Tensor] = []

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 1, is measured."""
        return self.every > 0 and (step == 1 or step % self.every == 0)

    @property
    def measures_next(self) -> bool:
        """Whether the step to come is measured."""
        return self.is_due(self.steps + 1)

    def step(self, move: Callable[[], Tensor | None]) -> dict[str, Tensor]:
        """Let the optimizer make its next step.

        Args:
            move: makes it; returns the norm of the gradient, where it was measured.

        Returns:
            `norm_g`, the norm of the gradient, where `move` or this step measures it, and `step_figures` if it is due.
        """
        self.steps += 1
        due, leads = self.is_due(self.steps), self.is_due(self.steps + 1)
        points = self._points() if due or leads else []
        before = [point.clone() for point in points]
        norm = move()
        figures = {} if norm is None else {"norm_g": norm}
        update = list(torch._foreach_sub(points, before)) if points else []
        if due and points:
            covectors = [point.grad.detach() for point in self._parameters() if point.grad is not None]
            gradient = {"norm_g": _norm(covectors)} if covectors else {}
            figures = gradient | figures | step_figures(update, self._previous, before)
        self._previous = update if leads else []
        return figures

    def forget(self) -> None:
        """A step was left out: it counts, and has no direction."""
        self.steps += 1
        self._previous = []

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the direction that the next one is compared with, if it will be."""
        return {"steps": self.steps, "previous": self._previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.steps = state["steps"]
        points = self._points()
        fits = len(points) == len(state["previous"])
        self._previous = [d.to(p.device) for d, p in zip(state["previous"], points, strict=True)] if fits else []

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _points(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters()]


def _norm(vector: Sequence[Tensor]) -> Tensor:
    return inner(vector, vector).sqrt()


def _mean_share(hits: list[Tensor]) -> Tensor:
    return torch.stack([torch.mean(hit, dtype=torch.float32) for hit in hits]).mean()
