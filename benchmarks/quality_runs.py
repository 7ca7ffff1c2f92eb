"""Training runs of the benchmarks of quality and ablation: a method on a data set, judged along the way."""

import math
import statistics
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cells import HERE, Cells, place_of, suffix
from benchmarks.peers import METHODS, Make
from gac_plugin.training import Config
from gac_plugin.training.data import Data, load_data
from gac_plugin.training.data.source import sample
from gac_plugin.training.ema import RunningAverage
from gac_plugin.training.generate import render
from gac_plugin.training.judging.evaluate import Features, frechet_distance, make_features, precision_recall
from gac_plugin.training.judging.features import fingerprint, kept_features
from gac_plugin.training.networks import Recipe, choose_recipe

TUNING_SEED, EVALUATION_SEED, PACE_SEED = 100, 1000, 99
BATCH, EMA = 64, 0.995
FEATURES = HERE / "results" / "features"
"""The classifiers of the data sets that results were taken with, so that results of different machines compare."""
TURN = 20
"""Steps in which all that recurs does so as often as in any others: penalties every 4th, turned bases every 10th."""


@dataclass(frozen=True)
class Study:
    """A data set and its networks: an adapter of gac_plugin and its width."""

    title: str
    adapter: str
    width: int
    networks: str


STUDIES = {
    "mnist": Study("MNIST", "mlp", 256, "perceptrons, G 64-256-256-784, D 784-256-256-1"),
    "cifar": Study("CIFAR-10 (a copy in JPEG files)", "dcgan", 16, "dcgan of width 16, no batch norm"),
}


@dataclass(frozen=True)
class Size:
    """How much is computed. `tuning`, `steps`: of a cell of the grid and of a long run. `rates`: tried of each network.

    Attributes:
        evaluations: in a long run, evenly spaced.
        rounds: of the measurement of a step's time, `TURN` steps of each method in a round.
    """

    tuning: Mapping[str, int]
    steps: Mapping[str, int]
    evaluations: int = 34
    samples: int = 5_000
    rates: int = 5
    rounds: int = 30


SIZES = {
    "full": Size({"mnist": 1_700, "cifar": 500}, {"mnist": 6_800, "cifar": 2_720}),
    "smoke": Size({"mnist": 6, "cifar": 2}, {"mnist": 8, "cifar": 4}, evaluations=2, samples=100, rates=1, rounds=2),
}


# ---- one run


@dataclass(frozen=True)
class Yardstick:
    """A data set, its networks, and real test samples in features."""

    data: Data
    recipe: Recipe
    features: Features
    real: Tensor


@cache
def yardstick(study: str, folder: str) -> Yardstick:
    settings = STUDIES[study]
    config = Config(dataset=folder, adapter=settings.adapter, width=settings.width, cpu=True)
    data = load_data(config)
    recipe = choose_recipe(config, data.codec, data.adapter, 0)
    train, device = sample(data.train, 60_000), torch.device("cpu")
    kept = FEATURES / f"{fingerprint(train, 0)}.safetensors"
    features = kept_features(kept, data.test, device) if kept.exists() else make_features(train, data.test, 0, device)
    return Yardstick(data, recipe, features, features.of(data.test.values))


@dataclass
class Run:
    """Two networks under a method, with the generator's running average and the number of D's gradients so far."""

    generator: nn.Module
    discriminator: nn.Module
    average: RunningAverage
    step: Any
    batches: Iterator[Tensor]
    ema: float = EMA
    gradients: int = 0

    def advance(self) -> float:
        """One step; its CPU seconds."""
        start = time.process_time()
        self.step(self.batches)
        self.average.update(self.generator, self.ema)
        return time.process_time() - start


def new_run(
    known: Yardstick, make: Make, lr_g: float, lr_d: float, seed: int, ema: float = EMA, device: str = "cpu"
) -> Run:
    torch.manual_seed(seed)
    generator, discriminator = (build().to(device) for build in (known.recipe.generator, known.recipe.discriminator))
    step = make(generator, discriminator, lr_g, lr_d)
    run = Run(generator, discriminator, RunningAverage(generator), step, batches(known, seed, device), ema)

    def count(*_: Any) -> None:
        run.gradients += 1

    def watch(_: nn.Module, __: Any, logits: Tensor) -> None:
        if logits.requires_grad:
            logits.register_hook(count)

    discriminator.register_forward_hook(watch)
    return run


