"""What the adapters cost and what their samples are worth, where neither a run's own evaluation nor a test says it.

    python benchmarks/adapters.py timm                  a step with a resnet18 discriminator against the textbook loop
    python benchmarks/adapters.py mimicry               torch-mimicry's Trainer step with GAC against its own
    python benchmarks/adapters.py text --data FOLDER    Markov chains of letters, the yardstick for generated text

Each writes its part of results/adapters.json. Costs are CPU seconds of one thread, ways in turn within each round.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor, nn
from torch.nn.functional import softplus

from gac_plugin import GAC, ConjugateGradient
from gac_plugin.adapters.mimicry import GACGenerator
from gac_plugin.adapters.text import fit
from gac_plugin.adapters.timm_backbone import SkipGenerator, TimmDiscriminator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from mimicry_interop import SMALL, import_package, real_batch  # noqa: E402

BATCH, LATENT, WIDTH = 16, 64, 32
FAMILIES = ("SNGAN", "CGANPD", "SSGAN", "InfoMaxGAN", "WGANGP")
ORDERS, TEXTS, SEEDS = (1, 2, 3, 4), 5_000, 3
START, END = "^", "$"

Step = Callable[[], Any]


def ratios(ways: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds of each way to take a step, and its ratio to the first way; the first two rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, step in ways.items():
            began = time.process_time()
            step()
            if number >= 2:
                times[name].append(time.process_time() - began)
    base = next(iter(times.values()))
    found = {}
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, base, strict=True)], n=4)
        found[name] = {"seconds": statistics.median(seconds), "ratio": middle, "quartiles": [low, high]}
        print(f"  {name:<24} {found[name]['seconds']:.3f} s, ratio {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)
    return found


# ---- timm


def timm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Textbook loop, `fresh` and, for a frozen backbone, `fused`, with the same untrained resnet18, no penalty."""
    found = {}
    for kind, frozen in (("frozen", True), ("trained", False)):
        print(f"timm, {kind} resnet18 at 32x32, batch {BATCH}")
        schedules = ("fresh", "fused") if frozen else ("fresh",)
        steps = {"textbook": _textbook(frozen), **{name: _gac(frozen, name) for name in schedules}}
        found[kind] = ratios(steps, arguments.rounds or 40)
    return found


def _networks(frozen: bool) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    torch.manual_seed(0)
    generator = SkipGenerator((3, 32, 32), LATENT, WIDTH, 2, "tanh")
    discriminator = TimmDiscriminator((3, 32, 32), width=WIDTH, backbone="resnet18", frozen=frozen)
    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    return generator, discriminator, torch.optim.Adam(generator.parameters()), torch.optim.Adam(trained)


def _textbook(frozen: bool) -> Step:
    generator, discriminator, optimizer_g, optimizer_d = _networks(frozen)

    def step() -> None:
        real, fake = torch.randn(BATCH, 3, 32, 32), generator(torch.randn(BATCH, LATENT)).detach()
        optimizer_d.zero_grad()
        (softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()).backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        softplus(-discriminator(generator(torch.randn(BATCH, LATENT)))).mean().backward()
        optimizer_g.step()

    return step


def _gac(frozen: bool, schedule: str) -> Step:
    gac = GAC(*_networks(frozen), latent=LATENT, schedule=schedule)
    return lambda: gac.step(torch.randn(BATCH, 3, 32, 32))


# ---- torch-mimicry


def mimicry(arguments: argparse.Namespace) -> dict[str, Any]:
    """The package's own networks and train_step, n_dis discriminator steps and one of the generator."""
    package, found = import_package(), {}
    for family in FAMILIES:
        for n_dis in (1, 5):
            print(f"torch-mimicry, {family}, n_dis {n_dis}, width {WIDTH}, batch {BATCH}")
            ways = {
                "package": _trainer_step(package, family, n_dis, with_gac=False),
                "with GAC": _trainer_step(package, family, n_dis, with_gac=True),
            }
            found[f"{family}, n_dis {n_dis}"] = ratios(ways, arguments.rounds or 7)
    return found


def _trainer_step(package: Any, family: str, n_dis: int, with_gac: bool) -> Step:
    folder, options = SMALL[family]
    module = import_module(f"torch_mimicry.nets.{folder}.{folder}_32")
    generator_class = getattr(module, f"{family}Generator32")
    if with_gac:
        generator_class = type("WithGAC", (GACGenerator, generator_class), {})
    generator = generator_class(ngf=WIDTH, **options)
    discriminator = getattr(module, f"{family}Discriminator32")(ndf=WIDTH, **options)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.0, 0.9))
    optimizer_g: torch.optim.Optimizer = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.0, 0.9))
    if with_gac:
        optimizer_g = ConjugateGradient(generator.parameters(), 2e-4, "none", "adam", beta2=0.9)
    batch = real_batch(BATCH)

    def step() -> None:
        log, common = package.training.metric_log.MetricLog(), {"real_batch": batch, "device": generator.device}
        for _ in range(n_dis):
            log = discriminator.train_step(netG=generator, optD=optimizer_d, log_data=log, **common)
        generator.train_step(netD=discriminator, optG=optimizer_g, log_data=log, **common)

    return step


# ---- text


def text(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of texts drawn from chains of letters that were counted on the training split."""
    splits = load_dataset(arguments.data)
    (column,) = (name for name, feature in splits["train"].features.items() if feature.dtype.endswith("string"))
    train, test = splits["train"][column], splits["test"][column]
    codec = fit(train, {})

    def stored(texts: list[str]) -> Tensor:
        return torch.stack([codec.encode(text) for text in texts])

    known, held_out = stored(train), stored(test)
    found: dict[str, Any] = {}
    for order in ORDERS:
        follows = _chain(train, order)
        for seed in range(SEEDS):
            numbers = Random(seed)
            made = stored([_draw(follows, order, numbers) for _ in range(TEXTS)])
            figures = codec.figures(known, held_out, made)
            found[f"{order}-grams, seed {seed}"] = figures
            told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{order}-grams, seed {seed}: {told}", flush=True)
    return found


Chain = dict[str, tuple[list[str], list[int]]]


def _chain(texts: list[str], order: int) -> Chain:
    """How often each letter follows the order - 1 letters before it."""
    follows: dict[str, Counter[str]] = defaultdict(Counter)
    for one in texts:
        marked = START * (order - 1) + one + END
        for place in range(order - 1, len(marked)):
            follows[marked[place - order + 1 : place]][marked[place]] += 1
    return {context: (list(counts), list(counts.values())) for context, counts in follows.items()}


def _draw(follows: Chain, order: int, numbers: Random) -> str:
    """One text that is not empty."""
    while True:
        drawn = START * (order - 1)
        while not drawn.endswith(END):
            drawn += numbers.choices(*follows[drawn[len(drawn) - order + 1 :]])[0]
        if len(drawn) > order:
            return drawn[order - 1 : -1]


SECTIONS = {section.__name__: section for section in (timm, mimicry, text)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--data", metavar="FOLDER", help="a text data set in Hub layout, for `text`")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of a cost (default: 40, mimicry 7)")
    arguments = parser.parse_args()
    if arguments.section == "text" and not arguments.data:
        parser.error("text needs --data FOLDER")
    torch.set_num_threads(1)
    file = HERE / "results" / "adapters.json"
    report = json.loads(file.read_text()) if file.exists() else {}
    report[arguments.section] = SECTIONS[arguments.section](arguments)
    file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
