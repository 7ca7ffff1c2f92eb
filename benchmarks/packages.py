"""Published GAN packages with GAC swapped in: the changed lines, 50 steps before and after, the ratio of their cost.

    python benchmarks/packages.py        writes results/packages.json; needs pip install -e ".[packages,test]"

In the script `before` a package's own networks are trained by its own trainer, unmodified. After it stands one script
for each depth of the swap: `optimizer` (ConjugateGradient for Adam) and `step` (GAC's). What differs between
the two is what a user changes; it is printed and stored.

Cost is CPU seconds of one thread per training step, the median over the steps of a run. A round runs all scripts of a
package in turn; the ratio is taken in each round, and its median over the rounds is reported. Real data: scikit-learn's
digits and wines.
"""

import argparse
import difflib
import inspect
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits, load_wine
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, interpolate
from torch.optim import Adam
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

Losses = list[tuple[float, float]]
"""(discriminator's, generator's) of each step, as the script's own trainer counts them."""

STEPS, ROUNDS, SEEDS, EPOCHS, ROWS = 50, 3, 3, 300, 5_000
LATENT, BATCH, RATE, BETAS = 64, 16, 2e-4, (0.5, 0.999)


def digits(number: int = 1797) -> Tensor:
    """Handwritten digits in [0, 1], enlarged: (number, 1, 32, 32)."""
    images = torch.from_numpy(load_digits().images[:number]).float()[:, None] / 16
    return interpolate(images, size=32, mode="bilinear")


# lightweight-gan: its Trainer, one call of `train` for each step.


class WithoutGPU(TorchFunctionMode):
    """Keeps on the CPU what code sends to a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def lightweight_trainer() -> Iterator[Any]:
    """The Trainer on digits, one at a time, since it asks for an NVIDIA GPU and does without one here."""
    with mock.patch("torch.cuda.is_available", return_value=True):  # asserted at import
        from lightweight_gan import Trainer

    with WithoutGPU():
        trainer = Trainer(image_size=32, latent_dim=LATENT, fmap_max=32, greyscale=True, batch_size=1, use_aim=False)
        trainer.loader = iter(DataLoader(digits(), shuffle=True))
        trainer.init_GAN()
        trainer.steps = 4  # past the pictures and the checkpoint of step 0
        yield trainer


def lightweight_gan_before(steps: int) -> Losses:
    losses = []
    with lightweight_trainer() as trainer:
        for _ in range(steps):
            trainer.train()
            losses.append((trainer.d_loss, trainer.g_loss))
    return losses


def lightweight_gan_optimizer(steps: int) -> Losses:
    from gac_plugin import ConjugateGradient

    losses = []
    with lightweight_trainer() as trainer:
        trainer.GAN.G_opt = ConjugateGradient(trainer.GAN.G.parameters(), 2e-4, "pr+", "adam", beta2=0.9)
        for _ in range(steps):
            trainer.train()
            losses.append((trainer.d_loss, trainer.g_loss))
    return losses


def lightweight_gan_step(steps: int) -> Losses:
    from gac_plugin import GAC, GradientPenalty

    losses = []
    with lightweight_trainer() as trainer:
        gan, heads = trainer.GAN, lambda out: torch.cat([out[0], out[1].flatten(1)], dim=1)
        gac = GAC(gan.G, gan.D_aug, gan.G_opt, gan.D_opt, "hinge", penalty=GradientPenalty(2.5, 2.5), logits=heads)
        for _ in range(steps):
            stats = gac.step(next(trainer.loader), torch.randn(1, LATENT))
            losses.append((stats["loss_d"].item(), stats["loss_g"].item()))
    return losses


# ctgan: its `fit` on 178 wines with 13 measurements and their cultivar; an epoch is one step.


def wines() -> pd.DataFrame:
    return load_wine(as_frame=True).frame


def ctgan_before(steps: int) -> Losses:
    from ctgan import CTGAN

    model = CTGAN(epochs=steps, enable_gpu=False)
    model.fit(wines(), ["target"])
    return model.loss_values[["Discriminator Loss", "Generator Loss"]].to_numpy().tolist()


def ctgan_step(steps: int) -> Losses:
    from gac_plugin.adapters.tables import GACCTGAN as CTGAN

    model = CTGAN(epochs=steps, enable_gpu=False)
    model.fit(wines(), ["target"])
    return model.loss_values[["Discriminator Loss", "Generator Loss"]].to_numpy().tolist()


# MONAI: its GanTrainer, an engine of pytorch-ignite; the discriminator ends in a sigmoid.


def monai_networks() -> tuple[Any, Any]:
    from monai.networks.nets import Discriminator, Generator

    return Generator((LATENT,), (32, 8, 8), (16, 1), (2, 2)), Discriminator((1, 32, 32), (16, 32, 64), (2, 2, 2))


def monai_losses(discriminator: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The generator's of generated samples, the discriminator's of generated and real ones."""

    def entropy(samples: Tensor, target: float) -> Tensor:
        answer = discriminator(samples)
        return binary_cross_entropy(answer, torch.full_like(answer, target))

    return lambda fake: entropy(fake, 1), lambda fake, real: entropy(real, 1) + entropy(fake.detach(), 0)


