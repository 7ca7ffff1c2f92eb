"""What the benchmark of coverage has to learn, and the networks that learn it: PacGAN's, from its published code."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gac_plugin.training import Config
from gac_plugin.training.data import load_data
from gac_plugin.training.files import write_whole

# ---- what is to be learnt


class World(Protocol):
    """Real samples without end, and the modes that samples are of.

    Attributes:
        shown: samples in a picture.
    """

    modes: int
    shown: ClassVar[int]

    def draw(self, count: int, random: torch.Generator) -> Tensor: ...

    def mode_of(self, samples: Tensor) -> Tensor:
        """The mode of each sample, int64, -1 for a sample that is of none."""
        ...


@dataclass(frozen=True)
class Mixture:
    """Normal distributions around points of the plane, equally likely. A sample is of a mode within 3 deviations."""

    shown: ClassVar[int] = 1000
    centres: Tensor
    deviation: float

    @property
    def modes(self) -> int:
        return len(self.centres)

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        rows = torch.randint(self.modes, (count,), generator=random)
        return self.centres[rows] + self.deviation * torch.randn(count, 2, generator=random)

    def mode_of(self, samples: Tensor) -> Tensor:
        distance, mode = torch.cdist(samples, self.centres).min(dim=1)
        return torch.where(distance < 3 * self.deviation, mode, -1)

    def spread(self, samples: Tensor) -> float:
        """Root mean square distance of the samples from the nearest centre, in deviations."""
        return float(torch.cdist(samples, self.centres).amin(dim=1).square().mean().sqrt() / self.deviation)


def ring(_: Path, __: str) -> World:
    angles = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(torch.stack([angles.cos(), angles.sin()], dim=1), 0.01)


def grid(_: Path, __: str) -> World:
    line = torch.arange(-4.0, 5.0, 2.0)
    return Mixture(torch.cartesian_prod(line, line), 0.05)


@dataclass(frozen=True)
class Stacked:
    """Three digits drawn apart, one in each colour; the mode is the number that a classifier reads."""

    shown: ClassVar[int] = 16
    digits: Tensor
    classifier: nn.Module
    modes: int = 1000

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.digits), (count, 3), generator=random)
        return self.digits[rows].float() / 127.5 - 1

    @torch.no_grad()
    def mode_of(self, samples: Tensor) -> Tensor:
        read = [
            self.classifier(part.flatten(0, 1).unsqueeze(1)).argmax(1).reshape(-1, 3) for part in samples.split(1000)
        ]
        return torch.cat(read) @ torch.tensor([100, 10, 1])


@cache
def stacked(work: Path, folder: str) -> World:
    """The digits, and their classifier, which is trained once and kept in the work folder."""
    data = load_data(Config(dataset=folder, cpu=True))
    pixels, labels = data.train.values[:, 0], data.train.labels
    side, file = pixels.shape[-1], work / "digits.safetensors"
    network = new_classifier(side)
    if not file.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = new_classifier(side)
            read_digits(network, pixels, labels)
        write_whole(file, lambda temporary: save_file(network.state_dict(), temporary))
    network.load_state_dict(load_file(file))
    return Stacked(pixels, network.requires_grad_(False).eval())


def new_classifier(side: int) -> nn.Sequential:
    """Digits (B, 1, side, side) in [-1, 1] -> logits (B, 10)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * halved(side, 2) ** 2, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )


def read_digits(network: nn.Module, pixels: Tensor, labels: Tensor, epochs: int = 4, batch: int = 128) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(batch):
            optimizer.zero_grad()
            cross_entropy(network(pixels[rows].unsqueeze(1).float() / 127.5 - 1), labels[rows]).backward()
            optimizer.step()


def halved(side: int, times: int) -> int:
    """The side of a map after so many strided convolutions."""
    return math.ceil(side / 2**times)


# ---- networks


def planar_generator() -> nn.Module:
    """2 - 400 - 400 - 400 - 400 - 2, batch norm and ReLU."""
    sizes = (2, 400, 400, 400, 400)
    layers = [
        layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU())
    ]
    network = nn.Sequential(*layers, nn.Linear(400, 2)).apply(narrow)
    network.nz = 2  # type: ignore[assignment]
    return network


def planar_discriminator() -> nn.Module:
    """2 - 200 - 200 - 200 - 1, each hidden unit the largest of 5 linear pieces."""
    return nn.Sequential(Maxout(2, 200), Maxout(200, 200), Maxout(200, 200), nn.Linear(200, 1)).apply(narrow)


class Maxout(nn.Module):
    """Goodfellow et al. 2013: the largest of `pieces` linear maps."""

    def __init__(self, size_in: int, size_out: int, pieces: int = 5) -> None:
        super().__init__()
        self.linear, self.pieces = nn.Linear(size_in, size_out * pieces), pieces

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(1, (self.pieces, -1)).amax(dim=1)


def narrow(layer: nn.Module) -> None:
    """The published initial weights: normal, of deviation 0.02."""
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class StackedGenerator(nn.Module):
    """latent -> 8 w maps of an eighth of the side -> 4 w -> 2 w -> w at full size -> 3, batch norm and ReLU."""

    def __init__(self, latent: int, width: int, side: int) -> None:
        super().__init__()
        self.nz = latent
        sides = [halved(side, times) for times in (3, 2, 1, 0)]
        layers: list[nn.Module] = [nn.Linear(latent, 8 * width * sides[0] ** 2)]
        layers += [nn.Unflatten(1, (8 * width, sides[0], sides[0])), nn.BatchNorm2d(8 * width), nn.ReLU()]
        for small, large, wide in zip(sides[:-1], sides[1:], (8 * width, 4 * width, 2 * width), strict=True):
            rest = large - (2 * small - 1)
            layers += [nn.ConvTranspose2d(wide, wide // 2, 3, stride=2, padding=1, output_padding=rest)]
            layers += [nn.BatchNorm2d(wide // 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def stacked_discriminator(width: int, side: int, normalised: bool) -> nn.Module:
    """3 -> w -> 2 w -> 4 w maps by strided convolutions -> one logit, LeakyReLU 0.3, batch norm if wanted."""
    layers: list[nn.Module] = []
    for narrow_, wide in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        norm = [nn.BatchNorm2d(wide)] if normalised else []
        layers += [nn.Conv2d(narrow_, wide, 3, stride=2, padding=1), *norm, nn.LeakyReLU(0.3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * halved(side, 3) ** 2, 1))
