"""Do samples get better by refinement, by which method and which discriminator, and what does it cost in variety?

    python benchmarks/refine.py MNIST_FOLDER CIFAR_FOLDER --work FOLDER

writes results/refine.json, REFINE.md and a plot.

Networks are trained once for each seed. A discriminator judges as training left it, or after further steps against the
held generator: by the loss of classification, which makes its logit the log-ratio of densities that DDLS and DGflow
start from, or by `calibrate`. Every contender in `CONTENDERS` has the same number of cells, tuned on a training seed of
its own at 10 evaluations; then the cell that won is measured on the other seeds. Whatever is in the work folder already
is not computed again. One thread in a process.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import refine_page
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gac_plugin import LOSSES, REFINEMENTS, calibrate, refine
from gac_plugin.calibrate import PENALTY
from gac_plugin.climb import flow
from gac_plugin.penalties import logit_gradient
from gac_plugin.tensors import per_sample_norm
from gac_plugin.training import Config, load_discriminator, load_generator, train
from gac_plugin.training.data import codec_of, load_data
from gac_plugin.training.data.batches import batches
from gac_plugin.training.data.source import sample
from gac_plugin.training.files import write_json
from gac_plugin.training.generate import draw_latents
from gac_plugin.training.hub import network_folder, read_recipe, save_network
from gac_plugin.training.judging.evaluate import Features, frechet_distance, make_features, precision_recall
from gac_plugin.training.stopping import Stop

HERE = Path(__file__).parent
COMMAND = "python benchmarks/refine.py MNIST_FOLDER CIFAR_FOLDER --work FOLDER"
TUNING_SEED, TUNED_AT, REDRAWN = 100, 10, 10_000
BUDGETS = (1, 5, 10, 25)
TUNING_SAMPLES, NEIGHBOURS, AT_ONCE = 1_500, 2_500, 250
"""Samples in tuning, at most in precision and recall, and in a batch."""
TOLERANCE = refine_page.TOLERANCE
Figures = dict[str, float]


@dataclass(frozen=True)
class Study:
    """A data set and its networks.

    Attributes:
        title: for people.
        samples: generated ones in a measurement.
        batch, updates: in both kinds of further training.
        without: contenders that are left out, to bound the time.
        settings: of `gac train`, beyond its defaults.
    """

    title: str
    samples: int
    batch: int
    updates: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: Sequence[str] = ()


@dataclass(frozen=True)
class Contender:
    """A line of the tables.

    Attributes:
        what: how the tables call it.
        judge: a name in `JUDGES`.
        options: of `refine`, the same in every cell.
        grid: the values of two options; a cell is a pair of them. None: nothing is tuned.
        published: its method and its judge are those of a paper, or what the paper's theory asks for.
        redrawn: nothing moves; the latents are others.
    """

    what: str
    judge: str
    options: Mapping[str, Any]
    grid: Mapping[str, Sequence[float | str]] | None = None
    published: bool = False
    redrawn: bool = False

    @property
    def cells(self) -> list[dict[str, Any]]:
        if self.grid is None:
            return [{}]
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


STUDIES = {
    "mnist": Study("MNIST", samples=5_000, batch=256, updates=800),
    "cifar": Study(
        "CIFAR-10 (a copy in JPEG files), small dcgan, short",
        samples=1_000,
        batch=64,
        updates=700,
        settings={"width": 16, "steps": 2_000},
        without=("gradient", "dgflow-js-saved", "dgflow-js-ratio", "dgflow-logd-saved"),
    ),
}
JUDGES = {
    "saved": "D as training left it",
    "ratio": "D trained on as a classifier",
    "calibrated": "D calibrated",
}
STEP_AND_NOISE = {"rate": (0.01, 0.03, 0.1), "noise": (0.0, 0.01)}
LANGEVIN = {"rate": (0.003, 0.01, 0.03), "noise": (0.1, 1.0)}
STEP_AND_PROXIMITY = {"rate": (0.35 / 30, 0.7 / 30, 1 / 30), "proximity": (20.0, 30.0)}
CONTENDERS = {
    "default": Contender("conjugate ascent, defaults", "calibrated", {}),
    "default-saved": Contender("conjugate ascent, defaults", "saved", {}),
    "conjugate": Contender("conjugate ascent", "calibrated", {}, STEP_AND_PROXIMITY),
    "gradient": Contender("plain ascent", "calibrated", {"method": "gradient"}, STEP_AND_PROXIMITY),
    **{
        f"{method}-{judge}": Contender(what, judge, {"method": method}, grid, published=judge != "calibrated")
        for method, what, grid, judges in (
            ("langevin", "Langevin (DDLS)", LANGEVIN, ("saved", "ratio", "calibrated")),
            ("dgflow-kl", "DGflow, KL", STEP_AND_NOISE, ("saved", "ratio", "calibrated")),
            ("dgflow-js", "DGflow, JS", STEP_AND_NOISE, ("saved", "ratio")),
            ("dgflow-logd", "DGflow, log D", STEP_AND_NOISE, ("saved",)),
        )
        for judge in judges
    },
    "redrawn": Contender("control: other latents, not refined", "saved", {}, redrawn=True),
}


# ---- the judges


def config(study: str, folder: str, seed: int = 0) -> Config:
    trained = {"metric": "adam", "lr_generator": 2e-3, "lr_schedule": "constant", **STUDIES[study].settings}
    return Config(dataset=folder, seed=seed, cpu=True, evaluation_samples=0, memory=0.0, **trained)


def trained(study: str, folder: str, run: Path, seed: int) -> Figures:
    result = train(replace(config(study, folder, seed), output_dir=str(run), resume="auto"))
    if result.stopped is not Stop.NO:
        raise KeyboardInterrupt(f"stopped at step {result.step}; start the same command again to go on")
    return {"seconds": result.seconds}


def judged(study: str, folder: str, run: Path, seed: int, judge: str) -> Figures:
    """Leave a further trained discriminator in the run folder."""
    wanted, recipe = config(study, folder, seed), read_recipe(run / "generator")
    generator, saved = load_generator(run), load_discriminator(run)
    data = load_data(wanted).train
    start = time.perf_counter()
    with closing(batches(data, STUDIES[study].batch, codec_of(recipe).to_samples, seed)) as endless:
        known = with_latents(endless, recipe.latent_size, seed)
        further = calibrate if judge == "calibrated" else classifier
        network = further(generator, saved, known, STUDIES[study].updates)
    seconds = time.perf_counter() - start
    save_network(run / judge / "discriminator", network, read_recipe(run / "discriminator"))
    return {"seconds": seconds}


def with_latents(
    real: Iterator[tuple[Tensor, Tensor]], size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    random = torch.Generator().manual_seed(seed)
    return ((x, torch.randn(len(x), size, generator=random), {}) for x, _ in real)


def classifier(
    generator: nn.Module,
    saved: nn.Module,
    known: Iterator[tuple[Tensor, Tensor, dict[str, Any]]],
    updates: int,
) -> nn.Module:
    """The discriminator trained on to tell real samples from the held generator's, else just as in `calibrate`."""
    learner, loss = deepcopy(saved), LOSSES["bce"].discriminator
    average = AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.Adam(learner.parameters(), 2e-3, betas=(0.0, 0.99))
    schedule = LinearLR(optimizer, 1.0, 0.0, updates)
    for step, (real, z, _) in enumerate(islice(known, updates)):
        with torch.no_grad():
            made = generator(z)
        real, made = real.requires_grad_(), made.requires_grad_()
        l_real, l_made = learner(real), learner(made)
        value = loss(l_real, l_made).mean()
        if PENALTY.is_due(step):
            value = value + PENALTY.of(logit_gradient(l_real, real), logit_gradient(l_made, made))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(learner)
    return average.module


