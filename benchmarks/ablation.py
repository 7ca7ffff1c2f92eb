"""What does each piece of GAC contribute, and what should its defaults be? One factor at a time on MNIST.

    python -m benchmarks.ablation MNIST_FOLDER --work FOLDER

writes results/ablation.json, ABLATION.md and a plot.

Everything starts from the defaults of `gac train`, but for rates that stay as they are, and each rival changes one
factor. Every rival, and the default, has the generator's rate tuned over as many values on a seed of its own. A rival
is ahead if it is better than the default over 5 paired seeds by more than twice the standard error of the log ratio. Of
so many rivals some are ahead by chance, and what wins a short run may lose a long one; so those ahead meet the default
again in longer runs on other seeds, and only one that is ahead there too is the winner of its factor. Ties leave the
default.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.ablation_variants import DEFAULT, VARIANTS
from benchmarks.cells import Cells, new_figure, new_parser, save_plot, table, workers, write_report
from benchmarks.quality_runs import TUNING_SEED, learn, new_run, yardstick

COMMAND = "python -m benchmarks.ablation MNIST_FOLDER --work FOLDER"
STUDY, CONFIRMING_SEED = "mnist", 10
SURE = 2.0
"""Standard errors by which a rival has to be better."""


@dataclass(frozen=True)
class Size:
    """How much is computed. `steps`: of first runs and tuning. `confirming`: of those that confirm.

    Attributes:
        rounds: of the measurement of a step's time.
        turn: steps of each of the two in a round; of 80 all that recurs does so as often as in any others.
    """

    steps: int = 1_000
    confirming: int = 3_000
    samples: int = 5_000
    rates: int = 3
    rounds: int = 4
    turn: int = 80


SIZES = {"full": Size(), "smoke": Size(steps=4, confirming=5, samples=100, rates=1, rounds=1, turn=4)}


# ---- runs


def ends_with(folder: str, name: str, lr_g: float, seed: int, steps: int, samples: int) -> float | None:
    """The Frechet distance at the end; None where it diverged."""
    variant = VARIANTS[name]
    rates = (lr_g, variant.config.lr_discriminator)
    curve = learn(STUDY, folder, variant.recipe(steps), rates, seed, [steps], samples, variant.config.ema)["curve"]
    return curve[0]["frechet"] if curve else None


def relative_cost(folder: str, name: str, rounds: int, turn: int) -> float:
    """CPU seconds of a step by those of the default: median over rounds, begun by one and by the other in turn."""
    known = yardstick(STUDY, folder)
    runs = []
    for variant in (VARIANTS[name], VARIANTS[DEFAULT]):
        rates = (variant.rates[0], variant.config.lr_discriminator)
        runs.append(new_run(known, variant.recipe(1000), *rates, TUNING_SEED))
    ratios = []
    for number in range(rounds + 1):
        taken = {}
        for which in (0, 1) if number % 2 else (1, 0):
            taken[which] = sum(runs[which].advance() for _ in range(turn))
        ratios.append(taken[0] / taken[1])
    return statistics.median(ratios[1:])  # the first round warms up


def equal_steps(steps: int, cost: float) -> int:
    """As many steps as take the default's time."""
    return max(1, round(steps / cost))


