"""Measures of generated against real samples, both as feature vectors; and how sure one can be of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024
CACHED = 128
"""Rows of a matrix that is used at once and fits into the cache: three times as fast as `CHUNK`."""
MANIFOLD, DENSITY = 3, 5
"""Neighbours that reach the edge of a sample's ball, for precision and recall, and for density and coverage: those of
the papers."""
LEVEL = 0.95
"""Of the intervals."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64 (Heusel et al. 2017).

    With S = R^T R the eigenvalues of S_a S_b are the squared singular values of R_a R_b^T.

    Args:
        a, b: features, shapes (N, F) and (M, F), at least 2 of each.
    """
    r_a, r_b = _root_of_covariance(a), _root_of_covariance(b)
    apart = (a.double().mean(0) - b.double().mean(0)).square().sum()
    distance = apart + r_a.square().sum() + r_b.square().sum() - 2 * torch.linalg.svdvals(r_a @ r_b.T).sum()
    return max(0.0, float(distance))


def _root_of_covariance(x: Tensor) -> Tensor:
    """R with R^T R the covariance of the rows of x."""
    x = x.double()
    return torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) with k(x, y) = (<x, y> / F + 1)^3, in float64 (Binkowski et al. 2018).

    The mean over all pairs of different samples: unbiased, and therefore below 0 at times. The paper takes the mean
    over random subsets, which is the same but for chance.

    Args:
        a, b: features, shapes (N, F) and (M, F), at least 2 of each.
    """
    a, b = a.double(), b.double()
    return float(_mean_within(a) + _mean_within(b) - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    one = torch.ones((), dtype=a.dtype, device=a.device)
    parts = (torch.addmm(one, part, b.T, alpha=1 / b.shape[1]) for part in a.split(CACHED))
    return torch.stack([kernel.square().mul_(kernel).sum() for kernel in parts]).sum()


def _mean_within(x: Tensor) -> Tensor:
    own = (x.square().mean(1) + 1).pow(3).sum()
    return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def precision(real: Tensor, generated: Tensor, neighbours: int = MANIFOLD) -> float:
    """Share of generated samples in the ball around a real one, up to its k-th neighbour (Kynkaanniemi et al. 2019).

    Args:
        real, generated: features, shapes (N, F) and (M, F), at least 2 of each.
        neighbours: k; at most N - 1 is taken.
    """
    radii = _radii(real, neighbours)
    inside = [(torch.cdist(part, real) <= radii).any(dim=1) for part in generated.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def recall(real: Tensor, generated: Tensor, neighbours: int = MANIFOLD) -> float:
    """Share of real samples in the ball around a generated one; see `precision`."""
    return precision(generated, real, neighbours)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = MANIFOLD) -> tuple[float, float]:
    """Both; see `precision`."""
    return precision(real, generated, neighbours), recall(real, generated, neighbours)


def density(real: Tensor, generated: Tensor, neighbours: int = DENSITY) -> float:
    """In how many balls of real samples a generated one lies, on average, of the k that are expected: 1 is as for real.

    Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models". Arguments as for `precision`.
    """
    radii = _radii(real, neighbours)
    balls = [(torch.cdist(part, real) <= radii).sum(dim=1) for part in generated.split(CHUNK)]
    return float(torch.cat(balls).double().mean()) / neighbours


def coverage(real: Tensor, generated: Tensor, neighbours: int = DENSITY) -> float:
    """Share of real samples with a generated one in their ball; see `density`."""
    radii = _radii(real, neighbours)
    nearest = [torch.cdist(part, generated).min(dim=1).values for part in real.split(CHUNK)]
    return float((torch.cat(nearest) <= radii).double().mean())


def _radii(manifold: Tensor, neighbours: int) -> Tensor:
    # the nearest neighbour of a point in its own set is the point itself: take the k + 1 nearest
    nearest = 1 + min(neighbours, len(manifold) - 1)
    return torch.cat([torch.cdist(part, manifold).kthvalue(nearest, dim=1).values for part in manifold.split(CHUNK)])


@dataclass(frozen=True)
class Measure:
    """One figure of an evaluation.

    Attributes:
        title: for people.
        meaning: what to look for.
        of: features (N, F) of real and (M, F) of generated samples -> the figure.
        least, most: its range.
        equal: whether it depends on N and M so much that it is taken of equally many.
    """

    title: str
    meaning: str
    of: Callable[[Tensor, Tensor], float]
    least: float = 0.0
    most: float = math.inf
    equal: bool = False


MEASURES = {
    "frechet": Measure("Frechet distance", "lower is better", frechet_distance),
    "kernel": Measure("kernel distance", "lower is better, below 0 by chance", kernel_distance, least=-math.inf),
    "precision": Measure("precision", "share of generated samples near a real one", precision, most=1, equal=True),
    "recall": Measure("recall", "share of real samples near a generated one", recall, most=1, equal=True),
    "density": Measure("density", "1 where generated samples lie as densely as real ones", density, equal=True),
    "coverage": Measure("coverage", "share of real samples with a generated one near", coverage, most=1, equal=True),
}


def measure(real: Tensor, generated: Tensor) -> dict[str, float]:
    """All of `MEASURES` by name.

    Args:
        real, generated: features, shapes (N, F) and (M, F), in random order.
    """
    count = min(len(real), len(generated))
    few = real[:count], generated[:count]
    return {name: one.of(*few) if one.equal else one.of(real, generated) for name, one in MEASURES.items()}


def intervals(
    real: Tensor, generated: Tensor, found: Mapping[str, float], resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of `MEASURES` for as many samples as these; see `how_sure`.

    A bootstrap that draws with repetition puts samples at distance 0 from their like, which no nearest-neighbour
    measure survives. Halves drawn without repetition have none, and their spread is the right one: the variance of a
    mean over n of N samples about the mean over all is s^2 / n - s^2 / N, which for n = N / 2 is s^2 / N. (Politis and
    Romano 1994, "Large sample confidence regions based on subsamples under minimal assumptions".) A measure of half as
    many samples is off by its bias, so the quantiles are centred.

    Args:
        real, generated: features, shapes (N, F) and (M, F), at least 4 of each.
        found: the measures of all of them.
        resamples: how many halves are drawn of both.
        seed: fixes them.
    """
    draw = torch.Generator().manual_seed(seed)
    drawn = [measure(_half(real, draw), _half(generated, draw)) for _ in range(resamples)]
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    told = {}
    for name, one in MEASURES.items():
        values = torch.tensor([values[name] for values in drawn], dtype=torch.float64)
        low, high = (found[name] + (values - values.mean()).quantile(edges)).clamp(one.least, one.most).tolist()
        told[name] = (low, high)
    return told


def how_sure(resamples: int) -> str:
    """The method of `intervals` in words."""
    return (
        f"{LEVEL:.0%} intervals by {resamples} half-samples of both sets, drawn without repetition (a bootstrap that "
        "nearest neighbours survive); quantiles centred on the figure of all samples"
    )


def _half(x: Tensor, draw: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=draw)[: len(x) // 2].to(x.device)]
