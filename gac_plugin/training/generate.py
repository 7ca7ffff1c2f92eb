"""Latents, and the samples that a generator makes of them, as its codec stores them."""

import math
from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor, nn

from gac_plugin.cotangent import evaluating
from gac_plugin.errors import UsageError
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
    truncation: float | None = None,
) -> Tensor:
    """Samples from a generator, the same for the same seed.

    Args:
        generator: used in evaluation mode.
        recipe: tells its latent size, its classes and its codec.
        count: how many.
        seed: fixes the latents, drawn on the CPU.
        device: where the generator is.
        labels: int64, shape (count,), for a conditional generator; by default its classes take turns.
        truncation: bound on the latents, see `truncate`; None for none.

    Returns:
        Samples as the codec stores them, for images uint8 pixels (count, C, H, W), on the device.
    """
    latents = draw_latents(recipe, count, seed, truncation)
    if labels is None:
        labels = class_labels(recipe, count)
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


def draw_latents(recipe: Recipe, count: int, seed: int, truncation: float | None = None) -> Tensor:
    """Standard normal latents of a seed, float32, shape (count, latent_size), truncated where a bound is given."""
    latents = torch.randn(count, recipe.latent_size, generator=torch.Generator().manual_seed(seed))
    return latents if truncation is None else truncate(latents, truncation)


def class_labels(recipe: Recipe, count: int, label: int | None = None) -> Tensor | None:
    """One class for all samples, or all classes in turn; int64, shape (count,); None if there are no classes."""
    if not recipe.classes:
        return None
    return torch.arange(count) % recipe.classes if label is None else torch.full((count,), label)


def truncate(latents: Tensor, bound: float) -> Tensor:
    """Standard normal latents -> latents of the standard normal truncated to [-bound, bound] in every coordinate.

        z' = F^-1(Phi(z)) = sqrt(2) erfinv(erf(z / sqrt(2)) erf(bound / sqrt(2)))

    with F the distribution function of the truncated normal, and Phi(z), uniform, that of the standard normal. It is
    the truncation trick of Brock et al. 2019, "Large scale GAN training for high fidelity natural image synthesis": a
    smaller bound gives more typical and less varied samples. They draw what lies outside once more, which gives the
    same distribution; here every latent keeps its rank, so that a seed's samples change smoothly with the bound.

    Args:
        latents: any shape, floating point.
        bound: positive.

    Raises:
        UsageError: the bound is not positive or not finite.
    """
    if not 0 < bound < math.inf:
        raise UsageError(f"the truncation must be a positive number, got {bound}")
    inside = torch.erf(latents.double() / math.sqrt(2)) * math.erf(bound / math.sqrt(2))
    return (math.sqrt(2) * torch.erfinv(inside)).clamp(-bound, bound).to(latents.dtype)


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Latents on the way from one to another: spherical interpolation of the directions, linear one of the norms.

        z(s) / |z(s)| = (sin((1 - s) w) a / |a| + sin(s w) b / |b|) / sin(w)     with w the angle between a and b
        |z(s)| = (1 - s) |a| + s |b|                                             s = 0, 1 / (steps - 1), ..., 1

    Normal latents of many dimensions have almost the same norm, and a straight line between two of them passes through
    norms that the generator has never seen (White 2016, "Sampling generative networks"). Where a and b lie on one line
    through the origin, so that the way round is not determined, s and 1 - s stand for the two quotients of sines.

    Args:
        start, end: shape (N, latent_size); every row goes its own way.
        steps: how many latents on each way, both ends among them; at least 2.

    Returns:
        Latents, shape (steps, N, latent_size), of the type of `start`, the first exactly `start`, the last `end`.
    """
    a, b = start.double(), end.double()
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    angle = torch.arccos(((a / norm_a) * (b / norm_b)).sum(dim=1, keepdim=True).clamp(-1, 1))
    s = torch.linspace(0, 1, steps, dtype=torch.float64, device=start.device).view(-1, 1, 1)
    on_a_line = angle.sin() < 1e-6
    weight_a = torch.where(on_a_line, 1 - s, ((1 - s) * angle).sin() / angle.sin())
    weight_b = torch.where(on_a_line, s, (s * angle).sin() / angle.sin())
    norm = (1 - s) * norm_a + s * norm_b
    return (norm / norm_a * weight_a * a + norm / norm_b * weight_b * b).to(start.dtype)
