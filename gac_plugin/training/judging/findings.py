"""Findings: what the figures of a run say in plain language, and the setting that mends it.

Each is a sign in the figures, over the last quarter of the run unless it says otherwise, and one sentence. Signs are
rules of thumb, not proofs: they tell where to look, and what to try first.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gac_plugin.errors import UsageError
from gac_plugin.losses import LOSSES
from gac_plugin.training.config import Config
from gac_plugin.training.health import ALIKE, BEATEN, blind_loss

FEWEST = 4
"""Lines of metrics, below which nothing is said."""
SURE = 0.98
"""D wins when it is right about so many of both kinds of samples."""
GUESSING = 0.52
"""D is blind when it is right about so few of both kinds together, where 0.5 is guessing."""
NARROWER = 0.6
"""G narrows when the diversity of its samples falls below this share of what it was at its widest."""
AGAINST = -0.3
"""Directions oppose each other when their cosine is below this."""
STRIDE = 0.2
"""Steps are too long above, each one relative to the parameters."""
STILL = 1e-6
"""G stands still when half of its steps are below, relative to the parameters."""
SATURATED = 1e-6
"""G is saturated when its gradient is below this share of the covectors that were pulled back to it."""
FADED = 0.01
"""Covectors have faded when they are below this share of their norm in the first quarter."""
BY_HEART = 1.0
"""D learns its samples by heart when its mean logit is so much higher on training samples than on held-out ones. Of 128
samples each it is higher by up to .5 by chance, where there is no penalty."""
FAR = 10
"""G is far from the data when its Frechet distance is more than so many times that of two halves of the real ones."""
BETTER, WORSE = 0.1, 0.2
"""A run still improves when its Frechet distance falls by this share in the last quarter; the best came earlier when it
is lower than the last one by this share. Two seeds of one recipe differ by about 0.1."""

Evidence = dict[str, float | str]


@dataclass(frozen=True)
class Finding:
    """Something that the figures of a run say.

    Attributes:
        name: of its sign in `SIGNS`, "too short" or "nothing unusual".
        text: one sentence, with the figures behind it and, where something is wrong, what to do.
    """

    name: str
    text: str


class Curves:
    """The figures of a run by name, in the order of its steps; what is missing or not finite is left out.

    Args:
        records: lines of `metrics.jsonl`.
        evaluation: at the end of the run, as `evaluation.json` holds it; {} for none.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None = None) -> None:
        self.records = records
        self.evaluation = evaluation or {}

    def points(self, name: str) -> list[tuple[int, float]]:
        """Steps and figures."""
        found = ((record["step"], record.get(name)) for record in self.records)
        return [(step, value) for step, value in found if value is not None and math.isfinite(value)]

    def early(self, name: str) -> float | None:
        """Median over the first quarter; None where the figure is not there at least twice."""
        return self._median(name, lambda step, last: step <= last / 4)

    def late(self, name: str) -> float | None:
        """Median over the last quarter, likewise."""
        return self._median(name, lambda step, last: step > 3 * last / 4)

    def middle(self, name: str) -> float | None:
        """Median over the whole run, likewise."""
        return self._median(name, lambda step, last: True)

    def _median(self, name: str, inside: Callable[[int, int], bool]) -> float | None:
        last = self.records[-1]["step"]
        values = [value for step, value in self.points(name) if inside(step, last)]
        return statistics.median(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Sign:
    """What a finding is told by.

    Attributes:
        name: short and plain.
        evidence: (curves, configuration) -> the figures behind it, None where the sign is not there.
        text: the sentence, with places for the evidence.
    """

    name: str
    evidence: Callable[[Curves, Config], Evidence | None]
    text: str


def findings(
    records: Sequence[Mapping[str, Any]], config: Config, evaluation: Mapping[str, Any] | None = None
) -> list[Finding]:
    """What the figures of a run say, the gravest first; "nothing unusual" where no sign is there.

    Args:
        records: lines of its `metrics.jsonl`, oldest first. Figures that they lack are passed over.
        config: of the run.
        evaluation: at its end, likewise.
    """
    if len(records) < FEWEST:
        text = f"{len(records)} lines of metrics are too few to tell; train longer, or lower --log-every"
        return [Finding("too short", text)]
    curves = Curves(records, evaluation)
    found = [(sign, sign.evidence(curves, config)) for sign in SIGNS]
    told = [Finding(sign.name, sign.text.format(**evidence)) for sign, evidence in found if evidence is not None]
    return told or [Finding("nothing unusual", "nothing unusual in the figures")]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that a killed process left half-written at the end is passed over.

    Raises:
        UsageError: the file cannot be read, or is not one of metrics.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines[:-1]]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the metrics in {file}: {error}") from error
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise UsageError(f"{file} does not hold metrics, one JSON object with a step in each line")
    return records