def monai_settings(steps: int) -> dict[str, Any]:
    """One epoch of `steps` batches."""
    images: Any = [{"reals": image} for image in digits(steps * BATCH)]
    loader = DataLoader(images, batch_size=BATCH)
    return {"device": "cpu", "max_epochs": 1, "train_data_loader": loader, "decollate": False}


def losses_of(trainer: Any, discriminator: str, generator: str) -> Losses:
    """A list that grows by these two entries of the trainer's output at every iteration."""
    from ignite.engine import Events

    losses: Losses = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        losses.append((float(trainer.state.output[discriminator]), float(trainer.state.output[generator])))

    return losses


def monai_before(steps: int) -> Losses:
    from monai.engines import GanTrainer

    generator, discriminator = monai_networks()
    loss_g, loss_d = monai_losses(discriminator)
    optimizer_g = Adam(generator.parameters(), RATE, BETAS)
    optimizer_d = Adam(discriminator.parameters(), RATE, BETAS)
    trainer = GanTrainer(
        g_network=generator,
        g_optimizer=optimizer_g,
        g_loss_function=loss_g,
        d_network=discriminator,
        d_optimizer=optimizer_d,
        d_loss_function=loss_d,
        **monai_settings(steps),
    )
    losses = losses_of(trainer, "d_loss", "g_loss")
    trainer.run()
    return losses


def monai_optimizer(steps: int) -> Losses:
    from monai.engines import GanTrainer

    from gac_plugin import ConjugateGradient

    generator, discriminator = monai_networks()
    loss_g, loss_d = monai_losses(discriminator)
    optimizer_g = ConjugateGradient(generator.parameters(), RATE, "pr+", "adam")
    optimizer_d = Adam(discriminator.parameters(), RATE, BETAS)
    trainer = GanTrainer(
        g_network=generator,
        g_optimizer=optimizer_g,
        g_loss_function=loss_g,
        d_network=discriminator,
        d_optimizer=optimizer_d,
        d_loss_function=loss_d,
        **monai_settings(steps),
    )
    losses = losses_of(trainer, "d_loss", "g_loss")
    trainer.run()
    return losses


def monai_step(steps: int) -> Losses:
    from monai.engines import GanTrainer

    from gac_plugin import GAC

    generator, discriminator = monai_networks()
    loss_g, loss_d = monai_losses(discriminator)
    optimizer_g = Adam(generator.parameters(), RATE, BETAS)
    optimizer_d = Adam(discriminator.parameters(), RATE, BETAS)
    gac = GAC(generator, discriminator, optimizer_g, optimizer_d, output="probability", latent=LATENT)
    trainer = GanTrainer(
        g_network=generator,
        g_optimizer=optimizer_g,
        g_loss_function=loss_g,
        d_network=discriminator,
        d_optimizer=optimizer_d,
        d_loss_function=loss_d,
        iteration_update=lambda engine, batch: gac.step(batch["reals"]),
        **monai_settings(steps),
    )
    losses = losses_of(trainer, "loss_d", "loss_g")
    trainer.run()
    return losses


