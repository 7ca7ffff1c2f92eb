"""Multilayer perceptrons for small images: the article's shape, any width and depth."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from gac_plugin.protocols import Adapter


class MLPGenerator(nn.Module):
    """latent -> hidden layers with LeakyReLU 0.2 -> pixels.

    Args:
        sample_shape: (C, H, W).
        latent_size: size of a latent; also `nz`, torch-mimicry's name for it.
        width, depth: size and number of the hidden layers.
        output: "tanh" for samples in [-1, 1], "sigmoid" for [0, 1].
    """

    def __init__(self, sample_shape: Sequence[int], latent_size: int, width: int, depth: int, output: str) -> None:
        super().__init__()
        self.nz = latent_size
        self.sample_shape = tuple(sample_shape)
        self.layers = perceptron(latent_size, width, depth, math.prod(self.sample_shape))
        self.output = nn.Sigmoid() if output == "sigmoid" else nn.Tanh()

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, latent_size) -> samples (B, C, H, W)."""
        return self.output(self.layers(z)).reshape(-1, *self.sample_shape)


class MLPDiscriminator(nn.Module):
    """pixels -> hidden layers with LeakyReLU 0.2 -> one logit; the arguments are those of the generator."""

    def __init__(self, sample_shape: Sequence[int], latent_size: int, width: int, depth: int, output: str) -> None:
        super().__init__()
        self.layers = perceptron(math.prod(sample_shape), width, depth, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Samples (B, C, H, W) -> logits (B, 1)."""
        return self.layers(x.flatten(1))


def perceptron(size_in: int, width: int, depth: int, size_out: int) -> nn.Sequential:
    """`depth` hidden layers of `width` units, LeakyReLU 0.2 between all layers."""
    sizes = [size_in, *[width] * depth]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2, inplace=True))]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], size_out))


adapter = Adapter(
    "mlp", MLPGenerator, MLPDiscriminator, "multilayer perceptrons for small images (up to about 32 x 32 grey)"
)
