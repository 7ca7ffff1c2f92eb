"""Runs of the benchmark of coverage: settings, methods, training, and what their samples are, as made and refined.

The protocol is PacGAN's (Lin, Khetan, Fanti & Oh 2018; its published code): networks, batches, numbers of samples, and
what counts as a mode. All samples come from the running average of the generator, and all rates fall linearly to zero,
GAC's penalty with them: it evens out the modes at first and would blur them later.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cells import Cells, place_of, suffix
from benchmarks.peers import (
    LINEAR,
    PLAIN_GAME,
    Batches,
    Game,
    Make,
    Step,
    adam,
    conjugate,
    falling,
    falling_alternating,
)
from benchmarks.worlds import (
    Mixture,
    StackedGenerator,
    World,
    grid,
    planar_discriminator,
    planar_generator,
    ring,
    stacked,
    stacked_discriminator,
)
from gac_plugin import GAC, LOSSES, GradientPenalty, Metric, kronecker, refine
from gac_plugin.cotangent import evaluating
from gac_plugin.training.ema import RunningAverage

TUNING_SEED, EVALUATION_SEED, EMA = 100, 1000, 0.995
AS_MADE, REFINED = "as made", "refined"
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
        times: its steps for each of the setting's, so that all methods train for about as long.
    """

    title: str
    make: Callable[[Cell, int], Make]
    cells: Sequence[Cell]
    normalised: bool = False
    times: int = 1