@dataclass(frozen=True)
class Bench:
    folder: str
    cells: Cells
    seeds: int
    size: Size

    def ends(self, name: str, rates: Sequence[float], seeds: Sequence[int], steps: int) -> list[float | None]:
        tasks = {
            f"{name}/{rate:g}-{steps}-{seed}": (ends_with, self.folder, name, rate, seed, steps, self.size.samples)
            for rate, seed in product(rates, seeds)
        }
        return self.cells.of(tasks)

    def cost(self, name: str) -> float:
        if name == DEFAULT:
            return 1.0
        rounds, turn = self.size.rounds, self.size.turn
        return self.cells.of({f"{name}/cost-{rounds}-{turn}": (relative_cost, self.folder, name, rounds, turn)})[0]

    def measure(self, name: str) -> dict[str, Any]:
        """The cost of a variant, its tuning and its first runs."""
        cost = self.cost(name)
        rates, steps = VARIANTS[name].rates[: self.size.rates], equal_steps(self.size.steps, cost)
        tuning = self.ends(name, rates, [TUNING_SEED], steps)
        rate = min(zip(rates, tuning, strict=True), key=lambda pair: finite(pair[1]))[0]
        first = self.ends(name, [rate], range(self.seeds), steps)
        return {
            "cost": cost,
            "steps": steps,
            "tuning": dict(zip(map(str, rates), tuning, strict=True)),
            "rate": rate,
            "first": first,
        }

    def confirm(self, name: str, found: Mapping[str, Any]) -> list[float | None]:
        """Longer runs on other seeds."""
        seeds = range(CONFIRMING_SEED, CONFIRMING_SEED + self.seeds)
        return self.ends(name, [found["rate"]], seeds, equal_steps(self.size.confirming, found["cost"]))


def measure(bench: Bench, names: Sequence[str], tell: Callable[[dict[str, Any]], None]) -> None:
    """Measure the variants, the default first, and `tell` what is known after each."""
    variants: dict[str, Any] = {}
    report = {"seeds": bench.seeds, "variants": variants}
    for name in names:
        variants[name] = bench.measure(name)
        if is_ahead(variants, name, "first"):
            for one in (DEFAULT, name):
                variants[one]["confirming"] = bench.confirm(one, variants[one])
        tell(report)


# ---- what the figures say


def finite(value: float | None) -> float:
    return math.inf if value is None else value


def advantage(variants: Mapping[str, Any], name: str, stage: str) -> tuple[float, float]:
    """Mean and standard error of log(rival / default) over paired seeds; infinite where a run diverged."""
    pairs = zip(variants[name][stage], variants[DEFAULT][stage], strict=True)
    logs = [math.log(finite(rival) / finite(default)) for rival, default in pairs]
    if not all(map(math.isfinite, logs)) or len(logs) < 2:
        return math.inf, math.inf
    return statistics.mean(logs), statistics.stdev(logs) / len(logs) ** 0.5


def is_ahead(variants: Mapping[str, Any], name: str, stage: str) -> bool:
    mean, error = advantage(variants, name, stage)
    return name != DEFAULT and mean < -SURE * error and math.isfinite(mean)


def winners(variants: Mapping[str, Any]) -> dict[str, str]:
    """The best rival of each factor that was ahead twice; factors without one keep the default."""
    found: dict[str, str] = {}
    for name in variants:
        if not (is_ahead(variants, name, "first") and is_ahead(variants, name, "confirming")):
            continue
        factor = VARIANTS[name].factor
        best = found.get(factor)
        if best is None or advantage(variants, name, "confirming") < advantage(variants, best, "confirming"):
            found[factor] = name
    return found


