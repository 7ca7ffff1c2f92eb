"""Multilayer perceptrons for small images: the article's shape, any width and depth."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gac_plugin.protocols import Adapter


class MLPGenerator(nn.Module):
    """latent -> hidden layers with LeakyReLU 0.2 -> pixels.

    Args:
        sample_shape: (C, H, W).
        latent_size: size of a latent; also `nz`, torch-mimicry's name for it.
        width, depth: size and number of the hidden layers.
        output: "tanh" for samples in [-1, 1], "sigmoid" for [0, 1].
        classes: number of class labels that go in beside the latents; 0 for none.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.nz = latent_size
        self.sample_shape = tuple(sample_shape)
        self.classes = nn.Embedding(classes, latent_size) if classes else None
        size_in = 2 * latent_size if classes else latent_size
        self.layers = perceptron(size_in, width, depth, math.prod(self.sample_shape))
        self.output = nn.Sigmoid() if output == "sigmoid" else nn.Tanh()

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, latent_size), and labels (B,) where there are classes -> samples (B, C, H, W)."""
        if self.classes is not None:
            z = torch.cat([z, self.classes(labels)], dim=1)
        return self.output(self.layers(z)).reshape(-1, *self.sample_shape)


class MLPDiscriminator(nn.Module):
    """pixels -> hidden layers with LeakyReLU 0.2 -> one logit; the arguments are those of the generator.

    With classes the logit has a term for each, <e_y, h> of the last hidden layer h (projection, Miyato & Koyama 2018).
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.layers = perceptron(math.prod(sample_shape), width, depth, 1)
        self.classes = nn.Embedding(classes, width) if classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples (B, C, H, W), and labels (B,) where there are classes -> logits (B, 1)."""
        if self.classes is None:
            return self.layers(x.flatten(1))
        hidden = self.layers[:-1](x.flatten(1))
        return self.layers[-1](hidden) + (self.classes(labels) * hidden).sum(dim=1, keepdim=True)


def perceptron(size_in: int, width: int, depth: int, size_out: int) -> nn.Sequential:
    """`depth` hidden layers of `width` units, LeakyReLU 0.2 between all layers."""
    sizes = [size_in, *[width] * depth]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2, inplace=True))]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], size_out))


adapter = Adapter(
    "mlp",
    MLPGenerator,
    MLPDiscriminator,
    "multilayer perceptrons for small images (up to about 32 x 32 grey)",
    width=256,
)