@dataclass(frozen=True)
class Setting:
    """A world, networks, and who is to learn it.

    Attributes:
        published: (name, modes, KL) of the best published result.
        goal: (modes, KL, share of good samples): at least, at most, at least.
        smaller: what is smaller here than in the published runs.
        refinements: steps of `refine` after which samples are judged again; 0 for no second judgement.
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
    refinements: int = 0
    seeds: int = 10


def textbook(betas: tuple[float, float] | None, cell: Cell, steps: int) -> Make:
    return falling_alternating(PLAIN_GAME, adam(*(betas or (cell["beta1"], 0.999))), steps)


def penalised(cell: Cell, steps: int) -> Make:
    """`our_recipe` without GAC: textbook order, two draws, plain Adam for both networks; the penalty falls as there."""
    penalty = GradientPenalty(cell["gamma"], cell["gamma"])
    game = Game(LOSSES["bce"], penalty, lambda number: LINEAR.factor(number + 1, steps))
    return falling_alternating(game, adam(0.0, 0.99), steps)


def our_recipe(metric: str | Metric, cell: Cell, steps: int) -> Make:
    """`gac train --penalty-schedule linear`, under a metric."""

    def make(generator: nn.Module, discriminator: nn.Module, lr_g: float, lr_d: float) -> Step:
        gac = GAC(
            generator,
            discriminator,
            falling(conjugate(metric=metric), LINEAR, steps)(generator.parameters(), lr_g),
            falling(adam(0.0, 0.99), LINEAR, steps)(discriminator.parameters(), lr_d),
        )
        numbers = count(1)

        def step(batches: Batches) -> None:
            gamma = cell["gamma"] * LINEAR.factor(next(numbers), steps)
            gac.penalty = GradientPenalty(gamma, gamma)
            gac.step(next(batches))

        return step

    return make


PLANAR = {
    "textbook": Contender(
        "textbook Adam",
        partial(textbook, None),
        [{"lr_g": rate, "lr_d": rate, "beta1": beta} for rate in (3e-5, 1e-4, 3e-4) for beta in (0.0, 0.5)],
        times=2,
    ),
    "recipe": Contender(
        "our recipe, plain Adam",
        penalised,
        [{"lr_g": rate, "lr_d": rate, "gamma": gamma} for rate in (3e-4, 1e-3) for gamma in (0.03, 0.3, 1.0)],
        times=2,
    ),
    "gac": Contender(
        "GAC",
        partial(our_recipe, kronecker(largest_side=400)),
        [{"lr_g": 1e-3, "lr_d": rate, "gamma": gamma} for rate in (1e-3, 2e-3) for gamma in (0.03, 0.3, 1.0)],
    ),
}


def stacked_contenders(rates: tuple[float, float], betas: tuple[float, float]) -> dict[str, Contender]:
    scaled = [{"lr_g": factor * rates[0], "lr_d": factor * rates[1]} for factor in (4.0, 8.0, 16.0, 32.0)]
    ours = [{"lr_g": rate, "lr_d": 4e-3, "gamma": gamma} for rate in (2e-3, 4e-3) for gamma in (1.0, 3.0)]
    return {
        "textbook": Contender("textbook Adam", partial(textbook, betas), scaled, normalised=True),
        "recipe": Contender("our recipe, plain Adam", penalised, ours),
        "gac": Contender("GAC", partial(our_recipe, "kronecker"), ours),
    }


def planar(title: str, world: Callable[[Path, str], World], modes: int, published: tuple[str, str, str]) -> Setting:
    return Setting(
        title,
        world,
        generator=lambda _: planar_generator(),
        discriminator=lambda *_: planar_discriminator(),
        batch=100,
        samples=2_500,
        contenders=PLANAR,
        published=published,
        goal=(modes, 0.02, 0.97),
        smaller="steps (published 400,000)",
        refinements=10,
    )


SETTINGS = {
    "ring": planar("2-D ring, 8 modes of deviation 0.01", ring, 8, ("PacGAN", "7.9", "0.07")),
    "grid": planar("2-D grid, 25 modes of deviation 0.05", grid, 25, ("PacGAN", "24.8", "0.04")),
    "stacked": Setting(
        title="Stacked MNIST",
        world=stacked,
        generator=partial(StackedGenerator, 100, 16),
        discriminator=partial(stacked_discriminator, 32),
        batch=64,
        samples=26_000,
        contenders=stacked_contenders((2e-4, 2e-4), (0.5, 0.999)),
        published=("PacDCGAN", "1000", "0.06"),
        goal=(1000, 0.06, 0.0),
        smaller="networks (G of width 16, D of 32; published: DCGAN of width 64, D with four stages, the first "
        "without batch norm), steps (published 100,000), one step of G for each of D (published two); latents are "
        "normal (published uniform)",
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
        {"ring": 1_000, "grid": 1_000, "stacked": 2_000, "hard": 1_000},
        {"ring": 3_000, "grid": 4_000, "stacked": 12_000, "hard": 4_000},
    ),
    "smoke": Size(dict.fromkeys(SETTINGS, 3), dict.fromkeys(SETTINGS, 4), samples=0.02, cells=2),
}


# ---- one run


def run(
    name: str,
    contender: str,
    folder: str,
    work: Path,
    cell: Cell,
    seed: int,
    steps: int,
    wanted: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train on a device and count modes.

    Returns:
        CPU `seconds` of training, and of the samples `as made`, and `refined` where the setting wants it, what `judge`
        says, with a few of the `samples`. Where it diverged each has `modes` 0 alone.
    """
    setting = SETTINGS[name]
    world, method = setting.world(work, folder), setting.contenders[contender]
    torch.manual_seed(seed)
    side = world.draw(1, torch.Generator()).shape[-1]
    generator, discriminator = (
        setting.generator(side).to(device),
        setting.discriminator(side, method.normalised).to(device),
    )
    step = method.make(cell, steps)(generator, discriminator, cell["lr_g"], cell["lr_d"])
    average, batches = RunningAverage(generator), real_batches(world, setting.batch, seed, device)
    start = time.process_time()
    for _ in range(steps):
        step(batches)
        average.update(generator, EMA)
    seconds = time.process_time() - start
    latents = torch.randn(wanted, generator.nz, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    parts = latents.to(device).split(1000)
    found = {"seconds": seconds, AS_MADE: figures_of(world, samples_of(average.network, parts))}
    if setting.refinements:
        refined = (refine(average.network, discriminator, z, setting.refinements) for z in parts)
        found[REFINED] = figures_of(world, samples_of(average.network, refined))
    return found


@torch.no_grad()
def samples_of(generator: nn.Module, latents: Iterable[Tensor]) -> Tensor:
    with evaluating(generator):
        return torch.cat([generator(z) for z in latents]).cpu()


def figures_of(world: World, samples: Tensor) -> dict[str, Any]:
    """What `judge` says, and the first `samples`."""
    if not samples.isfinite().all():
        return {"modes": 0}
    return {**judge(world, samples), "samples": samples[: world.shown].tolist()}


def real_batches(world: World, batch: int, seed: int, device: str = "cpu") -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(seed)
    while True:
        yield world.draw(batch, random).to(device)


def judge(world: World, samples: Tensor) -> Figures:
    """How many modes have a sample, how evenly, and the share of samples that are of any mode.

    KL = sum_m p_m log(p_m / q_m), p the shares of the modes among the samples that are of one, q = 1 / modes; left out
    where no sample is. `spread`, of a mixture: how far these are from their modes, root mean square, in deviations.
    """
    mode = world.mode_of(samples)
    of_a_mode = mode >= 0
    figures = {"modes": 0, "good": float(of_a_mode.double().mean())}
    if not of_a_mode.any():
        return figures
    counts = torch.bincount(mode[of_a_mode], minlength=world.modes).double()
    shares = counts[counts > 0] / counts.sum()
    figures |= {"modes": len(shares), "kl": float((shares * (shares * world.modes).log()).sum())}
    if isinstance(world, Mixture):
        figures["spread"] = world.spread(samples[of_a_mode])
    return figures


def judge_real(name: str, folder: str, work: Path, count: int) -> dict[str, Any]:
    """The same of real samples: what is best possible with so many."""
    world = SETTINGS[name].world(work, folder)
    return figures_of(world, world.draw(count, torch.Generator().manual_seed(EVALUATION_SEED)))


def loss_of(figures: Mapping[str, float]) -> float:
    """KL - log(share of good samples): what the cells are chosen by; infinite where a run diverged."""
    good = figures.get("good", 0.0)
    return figures["kl"] - math.log(good) if good > 0 else math.inf


# ---- all runs


def measure(name: str, folder: str, cells: Cells, seeds: int, size: Size, device: str = "cpu") -> dict[str, Any]:
    """Real samples, the tuning and the runs of every method in a setting."""
    setting = SETTINGS[name]
    count = round(size.samples * setting.samples)
    (real,) = cells.of({f"{name}/real-{count}": (judge_real, name, folder, cells.work, count)})
    found = {}
    for contender, method in setting.contenders.items():
        common, ending = (run, name, contender, folder, cells.work), suffix(device)
        tuning, steps = method.times * size.tuning[name], method.times * size.steps[name]
        options = method.cells[: size.cells]
        tried = cells.of(
            {
                f"{name}/{contender}-{told(cell)}-{tuning}-tuning{ending}": (
                    *common,
                    cell,
                    TUNING_SEED,
                    tuning,
                    count,
                    device,
                )
                for cell in options
            }
        )
        cell = min(zip(options, tried, strict=True), key=lambda pair: loss_of(pair[1][AS_MADE]))[0]
        runs = cells.of(
            {
                f"{name}/{contender}-{told(cell)}-{steps}-{seed}{ending}": (*common, cell, seed, steps, count, device)
                for seed in range(min(seeds, setting.seeds))
            }
        )
        told_cells = [{"cell": one, **plain(made[AS_MADE])} for one, made in zip(options, tried, strict=True)]
        found[contender] = {"steps": steps, "cell": cell, "tried": told_cells, "runs": runs}
    return {"real": real, "samples": count, "device": place_of(device), "methods": found}


def told(cell: Cell) -> str:
    return "-".join(f"{option}={value:g}" for option, value in cell.items())


def plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "samples"}
