"""What does GAC add to an autoencoder? Plain VAE, adversarial autoencoder and VAE-GAN on MNIST.

    python benchmarks/autoencoders.py --data FOLDER        writes results/autoencoders.json and plots/autoencoders.png

All have the same decoder, the same encoder up to its last layer, the same rate of reconstruction and the same number of
steps. A step of VAE-GAN costs about two and a half of the VAE's, so a VAE with as many more steps stands beside it.
Five seeds each; every method's networks are running averages, as GANs are usually sampled.

Chosen in single runs of one seed with wider networks (256) and more steps (1,500, or 2,500 where starred): the VAE's KL
weight out of .1*, .3 and 1 (Frechet distance of samples 59, 53 and 49, at an MSE of .011, .013 and .017: .3 is a
compromise); the AAE's rate of codes out of 1e-4, 3e-4 and 1e-3* (60, 25 and 46). VAE-GAN takes the VAE's weight in
pixels and the paper's in features, both untuned.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.multiprocessing import get_context

from gac_plugin import GAC, ConjugateGradient
from gac_plugin.adapters.autoencoder import (
    VAEGAN,
    AdversarialAutoencoder,
    error_in,
    half_squared_error,
    kl_to_standard_normal,
)
from gac_plugin.adapters.mlp import perceptron
from gac_plugin.training.config import Config
from gac_plugin.training.data import load_data
from gac_plugin.training.data.source import Decoded
from gac_plugin.training.ema import RunningAverage
from gac_plugin.training.judging.evaluate import Features, evaluate, frechet_distance, make_features

SHAPE, PIXELS = (1, 28, 28), 784
LATENT, WIDTH, DEPTH = 16, 128, 2
BATCH, STEPS, SEEDS, SAMPLES = 64, 1_000, 5, 5_000
RATE, EMA = 1e-3, 0.995
CODE_RATE, KL_WEIGHT, FEATURE_KL_WEIGHT = 3e-4, 0.3, 1.0


class Model(Protocol):
    """What the benchmark asks of a method."""

    encoder: nn.Module
    decoder: nn.Module

    def step(self, x: Tensor) -> dict[str, Tensor]: ...

    def reconstruct(self, x: Tensor) -> Tensor: ...

    def sample(self, n: int) -> Tensor: ...


class Encoder(nn.Module):
    """x -> (mean, log variance) of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), perceptron(PIXELS, WIDTH, DEPTH, 2 * LATENT))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.layers(x).chunk(2, dim=1)
        return mean, log_variance


class VAE:
    """The baseline (Kingma & Welling 2014): a likelihood of variance `KL_WEIGHT`."""

    def __init__(self) -> None:
        self.encoder, self.decoder = Encoder(), new_decoder()
        self.optimizer = adam(self.encoder, self.decoder)

    def step(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encoder(x)
        codes = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = kl_to_standard_normal(mean, log_variance).mean()
        loss = half_squared_error(self.decoder(codes), x) + KL_WEIGHT * kl
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)[0])

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.decoder(torch.randn(n, LATENT))


def new_decoder() -> nn.Module:
    return nn.Sequential(perceptron(LATENT, WIDTH, DEPTH, PIXELS), nn.Tanh(), nn.Unflatten(1, SHAPE))


def adam(*networks: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for network in networks for p in network.parameters()], RATE, betas=(0.9, 0.99))


def gac_of(generator: nn.Module, discriminator: nn.Module, rate: float) -> GAC:
    return GAC(
        generator,
        discriminator,
        ConjugateGradient(generator.parameters(), rate, rule="none", metric="adam", beta2=0.99),
        torch.optim.Adam(discriminator.parameters(), RATE, betas=(0.0, 0.99)),
        penalty="r1+r2",
    )


def adversarial_autoencoder() -> Model:
    encoder = nn.Sequential(nn.Flatten(), perceptron(PIXELS, WIDTH, DEPTH, LATENT))
    decoder, discriminator = new_decoder(), perceptron(LATENT, WIDTH, DEPTH, 1)
    gac = gac_of(encoder, discriminator, CODE_RATE)
    return AdversarialAutoencoder(gac, decoder, adam(encoder, decoder), prior=LATENT)


def vae_gan_in_pixels() -> Model:
    encoder, decoder = Encoder(), new_decoder()
    discriminator = nn.Sequential(nn.Flatten(), perceptron(PIXELS, WIDTH, DEPTH, 1))
    gac = gac_of(decoder, discriminator, RATE)
    return VAEGAN(gac, encoder, adam(encoder, decoder), LATENT, kl_weight=KL_WEIGHT)


def vae_gan_in_features() -> Model:
    encoder, decoder = Encoder(), new_decoder()
    discriminator = nn.Sequential(nn.Flatten(), *perceptron(PIXELS, WIDTH, DEPTH, 1))
    gac = gac_of(decoder, discriminator, RATE)
    error = error_in(discriminator[:3])  # its first hidden layer
    return VAEGAN(gac, encoder, adam(encoder, decoder), LATENT, error, FEATURE_KL_WEIGHT)


@dataclass(frozen=True)
class Method:
    """A row of the table: how the model is built, and how many steps it gets."""

    build: Callable[[], Model]
    steps: int = STEPS