def batches(known: Yardstick, seed: int, device: str = "cpu") -> Iterator[Tensor]:
    """Real samples, drawn with repetition; the same for every method."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(known.data.train), (BATCH,), generator=draw)
        yield known.data.codec.to_samples(known.data.train.read(rows).values.to(device))


def learn(
    study: str,
    folder: str,
    make: Make,
    rates: tuple[float, float],
    seed: int,
    steps: Sequence[int],
    samples: int,
    ema: float = EMA,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train on a device, and evaluate after each of the steps.

    Returns:
        `curve`: step, CPU seconds of training, gradients of D and Frechet distance at each, up to the first at which
        samples are not finite. `precision`, `recall`: at the end, if it was reached.
    """
    known, seconds, curve = yardstick(study, folder), 0.0, []
    run = new_run(known, make, *rates, seed, ema, device)
    latents = torch.randn(samples, run.generator.nz, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    latents = latents.to(device)
    ends: dict[str, float] = {}
    for number in range(1, steps[-1] + 1):
        seconds += run.advance()
        if number in steps:
            network = run.average.network
            if not all(p.isfinite().all() for p in network.parameters()):
                break
            generated = known.features.of(render(network, known.data.codec, latents).cpu())
            frechet = frechet_distance(known.real, generated)
            curve.append({"step": number, "seconds": seconds, "gradients": run.gradients, "frechet": frechet})
            if number == steps[-1]:
                precision, recall = precision_recall(known.real[: len(generated)], generated)
                ends = {"precision": precision, "recall": recall}
    return {"curve": curve, **ends}


def try_cell(
    study: str, folder: str, name: str, rates: tuple[float, float], steps: int, samples: int, device: str = "cpu"
) -> float | None:
    """The Frechet distance that a cell of the grid ends with; None where it diverged."""
    make = METHODS[name].make_over(steps)
    curve = learn(study, folder, make, rates, TUNING_SEED, [steps], samples, device=device)["curve"]
    return curve[0]["frechet"] if curve else None


def long_run(
    study: str,
    folder: str,
    name: str,
    rates: tuple[float, float],
    seed: int,
    steps: int,
    size: Size,
    device: str = "cpu",
) -> dict[str, Any]:
    marks = [steps * number // size.evaluations for number in range(1, size.evaluations + 1)]
    return learn(study, folder, METHODS[name].make_over(steps), rates, seed, marks, size.samples, device=device)


def measure_pace(study: str, folder: str, names: Sequence[str], rounds: int) -> dict[str, float]:
    """CPU seconds of a step of each method, in rounds of `TURN` steps in which the methods take turns.

    The first method's is the median over rounds. The others' are that times the median over rounds of the ratio of the
    two within a round, since the machine's own pace changes from round to round.
    """
    known = yardstick(study, folder)
    runs = {
        name: new_run(known, METHODS[name].make, METHODS[name].rates[1], METHODS[name].rates[1], PACE_SEED)
        for name in names
    }
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = sum(run.advance() for _ in range(TURN)) / TURN
            if number:  # the first round warms up
                taken[name].append(seconds)
    base = taken[names[0]]
    return {
        name: statistics.median(base) * statistics.median(a / b for a, b in zip(values, base, strict=True))
        for name, values in taken.items()
    }


def describe(study: str, folder: str) -> dict[str, Any]:
    known = yardstick(study, folder)
    shuffled = known.real[torch.randperm(len(known.real), generator=torch.Generator().manual_seed(0))]
    return {
        "features": known.features.name,
        "real samples": len(known.real),
        "floor": frechet_distance(*shuffled.tensor_split(2)),
    }


# ---- all runs of a study


@dataclass(frozen=True)
class Bench:
    """A study with its data, its cells, its seeds, its size, and the device that networks are trained on."""

    study: str
    folder: str
    cells: Cells
    seeds: Sequence[int]
    size: Size
    device: str = "cpu"

    def prepare(self, names: Sequence[str]) -> dict[str, Any]:
        """What the features are, and the pace of all methods."""
        these = zlib.crc32(f"{names} {self.size.rounds}".encode())
        about, pace = self.cells.of(
            {
                f"{self.study}/about": (describe, self.study, self.folder),
                f"{self.study}/pace-{these:08x}": (measure_pace, self.study, self.folder, names, self.size.rounds),
            }
        )
        return {**about, "samples": self.size.samples, "seeds": list(self.seeds), "pace": pace, "methods": {}}

    def measure(self, name: str) -> dict[str, Any]:
        """The grid of a method, and the long runs of its best cell."""
        tuning, steps = self.size.tuning[self.study], self.size.steps[self.study]
        rates_g, rates_d = METHODS[name].rates, METHODS[name].rates_d
        pairs = list(product(rates_g[: self.size.rates], rates_d[: self.size.rates]))
        common = (self.study, self.folder, name)
        ending = suffix(self.device)
        grid = self.cells.of(
            {
                f"{self.study}/grid/{name}-{g:g}-{d:g}-{tuning}{ending}": (
                    try_cell,
                    *common,
                    (g, d),
                    tuning,
                    self.size.samples,
                    self.device,
                )
                for g, d in pairs
            }
        )
        best = min(zip(pairs, grid, strict=True), key=lambda pair: math.inf if pair[1] is None else pair[1])[0]
        runs = self.cells.of(
            {
                f"{self.study}/long/{name}-{best[0]:g}-{best[1]:g}-{steps}-{seed}{ending}": (
                    long_run,
                    *common,
                    best,
                    seed,
                    steps,
                    self.size,
                    self.device,
                )
                for seed in self.seeds
            }
        )
        cells = [{"lr_g": g, "lr_d": d, "frechet": frechet} for (g, d), frechet in zip(pairs, grid, strict=True)]
        found = {"tuning steps": tuning, "steps": steps, "best": best, "grid": cells, "runs": runs}
        return found if self.device == "cpu" else {**found, "device": place_of(self.device)}
