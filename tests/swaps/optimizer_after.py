"""A small DCGAN for 32x32 pictures, as one writes it without GAC: `python FILE FOLDER_OF_PNG --steps 5000`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from gac_plugin import ConjugateGradient

LATENT = 64


def make_generator(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(LATENT, 4 * width * 16, bias=False),
        nn.Unflatten(1, (4 * width, 4, 4)),
        *(nn.BatchNorm2d(4 * width), nn.ReLU(), nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False)),
        *(nn.BatchNorm2d(2 * width), nn.ReLU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False)),
        *(nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1)),
        nn.Tanh(),
    )


def make_discriminator(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(4 * width * 16, 1)),
    )


def load(folder: Path) -> Tensor:
    pictures = [Image.open(file).convert("RGB").resize((32, 32)) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    at_real, at_fake = discriminator(real), discriminator(fake)
    return cross_entropy(at_real, torch.ones_like(at_real)) + cross_entropy(at_fake, torch.zeros_like(at_fake))


def generator_loss(discriminator: nn.Module, fake: Tensor) -> Tensor:
    at_fake = discriminator(fake)
    return cross_entropy(at_fake, torch.ones_like(at_fake))


def minimise(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(pictures: Tensor, steps: int, batch: int = 64, width: int = 32) -> tuple[nn.Module, nn.Module, list[dict]]:
    generator, discriminator, history = make_generator(width), make_discriminator(width), []
    optimizer_g = ConjugateGradient(generator.parameters(), lr=2e-4, rule="none", metric="adam", beta2=0.99)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.0, 0.99))
    for step in range(steps):
        real = pictures[torch.randint(len(pictures), (batch,))]
        logs = {"step": step}
        fake = generator(torch.randn(batch, LATENT))
        logs["loss_d"] = minimise(discriminator_loss(discriminator, real, fake.detach()), optimizer_d)
        logs["loss_g"] = minimise(generator_loss(discriminator, fake), optimizer_g)
        history.append(logs)
    return generator, discriminator, history


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    arguments = parser.parse_args()
    generator, *_ = train(load(arguments.folder), arguments.steps)
    with torch.no_grad():
        samples = generator.eval()(torch.randn(16, LATENT))
    row = samples.add(1).mul(127.5).to(torch.uint8).permute(2, 0, 3, 1).reshape(32, -1, 3)
    Image.fromarray(row.numpy()).save(arguments.out)


if __name__ == "__main__":
    main()