METHODS = {
    "VAE": Method(VAE),
    "VAE, 2.5 times the steps": Method(VAE, STEPS * 5 // 2),
    "AAE": Method(adversarial_autoencoder),
    "VAE-GAN, error in pixels": Method(vae_gan_in_pixels),
    "VAE-GAN, error in a layer of D": Method(vae_gan_in_features),
}
MEASURES = ("mse", "frechet of reconstructions", "frechet of samples", "precision", "recall", "cpu seconds")


class Outcome(NamedTuple):
    """What a trained model makes: reconstructions of the test set in [-1, 1], and samples as uint8 pixels."""

    reconstructions: Tensor
    samples: Tensor
    cpu_seconds: float


def to_range(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def to_pixels(samples: Tensor) -> Tensor:
    return ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def train(job: tuple[str, int], train_pixels: Tensor, test_pixels: Tensor) -> Outcome:
    """One method and seed, in a process with one thread."""
    name, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = METHODS[name].build()
    networks = nn.ModuleList([model.encoder, model.decoder])
    average = RunningAverage(networks)
    start = time.process_time()
    for _ in range(METHODS[name].steps):
        model.step(to_range(train_pixels[torch.randint(len(train_pixels), (BATCH,))]))
        average.update(networks, EMA)
    seconds = time.process_time() - start
    networks.load_state_dict(average.network.state_dict())
    return Outcome(model.reconstruct(to_range(test_pixels)), to_pixels(model.sample(SAMPLES)), seconds)


def measure(outcome: Outcome, features: Features, test_pixels: Tensor) -> dict[str, float]:
    scores = evaluate(features, test_pixels, outcome.samples)
    error = (outcome.reconstructions - to_range(test_pixels)) / 2
    remade = features.extract(to_pixels(outcome.reconstructions))
    values = (
        float(error.square().mean()),
        frechet_distance(features.extract(test_pixels), remade),
        scores.frechet,
        scores.precision,
        scores.recall,
        outcome.cpu_seconds,
    )
    return dict(zip(MEASURES, values, strict=True))


def plot(test_pixels: Tensor, outcomes: dict[str, Outcome], columns: int = 16) -> Figure:
    """Rows of digits: real ones, each method's reconstructions of them, each method's samples."""
    rows = [("real", test_pixels)]
    rows += [(f"{name}\nreconstructions", to_pixels(outcome.reconstructions)) for name, outcome in outcomes.items()]
    rows += [(f"{name}\nsamples", outcome.samples) for name, outcome in outcomes.items()]
    figure, axes = plt.subplots(len(rows), 1, figsize=(9.6, 0.52 * len(rows)))
    for row, (name, pixels) in zip(axes, rows, strict=True):
        row.imshow(torch.cat(list(pixels[:columns, 0]), dim=1), cmap="gray_r", vmin=0, vmax=255)
        row.set(xticks=[], yticks=[])
        row.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        row.spines[:].set_visible(False)
    figure.subplots_adjust(left=0.24, right=0.99, top=0.99, bottom=0.01, hspace=0.08)
    return figure


def print_table(figures: dict[str, Any]) -> None:
    print(f"median of {SEEDS} seeds (lowest to highest)")
    for name, by_measure in figures.items():
        print(name)
        for measure_name, values in by_measure.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"  {measure_name:28}{middle:9.4f}  ({low:.4f} to {high:.4f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of MNIST in Hub layout, or its name on the Hub")
    help_out = "folder that gets results/ and plots/ (default: the folder of this script)"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help=help_out)
    arguments = parser.parse_args()
    mpl.use("Agg")
    torch.set_num_threads(1)

    data = load_data(Config(dataset=arguments.data))
    train_images, test_images = data.train, data.test
    assert isinstance(train_images, Decoded)
    pixels = (train_images.values.share_memory_(), test_images.values.share_memory_())
    jobs = [(name, seed) for seed in range(SEEDS) for name in METHODS]
    figures: dict[str, Any] = {name: {measure_name: [] for measure_name in MEASURES} for name in METHODS}
    pictured: dict[str, Outcome] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        outcomes = pool.map(train, jobs, *(repeat(part) for part in pixels))
        features = make_features(train_images, test_images, 0, torch.device("cpu"))
        for (name, seed), outcome in zip(jobs, outcomes, strict=True):
            found = measure(outcome, features, test_images.values)
            print(
                f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True
            )
            for measure_name, value in found.items():
                figures[name][measure_name].append(value)
            if seed == 0:
                pictured[name] = outcome
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "command": "python benchmarks/autoencoders.py --data FOLDER",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "settings": {
            "networks": f"perceptrons, {DEPTH} hidden layers of {WIDTH}, codes of {LATENT}, tanh, samples in [-1, 1]",
            "steps": {name: method.steps for name, method in METHODS.items()},
            "batch": BATCH,
            "seeds": SEEDS,
            "kl weight": {"in pixels": KL_WEIGHT, "in a layer of D": FEATURE_KL_WEIGHT},
            "rates": f"{RATE} of Adam everywhere, but {CODE_RATE} where the AAE's encoder follows D",
            "running average": EMA,
        },
        "measures": {
            "mse": "of reconstructions of the test set, pixels in [0, 1]",
            "frechet": f"{features.name}; {SAMPLES} samples, or 10,000 reconstructions, against 10,000 test images",
            "precision, recall": f"same features, {SAMPLES} samples of each",
            "cpu seconds": "of training, one thread",
        },
        "figures, one for each seed": figures,
    }
    for folder in ("results", "plots"):
        (arguments.out / folder).mkdir(parents=True, exist_ok=True)
    (arguments.out / "results" / "autoencoders.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(test_images.values, pictured).savefig(arguments.out / "plots" / "autoencoders.png", dpi=120)
    print_table(figures)


if __name__ == "__main__":
    main()
