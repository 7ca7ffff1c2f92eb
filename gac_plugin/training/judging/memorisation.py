"""Whether a generator gives back its training samples, and whether the discriminator has learned them by heart.

Real samples that were held out tell what to expect: they come from the same source and cannot have been copied.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gac_plugin.cotangent import evaluating
from gac_plugin.protocols import Codec
from gac_plugin.training.data.source import Decoded, sample
from gac_plugin.training.files import write_grid
from gac_plugin.training.judging.features import Features

NEAR = 0.05
"""Share of the held-out samples that count as near to a training sample: the nearest ones."""
PAIRS = 16
"""Pairs in the picture."""
GAP_SAMPLES = 1_000
"""Of either kind, for `discriminator_gap`."""
AT_ONCE = 256
Z = 1.96
"""Half the width of a 95% interval, in standard deviations."""


@dataclass(frozen=True)
class Memorisation:
    """Generated samples against those that the generator was trained on.

    Attributes:
        features: in which distances were taken.
        near: share of the held-out samples that are as near to a training sample as the nearest 5% of them; more than
            5% where there are ties.
        closer: share of the generated samples that are as near to one as those: `near` is what fresh real samples give.
        closer_null: 95% interval of that share for as many fresh real samples.
        copied: share of generated samples whose nearest real sample, of training and held-out ones together, is a
            training sample.
        copied_null: 95% interval of that share for a generator that has not seen which ones are which.
        authenticity: share of generated samples that are farther from the nearest training sample than that one is
            from its own nearest one (Alaa et al. 2022, "How faithful is your synthetic data?").
        authenticity_real: the same share of the held-out samples.
        generated_samples, training_samples, held_out_samples: how many were compared.
    """

    features: str
    near: float
    closer: float
    closer_null: tuple[float, float]
    copied: float
    copied_null: tuple[float, float]
    authenticity: float
    authenticity_real: float
    generated_samples: int
    training_samples: int
    held_out_samples: int

    @property
    def memorises(self) -> bool:
        """Whether both shares are above what chance gives.

        `closer` alone is so for any generator of typical samples, which lie near to real ones of all kinds.
        """
        return self.closer > self.closer_null[1] and self.copied > self.copied_null[1]

    @property
    def verdict(self) -> str:
        """The finding in words."""
        found = (
            f"{self.closer:.0%} of samples are closer to a training sample than {self.near:.0%} of real ones are "
            f"(by chance {self.closer_null[0]:.0%} to {self.closer_null[1]:.0%})"
        )
        nearest = (
            f"for {self.copied:.0%} the nearest real sample is a training one "
            f"(by chance {self.copied_null[0]:.0%} to {self.copied_null[1]:.0%})"
        )
        return f"{'memorises' if self.memorises else 'no sign of memorisation'}: {found}; {nearest}"

    def to_json(self) -> dict[str, Any]:
        """Names and values, with the verdict."""
        return {"verdict": self.verdict, "memorises": self.memorises, **asdict(self)}


def memorisation(
    features: Features, train: Tensor, held_out: Tensor, generated: Tensor
) -> tuple[Memorisation, tuple[Tensor, Tensor]]:
    """Look for training samples among generated ones.

    Args:
        features: in which to take distances. Those of a classifier of the training samples will not do: these lie
            elsewhere among its features than fresh real samples.
        train, held_out, generated: uint8 pictures, shapes (N, C, H, W), (M, C, H, W) and (K, C, H, W), at least 2 of
            each.

    Returns:
        The finding; and the closest pairs, row numbers of generated samples and of their nearest training samples,
        int64, the closest first.
    """
    t, h, g = (features.of(pixels).double() for pixels in (train, held_out, generated))
    to_train, source = nearest(g, t)
    real_to_train, real_source = nearest(h, t)
    edge = real_to_train.kthvalue(max(1, round(NEAR * len(h)))).values
    near = int((real_to_train <= edge).sum())
    copied, copied_null = _share_of_training(g, t, h)
    return Memorisation(
        features=features.name,
        near=near / len(h),
        closer=float((to_train <= edge).double().mean()),
        closer_null=_interval_of_fresh(near, len(h), len(g)),
        copied=copied,
        copied_null=copied_null,
        authenticity=_authenticity(to_train, source, t),
        authenticity_real=_authenticity(real_to_train, real_source, t),
        generated_samples=len(g),
        training_samples=len(t),
        held_out_samples=len(h),
    ), _closest(to_train, source)


def nearest(points: Tensor, among: Tensor, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance and row number of the nearest neighbour of each point.

    Args:
        points: float64, shape (N, F).
        among: float64, shape (M, F).
        apart: int64, shape (N,): a row of `among`, for each point, that does not count, such as itself.
    """
    found = []
    for rows in torch.arange(len(points), device=points.device).split(AT_ONCE):
        distances = torch.cdist(points[rows], among)
        if apart is not None:
            distances.scatter_(1, apart[rows, None], torch.inf)
        found.append(distances.argmin(dim=1))
    index = torch.cat(found)
    return (points - among[index]).norm(dim=1), index  # once more: cdist rounds the distance of equal points


