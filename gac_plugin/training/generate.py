"""Samples from a generator, as its codec stores them."""

from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor, nn

from gac_plugin.cotangent import evaluating
from gac_plugin.protocols import Codec
from gac_plugin.training.data import codec_of
from gac_plugin.training.networks import Recipe

GENERATION_BATCH = 1000


def generate(
    generator: nn.Module,
    recipe: Recipe,
    count: int,
    seed: int,
    device: torch.device | str = "cpu",
    labels: Tensor | None = None,
) -> Tensor:
    """Samples from a generator, the same for the same seed.

    Args:
        generator: used in evaluation mode.
        recipe: tells its latent size, its classes and its codec.
        count: how many.
        seed: fixes the latents, drawn on the CPU.
        device: where the generator is.
        labels: int64, shape (count,), for a conditional generator; by default its classes take turns.

    Returns:
        Samples as the codec stores them, for images uint8 pixels (count, C, H, W), on the device.
    """
    latents = torch.randn(count, recipe.latent_size, generator=torch.Generator().manual_seed(seed))
    if labels is None and recipe.classes:
        labels = torch.arange(count) % recipe.classes
    return render(generator, codec_of(recipe), latents.to(device), None if labels is None else labels.to(device))


@torch.no_grad()
def render(generator: nn.Module, codec: Codec, latents: Tensor, labels: Tensor | None = None) -> Tensor:
    """Samples as the codec stores them, made in evaluation mode and in parts of 1,000.

    Args:
        generator: its parameters stay as they are.
        codec: of its samples.
        latents: shape (N, latent_size).
        labels: int64, shape (N,), for a conditional generator.
    """
    conditions: Iterable[dict[str, Tensor]] = repeat({})
    if labels is not None:
        conditions = ({"labels": part} for part in labels.split(GENERATION_BATCH))
    with evaluating(generator):
        parts = zip(latents.split(GENERATION_BATCH), conditions, strict=False)
        return torch.cat([codec.to_stored(generator(z, **some)) for z, some in parts])
