"""Do samples get better by refinement, by which method, and what does it cost in variety?

    python benchmarks/refine.py MNIST_FOLDER CIFAR_FOLDER --work FOLDER

writes results/refine.json, REFINE.md and a plot.

Networks are trained once for each seed, and every contender in `CONTENDERS` has the same number of cells, tuned on a
training seed of its own at 10 evaluations; then the cell that won is measured on the other seeds. Whatever is in the
work folder already is not computed again. One thread in a process.
"""

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

from gac_plugin import Refined, Score, refine
from gac_plugin.training import Config, load_discriminator, load_generator, train
from gac_plugin.training.data import codec_of, load_data
from gac_plugin.training.data.source import sample
from gac_plugin.training.files import write_json
from gac_plugin.training.generate import GENERATION_BATCH, draw_latents
from gac_plugin.training.hub import network_folder, read_recipe
from gac_plugin.training.judging.evaluate import Features, frechet_distance, make_features, precision_recall
from gac_plugin.training.stopping import Stop

HERE = Path(__file__).parent
COMMAND = "python benchmarks/refine.py MNIST_FOLDER CIFAR_FOLDER --work FOLDER"
TUNING_SEED, TUNED_AT, REDRAWN = 100, 10, 10_000
BUDGETS = (1, 5, 10, 25)
SAMPLES, TUNING_SAMPLES = 5_000, 2_000
Figures = dict[str, float]
GOAL, PUBLISHED = 0.7, ("langevin", "dgflow-kl", "dgflow-js", "dgflow-logd")
TOLERANCE = 0.01
"""What recall may lose: 1.4 standard errors of the difference of two shares of 5,000, at most."""


