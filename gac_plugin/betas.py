"""Conjugacy rules: beta in d = u + beta d_previous, from six inner products.

Notation: g the covector of this step, g- that of the step before, y = g - g-, u = M^-1 g, d- the direction before;
<g, y>* and <y, y>* are taken in the dual metric, <a, b>* = <a, M^-1 b>.

    FR   <g, u> / <g-, u->                              Fletcher & Reeves 1964
    PR+  max(0, <g, y>* / <g-, u->)                     Polak & Ribiere 1969, Powell's max
    HS   <g, y>* / kappa                                Hestenes & Stiefel 1952
    DY   <g, u> / kappa                                 Dai & Yuan 1999
    HZ   (<g, y>* + 2 <y, y>* <d-, g> / kappa) / kappa  Hager & Zhang 2005
    HS-DY, FR-PR: the hybrids of Dai & Yuan 2001 and of Gilbert & Nocedal 1992

The textbooks state these for the gradient of a cost that is *descended*, where kappa = <d-, y>. Here g is the covector
of a score that is *ascended*: g and y change sign and d- does not, so kappa = -<d-, y>, the curvature along d-,
positive where the score is concave. With this sign every rule is the textbook's, and each solves an n-dimensional
quadratic in n exact line searches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

Vector = TypeVar("Vector", Tensor, list[Tensor])


@dataclass
class InnerProducts(Generic[Vector]):
    """The six inner products, each computed when a rule asks for it.

    All products have one shape: 0-dimensional for one direction in parameter space, (B,) for a direction per sample.

    Attributes:
        inner: (a, b) -> <a, b>.
        sharp: a -> M^-1 a at this step.
        g, u: covector and direction of this step.
        y: g - g-, the change of the covector; None for a rule that does not use it.
        d_previous: d-, the direction of the step before.
        gu_previous: <g-, u-> of the step before.
    """

    inner: Callable[[Vector, Vector], Tensor]
    sharp: Callable[[Vector], Vector]
    g: Vector
    u: Vector
    y: Vector | None
    d_previous: Vector
    gu_previous: Tensor

    @property
    def change(self) -> Vector:
        assert self.y is not None, "a rule that reads y must be declared with uses_change=True"
        return self.y

    @cached_property
    def gu(self) -> Tensor:
        """<g, u>"""
        return self.inner(self.g, self.u)

    @cached_property
    def gy(self) -> Tensor:
        """<g, y>* = <u, y>"""
        return self.inner(self.u, self.change)

    @cached_property
    def yy(self) -> Tensor:
        """<y, y>* = <y, M^-1 y>"""
        return self.inner(self.change, self.sharp(self.change))

    @cached_property
    def dg(self) -> Tensor:
        """<d-, g>"""
        return self.inner(self.d_previous, self.g)

    @cached_property
    def curvature(self) -> Tensor:
        """kappa = -<d-, y>"""
        return -self.inner(self.d_previous, self.change)


@dataclass(frozen=True)
class BetaRule:
    """A conjugacy rule.

    Attributes:
        name: its key in `BETAS`.
        formula: inner products -> beta, of their shape; None for beta = 0, which keeps no memory at all.
        description: one line with the formula.
        uses_change: whether the formula reads y, so that g- has to be kept.
    """

    name: str
    formula: Callable[[InnerProducts], Tensor] | None
    description: str
    uses_change: bool = True


def fletcher_reeves(p: InnerProducts) -> Tensor:
    """FR = <g, u> / <g-, u->"""
    return p.gu / p.gu_previous


def polak_ribiere(p: InnerProducts) -> Tensor:
    """PR = <g, y>* / <g-, u->"""
    return p.gy / p.gu_previous


def polak_ribiere_plus(p: InnerProducts) -> Tensor:
    """PR+ = max(0, PR)"""
    return polak_ribiere(p).clamp_min(0)


def hestenes_stiefel(p: InnerProducts) -> Tensor:
    """HS = <g, y>* / kappa"""
    return p.gy / p.curvature


def dai_yuan(p: InnerProducts) -> Tensor:
    """DY = <g, u> / kappa"""
    return p.gu / p.curvature


def hager_zhang(p: InnerProducts) -> Tensor:
    """HZ = (<g, y>* + 2 <y, y>* <d-, g> / kappa) / kappa"""
    return (p.gy + 2 * p.yy * p.dg / p.curvature) / p.curvature


def hestenes_stiefel_dai_yuan(p: InnerProducts) -> Tensor:
    """HS-DY = max(0, min(HS, DY))"""
    return torch.minimum(hestenes_stiefel(p), dai_yuan(p)).clamp_min(0)


def fletcher_reeves_polak_ribiere(p: InnerProducts) -> Tensor:
    """FR-PR = PR kept within [-FR, FR]"""
    fr = fletcher_reeves(p)
    return polak_ribiere(p).clamp(-fr, fr)


BETAS: dict[str, BetaRule] = {
    rule.name: rule
    for rule in (
        BetaRule("none", None, "beta = 0: steepest ascent under the metric", uses_change=False),
        BetaRule("fr", fletcher_reeves, "Fletcher-Reeves: <g,u> / <g-,u->", uses_change=False),
        BetaRule("pr+", polak_ribiere_plus, "Polak-Ribiere, never negative: max(0, <g,y>* / <g-,u->)"),
        BetaRule("hs", hestenes_stiefel, "Hestenes-Stiefel: <g,y>* / kappa, kappa = -<d-,y>"),
        BetaRule("dy", dai_yuan, "Dai-Yuan: <g,u> / kappa"),
        BetaRule("hz", hager_zhang, "Hager-Zhang: (<g,y>* + 2 <y,y>* <d-,g> / kappa) / kappa"),
        BetaRule("hs-dy", hestenes_stiefel_dai_yuan, "hybrid: max(0, min(HS, DY))"),
        BetaRule("fr-pr", fletcher_reeves_polak_ribiere, "hybrid: PR kept within [-FR, FR]"),
    )
}


def conjugate_beta(rule: BetaRule, products: InnerProducts, beta_max: float) -> Tensor:
    """The rule's beta made safe: capped, and 0 (a restart) where it is not finite or d would not ascend.

        d = u + beta d-  ascends while  <g, d> = <g, u> + beta <d-, g> > 0

    The first step needs no case of its own: with d- = 0 and <g-, u-> = 0 every formula is 0/0 or x/0, hence beta = 0.
    Nothing here reads a value back to the host.

    Args:
        rule: a rule with a formula.
        products: the inner products of this step.
        beta_max: bound on |beta|.

    Returns:
        beta, of the shape of the products.
    """
    assert rule.formula is not None
    beta = torch.nan_to_num(rule.formula(products), nan=0.0, posinf=0.0, neginf=0.0).clamp(-beta_max, beta_max)
    ascends = products.gu + beta * products.dg > 0
    return torch.where(ascends, beta, torch.zeros_like(beta))
