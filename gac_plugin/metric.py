"""Metrics: the map from covectors to directions, u = M^-1 g (the musical isomorphism "sharp").

A gradient is a covector. Which direction is steepest depends on how lengths are measured, that is, on the metric M.
A `Metric` gives, at each step, the map `Sharp`; `ConjugateGradient` never looks inside.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gac_plugin.tensors import on_whole


class Sharp(Protocol):
    """u = M^-1 g over a list of tensors."""

    def __call__(self, covectors: list[Tensor]) -> list[Tensor]:
        """Return M^-1 covectors: new tensors of the same shapes."""
        ...

    def ascend_(self, points: list[Tensor], covectors: list[Tensor], rate: float) -> None:
        """points += rate * M^-1 covectors, in place and without building the direction where that can be helped."""
        ...


State = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A rule for the metric along training.

    Attributes:
        name: its key in `METRICS`.
        init: parameter -> the named tensors that the metric keeps for it.
        at: (covectors, states, settings) -> the map at this step. `states[i]` holds the tensors of `init` for tensor
            i, which are updated in place, and `step`, the number of this step counted from 1; `settings` is the
            optimizer's parameter group, with `beta2` and `eps`.
        description: one line with the formula and its source.
    """

    name: str
    init: Callable[[Tensor], dict[str, Tensor]]
    at: Callable[[list[Tensor], list[State], Mapping[str, Any]], Sharp]
    description: str


class Identity:
    """M = I: u = g."""

    def __call__(self, covectors: list[Tensor]) -> list[Tensor]:
        return [covector.clone() for covector in covectors]

    def ascend_(self, points: list[Tensor], covectors: list[Tensor], rate: float) -> None:
        torch._foreach_add_(points, covectors, alpha=rate)


class Diagonal:
    """M = diag(m): u = g / m.

    Args:
        diagonal: m, one tensor for each covector, of its shape.
    """

    def __init__(self, diagonal: list[Tensor]) -> None:
        self.diagonal = diagonal

    def __call__(self, covectors: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_div(covectors, self.diagonal))

    def ascend_(self, points: list[Tensor], covectors: list[Tensor], rate: float) -> None:
        torch._foreach_addcdiv_(points, covectors, self.diagonal, value=rate)


class Spectral:
    """u = U V^T for each matrix g = U S V^T: of all matrices of spectral norm 1 the one with the largest <g, u>.

    This is the duality map of the spectral norm (Bernstein & Newhouse 2024); <g, u> is then the nuclear norm of g.
    A kernel of shape (out, ...) counts as a matrix (out, rest), a vector as one column (u = g / ||g||).

    Args:
        eps: covectors of a smaller norm count as zero, so that rounding is not blown up to a step of full length.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    def __call__(self, covectors: list[Tensor]) -> list[Tensor]:
        return [on_whole(lambda g: orthogonalise(g, self.eps), covector) for covector in covectors]

    def ascend_(self, points: list[Tensor], covectors: list[Tensor], rate: float) -> None:
        torch._foreach_add_(points, self(covectors), alpha=rate)


# p(s) = a s + b s^3 + c s^5 applied to all singular values at once. The first polynomial (K. Jordan, Muon, 2024) lifts
# small values fast but leaves them between 0.68 and 1.13; the second has the fixed point 1 and converges cubically.
_LIFT, _POLISH = (3.4445, -4.7750, 2.0315), (1.875, -1.25, 0.375)
_NEWTON_SCHULZ = (*[_LIFT] * 5, *[_POLISH] * 4)


def orthogonalise(g: Tensor, eps: float = 1e-8) -> Tensor:
    """U V^T of g = U S V^T by Newton-Schulz iteration: matrix products alone, so nothing waits for the host.

    Singular values above 0.002 of the Frobenius norm come out as 1 to rounding; smaller ones come out smaller, and
    directions that g does not have stay absent.

    Args:
        g: a floating-point tensor of any shape; (n, ...) counts as a matrix (n, rest), a scalar as 1 x 1.
        eps: added to the Frobenius norm that g is divided by.

    Returns:
        A tensor of the shape and dtype of `g`; zero where `g` is zero, and near zero where its norm is far below `eps`.
    """
    matrix = g.reshape(g.shape[0] if g.dim() > 0 else 1, -1)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = wide / (torch.linalg.matrix_norm(wide) + eps)
    for a, b, c in _NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrix else x.mT).reshape(g.shape)


def _adam(covectors: list[Tensor], states: list[State], settings: Mapping[str, Any]) -> Diagonal:
    # v <- b2 v + (1 - b2) g^2        m = sqrt(v / (1 - b2^t)) + eps        (Kingma & Ba 2015, the second moment alone)
    beta2, moments = settings["beta2"], [state["second_moment"] for state in states]
    torch._foreach_mul_(moments, beta2)
    torch._foreach_addcmul_(moments, covectors, covectors, value=1 - beta2)
    diagonal = list(torch._foreach_sqrt(moments))
    torch._foreach_div_(diagonal, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
    torch._foreach_add_(diagonal, settings["eps"])
    return Diagonal(diagonal)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("identity", lambda p: {}, lambda *_: Identity(), "u = g: the plain gradient"),
        Metric(
            "adam",
            lambda p: {"second_moment": torch.zeros_like(p)},
            _adam,
            "u = g / (sqrt(v) + eps), v the running mean of g^2, bias-corrected: Adam's diagonal (Kingma & Ba 2015)",
        ),
        Metric(
            "spectral",
            lambda p: {},
            lambda _covectors, _states, settings: Spectral(settings["eps"]),
            "u = U V^T of each matrix g = U S V^T: duality map of the spectral norm (Bernstein & Newhouse 2024)",
        ),
    )
}
