"""Convolutional networks shaped like DCGAN (Radford et al. 2016), for images.

Without its batch norms: with a gradient penalty they are not needed, and samples stay independent of each other, which
the fused schedule asks for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Adapter


class DCGANGenerator(nn.Module):
    """latent -> coarse map -> `depth` doublings by transposed convolution -> image.

    Args:
        sample_shape: (C, H, W), H and W divisible by 2^depth.
        latent_size: size of a latent; also `nz`, torch-mimicry's name for it.
        width: channels of the finest hidden map; each coarser one has twice as many.
        depth: number of doublings.
        output: "tanh" for samples in [-1, 1], "sigmoid" for [0, 1].
        classes: number of class labels that go in beside the latents; 0 for none.

    Raises:
        UsageError: H or W is not divisible by 2^depth.
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
        channels, height, columns = _coarsest(sample_shape, width, depth)
        self.nz = latent_size
        self.classes = nn.Embedding(classes, latent_size) if classes else None
        size_in = 2 * latent_size if classes else latent_size
        self.coarse = nn.Sequential(
            nn.Linear(size_in, channels * height * columns), nn.Unflatten(1, (channels, height, columns))
        )
        layers: list[nn.Module] = []
        for level in range(depth):
            wide, narrow = channels >> level, sample_shape[0] if level == depth - 1 else channels >> (level + 1)
            layers += [nn.LeakyReLU(0.2, inplace=True), nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)]
        self.doublings = nn.Sequential(*layers, nn.Sigmoid() if output == "sigmoid" else nn.Tanh())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, latent_size), and labels (B,) where there are classes -> samples (B, C, H, W)."""
        if self.classes is not None:
            z = torch.cat([z, self.classes(labels)], dim=1)
        return self.doublings(self.coarse(z))


class DCGANDiscriminator(nn.Module):
    """image -> `depth` halvings by strided convolution -> one logit; the arguments are those of the generator.

    With classes the logit has a term for each, <e_y, h> of the last map h (projection, Miyato & Koyama 2018).
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
        channels, height, columns = _coarsest(sample_shape, width, depth)
        layers: list[nn.Module] = []
        for level in reversed(range(depth)):
            narrow, wide = sample_shape[0] if level == depth - 1 else channels >> (level + 1), channels >> level
            layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        size = channels * height * columns
        self.halvings = nn.Sequential(*layers, nn.Flatten())
        self.logit = nn.Linear(size, 1)
        self.classes = nn.Embedding(classes, size) if classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples (B, C, H, W), and labels (B,) where there are classes -> logits (B, 1)."""
        hidden = self.halvings(x)
        if self.classes is None:
            return self.logit(hidden)
        return self.logit(hidden) + (self.classes(labels) * hidden).sum(dim=1, keepdim=True)


def _coarsest(sample_shape: Sequence[int], width: int, depth: int) -> tuple[int, int, int]:
    _, height, columns = sample_shape
    if height % 2**depth or columns % 2**depth:
        raise UsageError(
            f"the dcgan networks halve the image {depth} times, which {height}x{columns} does not allow; "
            f"pass another --image-size or --depth"
        )
    return width << (depth - 1), height >> depth, columns >> depth


adapter = Adapter(
    "dcgan", DCGANGenerator, DCGANDiscriminator, "convolutional networks shaped like DCGAN, without batch norm", depth=3
)