@dataclass(frozen=True)
class Study:
    """A data set and its networks. `settings`: of `gac train`, beyond its defaults."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """A line of the tables.

    Attributes:
        what: how the tables call it.
        options: of `refine`, the same in every cell.
        grid: the values of two options; a cell is a pair of them. None: nothing is tuned.
        samples: samples move, not latents.
        redrawn: nothing moves; the latents are others.
    """

    what: str
    options: Mapping[str, Any]
    grid: Mapping[str, Sequence[float]] | None = None
    samples: bool = False
    redrawn: bool = False

    @property
    def cells(self) -> list[dict[str, float]]:
        if self.grid is None:
            return [{}]
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


STUDIES = {
    "mnist": Study("MNIST, the default recipe"),
    "cifar": Study("CIFAR-10 (a copy in JPEG files), small dcgan, short", {"width": 16, "steps": 2000}),
}
SHORT, NOISES = (0.003, 0.01, 0.03), (0.0, 0.01)
CONTENDERS = {
    "default": Contender("conjugate ascent, defaults, untuned", {}),
    "conjugate": Contender("conjugate ascent", {}, {"rate": (0.001, 0.003, 0.01), "prior": (0.0, 0.3)}),
    "proximal": Contender(
        "conjugate ascent near the start", {"prior": 0.0}, {"rate": (0.03, 0.1), "proximity": (3, 10, 30)}
    ),
    "gradient": Contender("plain ascent", {"method": "gradient"}, {"rate": SHORT, "prior": (0.0, 0.3)}),
    "samples": Contender(
        "plain ascent of samples",
        {"method": "gradient"},
        {"rate": (0.1, 0.3, 1.0), "proximity": (0.0, 1.0)},
        samples=True,
    ),
    "langevin": Contender("Langevin (DDLS)", {"method": "langevin"}, {"rate": SHORT, "noise": (0.1, 1.0)}),
    "tempered": Contender(
        "Langevin, the logit weighted", {"method": "langevin"}, {"rate": SHORT, "weight": (0.25, 0.5)}
    ),
    "dgflow-kl": Contender("DGflow, KL", {"method": "dgflow-kl"}, {"rate": (0.01, 0.03, 0.1), "noise": NOISES}),
    "dgflow-js": Contender("DGflow, JS", {"method": "dgflow-js"}, {"rate": (0.01, 0.03, 0.1), "noise": NOISES}),
    "dgflow-logd": Contender("DGflow, log D", {"method": "dgflow-logd"}, {"rate": (0.01, 0.03, 0.1), "noise": NOISES}),
    "noise": Contender(
        "control: Langevin without D", {"method": "langevin", "weight": 0.0}, {"rate": SHORT, "noise": (0.1, 1.0)}
    ),
    "redrawn": Contender("control: other latents, not refined", {}, redrawn=True),
}
"""`weight` stands for the score that is so many times the logit."""


# ---- one cell


@dataclass(frozen=True)
class Yardstick:
    """Real samples in the features, in a fixed random order, and the distance between two halves of them."""

    features: Features
    real: Tensor
    floor: float


def config(study: str, folder: str, seed: int = 0, **settings: Any) -> Config:
    return Config(
        dataset=folder, seed=seed, cpu=True, evaluation_samples=0, memory=0.0, **STUDIES[study].settings, **settings
    )


@cache
def yardstick(study: str, folder: str) -> Yardstick:
    data = load_data(config(study, folder))
    features = make_features(sample(data.train), data.test, 0, torch.device("cpu"))
    real = vectors(features, data.test.values)
    real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    return Yardstick(features, real, frechet_distance(*real.tensor_split(2)))


def vectors(features: Features, stored: Tensor) -> Tensor:
    return torch.cat([features.extract(part) for part in stored.split(GENERATION_BATCH)])


def made(
    run: Path, seed: int, contender: Contender, options: Mapping[str, Any], steps: int, count: int
) -> tuple[Tensor, float]:
    """Samples, and how far latents (or samples) moved, in the mean."""
    folder = network_folder(run, "generator")
    generator, discriminator = load_generator(folder), load_discriminator(run)
    random, reports = torch.Generator().manual_seed(seed + 1), list[Refined]()
    chosen = {**contender.options, **options}
    if "weight" in chosen:
        chosen["score"] = weighted(chosen.pop("weight"))
    if contender.redrawn:
        seed, steps = seed + REDRAWN, 0
    move = partial(refine, steps=steps, random=random, report=reports.append, **chosen)
    samples = []
    with torch.no_grad():
        for z in draw_latents(read_recipe(folder), count, seed).split(GENERATION_BATCH):
            direct = contender.samples
            samples.append(
                move(None, discriminator, generator(z)) if direct else generator(move(generator, discriminator, z))
            )
    return torch.cat(samples), float(torch.cat([report.moved for report in reports]).mean())


def weighted(weight: float) -> Score:
    return Score("weighted", lambda logit: weight * logit, "so many times the logit")


def measure(
    study: str, folder: str, run: Path, seed: int, name: str, options: Mapping[str, Any], steps: int, count: int
) -> Figures:
    """The figures of a contender on a model; none where a sample is not finite."""
    samples, moved = made(run, seed, CONTENDERS[name], options, steps, count)
    if not samples.isfinite().all():
        return {}
    known = yardstick(study, folder)
    generated = vectors(known.features, codec_of(read_recipe(run / "generator")).to_stored(samples))
    precision, recall = precision_recall(known.real[:count], generated)
    frechet = frechet_distance(known.real, generated)
    return {"frechet": frechet, "precision": precision, "recall": recall, "moved": moved}


# ---- stages, of which nothing is computed twice


def single_threaded() -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def remember(file: Path, compute: Callable[..., Any], *arguments: Any) -> None:
    """Leave in the file what `compute` gives."""
    if not file.exists():
        write_json(file, compute(*arguments))
        print(f"  {file.parent.name}/{file.stem}", flush=True)


def trained(study: str, folder: str, run: Path, seed: int) -> dict[str, int]:
    result = train(config(study, folder, seed, output_dir=str(run), resume="auto"))
    if result.stopped is not Stop.NO:
        raise KeyboardInterrupt(f"stopped at step {result.step}; start the same command again to go on")
    return {"steps": result.step}


def described(study: str, folder: str) -> dict[str, Any]:
    known = yardstick(study, folder)
    return {"features": known.features.name, "real samples": len(known.real), "floor": known.floor}


@dataclass(frozen=True)
class Bench:
    """A study with its data folder, its folder of results, its seeds, and the processes that compute."""

    study: str
    folder: str
    work: Path
    seeds: Sequence[int]
    pool: Executor

    def run(self, seed: int) -> Path:
        return self.work / self.study / f"run-{seed}"

    def together(self, tasks: Mapping[Path, tuple[Any, ...]]) -> list[Any]:
        """What each of the files then holds."""
        missing = [self.pool.submit(remember, file, *task) for file, task in tasks.items() if not file.exists()]
        for one in missing:
            one.result()
        return [json.loads(file.read_text()) for file in tasks]

    def figures(self, cells: Sequence[tuple[int, str, Mapping[str, float], int]]) -> list[Figures]:
        """Of (seed, contender, cell, evaluations)."""
        tasks = {}
        for seed, name, cell, steps in cells:
            told = "-".join(f"{option}={value:g}" for option, value in cell.items())
            file = self.work / self.study / "cells" / f"{name}-{told}-{steps}-{seed}.json"
            latents, count = seed + 1000, TUNING_SAMPLES if seed == TUNING_SEED else SAMPLES
            tasks[file] = (measure, self.study, self.folder, self.run(seed), latents, name, cell, steps, count)
        return self.together(tasks)

    def tune(self) -> dict[str, Any]:
        """The winning cell of every contender, and all cells."""
        (before,) = self.figures([(TUNING_SEED, "default", {}, 0)])
        found = {}
        for name, contender in CONTENDERS.items():
            tried = self.figures([(TUNING_SEED, name, cell, TUNED_AT) for cell in contender.cells])
            pairs = [(cell, figures) for cell, figures in zip(contender.cells, tried, strict=True) if figures]
            kept = [pair for pair in pairs if pair[1]["recall"] >= before["recall"] - TOLERANCE]
            cell, _ = min(kept or pairs, key=lambda pair: pair[1]["frechet"])
            found[name] = {"cell": cell, "diverged": len(tried) - len(pairs), "recall kept": len(kept)}
            found[name]["tried"] = [{**cell, **figures} for cell, figures in zip(contender.cells, tried, strict=True)]
        return {"unrefined": before, "contenders": found}

    def report(self) -> dict[str, Any]:
        """All stages."""
        print(STUDIES[self.study].title, flush=True)
        runs = [TUNING_SEED, *self.seeds]
        self.together(
            {
                self.work / self.study / f"trained-{seed}.json": (
                    trained,
                    self.study,
                    self.folder,
                    self.run(seed),
                    seed,
                )
                for seed in runs
            }
        )
        (about,) = self.together({self.work / self.study / "about.json": (described, self.study, self.folder)})
        tuning = self.tune()
        unrefined = self.figures([(seed, "default", {}, 0) for seed in self.seeds])
        results = {}
        for name in CONTENDERS:
            cell = tuning["contenders"][name]["cell"]
            results[name] = {
                str(steps): self.figures([(seed, name, cell, steps) for seed in self.seeds]) for steps in BUDGETS
            }
        return {
            **about,
            "seeds": list(self.seeds),
            "samples": SAMPLES,
            "tuning": tuning,
            "unrefined": unrefined,
            "results": results,
        }


# ---- the page


def ratios(report: Mapping[str, Any], name: str, steps: int) -> list[float]:
    """Frechet distance after against before, of every seed; infinite where it diverged."""
    after = report["results"][name][str(steps)]
    return [b.get("frechet", math.inf) / a["frechet"] for a, b in zip(report["unrefined"], after, strict=True)]


def lost_recall(report: Mapping[str, Any], name: str, steps: int) -> list[float]:
    after = report["results"][name][str(steps)]
    return [b.get("recall", 0.0) - a["recall"] for a, b in zip(report["unrefined"], after, strict=True)]


def spread(values: Sequence[float], form: str) -> str:
    """Median, and in brackets the smallest and the largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def option_text(cell: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in cell.items())


