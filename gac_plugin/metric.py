"""Metrics: the map from covectors to directions, u = M^-1 g (the musical isomorphism "sharp").

A gradient is a covector. Which direction is steepest depends on how lengths are measured, that is, on the metric M.
A `Metric` gives, at each step, the map `Sharp`; `ConjugateGradient` never looks inside.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gac_plugin.tensors import on_whole, whole


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


Bases = tuple[Tensor | None, Tensor | None]
"""Orthonormal bases L and R of a matrix's two sides, as columns; None for the one it is written in."""


class Turned:
    """M = (L x R) N (L x R)^T: u = L N^-1(L^T g R) R^T, the map N^-1 in other orthonormal bases.

    Args:
        bases: L and R of each covector, which counts as a matrix (out, rest).
        inner: N^-1.
        covectors, turned: covectors whose L^T g R is known already.
    """

    def __init__(self, bases: list[Bases], inner: Sharp, covectors: list[Tensor], turned: list[Tensor]) -> None:
        self.bases, self.inner, self.covectors, self.turned = bases, inner, covectors, turned

    def __call__(self, covectors: list[Tensor]) -> list[Tensor]:
        known = covectors is self.covectors
        turned = self.turned if known else [_in_bases(g, *pair) for g, pair in zip(covectors, self.bases, strict=True)]
        return [_from_bases(u, *pair) for u, pair in zip(self.inner(turned), self.bases, strict=True)]

    def ascend_(self, points: list[Tensor], covectors: list[Tensor], rate: float) -> None:
        torch._foreach_add_(points, self(covectors), alpha=rate)


def _in_bases(g: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """L^T g R, of the shape and dtype of g."""
    return _between(None if left is None else left.mT, g, right)


def _from_bases(u: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """L u R^T, of the shape and dtype of u."""
    return _between(left, u, None if right is None else right.mT)


def _between(left: Tensor | None, tensor: Tensor, right: Tensor | None) -> Tensor:
    if left is None and right is None:
        return tensor

    def product(matrix: Tensor) -> Tensor:
        result = as_matrix(matrix)
        if left is not None:
            result = left @ result.to(left.dtype)
        if right is not None:
            result = result.to(right.dtype) @ right
        return result.reshape(matrix.shape).to(matrix.dtype)

    return on_whole(product, tensor)


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
    matrix = as_matrix(g)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = wide / (torch.linalg.matrix_norm(wide) + eps)
    for a, b, c in _NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrix else x.mT).reshape(g.shape)


def as_matrix(g: Tensor) -> Tensor:
    """g of shape (out, ...) as (out, rest); a vector is one column, a scalar 1 x 1."""
    return g.reshape(g.shape[0] if g.dim() > 0 else 1, -1)


def _adam(covectors: list[Tensor], states: list[State], settings: Mapping[str, Any]) -> Diagonal:
    # v <- b2 v + (1 - b2) g^2        m = sqrt(v / (1 - b2^t)) + eps        (Kingma & Ba 2015, the second moment alone)
    beta2, moments = settings["beta2"], [state["second_moment"] for state in states]
    torch._foreach_mul_(moments, beta2)
    torch._foreach_addcmul_(moments, covectors, covectors, value=1 - beta2)
    diagonal = list(torch._foreach_sqrt(moments))
    torch._foreach_div_(diagonal, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
    torch._foreach_add_(diagonal, settings["eps"])
    return Diagonal(diagonal)


def kronecker(largest_side: int = 256, interval: int = 10) -> Metric:
    """Adam's diagonal in a basis that turns with the gradients: Shampoo's eigenbasis (SOAP, Vyas et al. 2024).

        A = E[g g^T]    B = E[g^T g]        L, R: their eigenvectors        (Gupta, Koren & Singer 2018, Shampoo)
        m = sqrt(E[(L^T g R)^2]) + eps      u = L ((L^T g R) / m) R^T

    for each matrix g of shape (out, rest), as in `Spectral`. One step of orthogonal iteration, L <- QR(A L), at a time
    follows the eigenvectors: any orthonormal basis makes a metric. The side n of a matrix of shape (m, n) costs two
    products of m n^2 multiplications in each step, and memory for two n x n matrices. Sides that are too dear keep the
    basis they are written in; vectors, and matrices of such sides alone, have Adam's diagonal.

    Args:
        largest_side: sides turn that are no longer than this and cost no more than those of a square of this side.
        interval: steps between one turn of the bases and the next; the first steps, as many, turn them each time.
    """

    def init(parameter: Tensor) -> dict[str, Tensor]:
        sides = dict(zip(("left", "right"), as_matrix(parameter).shape, strict=True)) if parameter.dim() > 1 else {}
        wide = torch.promote_types(parameter.dtype, torch.float32)
        state = {"second_moment": torch.zeros_like(parameter)}
        for side, length in sides.items():
            if length <= largest_side and length * parameter.numel() <= largest_side**3:
                basis = torch.eye(length, device=parameter.device, dtype=wide)
                state |= {side: torch.zeros_like(basis), f"{side}_basis": basis}
        return state

    def at(covectors: list[Tensor], states: list[State], settings: Mapping[str, Any]) -> Sharp:
        for covector, state in zip(covectors, states, strict=True):
            if state["step"] <= interval or state["step"] % interval == 0:
                since = 1 if state["step"] <= interval else interval
                _turn(state, covector, 1 - settings["beta2"] ** since)
        bases = [(state.get("left_basis"), state.get("right_basis")) for state in states]
        turned = [_in_bases(covector, *pair) for covector, pair in zip(covectors, bases, strict=True)]
        return Turned(bases, _adam(turned, states, settings), covectors, turned)

    about = "u = L ((L^T g R) / m) R^T: Adam's diagonal in Shampoo's eigenbasis (SOAP, Vyas et al. 2024)"
    return Metric("kronecker", init, at, about)


_STILL = 1e-4
"""Added to the eigenvalues, as a share of their mean: directions without gradients then keep still."""


def _turn(state: State, covector: Tensor, share: float) -> None:
    """Take g into A = E[g g^T] and B = E[g^T g] with this share, and turn the bases towards their eigenvectors."""
    sides = state.keys() & {"left", "right"}
    if not sides:
        return
    g = as_matrix(whole(covector))
    for side, matrix in (("left", g), ("right", g.mT)):
        if side in sides:
            average, basis = state[side], state[f"{side}_basis"]
            matrix = matrix.to(average.dtype)
            average.lerp_(matrix @ matrix.mT, share)
            still = _STILL * average.diagonal().mean()
            basis.copy_(torch.linalg.qr(average @ basis + still * basis).Q)


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
        kronecker(),
    )
}
