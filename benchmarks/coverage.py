"""Does a GAN make all there is? Modes and their shares: mixtures in the plane, and Stacked MNIST.

    python -m benchmarks.coverage MNIST_FOLDER --work FOLDER

writes results/coverage.json, COVERAGE.md and a plot.

The protocol is PacGAN's (Lin, Khetan, Fanti & Oh 2018; its published code): networks, batches, numbers of samples, and
what counts as a mode. Runs are far shorter than the published ones. Every method has the same number of cells, tried on
a seed of its own; the best cell is then run on the others. All samples come from the running average of the generator,
and all rates fall linearly to zero, GAC's penalty with them: it evens out the modes at first and would blur them later.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.cells import Cells, new_figure, new_parser, table, workers, write_report
from benchmarks.peers import PLAIN_GAME, Batches, Make, Step, adam, alternating, conjugate, falling
from benchmarks.worlds import (
    StackedGenerator,
    World,
    grid,
    planar_discriminator,
    planar_generator,
    ring,
    stacked,
    stacked_discriminator,
)
from gac_plugin import GAC, GradientPenalty
from gac_plugin.cotangent import evaluating
from gac_plugin.training.ema import RunningAverage
from gac_plugin.training.schedules import Schedule

COMMAND = "python -m benchmarks.coverage MNIST_FOLDER --work FOLDER"
TUNING_SEED, EVALUATION_SEED, EMA = 100, 1000, 0.995
LINEAR = Schedule("linear", 0.0)
Cell = Mapping[str, float]
Figures = dict[str, float]


# ---- the settings and the methods


@dataclass(frozen=True)
class Contender:
    """A method in a setting.

    Attributes:
        make: (cell, steps) -> how the networks are trained.
        cells: what is tried; `lr_g` and `lr_d` are the rates.
        normalised: whether D has batch norm, where the setting publishes it.
    """

    title: str
    make: Callable[[Cell, int], Make]
    cells: Sequence[Cell]
    normalised: bool = False


@dataclass(frozen=True)
class Setting:
    """A world, networks, and who is to learn it.

    Attributes:
        published: (name, modes, KL) of the best published result.
        goal: (modes, KL, share of good samples): at least, at most, at least.
        smaller: what is smaller here than in the published runs.
    """

    title: str
    world: Callable[[Path, str], World]
    generator: Callable[[int], nn.Module]
    discriminator: Callable[[int, bool], nn.Module]
    batch: int
    samples: int
    contenders: Mapping[str, Contender]
    published: tuple[str, str, str]
    goal: tuple[float, float, float]
    smaller: str
    seeds: int = 10


def textbook(betas: tuple[float, float] | None, cell: Cell, steps: int) -> Make:
    optimizer = falling(adam(*(betas or (cell["beta1"], 0.999))), LINEAR, steps)
    return alternating(PLAIN_GAME, optimizer, optimizer)


def our_recipe(cell: Cell, steps: int) -> Make:
    """`gac train --lr-schedule linear --penalty-schedule linear`."""

    def make(generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> Step:
        gac = GAC(
            generator,
            discriminator,
            falling(conjugate(), LINEAR, steps)(generator.parameters(), lr_g),
            falling(adam(0.0, 0.99), LINEAR, steps)(discriminator.parameters(), lr_d),
        )
        numbers = count(1)

        def step(batches: Batches) -> None:
            gamma = cell["gamma"] * LINEAR.factor(next(numbers), steps)
            gac.penalty = GradientPenalty(gamma, gamma)
            gac.step(next(batches))

        return step

    return make


def even(rates: Sequence[float], name: str, values: Sequence[float]) -> list[Cell]:
    return [{"lr_g": rate, "lr_d": rate, name: value} for rate in rates for value in values]


PLANAR = {
    "textbook": Contender("textbook Adam", partial(textbook, None), even((1e-4, 3e-4, 1e-3), "beta1", (0.5, 0.8))),
    "gac": Contender("GAC", our_recipe, even((3e-4, 1e-3, 2e-3), "gamma", (0.003, 0.03))),
}


def stacked_contenders(rates: tuple[float, float], betas: tuple[float, float]) -> dict[str, Contender]:
    scaled = [{"lr_g": factor * rates[0], "lr_d": factor * rates[1]} for factor in (1.0, 2.0, 4.0, 8.0)]
    ours = [{"lr_g": rate, "lr_d": rate / 2, "gamma": gamma} for rate in (1e-3, 2e-3) for gamma in (0.1, 1.0)]
    return {
        "textbook": Contender("textbook Adam", partial(textbook, betas), scaled, normalised=True),
        "gac": Contender("GAC", our_recipe, ours),
    }


SETTINGS = {
    "ring": Setting(
        title="2-D ring, 8 modes of deviation 0.01",
        world=ring,
        generator=lambda _: planar_generator(),
        discriminator=lambda _, normalised: planar_discriminator(normalised),
        batch=100,
        samples=2_500,
        contenders=PLANAR,
        published=("PacGAN", "7.9", "0.07"),
        goal=(8, 0.02, 0.97),
        smaller="steps (published 400,000)",
    ),
    "grid": Setting(
        title="2-D grid, 25 modes of deviation 0.05",
        world=grid,
        generator=lambda _: planar_generator(),
        discriminator=lambda _, normalised: planar_discriminator(normalised),
        batch=100,
        samples=2_500,
        contenders=PLANAR,
        published=("PacGAN", "24.8", "0.04"),
        goal=(25, 0.02, 0.97),
        smaller="steps (published 400,000)",
    ),
    "stacked": Setting(
        title="Stacked MNIST",
        world=stacked,
        generator=partial(StackedGenerator, 100, 16),
        discriminator=partial(stacked_discriminator, 16),
        batch=64,
        samples=26_000,
        contenders=stacked_contenders((2e-4, 2e-4), (0.5, 0.999)),
        published=("PacDCGAN", "1000", "0.06"),
        goal=(1000, 0.06, 0.0),
        smaller="networks (published: DCGAN of width 64) and steps (published 100,000)",
        seeds=5,
    ),
    "hard": Setting(
        title="Stacked MNIST, D a quarter of the size",
        world=stacked,
        generator=partial(StackedGenerator, 256, 8),
        discriminator=partial(stacked_discriminator, 2),
        batch=128,
        samples=25_600,
        contenders=stacked_contenders((1e-4, 2e-4), (0.5, 0.99)),
        published=("PacGAN", "667", "1.81"),
        goal=(667, 1.81, 0.0),
        smaller="steps (published 500,000)",
        seeds=5,
    ),
}


@dataclass(frozen=True)
class Size:
    """Steps of a cell that is tried and of a run that counts, and the share of the published numbers of samples."""

    tuning: Mapping[str, int]
    steps: Mapping[str, int]
    samples: float = 1.0
    cells: int | None = None


SIZES = {
    "full": Size(
        {"ring": 2_500, "grid": 2_500, "stacked": 1_500, "hard": 2_500},
        {"ring": 10_000, "grid": 10_000, "stacked": 6_000, "hard": 10_000},
    ),
    "smoke": Size(dict.fromkeys(SETTINGS, 3), dict.fromkeys(SETTINGS, 4), samples=0.02, cells=2),
}


# ---- one run


def run(
    name: str, contender: str, folder: str, work: Path, cell: Cell, seed: int, steps: int, wanted: int
) -> dict[str, Any]:
    """Train and count modes.

    Returns:
        `modes`, `kl`, `good` (see `judge`), the `shares` of the modes, CPU `seconds` of training, and for mixtures the
        first 1,000 `samples`. `modes` 0 alone where it diverged.
    """
    setting = SETTINGS[name]
    world, method = setting.world(work, folder), setting.contenders[contender]
    torch.manual_seed(seed)
    side = world.draw(1, torch.Generator()).shape[-1]
    generator, discriminator = setting.generator(side), setting.discriminator(side, method.normalised)
    step = method.make(cell, steps)(generator, discriminator, cell["lr_g"], cell["lr_d"])
    average, batches = RunningAverage(generator), real_batches(world, setting.batch, seed)
    start = time.process_time()
    for _ in range(steps):
        step(batches)
        average.update(generator, EMA)
    seconds = time.process_time() - start
    z = torch.randn(wanted, generator.nz, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    with torch.no_grad(), evaluating(average.network):
        samples = torch.cat([average.network(part) for part in z.split(1000)])
    if not samples.isfinite().all():
        return {"modes": 0}
    points = {"samples": samples[:1000].tolist()} if samples.dim() == 2 else {}
    return {**judge(world, samples), "seconds": seconds, **points}


def real_batches(world: World, batch: int, seed: int) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(seed)
    while True:
        yield world.draw(batch, random)


def judge(world: World, samples: Tensor) -> Figures:
    """How many modes have a sample, how evenly, and the share of samples that are of any mode.

    KL = sum_m p_m log(p_m / q_m), p the shares of the modes among the samples that are of one, q = 1 / modes; left out
    where no sample is.
    """
    mode = world.mode_of(samples)
    counts = torch.bincount(mode[mode >= 0], minlength=world.modes).double()
    shares = counts[counts > 0] / counts.sum()
    figures = {"modes": len(shares), "good": float((mode >= 0).double().mean())}
    return {**figures, "kl": float((shares * (shares * world.modes).log()).sum())} if len(shares) else figures


def judge_real(name: str, folder: str, work: Path, count: int) -> Figures:
    """The same of real samples: what is best possible with so many."""
    world = SETTINGS[name].world(work, folder)
    return judge(world, world.draw(count, torch.Generator().manual_seed(EVALUATION_SEED)))


def loss_of(figures: Mapping[str, float]) -> float:
    """KL - log(share of good samples): what the cells are chosen by; infinite where a run diverged."""
    good = figures.get("good", 0.0)
    return figures["kl"] - math.log(good) if good > 0 else math.inf


# ---- all runs


def measure(name: str, folder: str, cells: Cells, seeds: int, size: Size) -> dict[str, Any]:
    """Real samples, the tuning and the runs of every method in a setting."""
    setting = SETTINGS[name]
    count, steps = round(size.samples * setting.samples), size.steps[name]
    (real,) = cells.of({f"{name}/real-{count}": (judge_real, name, folder, cells.work, count)})
    found = {}
    for contender, method in setting.contenders.items():
        common = (run, name, contender, folder, cells.work)
        tuning = size.tuning[name]
        options = method.cells[: size.cells]
        tried = cells.of(
            {
                f"{name}/{contender}-{told(cell)}-{tuning}-tuning": (*common, cell, TUNING_SEED, tuning, count)
                for cell in options
            }
        )
        cell = min(zip(options, tried, strict=True), key=lambda pair: loss_of(pair[1]))[0]
        runs = cells.of(
            {
                f"{name}/{contender}-{told(cell)}-{steps}-{seed}": (*common, cell, seed, steps, count)
                for seed in range(min(seeds, setting.seeds))
            }
        )
        told_cells = [{"cell": one, **plain(figures)} for one, figures in zip(options, tried, strict=True)]
        found[contender] = {"cell": cell, "tried": told_cells, "runs": runs}
    return {"real": real, "samples": count, "steps": steps, "methods": found}


def told(cell: Cell) -> str:
    return "-".join(f"{option}={value:g}" for option, value in cell.items())


def plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "samples"}


# ---- the page


def mean(runs: Sequence[Mapping[str, float]], what: str, form: str) -> str:
    """Mean and standard error over the runs that have the figure."""
    values = [one[what] for one in runs if what in one]
    if not values:
        return "-"
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {error:{form}}"


def reached(setting: Setting, runs: Sequence[Mapping[str, float]]) -> int:
    """How many runs reach the goal."""
    modes, kl, good = setting.goal
    return sum(one["modes"] >= modes and one.get("kl", math.inf) <= kl and one.get("good", 0.0) >= good for one in runs)


def setting_lines(name: str, report: Mapping[str, Any]) -> list[str]:
    setting, real = SETTINGS[name], report["real"]
    rows = []
    for contender, found in report["methods"].items():
        runs = found["runs"]
        rows.append(
            [
                setting.contenders[contender].title,
                ", ".join(f"{option} {value:g}" for option, value in found["cell"].items()),
                mean(runs, "modes", ".1f"),
                mean(runs, "kl", ".3f"),
                mean(runs, "good", ".3f"),
                f"{reached(setting, runs)}/{len(runs)}",
                mean(runs, "seconds", ".0f"),
            ]
        )
    title, *figures = setting.published
    rows.append([f"published: {title}", "", *figures, "", "", ""])
    rows.append(["real samples", "", f"{real['modes']}", f"{real['kl']:.3f}", f"{real['good']:.3f}", "", ""])
    modes, kl, good = setting.goal
    return [
        f"## {setting.title}",
        "",
        f"{report['steps']:,} steps, batch {setting.batch}, {report['samples']:,} samples. Smaller than published: "
        f"{setting.smaller}. Goal: at least {modes:g} modes, KL at most {kl:g}"
        + (f", at least {good:.0%} good samples." if good else "."),
        "",
        *table(("method", "cell", "modes", "KL", "good samples", "runs at the goal", "CPU s of training"), rows),
        "",
        "Tried: "
        + "; ".join(
            f"{setting.contenders[contender].title} {told(one['cell'])}: " + outcome(one)
            for contender, found in report["methods"].items()
            for one in found["tried"]
        )
        + ".",
        "",
    ]


def outcome(figures: Mapping[str, Any]) -> str:
    if "good" not in figures:
        return "diverged"
    kl = f", KL {figures['kl']:.3f}" if "kl" in figures else ""
    return f"{figures['modes']} modes{kl}, good {figures['good']:.3f}"


def page(settings: Mapping[str, Any]) -> str:
    """COVERAGE.md."""
    lines = [
        "# Does a GAN make all there is?",
        "",
        "```bash",
        COMMAND,
        "```",
        "",
        "PacGAN's protocol (Lin et al. 2018), with its networks, batches, numbers of samples and rule of what counts: "
        "in the plane a sample is good within 3 deviations of a mode, and a mode is found if it has a good sample; on "
        "Stacked MNIST a classifier reads three digits. KL is the reverse one, of the generated shares of modes "
        "against equal ones. Means and standard errors over seeds. Every method has as many cells, tried on a seed of "
        f"its own; all samples come from the running average of the generator (decay {EMA}), all rates fall to zero, "
        "and GAC's penalty with them. Where the published discriminator has batch norm, the textbook loop's has it, "
        "and GAC's has not.",
        "",
        "![Samples in the plane](plots/coverage.png)",
        "",
    ]
    for name in SETTINGS:
        lines += (
            setting_lines(name, settings[name])
            if name in settings
            else [f"## {SETTINGS[name].title}", "", "Not measured yet.", ""]
        )
    return "\n".join(lines)


def draw(settings: Mapping[str, Any]) -> Figure:
    """Samples of the first seed in the plane: a row for each mixture, real ones first."""
    shown = [name for name in ("ring", "grid") if name in settings] or ["ring"]
    figure, axes = new_figure(len(shown), 1 + len(PLANAR), 4.0, 4.2)
    for row, name in zip(axes, shown, strict=True):
        world = SETTINGS[name].world(Path(), "")
        panels = [("real", world.draw(1000, torch.Generator().manual_seed(0)).tolist())]
        methods = settings.get(name, {}).get("methods", {})
        panels += [(PLANAR[one].title, found["runs"][0].get("samples", [])) for one, found in methods.items()]
        for axis, (title, points) in zip(row, panels, strict=False):
            axis.scatter(*zip(*points, strict=True), s=2, alpha=0.4) if points else None
            edge = 1.5 if name == "ring" else 5.0
            axis.set(title=f"{name}: {title}", xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
    return figure


def main() -> None:
    parser = new_parser(__doc__, 10, SIZES)
    parser.add_argument("mnist", metavar="MNIST_FOLDER", help="MNIST in Hub layout")
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=list(SETTINGS), help="these settings")
    arguments = parser.parse_args()
    settings: dict[str, Any] = {}
    with workers(arguments.processes) as pool:
        cells = Cells(arguments.work / "coverage", pool)
        for name in arguments.only:
            print(SETTINGS[name].title, flush=True)
            settings[name] = measure(name, arguments.mnist, cells, arguments.seeds, SIZES[arguments.size])
            kept = {one: without_samples(report) for one, report in settings.items()}
            write_report(
                arguments.out, "coverage", {"command": COMMAND, "settings": kept}, page(settings), draw(settings)
            )


def without_samples(report: Mapping[str, Any]) -> dict[str, Any]:
    methods = {
        name: {**found, "runs": [plain(one) for one in found["runs"]]} for name, found in report["methods"].items()
    }
    return {**report, "methods": methods}


if __name__ == "__main__":
    main()