# torchgan: its Trainer on two loss objects, each of which trains one network.


def torchgan_networks(optimizer: Any, **settings: Any) -> dict[str, Any]:
    """The Trainer's table of networks, with this optimizer for the generator."""
    from torchgan.models import DCGANDiscriminator, DCGANGenerator

    return {
        "generator": {
            "name": DCGANGenerator,
            "args": {"encoding_dims": LATENT, "out_channels": 1, "step_channels": 8},
            "optimizer": {"name": optimizer, "args": {"lr": RATE, **settings}},
        },
        "discriminator": {
            "name": DCGANDiscriminator,
            "args": {"in_channels": 1, "step_channels": 8},
            "optimizer": {"name": Adam, "args": {"lr": RATE, "betas": BETAS}},
        },
    }


def torchgan_batches(steps: int) -> Any:
    return DataLoader(TensorDataset(2 * digits(steps * BATCH) - 1, torch.zeros(steps * BATCH)), batch_size=BATCH)


def torchgan_losses(trainer: Any) -> Losses:
    """The curves that the Trainer keeps."""
    curves = trainer.logger.get_loss_viz().logs
    return list(zip(curves["MinimaxDiscriminatorLoss"], curves["MinimaxGeneratorLoss"], strict=True))


def torchgan_before(steps: int) -> Losses:
    from torchgan.losses import MinimaxDiscriminatorLoss, MinimaxGeneratorLoss
    from torchgan.trainer import Trainer

    networks = torchgan_networks(Adam, betas=BETAS)
    losses = [MinimaxGeneratorLoss(), MinimaxDiscriminatorLoss()]
    trainer = Trainer(networks, losses, device=torch.device("cpu"), epochs=1)
    trainer.logger.logger_end_epoch.clear()  # its pictures use an argument that torchvision has removed since
    trainer(torchgan_batches(steps))
    return torchgan_losses(trainer)


def torchgan_optimizer(steps: int) -> Losses:
    from torchgan.losses import MinimaxDiscriminatorLoss, MinimaxGeneratorLoss
    from torchgan.trainer import Trainer

    from gac_plugin import ConjugateGradient

    networks = torchgan_networks(ConjugateGradient, rule="pr+", metric="adam")
    losses = [MinimaxGeneratorLoss(), MinimaxDiscriminatorLoss()]
    trainer = Trainer(networks, losses, device=torch.device("cpu"), epochs=1)
    trainer.logger.logger_end_epoch.clear()  # its pictures use an argument that torchvision has removed since
    trainer(torchgan_batches(steps))
    return torchgan_losses(trainer)


SCRIPTS: dict[str, dict[str, Callable[[int], Losses]]] = {
    "lightweight-gan": {
        "before": lightweight_gan_before,
        "optimizer": lightweight_gan_optimizer,
        "step": lightweight_gan_step,
    },
    "ctgan": {"before": ctgan_before, "step": ctgan_step},
    "monai": {"before": monai_before, "optimizer": monai_optimizer, "step": monai_step},
    "torchgan": {
        "before": torchgan_before,
        "optimizer": torchgan_optimizer,
    },
}
"""By package, as the registry names it, and depth of the swap."""


def installed() -> list[str]:
    """The packages of `SCRIPTS` that are installed here."""
    return [package for package in SCRIPTS if find_spec(package.replace("-", "_")) is not None]


def changed_lines(before: Callable[..., Any], after: Callable[..., Any]) -> list[str]:
    """What a user changes: lines of the script `before` with a -, lines of `after` with a +, blank ones left out."""
    sources = [inspect.getsource(script).splitlines()[1:] for script in (before, after)]
    lines = list(difflib.unified_diff(*sources, n=0, lineterm=""))[2:]
    return [line for line in lines if not line.startswith("@@") and line[1:].strip()]


class Run(NamedTuple):
    losses: Losses
    seconds: float
    """of one thread, for one training step: the median over the run"""