# ---- one cell


@dataclass(frozen=True)
class Yardstick:
    """Real samples in the features, in a fixed random order, and the distance between two halves of them."""

    features: Features
    real: Tensor
    floor: float


@cache
def yardstick(study: str, folder: str) -> Yardstick:
    data = load_data(config(study, folder))
    features = make_features(sample(data.train), data.test, 0, torch.device("cpu"))
    real = vectors(features, data.test.values)
    real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    return Yardstick(features, real, frechet_distance(*real.tensor_split(2)))


def vectors(features: Features, stored: Tensor) -> Tensor:
    return torch.cat([features.extract(part) for part in stored.split(AT_ONCE)])


def walks(
    run: Path, contender: Contender, options: Mapping[str, Any], seed: int, budgets: Sequence[int], count: int
) -> Iterator[tuple[int, Tensor, float]]:
    """At each budget: samples, and how far latents moved in the mean."""
    folder = network_folder(run, "generator")
    generator = load_generator(folder)
    discriminator = load_discriminator(run if contender.judge == "saved" else run / contender.judge)
    random, chosen = torch.Generator().manual_seed(seed + 1), {**contender.options, **options}
    goes_on = REFINEMENTS[chosen.get("method", "conjugate")].walk is flow  # has no memory of its start
    starts = draw_latents(read_recipe(folder), count, seed + REDRAWN * contender.redrawn).split(AT_ONCE)
    points, done = starts, 0
    for budget in budgets:
        if not contender.redrawn:
            before, steps = (points, budget - done) if goes_on else (starts, budget)
            points = [refine(generator, discriminator, z, steps, random=random, **chosen) for z in before]
            done = budget
        moved = [per_sample_norm(point - start) for point, start in zip(points, starts, strict=True)]
        with torch.no_grad():
            yield budget, torch.cat([generator(z) for z in points]), float(torch.cat(moved).mean())


