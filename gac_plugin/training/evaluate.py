"""How far generated samples are from real ones: Frechet distance, precision and recall, in named features.

A score means nothing without its features and sample counts, so both are part of every result.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gac_plugin.training.source import Decoded

CHUNK = 1024


@dataclass(frozen=True)
class Features:
    """A map from images to vectors in which distances mean something.

    Attributes:
        name: what to call it in a result, with what is needed to judge it.
        extract: uint8 pixels (N, C, H, W) -> float32 vectors (N, F).
        classify: vectors (N, F) -> int64 classes (N,), where the features are those of a classifier.
        accuracy: share of real test images whose class it finds.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Generated against real samples.

    Attributes:
        features: name of the features.
        frechet: Frechet distance of normal distributions fitted to both feature sets, at least 0; lower is better.
        floor: the same between two halves of the real samples, which is what chance alone gives.
        precision: share of generated samples near a real one, in [0, 1].
        recall: share of real samples near a generated one, in [0, 1].
        real_samples, generated_samples: how many went into the Frechet distance; precision and recall use the smaller
            number of both.
        recognised: share of generated samples that a classifier of the data set takes for the class that was asked for.
        recognised_real: the same share of real test samples.
        figures: what the codec adds; see `Codec.figures`.
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

    @property
    def scores(self) -> dict[str, float]:
        """What is worth following along a run."""
        told = {} if self.recognised is None else {"recognised": self.recognised}
        return {"frechet": self.frechet, "precision": self.precision, "recall": self.recall, **told, **self.figures}

    def to_json(self) -> dict[str, float | int | str]:
        """Names and values of what was measured."""
        values = asdict(self)
        figures = values.pop("figures")
        return {name: value for name, value in values.items() if value is not None} | figures


def evaluate(
    features: Features,
    real: Tensor,
    generated: Tensor,
    labels: Tensor | None = None,
    figures: Mapping[str, float] = {},
) -> Evaluation:
    """Compare generated with real images.

    Args:
        features: what to measure distances in.
        real, generated: uint8, shapes (N, C, H, W) and (M, C, H, W), at least 8 of each.
        labels: int64, shape (M,), the classes that the generated images were asked to be of.
        figures: to be told as well.
    """
    a, b = _extract(features, real), _extract(features, generated)
    shuffled = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0)).to(a.device)]
    count = min(len(a), len(b))
    precision, recall = precision_recall(shuffled[:count], b[:count])
    recognised = None
    if labels is not None and features.classify is not None:
        recognised = float((features.classify(b).cpu() == labels.cpu()).float().mean())
    return Evaluation(
        features=features.name,
        frechet=frechet_distance(a, b),
        floor=frechet_distance(shuffled[: len(a) // 2], shuffled[len(a) // 2 :]),
        precision=precision,
        recall=recall,
        real_samples=len(a),
        generated_samples=len(b),
        recognised=recognised,
        recognised_real=None if recognised is None else features.accuracy,
        figures=dict(figures),
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64 (Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of S_a S_b, which are real and not negative.

    Args:
        a, b: features, shapes (N, F) and (M, F).
    """
    a, b = a.double(), b.double()
    s_a, s_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    root_trace = torch.linalg.eigvals(s_a @ s_b).real.clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * root_trace
    return max(0.0, float(distance))


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of each set inside the other's manifold, balls to the k-th neighbour (Kynkaanniemi et al. 2019).

    Args:
        real, generated: features, shapes (N, F) and (M, F), more than `neighbours` of each.
        neighbours: k.

    Returns:
        Precision and recall, in [0, 1].
    """
    return _share_inside(generated, real, neighbours), _share_inside(real, generated, neighbours)


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    # the nearest neighbour of a point in its own set is the point itself: take the k + 1 nearest
    radii = torch.cat(
        [torch.cdist(part, manifold).kthvalue(neighbours + 1, dim=1).values for part in manifold.split(CHUNK)]
    )
    inside = [(torch.cdist(part, manifold) <= radii).any(dim=1) for part in points.split(CHUNK)]
    return float(torch.cat(inside).float().mean())


def make_features(train: Decoded, test: Decoded, seed: int, device: torch.device) -> Features:
    """The features that need no download: of a small classifier trained on the data set, or of the pixels.

    Args:
        train: what the classifier learns, or the principal components are taken from.
        test: what its accuracy is measured on.
        seed: fixes the classifier.
        device: where to compute.
    """
    if train.labels is not None and test.labels is not None and 0 <= train.labels.min() < train.labels.max():
        return _classifier_features(train, test, seed, device)
    return _pixel_features(train, device)


def _classifier_features(
    train: Decoded, test: Decoded, seed: int, device: torch.device, steps: int = 1500, batch: int = 128, size: int = 64
) -> Features:
    assert train.labels is not None
    assert test.labels is not None
    x, y = train.values.to(device), train.labels.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 256), nn.ReLU(), nn.Linear(256, size), nn.ReLU()).to(
            device
        )
        head = nn.Linear(size, int(y.max()) + 1).to(device)
        parameters = [*body.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,)).to(device)
            optimizer.zero_grad()
            cross_entropy(head(body(_unit(x[rows]))), y[rows]).backward()
            optimizer.step()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    guesses = torch.cat([head(body(_unit(part.to(device)))).argmax(1).cpu() for part in test.values.split(CHUNK)])
    accuracy = float((guesses == test.labels).float().mean())
    name = f"{size} features of a classifier trained on this data set (accuracy {accuracy:.1%} on {test.split!r})"
    return Features(name, lambda pixels: body(_unit(pixels)), lambda vectors: head(vectors).argmax(1), accuracy)


def _pixel_features(train: Decoded, device: torch.device, size: int = 64) -> Features:
    x = _unit(train.values[:10_000].to(device)).flatten(1)
    size = min(size, *x.shape)
    mean = x.mean(0)
    components = torch.linalg.svd(x - mean, full_matrices=False).Vh[:size].T
    return Features(
        f"{size} principal components of the pixels in [0, 1]",
        lambda pixels: (_unit(pixels).flatten(1) - mean) @ components,
    )


def _extract(features: Features, pixels: Tensor) -> Tensor:
    return torch.cat([features.extract(part) for part in pixels.split(CHUNK)])


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 255