def run(script: Callable[[int], Losses], steps: int, seed: int) -> Run:
    """One script in an empty folder, its steps timed at the optimizers, two of which step in every training step."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    stamps: list[float] = []
    here = Path.cwd()
    clock = register_optimizer_step_post_hook(lambda *_: stamps.append(time.process_time()))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        os.chdir(folder)
        try:
            losses = script(steps)
        finally:
            os.chdir(here)
            clock.remove()
    ends = stamps[1::2]
    return Run(losses, statistics.median(after - before for before, after in pairwise(ends)))


def compare(package: str, steps: int = STEPS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Lines changed, first and last losses and cost of every script of a package."""
    scripts = SCRIPTS[package]
    runs = [{depth: run(script, steps, seed) for depth, script in scripts.items()} for seed in range(rounds)]
    figures: dict[str, Any] = {"version": version(package), "steps": steps, "rounds": rounds}
    for depth, script in scripts.items():
        curves = np.array([turn[depth].losses for turn in runs])
        figures[depth] = {
            "changed lines": changed_lines(scripts["before"], script),
            "all losses finite": bool(np.isfinite(curves).all()),
            "first losses (D, G)": curves[:, 0].mean(axis=0).round(3).tolist(),
            "last losses (D, G)": curves[:, -1].mean(axis=0).round(3).tolist(),
            "CPU seconds per step": round(statistics.median(turn[depth].seconds for turn in runs), 4),
            "ratio of cost": round(statistics.median(t[depth].seconds / t["before"].seconds for t in runs), 2),
        }
    return figures


# How good the rows are: the distance of each column's distribution, and of the correlations between columns.


def total_variation(real: pd.DataFrame, other: pd.DataFrame, discrete: list[str]) -> float:
    """Mean over the columns of TV = 1/2 sum_k |p_k - q_k|, k over categories, or over the real ones' deciles."""

    def shares(column: pd.Series) -> pd.Series:
        values: Any = column
        if column.name not in discrete:
            values = np.searchsorted(real[column.name].quantile(np.arange(1, 10) / 10), column)
        return pd.Series(values).value_counts(normalize=True)

    distances = [shares(real[name]).sub(shares(other[name]), fill_value=0).abs().sum() / 2 for name in real]
    return float(np.mean(distances))


def correlation_gap(real: pd.DataFrame, other: pd.DataFrame) -> float:
    """Mean |r - r'| over the pairs of columns."""
    gap = (real.corr() - other.corr()).abs().to_numpy()
    return float(np.nanmean(gap[np.triu_indices_from(gap, k=1)]))


def quality(seeds: int = SEEDS, epochs: int = EPOCHS) -> dict[str, Any]:
    """ctgan's rows before and after the swap, both with ctgan's default settings, over the seeds."""
    from ctgan import CTGAN

    from gac_plugin.adapters.tables import GACCTGAN

    table, discrete = wines(), ["target"]
    shuffled = table.sample(frac=1, random_state=0)
    independent = table.apply(np.random.default_rng(0).permutation)
    pairs = {
        "half of the real rows against the other half": [(shuffled[::2], shuffled[1::2])],
        "each real column shuffled by itself": [(table, independent)],
    }
    for name, model in (("before", CTGAN), ("step", GACCTGAN)):
        pairs[name] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            np.random.seed(seed)
            synthesizer = model(epochs=epochs, enable_gpu=False)
            synthesizer.fit(table, discrete)
            pairs[name].append((table, synthesizer.sample(ROWS)))
    return {
        name: {
            "total variation": [round(total_variation(*pair, discrete), 3) for pair in both],
            "correlation gap": [round(correlation_gap(*pair), 3) for pair in both],
        }
        for name, both in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packages.json")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("packages", nargs="*", default=installed(), help="default: all that are installed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")  # of packages that were written for older versions of torch and torchvision
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for package in options.packages:
        setting = {"torch": torch.__version__, "python": platform.python_version()}
        report[package] = compare(package, rounds=options.rounds) | setting
        for depth in list(SCRIPTS[package])[1:]:
            print(f"\n{package} {report[package]['version']}, {depth}", *report[package][depth].items(), sep="\n  ")
        if package == "ctgan":
            report[package]["quality"] = quality()
            print("\nctgan's rows", json.dumps(report[package]["quality"], indent=2), sep="\n")
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