def measure(
    study: str, folder: str, run: Path, name: str, options: Mapping[str, Any], seed: int, budgets: Sequence[int]
) -> dict[str, Figures]:
    """The figures of a contender on a model at each budget; none where a sample is not finite."""
    known, codec = yardstick(study, folder), codec_of(read_recipe(run / "generator"))
    count = STUDIES[study].samples
    if run.name == f"run-{TUNING_SEED}":
        count = min(count, TUNING_SAMPLES)
    near, found = min(count, NEIGHBOURS), dict[str, Figures]()
    for budget, samples, moved in walks(run, CONTENDERS[name], options, seed, budgets, count):
        if not samples.isfinite().all():
            found[str(budget)] = {}
            continue
        generated = vectors(known.features, codec.to_stored(samples))
        precision, recall = precision_recall(known.real[:near], generated[:near])
        frechet = frechet_distance(known.real, generated)
        found[str(budget)] = {"frechet": frechet, "precision": precision, "recall": recall, "moved": moved}
    return found


# ---- stages, of which nothing is computed twice


def single_threaded() -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def remember(file: Path, compute: Callable[..., Any], *arguments: Any) -> None:
    """Leave in the file what `compute` gives."""
    if not file.exists():
        write_json(file, compute(*arguments))
        print(f"  {file.parent.name}/{file.stem}", flush=True)


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

    @property
    def place(self) -> Path:
        return self.work / self.study

    @property
    def contenders(self) -> dict[str, Contender]:
        return {name: one for name, one in CONTENDERS.items() if name not in STUDIES[self.study].without}

    def run(self, seed: int) -> Path:
        return self.place / f"run-{seed}"

    def together(self, tasks: Mapping[Path, tuple[Any, ...]]) -> list[Any]:
        """What each of the files then holds."""
        missing = [self.pool.submit(remember, file, *task) for file, task in tasks.items() if not file.exists()]
        for one in missing:
            one.result()
        return [json.loads(file.read_text()) for file in tasks]

    def of_runs(self, name: str, compute: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What is found for the tuning seed and each of the others."""
        return self.together(
            {
                self.place / f"{name}-{seed}.json": (compute, self.study, self.folder, self.run(seed), seed, *arguments)
                for seed in (TUNING_SEED, *self.seeds)
            }
        )

    def figures(
        self, cells: Sequence[tuple[int, str, Mapping[str, Any]]], budgets: Sequence[int]
    ) -> list[dict[str, Figures]]:
        """Of (seed, contender, cell): the figures by budget."""
        tasks = {}
        for seed, name, cell in cells:
            told = "-".join(f"{option}={value:.4g}" for option, value in cell.items())
            file = self.place / "cells" / f"{name}-{told}-{'-'.join(map(str, budgets))}-{seed}.json"
            tasks[file] = (measure, self.study, self.folder, self.run(seed), name, cell, seed + 1000, budgets)
        return self.together(tasks)

    def tune(self) -> dict[str, Any]:
        """The winning cell of every contender, and all cells."""
        before = self.figures([(TUNING_SEED, "default", {})], [0])[0]["0"]
        tasks = [(TUNING_SEED, name, cell) for name, contender in self.contenders.items() for cell in contender.cells]
        measured = self.figures(tasks, [TUNED_AT])
        found = {}
        for name, contender in self.contenders.items():
            tried = [
                {**cell, **one[str(TUNED_AT)]} for (_, of, cell), one in zip(tasks, measured, strict=True) if of == name
            ]
            whole = [one for one in tried if "frechet" in one]
            kept = [one for one in whole if one["recall"] >= before["recall"] - TOLERANCE]
            best = min(kept or whole, key=lambda one: one["frechet"])
            found[name] = {"cell": {option: best[option] for option in contender.grid or {}}, "tried": tried}
        return {"unrefined": before, "contenders": found}

    def report(self) -> dict[str, Any]:
        """All stages."""
        print(STUDIES[self.study].title, flush=True)
        seconds = {"training": self.of_runs("trained", trained)}
        for judge in JUDGES.keys() - {"saved"}:
            seconds[judge] = self.of_runs(judge, judged, judge)
        (about,) = self.together({self.place / "about.json": (described, self.study, self.folder)})
        tuning = self.tune()
        unrefined = [one["0"] for one in self.figures([(seed, "default", {}) for seed in self.seeds], [0])]
        tasks = [(seed, name, tuning["contenders"][name]["cell"]) for name in self.contenders for seed in self.seeds]
        results: dict[str, list[dict[str, Figures]]] = {name: [] for name in self.contenders}
        for (_, name, _), one in zip(tasks, self.figures(tasks, BUDGETS), strict=True):
            results[name].append(one)
        return {
            **about,
            "seeds": list(self.seeds),
            "samples": STUDIES[self.study].samples,
            "further": {"updates": STUDIES[self.study].updates, "batch": STUDIES[self.study].batch},
            "seconds": {name: statistics.median(one["seconds"] for one in runs) for name, runs in seconds.items()},
            "tuning": tuning,
            "unrefined": unrefined,
            "results": results,
        }


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
    titles = {name: study.title for name, study in STUDIES.items()}
    (HERE / "REFINE.md").write_text(refine_page.page(COMMAND, titles, JUDGES, CONTENDERS, reports))
    refine_page.draw(titles, JUDGES, CONTENDERS, reports, HERE / "plots" / "refine.png")
    print(f"{file}\n{HERE / 'REFINE.md'}")


if __name__ == "__main__":
    main()