def _left_out(curves: Curves, config: Config) -> Evidence | None:
    skipped = max((count for _, count in curves.points("skipped")), default=0)
    return {"skipped": skipped} if skipped else None


def _discriminator_wins(curves: Curves, config: Config) -> Evidence | None:
    blind, loss = blind_loss(LOSSES[config.loss]), curves.late("loss_d")
    accuracies = curves.late("accuracy_real"), curves.late("accuracy_fake")
    right = min((accuracy for accuracy in accuracies if accuracy is not None), default=None)
    sure = right is not None and right > SURE
    # as in `Health`: a loss without a floor, such as wasserstein, says nothing
    beaten = loss is not None and blind > 0 and loss < BEATEN * blind
    known = [] if right is None else [f"it is right about {right:.0%} of the samples"]
    known += [] if loss is None else [f"its loss is {loss:.2g}"]
    return {"signs": " and ".join(known)} if sure or beaten else None


def _discriminator_is_blind(curves: Curves, config: Config) -> Evidence | None:
    real, fake = curves.late("accuracy_real"), curves.late("accuracy_fake")
    right = math.nan if real is None or fake is None else (real + fake) / 2
    return {"right": right} if right < GUESSING else None


def _collapsed(curves: Curves, config: Config) -> Evidence | None:
    diversity = curves.late("diversity")
    return {"diversity": diversity} if diversity is not None and diversity < ALIKE else None


def _narrows(curves: Curves, config: Config) -> Evidence | None:
    values = [value for _, value in curves.points("diversity")]
    # a single draw may be wide by chance: the widest of three in a row
    widest = max((min(three) for three in zip(values, values[1:], values[2:], strict=False)), default=0.0)
    diversity = curves.late("diversity")
    narrower = diversity is not None and ALIKE <= diversity < NARROWER * min(widest, 1.0)
    return {"diversity": diversity, "widest": widest} if narrower else None  # type: ignore[dict-item]


def _directions_oppose(curves: Curves, config: Config) -> Evidence | None:
    cosine = curves.late("cosine")
    return {"cosine": cosine} if cosine is not None and cosine < AGAINST else None


def _steps_too_long(curves: Curves, config: Config) -> Evidence | None:
    update = curves.late("update")
    return {"update": update} if update is not None and update > STRIDE else None


def _saturated(curves: Curves, config: Config) -> Evidence | None:
    gradient, covector = curves.late("norm_g"), curves.late("norm_c")
    lost = gradient is not None and covector is not None and gradient < SATURATED * covector
    return {"gradient": gradient, "covector": covector} if lost else None  # type: ignore[dict-item]


def _stands_still(curves: Curves, config: Config) -> Evidence | None:
    update = curves.middle("update")
    still = update is not None and update < STILL and _saturated(curves, config) is None
    return {"update": update} if still else None  # type: ignore[dict-item]


def _covectors_faded(curves: Curves, config: Config) -> Evidence | None:
    early, late = curves.early("norm_c"), curves.late("norm_c")
    faded = early is not None and late is not None and late < FADED * early
    return {"share": late / early} if faded else None  # type: ignore[operator]


def _learns_by_heart(curves: Curves, config: Config) -> Evidence | None:
    gap = curves.late("d_gap")
    scaled = blind_loss(LOSSES[config.loss]) > 0  # else, as with wasserstein, logits have no scale
    return {"gap": gap} if scaled and gap is not None and gap > BY_HEART else None


