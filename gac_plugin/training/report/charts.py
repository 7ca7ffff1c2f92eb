"""Curves of one run or several: which figures are drawn together, and where their lines, ticks and marks lie."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gac_plugin.training.judging.findings import Curves

WIDTH, HEIGHT = 420, 230
"""Size of a chart, in units of its own; it is drawn as wide as there is room."""
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 30
"""From its edges to the field in which lines are drawn."""
MOST_POINTS = 400
"""Of a line, about."""
MOST_ROWS = 40
"""Of the table below a chart."""
WIDE = 20
"""A figure that grows or shrinks by more than this factor is drawn on a logarithmic scale, if that suits it."""

Point = tuple[int, float]


@dataclass(frozen=True)
class Topic:
    """Figures that are drawn together.

    Attributes:
        title: of the chart.
        figures: name in `metrics.jsonl` -> what to call it.
        note: how to read it.
        logarithmic: whether a logarithmic scale suits it.
    """

    title: str
    figures: Mapping[str, str]
    note: str
    logarithmic: bool = False


TOPICS = (
    Topic(
        "Losses",
        {"loss_d": "loss of D", "loss_g": "loss of G"},
        "They need not fall: each network's loss depends on how good the other one is.",
    ),
    Topic(
        "D's answers",
        {"d_real": "D(x), of real", "d_fake": "D(G(z)), of generated"},
        "Mean probability that D gives for real; both near 0.5 where it cannot tell them apart.",
    ),
    Topic(
        "D's accuracy",
        {"accuracy_real": "D right about real", "accuracy_fake": "D right about generated"},
        "0.5 is guessing; near 1 for both, D wins.",
    ),
    Topic(
        "Diversity",
        {"diversity": "diversity"},
        "How far apart generated samples are: 1 as far as real ones, near 0 when G has collapsed.",
    ),
    Topic(
        "Norms",
        {"norm_c": "covectors of D", "norm_g": "gradient of G", "norm_d": "gradient of D"},
        "How loud D's wish is, and what of it arrives at the parameters.",
        logarithmic=True,
    ),
    Topic(
        "Length of G's steps",
        {"update": "step / parameters"},
        "Relative to the size of its parameters.",
        logarithmic=True,
    ),
    Topic(
        "Directions",
        {"cosine": "cosine of successive steps", "beta": "beta"},
        "Near 1, G walks straight on; below 0, each step takes back part of the one before.",
    ),
    Topic("Frechet distance", {"frechet": "Frechet distance"}, "Lower is better.", logarithmic=True),
    Topic(
        "Precision and recall",
        {"precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage"},
        "Whether single samples look real, and how much of the data they reach; higher is better.",
    ),
    Topic(
        "D's gap",
        {"d_gap": "training minus held out"},
        "D's mean logit on training samples minus on held-out ones; it grows when D learns them by heart. It is taken "
        "from 128 of each, and from up to 1,000 where the run was evaluated.",
    ),
)


@dataclass(frozen=True)
class Line:
    """One figure of one run.

    Attributes:
        name: in the legend.
        points: of the line, in units of the chart.
        last: its last value, as text.
        summary: first, lowest, highest and last value in words.
    """

    name: str
    points: list[tuple[float, float]]
    last: str
    summary: str


@dataclass(frozen=True)
class Chart:
    """What is drawn of a topic.

    Attributes:
        title, note: of the topic.
        lines: in the order of their colours.
        x_ticks, y_ticks: places and their labels.
        scale: "logarithmic scale" or nothing.
        marks: places on the x axis where something happened, and what.
        head, rows: the same figures as a table.
        rows_of: how many rows there would be.
    """

    title: str
    note: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    scale: str
    marks: list[tuple[float, str]]
    head: list[str]
    rows: list[list[str]]
    rows_of: int

    @property
    def description(self) -> str:
        """The chart in words."""
        return ". ".join(line.summary for line in self.lines)


def draw_charts(runs: Mapping[str, Sequence[Mapping[str, Any]]], marks: Sequence[tuple[int, str]] = ()) -> list[Chart]:
    """The charts of a run; or of several, one chart for each figure with a line for each run.

    Args:
        runs: name -> lines of `metrics.jsonl`.
        marks: steps at which something happened, and what.
    """
    curves = {name: Curves(records) for name, records in runs.items()}
    last = max((record["step"] for records in runs.values() for record in records), default=0)
    charts = []
    for topic in TOPICS:
        if len(runs) == 1:
            [only] = curves.values()
            measured = {told: only.points(key) for key, told in topic.figures.items() if only.points(key)}
            charts.append(_chart(topic, topic.title, measured, last, marks))
        else:
            for key, told in topic.figures.items():
                title = topic.title if len(topic.figures) == 1 else told[0].upper() + told[1:]
                lines = {name: curve.points(key) for name, curve in curves.items()}
                charts.append(_chart(topic, title, lines, last, marks))
    return [chart for chart in charts if chart is not None]


def number(value: Any) -> str:
    """A figure as people read it; a dash for none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < math.inf:
        return "\N{EN DASH}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _chart(
    topic: Topic, title: str, lines: Mapping[str, list[Point]], last: int, marks: Sequence[tuple[int, str]]
) -> Chart | None:
    steps = sorted({step for points in lines.values() for step, _ in points})
    values = [value for points in lines.values() for _, value in points]
    if not values:
        return None
    logarithmic = topic.logarithmic and min(values) > 0 and max(values) > WIDE * min(values)
    y_ticks = _decades(min(values), max(values)) if logarithmic else _round_numbers(min(values), max(values))
    x_ticks = [tick for tick in _round_numbers(0, last) if tick == int(tick) and 0 <= tick <= last]
    scale = math.log10 if logarithmic else float
    low, high = scale(min(y_ticks[0], *values)), scale(max(y_ticks[-1], *values))

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, last), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(value) - low) / ((high - low) or 1.0), 1)

    by_step = {name: dict(points) for name, points in lines.items()}
    rows = [[f"{step:,}", *(number(by_step[name].get(step)) for name in lines)] for step in thinned(steps, MOST_ROWS)]
    return Chart(
        title,
        topic.note,
        [
            Line(
                name,
                [(x(step), y(value)) for step, value in _fewer(points)],
                number(points[-1][1]) if points else number(None),
                _summary(name, points),
            )
            for name, points in lines.items()
        ],
        [(x(tick), _short(tick)) for tick in x_ticks],
        [(y(tick), _short(tick)) for tick in y_ticks],
        "logarithmic scale" if logarithmic else "",
        [(x(step), text) for step, text in marks],
        ["step", *lines],
        rows,
        len(steps),
    )