def changes(variants: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `Config` that the winners ask to be changed.

    What a winner with a `make` of its own does, `gac train` cannot do yet; it is told under its name, None.
    """
    asked: dict[str, Any] = {}
    for winner in winners(variants).values():
        asked |= VARIANTS[winner].settings if VARIANTS[winner].make is None else {winner: None}
    return asked


# ---- the page


def page(report: Mapping[str, Any], size: Size) -> str:
    """ABLATION.md."""
    variants = report["variants"]
    missing = [name for name in VARIANTS if name not in variants]
    base = variants[DEFAULT]
    rows = []
    for name, found in variants.items():
        if name == DEFAULT:
            continue
        confirmed = ratio_text(variants, name, "confirming") if "confirming" in found else ""
        rows.append(
            [
                VARIANTS[name].factor,
                VARIANTS[name].value,
                f"{found['cost']:.2f}",
                f"{found['steps']:,}",
                f"{found['rate']:g}",
                median_text(found["first"]),
                ratio_text(variants, name, "first"),
                confirmed,
                "**winner**" if name in winners(variants).values() else "",
            ]
        )
    lines = [
        "# What each piece contributes",
        "",
        "```bash",
        COMMAND,
        "```",
        "",
        "MNIST, the networks and features of [QUALITY.md](QUALITY.md). Each line changes one factor of the defaults of "
        "`gac train`, at constant rates: how these should fall in a run of full length is asked in "
        f"[QUALITY.md](QUALITY.md). Frechet distance at the end, medians over {report['seeds']} seeds; the default: "
        f"{median_text(base['first'])} after {base['steps']:,} steps at rate {base['rate']:g} of G. A dearer step "
        "means fewer steps: the default's time is the measure. D's rate stays that of the defaults. Ratio: rival over "
        "default, geometric mean of paired seeds, and in brackets the factor of one standard error; below 1 the rival "
        f"is better. A rival is ahead if it is better by more than {SURE:g} standard errors; those ahead were run "
        f"again for {size.confirming:,} steps on other seeds, and only those ahead twice win.",
        "",
        "Winners: " + (", ".join(winners(variants).values()) or "none: the defaults stay as they are") + ".",
        "",
        *([f"Not measured yet: {', '.join(missing)}.", ""] if missing else []),
        "![Rivals against the default](plots/ablation.png)",
        "",
        *table(
            ("factor", "rival", "cost of a step", "steps", "rate of G", "Frechet", "ratio", "ratio, longer", ""), rows
        ),
        "",
    ]
    return "\n".join(lines)


def median_text(values: Sequence[float | None]) -> str:
    middle = statistics.median(map(finite, values))
    failed = sum(value is None for value in values)
    return (f"{middle:.2f}" if math.isfinite(middle) else "-") + (f" ({failed} diverged)" if failed else "")


def ratio_text(variants: Mapping[str, Any], name: str, stage: str) -> str:
    mean, error = advantage(variants, name, stage)
    return f"{math.exp(mean):.2f} ({math.exp(error):.2f})" if math.isfinite(mean) else "-"


def draw(report: Mapping[str, Any]) -> Figure:
    """Ratios with twice their standard errors, best at the top."""
    variants = report["variants"]
    points = {name: advantage(variants, name, "first") for name in variants if name != DEFAULT}
    shown = sorted((name for name in points if math.isfinite(points[name][0])), key=lambda name: points[name][0])
    figure, ((axis,),) = new_figure(1, 1, 8.0, 1.5 + 0.22 * max(10, len(shown)))
    for place, name in enumerate(shown):
        mean, error = points[name]
        low, high = math.exp(mean - SURE * error), math.exp(mean + SURE * error)
        colour = "C2" if high < 1 else "C3" if low > 1 else "#888888"
        axis.plot((low, high), (place, place), color=colour)
        axis.plot(math.exp(mean), place, "o", color=colour, markersize=4)
    axis.axvline(1.0, color="#444444", linewidth=0.8)
    axis.set(xscale="log", yticks=range(len(shown)), yticklabels=shown, xlabel="Frechet distance, rival over default")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.tick_params(labelsize=8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    return figure


def main() -> None:
    parser = new_parser(__doc__, 5, SIZES)
    parser.add_argument("mnist", metavar="MNIST_FOLDER", help="MNIST in Hub layout")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS), help="these alone")
    arguments = parser.parse_args()
    names = list(dict.fromkeys((DEFAULT, *arguments.variants)))
    size = SIZES[arguments.size]

    def tell(report: dict[str, Any]) -> None:
        asked = {"winners": winners(report["variants"]), "changes": changes(report["variants"])}
        whole = {"command": COMMAND, **asked, **report}
        write_report(arguments.out, "ablation", whole, page(report, size))
        save_plot(arguments.out, "ablation", draw(report))

    with workers(arguments.processes) as pool:
        cells = Cells(arguments.work / "ablation", pool)
        measure(Bench(arguments.mnist, cells, arguments.seeds, size), names, tell)


if __name__ == "__main__":
    main()