def tables(report: Mapping[str, Any]) -> list[str]:
    before, count = report["unrefined"], len(report["seeds"])
    of = {what: [one[what] for one in before] for what in ("frechet", "precision", "recall")}
    lines = [
        f"{count} training seeds; features: {report['features']}; {report['samples']:,} generated against "
        f"{report['real samples']:,} real samples; two halves of the real ones are {report['floor']:.2f} apart. "
        f"Unrefined: Frechet distance {spread(of['frechet'], '.1f')}, precision {spread(of['precision'], '.3f')}, "
        f"recall {spread(of['recall'], '.3f')}.",
        "",
        verdict(report),
        "",
        f"### At {TUNED_AT} evaluations",
        "",
        "| method | cell | Frechet after / before | precision | recall, change | moved | worse | recall lost | "
        "diverged |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in by_quality(report):
        after = report["results"][name][str(TUNED_AT)]
        whole = [one for one in after if one]
        ratio, lost = ratios(report, name, TUNED_AT), lost_recall(report, name, TUNED_AT)
        worse, gone = sum(one > 1 for one in ratio), sum(one < -TOLERANCE for one in lost)
        precision, moved = (
            f"{statistics.median(one[what] for one in whole):.{digits}f}" if whole else ""
            for what, digits in (("precision", 3), ("moved", 2))
        )
        lines.append(
            f"| {CONTENDERS[name].what} | {option_text(report['tuning']['contenders'][name]['cell'])} | "
            f"{spread(ratio, '.3f')} | {precision} | {spread(lost, '+.3f')} | {moved} | {worse}/{count} | "
            f"{gone}/{count} | {count - len(whole)}/{count} |"
        )
    budgets = " | ".join(map(str, BUDGETS))
    lines += ["", "### At other numbers of evaluations", ""]
    lines += [
        f"Median of Frechet after / before, and in brackets of the change of recall; the cells are those tuned at "
        f"{TUNED_AT}.",
        "",
        f"| method | {budgets} |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    for name in by_quality(report):
        cells = [
            f"{statistics.median(ratios(report, name, steps)):.3f} "
            f"({statistics.median(lost_recall(report, name, steps)):+.3f})"
            for steps in BUDGETS
        ]
        lines.append(f"| {CONTENDERS[name].what} | {' | '.join(cells)} |")
    return lines


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the goal was reached, and what chance alone does."""
    best = next(name for name in by_quality(report) if not is_control(name))
    ratio, lost = (statistics.median(of(report, best, TUNED_AT)) for of in (ratios, lost_recall))
    reached = ratio <= GOAL and lost >= 0 and best not in PUBLISHED
    chance = [one for name in CONTENDERS if is_control(name) for one in ratios(report, name, TUNED_AT)]
    shipped = statistics.median(ratios(report, "default", TUNED_AT))
    return (
        f"Goal (distance down by {1 - GOAL:.0%} at {TUNED_AT} evaluations, recall not lower, ahead of DGflow and "
        f"DDLS): {'reached' if reached else 'not reached'}. The best method, {CONTENDERS[best].what}, gives "
        f"{ratio:.2f} times the distance and {lost:+.3f} recall. The controls, which do not ask D, give "
        f"{min(chance):.2f} to {max(chance):.2f} times the distance: what lies between is chance. The defaults give "
        f"{shipped:.2f} times the distance."
    )


def is_control(name: str) -> bool:
    return CONTENDERS[name].what.startswith("control")


def by_quality(report: Mapping[str, Any]) -> list[str]:
    return sorted(report["results"], key=lambda name: statistics.median(ratios(report, name, TUNED_AT)))


def page(reports: Mapping[str, Any]) -> str:
    """REFINE.md."""
    cells = max(len(contender.cells) for contender in CONTENDERS.values())
    lines = [
        "# Do samples get better by refinement?",
        "",
        "```bash",
        *(f"{COMMAND} --only {study} --seeds {len(report['seeds'])}" for study, report in reports.items()),
        "```",
        "",
        f"Every method had {cells} cells, its step length and a second option, tried at {TUNED_AT} evaluations on one "
        "training seed that is not reported; of the cells that kept recall within "
        f"{TOLERANCE} of the unrefined samples the one of the lowest Frechet distance won (of all, where none kept "
        "it). An evaluation is one gradient of D for every sample. Medians over seeds, in brackets the smallest and "
        "the largest. Worse: seeds in which the distance grew; recall lost: in which it fell by more than "
        f"{TOLERANCE}; diverged: in which samples were not finite.",
        "",
        "![Frechet distance and recall against evaluations](plots/refine.png)",
        "",
    ]
    for study, report in reports.items():
        lines += [f"## {STUDIES[study].title}", "", *tables(report), ""]
    for study in STUDIES.keys() - reports.keys():
        lines += [f"## {STUDIES[study].title}", "", "Not measured yet.", ""]
    lines += ["## What was tried", ""]
    for study, report in reports.items():
        lines += [f"### {STUDIES[study].title}", "", *tried(report), ""]
    return "\n".join(lines)


def tried(report: Mapping[str, Any]) -> list[str]:
    """All cells of the tuning."""
    before = report["tuning"]["unrefined"]
    lines = [
        f"Seed {TUNING_SEED}, {TUNED_AT} evaluations, {TUNING_SAMPLES:,} samples; unrefined: Frechet distance "
        f"{before['frechet']:.1f}, recall {before['recall']:.3f}. Frechet distance, and in brackets recall.",
        "",
        "| method | cells |",
        "|---|---|",
    ]
    for name, found in report["tuning"]["contenders"].items():
        told = []
        for cell in found["tried"]:
            options = {option: cell[option] for option in CONTENDERS[name].grid or {}}
            figures = f"{cell['frechet']:.1f} ({cell['recall']:.3f})" if "frechet" in cell else "diverged"
            told.append(f"{option_text(options)}: {figures}".removeprefix(": "))
        lines.append(f"| {CONTENDERS[name].what} | {'; '.join(told)} |")
    return lines


def draw(reports: Mapping[str, Any], file: Path) -> None:
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(reports), figsize=(6.2 * len(reports), 8.5), squeeze=False, layout="constrained")
    for column, (study, report) in enumerate(reports.items()):
        above, below = axes[:, column]
        for name, colour in zip(report["results"], plt.get_cmap("tab20").colors, strict=False):
            style = {"color": colour, "label": CONTENDERS[name].what, "marker": "o", "markersize": 3}
            style["linestyle"] = "--" if CONTENDERS[name].options.get("method", "").startswith("dgflow") else "-"
            above.plot((0, *BUDGETS), [1.0, *(statistics.median(ratios(report, name, n)) for n in BUDGETS)], **style)
            below.plot(
                (0, *BUDGETS), [0.0, *(statistics.median(lost_recall(report, name, n)) for n in BUDGETS)], **style
            )
        above.axhline(GOAL, color="#888888", linewidth=0.8)
        above.text(25, GOAL, "goal ", ha="right", va="bottom", color="#555555", fontsize=8)
        above.set(title=STUDIES[study].title, ylabel="Frechet distance, after / before", ylim=(0.6, 1.4))
        below.axhline(0.0, color="#888888", linewidth=0.8)
        below.set(xlabel="evaluations of D's gradient", ylabel="recall, change", ylim=(-0.1, 0.05))
        below.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("mnist", metavar="MNIST_FOLDER", help="MNIST in Hub layout")
    parser.add_argument("cifar", metavar="CIFAR_FOLDER", help="CIFAR-10 in Hub layout")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for models and cells, kept")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="training seeds (default: 5)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--only", choices=STUDIES, help="keep the figures of the other study")
    arguments = parser.parse_args()
    file = HERE / "results" / "refine.json"
    reports: dict[str, Any] = json.loads(file.read_text())["studies"] if arguments.only and file.exists() else {}
    folders = {"mnist": arguments.mnist, "cifar": arguments.cifar}
    with ProcessPoolExecutor(arguments.processes, get_context("spawn"), single_threaded) as pool:
        for study in [arguments.only] if arguments.only else STUDIES:
            bench = Bench(study, folders[study], arguments.work, range(arguments.seeds), pool)
            reports[study] = bench.report()
    reports = {study: reports[study] for study in STUDIES if study in reports}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write_json(file, {"command": COMMAND, **versions, "studies": reports})
    (HERE / "REFINE.md").write_text(page(reports))
    draw(reports, HERE / "plots" / "refine.png")
    print(f"{file}\n{HERE / 'REFINE.md'}")


if __name__ == "__main__":
    main()