def _summary(name: str, points: Sequence[Point]) -> str:
    if not points:
        return f"{name}: not measured"
    lowest, highest = (choose(points, key=lambda point: point[1]) for choose in (min, max))
    told = ", ".join(
        f"{what} {number(value)} at step {step:,}"
        for what, (step, value) in (
            ("first", points[0]),
            ("lowest", lowest),
            ("highest", highest),
            ("last", points[-1]),
        )
    )
    return f"{name}: {told}"


def _fewer(points: list[Point]) -> Iterable[Point]:
    """Points of a long line: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-2 * len(points) // MOST_POINTS)
    stretches = (points[start : start + size] for start in range(0, len(points), size))
    kept = {choose(stretch, key=lambda point: point[1]) for stretch in stretches for choose in (min, max)}
    return sorted(kept | {points[0], points[-1]})


def _round_numbers(low: float, high: float, about: int = 4) -> list[float]:
    """Ticks at multiples of 1, 2 or 5 times a power of ten, from the last one below to the first one above."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [float(f"{index * step:.9g}") for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _decades(low: float, high: float, most: int = 5) -> list[float]:
    """Ticks at powers of ten, from the last one below to the first one above."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, -(-(last - first) // (most - 1)))
    return [10.0**power for power in range(first, last + every, every)]


def _short(value: float) -> str:
    """A label of an axis: 20k for 20,000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
