"""How far generated samples are from real ones, in named features.

A score means nothing without its features and sample counts, so both are part of every result.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gac_plugin.training.generate import generate
from gac_plugin.training.judging.features import Features, make_features
from gac_plugin.training.judging.measures import frechet_distance, how_sure, intervals, measure, precision_recall
from gac_plugin.training.networks import Recipe

__all__ = [
    "Evaluation",
    "Features",
    "evaluate",
    "frechet_distance",
    "generated_samples",
    "make_features",
    "precision_recall",
]


@dataclass(frozen=True)
class Evaluation:
    """Generated against real samples; see `judging.measures` for the figures.

    Attributes:
        features: name of the features.
        frechet: Frechet distance of normal distributions fitted to both feature sets, at least 0; lower is better.
        floor: the same between two halves of the real samples, which is what chance alone gives.
        precision: share of generated samples near a real one, in [0, 1].
        recall: share of real samples near a generated one, in [0, 1].
        real_samples, generated_samples: how many went into the distances; the other figures use the smaller number of
            both.
        recognised: share of generated samples that a classifier of the data set takes for the class that was asked for.
        recognised_real: the same share of real test samples.
        figures: what the codec adds; see `Codec.figures`.
        kernel: kernel distance; lower is better, below 0 by chance.
        density: how densely generated samples lie where real ones do, 1 as densely as those.
        coverage: share of real samples with a generated one near, in [0, 1].
        split: name of the split that the real samples are of.
        d_gap: mean logit of D on training samples minus on real ones of another split; None where not measured.
        floors: every measure between two halves of the real samples.
        intervals: by measure; see `judging.measures.intervals`. Empty if none were asked for.
        resamples: how many the intervals were taken from.
    """

    features: str
    frechet: float
    floor: float
    precision: float
    recall: float
    real_samples: int
    generated_samples: int
    recognised: float | None = None
    recognised_real: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    kernel: float | None = None
    density: float | None = None
    coverage: float | None = None
    split: str | None = None
    d_gap: float | None = None
    floors: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    resamples: int = 0

    @property
    def scores(self) -> dict[str, float]:
        """What is worth following along a run."""
        told = {name: getattr(self, name) for name in ("kernel", "density", "coverage", "recognised", "d_gap")}
        known = {name: value for name, value in told.items() if value is not None}
        return {"frechet": self.frechet, "precision": self.precision, "recall": self.recall, **known, **self.figures}

    def to_json(self) -> dict[str, Any]:
        """Names and values of what was measured."""
        values = asdict(self)
        figures, resamples = values.pop("figures"), values.pop("resamples")
        sure = {"resamples": resamples, "interval_method": how_sure(resamples)} if resamples else {}
        return {name: value for name, value in values.items() if value not in (None, {})} | sure | figures


def evaluate(
    features: Features,
    real: Tensor,
    generated: Tensor,
    labels: Tensor | None = None,
    figures: Mapping[str, float] = {},
    split: str | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Evaluation:
    """Compare generated with real images.

    Args:
        features: what to measure distances in.
        real, generated: uint8, shapes (N, C, H, W) and (M, C, H, W), at least 8 of each.
        labels: int64, shape (M,), the classes that the generated images were asked to be of.
        figures: to be told as well.
        split: name of the split that the real images are of.
        resamples: for the bootstrap intervals; 0 for none.
        seed: fixes the resamples.
    """
    a, b = features.of(real), features.of(generated)
    a = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0)).to(a.device)]
    found, floors = measure(a, b), measure(*a.tensor_split(2))
    recognised = None
    if labels is not None and features.classify is not None:
        recognised = float((features.classify(b).cpu() == labels.cpu()).float().mean())
    return Evaluation(
        features=features.name,
        **found,
        floor=floors["frechet"],
        real_samples=len(a),
        generated_samples=len(b),
        recognised=recognised,
        recognised_real=None if recognised is None else features.accuracy,
        figures=dict(figures),
        split=split,
        floors=floors,
        intervals=intervals(a, b, found, resamples, seed) if resamples else {},
        resamples=resamples,
    )


def generated_samples(
    generator: nn.Module, recipe: Recipe, known: Tensor | None, count: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Samples to evaluate, and the classes that were asked for.

    Args:
        generator: on the device.
        recipe: of it.
        known: int64, shape (N,), classes of the training samples: they are asked for as often as they come there.
        count: how many.
        seed: fixes classes and latents.
        device: where to compute.

    Returns:
        Samples as the codec stores them, and int64 labels, shape (count,), or None without classes.
    """
    labels = None
    if recipe.classes and known is not None:
        labels = known[torch.randint(len(known), (count,), generator=torch.Generator().manual_seed(seed))]
    return generate(generator, recipe, count, seed, device, labels), labels