def _interval_of_fresh(near: int, held_out: int, fresh: int) -> tuple[float, float]:
    """95% interval of the share of fresh real samples that are as near as `near` of the held-out ones.

    The probability of one, p, is distributed as Beta(near, held_out + 1 - near), and the share of n given p as
    Binomial(n, p) / n:  mean m = near / (held_out + 1),  variance m (1 - m) (1 / n + (1 - 1 / n) / (held_out + 2)).
    """
    mean = near / (held_out + 1)
    spread = math.sqrt(mean * (1 - mean) * (1 / fresh + (1 - 1 / fresh) / (held_out + 2)))
    return max(0.0, mean - Z * spread), min(1.0, mean + Z * spread)


def _share_of_training(g: Tensor, t: Tensor, h: Tensor) -> tuple[float, tuple[float, float]]:
    """Share of generated samples whose nearest real sample is a training one, and its interval by chance.

    If the generator does not know which of the P = N + M real samples are the N training ones, these are any N of them.
    With c_j the generated samples that are nearest to the real one j, the share s = sum over training j of c_j / K has
    under these choices the mean N / P and the variance  N M / (P (P - 1)) sum_j (c_j - K / P)^2 / K^2.
    """
    count, places = len(t) + len(h), torch.randperm(len(t) + len(h), generator=torch.Generator().manual_seed(0))
    places = places.to(t.device)  # so that among equal samples the first one is any of them
    index = places[nearest(g, torch.cat([t, h])[places])[1]]
    share = float((index < len(t)).double().mean())
    counts = torch.bincount(index, minlength=count).double()
    mean = len(t) / count
    spread = math.sqrt(mean * len(h) / (count - 1) * float((counts - len(g) / count).square().sum())) / len(g)
    return share, (max(0.0, mean - Z * spread), min(1.0, mean + Z * spread))


def _authenticity(to_train: Tensor, source: Tensor, t: Tensor) -> float:
    sources, which = source.unique(return_inverse=True)
    between, _ = nearest(t[sources], t, apart=sources)
    return float((to_train > between[which]).double().mean())


def _closest(to_train: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    order = to_train.argsort()[:PAIRS].cpu()
    return order, source.cpu()[order]


def draw_pairs(path: Path, generated: Tensor, train: Tensor, pairs: tuple[Tensor, Tensor]) -> None:
    """Write a picture of the closest pairs: generated samples above, the nearest training sample of each below.

    Args:
        path: where it is to stand.
        generated, train: uint8 pictures, shapes (K, C, H, W) and (N, C, H, W).
        pairs: of `memorisation`.

    Raises:
        UsageError: it cannot be written.
    """
    above, below = generated.cpu()[pairs[0]], train[pairs[1].to(train.device)].cpu()
    write_grid(path, torch.cat([above, below]), columns=len(above))


@torch.no_grad()
def discriminator_gap(
    discriminator: nn.Module, codec: Codec, train: Decoded, held_out: Decoded, device: torch.device, conditional: bool
) -> float | None:
    """Mean logit of D on training samples minus that on held-out ones; above 0 where D knows its samples by heart.

    Args:
        discriminator: used in evaluation mode.
        codec: of the samples.
        train, held_out: real samples, of which at most 1,000 each are taken, evenly spaced.
        device: where the discriminator is.
        conditional: whether it is told their labels.

    Returns:
        None if nothing was held out.
    """
    if train.split == held_out.split:
        return None
    means = []
    with evaluating(discriminator):
        for real in (sample(train, GAP_SAMPLES), sample(held_out, GAP_SAMPLES)):
            logits = []
            for rows in torch.arange(len(real)).split(AT_ONCE):
                told = {"labels": real.labels[rows].to(device)} if conditional and real.labels is not None else {}
                logits.append(discriminator(codec.to_samples(real[rows].to(device)), **told).double().flatten())
            means.append(torch.cat(logits).mean())
    return float(means[0] - means[1])