def _far_from_the_data(curves: Curves, config: Config) -> Evidence | None:
    distance, floor = (curves.evaluation.get(name) for name in ("frechet", "floor"))
    far = isinstance(distance, float) and isinstance(floor, float) and distance > FAR * floor > 0
    return {"distance": distance, "times": distance / floor} if far else None  # type: ignore[dict-item, operator]


def _best_came_earlier(curves: Curves, config: Config) -> Evidence | None:
    evaluations = curves.points("frechet")
    if len(evaluations) < 2:
        return None
    step, best = min(evaluations, key=lambda evaluation: evaluation[1])
    _, last = evaluations[-1]
    return {"step": step, "best": best, "last": last} if best < (1 - WORSE) * last else None


def _still_improving(curves: Curves, config: Config) -> Evidence | None:
    evaluations = curves.points("frechet")
    before = [value for step, value in evaluations[:-1] if step <= 3 * evaluations[-1][0] / 4]
    if not before:
        return None
    then, now = before[-1], evaluations[-1][1]
    best = min(value for _, value in evaluations)
    return {"then": then, "now": now} if now <= best and now < (1 - BETTER) * then else None


SIGNS: tuple[Sign, ...] = (
    Sign(
        "steps left out",
        _left_out,
        "{skipped:.0f} steps were left out because a loss or gradient was not finite: lower --lr-generator and "
        "--lr-discriminator, or raise --r1 and --r2",
    ),
    Sign(
        "G is saturated",
        _saturated,
        "G is saturated: D's covectors are {covector:.2g} long, and a gradient of {gradient:.1g} arrives at its "
        "parameters: start again with a lower --lr-generator",
    ),
    Sign(
        "D wins",
        _discriminator_wins,
        "D wins: {signs}: raise --r1 and --r2, or lower --lr-discriminator",
    ),
    Sign(
        "G has collapsed",
        _collapsed,
        "G has collapsed: its samples are {diversity:.0%} as far apart as real ones: raise --r1 and --r2, or lower "
        "--lr-generator",
    ),
    Sign(
        "G narrows",
        _narrows,
        "G narrows: its samples were {widest:.0%} as far apart as real ones and are {diversity:.0%}: raise --r1 and "
        "--r2, or stop earlier",
    ),
    Sign(
        "D is blind",
        _discriminator_is_blind,
        "D is blind: it is right about {right:.0%} of the samples, where guessing gives 50%: if they do not look real, "
        "lower --r1 and --r2, or raise --lr-discriminator or --width",
    ),
    Sign(
        "directions oppose each other",
        _directions_oppose,
        "directions oppose each other, at a cosine of {cosine:.2f}: each step of G takes back part of the one before: "
        "lower --lr-generator",
    ),
    Sign(
        "steps too long",
        _steps_too_long,
        "steps are too long: each one changes G by {update:.1%} of its size: lower --lr-generator",
    ),
    Sign(
        "G stands still",
        _stands_still,
        "G stands still: a step changes it by {update:.0e} of its size: raise --lr-generator",
    ),
    Sign(
        "covectors have faded",
        _covectors_faded,
        "D's covectors have faded to {share:.1%} of what they were, and G has little to go by: lower --r1 and --r2, "
        "or choose another --score",
    ),
    Sign(
        "D learns by heart",
        _learns_by_heart,
        "D learns its samples by heart: its mean logit is {gap:.2g} higher on training samples than on held-out ones: "
        "raise --r1 and --r2, train on more samples, or lower --width or --steps",
    ),
    Sign(
        "far from the data",
        _far_from_the_data,
        "far from the data: the Frechet distance is {distance:.3g}, {times:.0f} times that of two halves of the real "
        "samples: train longer, with more --steps, or raise --width",
    ),
    Sign(
        "the best came earlier",
        _best_came_earlier,
        "the best came earlier: the Frechet distance was {best:.4g} at step {step:.0f} and is {last:.4g}: stop there "
        "(--until), lower --lr-generator and --lr-discriminator, or let them fall to zero (--lr-schedule linear)",
    ),
    Sign(
        "still improving",
        _still_improving,
        "still improving when it ended: the Frechet distance fell from {then:.4g} to {now:.4g} in the last quarter: "
        "train longer, with more --steps",
    ),
)
"""The gravest first."""
