"""Cotangent maps: what D wants changed in generated samples, and where in G that wish arrives.

    c_i = dl/dx (x_i),  x_i = G(z_i)        the covector of D's logit at a sample: the map
    g   = (1/B) sum_i J_i^T c_i             pulled back to G's parameters: which layers hear it
    e_i = (dG/dz)^T (z_i) c_i               pulled back to the latents: which coordinates hear it

A score that grows with the logit has these covectors times a positive number for each sample, so a map is the same for
every loss that pairs no samples. It is a gradient: it tells what a small change would do, one pixel at a time, and not
what D looks at in the large. Both networks run in evaluation mode and stay as they are.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from gac_plugin.cotangent import evaluating, frozen
from gac_plugin.errors import UsageError
from gac_plugin.protocols import Codec, Logits
from gac_plugin.refine import Refined, refine
from gac_plugin.tensors import per_sample_mean, per_sample_norm, scale_samples
from gac_plugin.training.checkpoint import DamagedCheckpoint, read_checkpoint
from gac_plugin.training.data import codec_of
from gac_plugin.training.data.images import ImageCodec
from gac_plugin.training.files import write_json, write_whole
from gac_plugin.training.generate import class_labels, draw_latents
from gac_plugin.training.hub import judge_folder, load_discriminator, load_generator, network_folder, read_recipe
from gac_plugin.training.judging.sheets import letters, overlay, pictures, stacked, write_bars, write_sheet
from gac_plugin.training.networks import Recipe

STRETCH = 0.05
"""Length of the change, relative to the sample, that is seen through a codec's picture."""
NEIGHBOURS = 5
"""Side of the square of pixels over which such a change is averaged."""
FULL = 0.99
"""Share of a map's pixels that are below full colour."""
FRAMES = (0, 1, 2, 4, 7, 10)
"""Steps of `refine` that the film shows."""
STRIPS = 4
"""Samples in the film and along training."""
STAGES = 8
"""Checkpoints along training, at most."""
WIDTH, NARROW = 1000, 520
"""Pixels of all maps in a row, about; and of those along training, which a phone shows."""
UNLIKE = 0.5
"""Maps whose rank correlation is below are taken to be different ones."""
MOST = 64
"""Samples at most."""

Captioned = tuple[Image.Image, str]
Draw = Callable[[Tensor, Tensor], list[Image.Image]]
"""Samples and covectors, both (B, ...) -> a tile for each sample."""


@dataclass(frozen=True)
class Wish:
    """What D wants of some samples.

    Attributes:
        samples: x_i, shape (B, ...).
        covectors: c_i, of the same shape.
        latents: e_i, shape (B, latent_size).
        logits: l(x_i), shape (B,).
    """

    samples: Tensor
    covectors: Tensor
    latents: Tensor
    logits: Tensor


def wishes(generator: nn.Module, discriminator: nn.Module, z: Tensor, conditions: Mapping[str, Any] = {}) -> Wish:
    """The covectors of D's logit at the samples of some latents, and pulled back to the latents.

    Args:
        generator: latents (and conditions) -> samples (B, ...).
        discriminator: samples (and conditions) -> logits; of a map of logits the mean counts.
        z: latents, shape (B, latent_size).
        conditions: for both networks.
    """
    with frozen(generator, discriminator), evaluating(generator, discriminator):
        leaf = z.detach().requires_grad_(True)
        samples = generator(leaf, **conditions)
        logits = per_sample_mean(Logits(discriminator)(samples, conditions))
        covectors, latents = torch.autograd.grad(logits.sum(), (samples, leaf))
    return Wish(samples.detach(), covectors, latents, logits.detach())


def layer_norms(
    generator: nn.Module, discriminator: nn.Module, z: Tensor, conditions: Mapping[str, Any] = {}
) -> dict[str, tuple[float, float]]:
    """|g| and |theta| of every layer of G that has parameters of its own, by name, in the order of its definition.

    The arguments are those of `wishes`.
    """
    parameters = dict(generator.named_parameters())
    with frozen(discriminator), evaluating(generator, discriminator):
        logits = Logits(discriminator)(generator(z, **conditions), conditions)
        gradients = torch.autograd.grad(logits.mean(), list(parameters.values()), allow_unused=True)
    squares: dict[str, list[float]] = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        layer = squares.setdefault(name.rpartition(".")[0] or name, [0.0, 0.0])
        layer[0] += 0.0 if gradient is None else float(gradient.double().square().sum())
        layer[1] += float(parameter.detach().double().square().sum())
    return {name: (g**0.5, theta**0.5) for name, (g, theta) in squares.items()}


def coordinates_heard(latents: Tensor) -> float:
    """How many latent coordinates hear the covectors, as the number of equal ones that would be as uneven.

        (sum_k v_k)^2 / sum_k v_k^2,   v_k = mean_i e_ik^2

    Args:
        latents: e_i, shape (B, latent_size).
    """
    v = latents.double().square().mean(dim=0)
    return float(v.sum().square() / v.square().sum().clamp_min(1e-300))


def randomisation_check(
    generator: nn.Module, discriminator: nn.Module, z: Tensor, conditions: Mapping[str, Any] = {}, seed: int = 0
) -> list[tuple[str, float, float]]:
    """Do the maps depend on what D has learned? The cascading randomisation of Adebayo et al. 2018, "Sanity checks".

    From D's last layer to its first, the entries of each layer's parameters are shuffled, and those of the layers
    behind it stay shuffled. Maps that tell something of D have little in common with the original ones at the end. They
    draw new weights instead; a shuffle keeps the distribution of the old ones.

    Args:
        generator, discriminator, z, conditions: see `wishes`. D is copied.
        seed: of the shuffles.

    Returns:
        For each layer, last first: its name, and Spearman's rank correlation of the maps with the original ones, mean
        over the samples; of c, and of |c|.
    """
    shuffled, draw = deepcopy(discriminator), torch.Generator().manual_seed(seed)
    original = wishes(generator, discriminator, z, conditions).covectors
    layers = [(name, layer) for name, layer in shuffled.named_modules() if list(layer.parameters(recurse=False))]
    found = []
    for name, layer in reversed(layers):
        for parameter in layer.parameters(recurse=False):
            order = torch.randperm(parameter.numel(), generator=draw)
            parameter.data = parameter.data.flatten()[order].reshape(parameter.shape)
        covectors = wishes(generator, shuffled, z, conditions).covectors
        signed, absolute = rank_correlation(original, covectors), rank_correlation(original.abs(), covectors.abs())
        found.append((name, float(signed.mean()), float(absolute.mean())))
    return found


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each sample of a with that of b, shapes (B, ...): shape (B,).

    Equal values share their mean rank; a sample without two different values correlates 0 with anything.
    """
    x, y = (_ranks(sample.flatten(1).double()) for sample in (a, b))
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    return (x * y).sum(dim=1) / (per_sample_norm(x) * per_sample_norm(y)).clamp_min(1e-300)


def pixel_changes(codec: Codec, samples: Tensor, covectors: Tensor) -> Tensor:
    """What D wants changed in the codec's pictures of the samples, each sample's on a scale of its own.

    Of images it is the covector itself, summed over the colours. What a codec shows of other samples is no linear
    function of them, so there it is how the picture changes along the covector:

        (picture(x_i + s_i c_i) - picture(x_i - s_i c_i)) / 2,   s_i = STRETCH |x_i| / |c_i|

    For the spectrograms of sounds that is decibels: where D wants it louder, and where less loud. It is averaged over
    neighbouring pixels: the phase of a sound makes single ones go up and down by chance.

    Returns:
        In [-1, 1], shape (B, H, W), positive where the picture is to be brighter, 1 from the `FULL` quantile on.
    """
    if isinstance(codec, ImageCodec):
        change = covectors.sum(dim=1)
    else:
        step = scale_samples(
            STRETCH * per_sample_norm(samples) / per_sample_norm(covectors).clamp_min(1e-30), covectors
        )
        more, less = (codec.pictures(codec.to_stored(x)).float() for x in (samples + step, samples - step))
        change = avg_pool2d((more - less).mean(dim=1) / 2, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)
    full = change.abs().flatten(1).quantile(FULL, dim=1).clamp_min(1e-30)
    return scale_samples(1 / full, change).clamp(-1, 1)


def letter_wishes(samples: Tensor, covectors: Tensor) -> tuple[Tensor, Tensor]:
    """The letter that D would rather see at each position, and how much its logit would gain, to first order.

        gain[p, v] = c[p, v] - c[p, letter at p]

    Args:
        samples: one-hot letters, shape (B, L, V).
        covectors: of the same shape.

    Returns:
        Number of the best letter, int64, and its gain, at least 0, where 0 means the letter that stands there.
    """
    here = covectors.gather(2, samples.argmax(dim=2, keepdim=True))
    gain, best = (covectors - here).max(dim=2)
    return torch.where(gain > 0, best, samples.argmax(dim=2)), gain


@dataclass(frozen=True)
class Pair:
    """A generator and its discriminator, with what they make.

    Attributes:
        generator, discriminator: on the CPU.
        recipe, codec: of the samples.
        z: latents, shape (B, latent_size).
        conditions: for both networks, of B samples.
    """

    generator: nn.Module
    discriminator: nn.Module
    recipe: Recipe
    codec: Codec
    z: Tensor
    conditions: dict[str, Any]

    def first(self, count: int) -> "tuple[Tensor, dict[str, Any]]":
        """Some of the latents, and their conditions."""
        return self.z[:count], {name: value[:count] for name, value in self.conditions.items()}


def explain(model: str, out: Path, count: int = 8, seed: int = 0, revision: str | None = None) -> list[str]:
    """Write the maps of a run or of a model that was published with its discriminator, and tell what they show.

    Args:
        model: run folder, or "user/name" on the Hub.
        out: folder for `maps.png`, `refine.png`, `layers.json` and `layers.png`; for a run with several checkpoints
            also `training.png`, for texts also `letters.txt`.
        count: samples, 1 to `MOST`.
        seed: of their latents.
        revision: branch, tag or commit on the Hub.

    Returns:
        Plain sentences.

    Raises:
        UsageError: the count or seed is out of range, a network is missing, or a file cannot be written.
    """
    for name, value, least, most in (("--n", count, 1, MOST), ("--seed", seed, 0, 2**32 - 1)):
        if not least <= value <= most:
            raise UsageError(f"{name} must be between {least} and {most}, got {value}")
    folder = network_folder(model, "generator", revision)
    if network_folder(model, "discriminator", revision) == folder:
        raise UsageError(f"{model!r} holds a generator alone; pass a run, or a model published with its discriminator")
    generator, discriminator = load_generator(model, revision), load_discriminator(model, revision)
    recipe = read_recipe(folder)
    labels = class_labels(recipe, count)
    conditions: dict[str, Any] = {} if labels is None else {"labels": labels}
    pair = Pair(generator, discriminator, recipe, codec_of(recipe), draw_latents(recipe, count, seed), conditions)
    wish = wishes(generator, discriminator, pair.z, conditions)
    return [
        _write_maps(pair, wish, out),
        *_write_training(pair, Path(model) / "checkpoints", out),
        _write_refinement(replace(pair, discriminator=load_discriminator(judge_folder(model, revision))), out),
        *_write_layers(pair, wish, out),
    ]


def write_stage(
    path: Path, generator: nn.Module, discriminator: nn.Module, codec: Codec, z: Tensor, conditions: Mapping[str, Any]
) -> None:
    """Write the maps of some samples as they are at a step of training, which goes on as if nobody had looked.

    Nothing is written while they are not finite.

    Args:
        path: where the picture is to stand.
        generator, discriminator, z, conditions: see `wishes`; on any device.
        codec: of the samples.

    Raises:
        UsageError: it cannot be written.
    """
    wish = wishes(generator, discriminator, z, conditions)
    if wish.covectors.isfinite().all():
        _write_tiles(path, codec, wish, NARROW)


def draw_tiles(codec: Codec) -> tuple[Draw, tuple[str, str] | None]:
    """How samples with their covectors are drawn, and what the two colours mean."""
    if hasattr(codec, "texts"):
        return partial(_letter_tiles, codec), None
    return partial(_picture_tiles, codec), ("D wants it darker", "brighter")


def _picture_tiles(codec: Codec, samples: Tensor, covectors: Tensor) -> list[Image.Image]:
    """The codec's picture of each sample, and below it the same in grey with what D wants changed."""
    base = codec.pictures(codec.to_stored(samples))
    maps = overlay(base, pixel_changes(codec, samples, covectors))
    return [stacked(*tile) for tile in zip(pictures(base), pictures(maps), strict=True)]


def _letter_tiles(codec: Any, samples: Tensor, covectors: Tensor) -> list[Image.Image]:
    """The letters of each sample, and below them those that D would rather see, the stronger the more it would gain."""
    best, gain = letter_wishes(samples, covectors)
    strengths = gain / gain.amax(dim=1, keepdim=True).clamp_min(1e-30)
    rows = zip(samples.argmax(dim=2), best, strengths.tolist(), strict=True)
    return [letters([_letters(codec, made), _letters(codec, wanted)], strength) for made, wanted, strength in rows]


def _letters(codec: Any, numbers: Tensor) -> list[str]:
    """The letter of each number, a middle dot for the end of the text and an open box for a space."""
    shown = {"": "\N{MIDDLE DOT}", " ": "\N{OPEN BOX}"}
    return [shown.get(letter, letter) for letter in codec.texts(numbers[:, None])]


def _write_tiles(path: Path, codec: Codec, wish: Wish, width: int = WIDTH) -> None:
    draw, legend = draw_tiles(codec)
    tiles = draw(wish.samples.float().cpu(), wish.covectors.float().cpu())
    captions = [f"logit {logit:+.2g}" for logit in wish.logits.tolist()]
    rows = math.ceil(len(tiles) * tiles[0].width / width)
    columns = math.ceil(len(tiles) / rows)
    title = "what D wants changed in generated samples" if legend else "below: the letters that D would rather see"
    write_sheet(path, list(zip(tiles, captions, strict=True)), columns, title, legend)


def _write_maps(pair: Pair, wish: Wish, out: Path) -> str:
    _write_tiles(out / "maps.png", pair.codec, wish)
    if hasattr(pair.codec, "texts"):
        _write_letters(pair.codec, wish, out / "letters.txt")
    squares = wish.covectors.flatten(1).square().sort(dim=1, descending=True).values
    tenth = squares[:, : max(1, squares.shape[1] // 10)].sum(dim=1) / squares.sum(dim=1).clamp_min(1e-30)
    logits = wish.logits
    return (
        f"D's logit of the {len(logits)} samples is {logits.mean():+.2g} on average, {logits.min():+.2g} to "
        f"{logits.max():+.2g}, above 0 for real; a tenth of the values of a sample carries {tenth.mean():.0%} of what "
        "D wants changed"
    )


def _write_letters(codec: Any, wish: Wish, path: Path) -> None:
    """A table: of each sample the text, and of each position the letter, the one wanted, and the gain in logit."""
    best, gains = letter_wishes(wish.samples, wish.covectors)
    made = wish.samples.argmax(dim=2)
    lines = []
    for row in range(len(made)):
        lines.append(f"{codec.texts(made[row : row + 1])[0]}\tlogit {wish.logits[row]:+.2g}\n")
        here, wanted = _letters(codec, made[row]), _letters(codec, best[row])
        for position, (old, new, gain) in enumerate(zip(here, wanted, gains[row].tolist(), strict=True), 1):
            lines.append(f"\t{position}\t{old}\t{new if gain > 0 else '='}\t{gain:+.2g}\n")
    text = "text\tposition\tletter\twanted\tgain\n" + "".join(lines)
    write_whole(path, lambda temporary: temporary.write_bytes(text.encode()))  # type: ignore[arg-type]


def _write_training(pair: Pair, checkpoints: Path, out: Path) -> list[str]:
    """The same latents at the checkpoints of a run, `STAGES` of them at most, the last one among them."""
    draw, legend = draw_tiles(pair.codec)
    z, conditions = pair.first(STRIPS)
    folders = sorted(checkpoints.glob("step-*"))
    stages, norms = [], []
    every = max(1, -(-len(folders) // STAGES))
    for folder in folders[::-every][::-1]:
        try:
            states = read_checkpoint(folder).states
        except DamagedCheckpoint:
            continue
        generator, discriminator = pair.recipe.generator(), pair.recipe.discriminator()
        generator.load_state_dict(states["average"]["network"])
        discriminator.load_state_dict(states["discriminator"])
        wish = wishes(generator, discriminator, z, conditions)
        captions = [f"step {int(folder.name.removeprefix('step-'))}"] * len(z)
        stages.append(list(zip(draw(wish.samples, wish.covectors), captions, strict=True)))
        norms.append(float(per_sample_norm(wish.covectors).mean()))
    if len(stages) < 2:
        return []
    _write_film(out / "training.png", stages, "what D wanted changed, along training", legend)
    return [
        f"from {stages[0][0][1]} to {stages[-1][0][1]} the norm of D's covectors went from {norms[0]:.3g} to "
        f"{norms[-1]:.3g}"
    ]


def _write_refinement(pair: Pair, out: Path) -> str:
    """A few samples on their way through `refine`, with D's map at each step of `FRAMES`."""
    draw, legend = draw_tiles(pair.codec)
    z, conditions = pair.first(STRIPS)
    seen: list[Refined] = []
    stages = []
    for steps in FRAMES:
        refined = refine(pair.generator, pair.discriminator, z, steps=steps, report=seen.append, **conditions)
        wish = wishes(pair.generator, pair.discriminator, refined, conditions)
        captions = [f"step {steps}: {logit:+.2g}" for logit in wish.logits.tolist()]
        stages.append(list(zip(draw(wish.samples, wish.covectors), captions, strict=True)))
    _write_film(out / "refine.png", stages, "samples on their way through refine, with D's logit", legend)
    moved = float((seen[-1].moved / per_sample_norm(z)).mean())
    return (
        f"{FRAMES[-1]} steps of refine take the logit of {len(z)} samples from {seen[-1].logit_before.mean():+.2g} to "
        f"{seen[-1].logit_after.mean():+.2g} and move the latents by {moved:.0%} of their length"
    )


def _write_film(path: Path, stages: list[list[Captioned]], title: str, legend: tuple[str, str] | None) -> None:
    """Samples through stages, from left to right with a row for each sample, or downwards where tiles are wide.

    Args:
        path: where the picture is to stand.
        stages: of each stage the tiles of all samples, with their captions.
        title, legend: see `write_sheet`.
    """
    wide = stages[0][0][0].width > 2 * stages[0][0][0].height
    rows = stages if wide else [list(row) for row in zip(*stages, strict=True)]
    write_sheet(path, [tile for row in rows for tile in row], len(rows[0]), title, legend)


def _write_layers(pair: Pair, wish: Wish, out: Path) -> list[str]:
    norms = layer_norms(pair.generator, pair.discriminator, pair.z, pair.conditions)
    relative = {name: g / theta if theta else 0.0 for name, (g, theta) in norms.items()}
    heard = wish.latents.square().mean(dim=0).sqrt()
    check = randomisation_check(pair.generator, pair.discriminator, pair.z, pair.conditions)
    write_json(
        out / "layers.json",
        {
            "layers": [
                {"name": name, "gradient": g, "parameters": theta, "relative": relative[name]}
                for name, (g, theta) in norms.items()
            ],
            "latents": heard.tolist(),
            "coordinates_heard": coordinates_heard(wish.latents),
            "randomisation": [
                {"layer": name, "rank_correlation": signed, "of_absolute_values": absolute}
                for name, signed, absolute in check
            ],
        },
    )
    order = heard.argsort(descending=True)[:16].tolist()
    write_bars(
        out / "layers.png",
        [
            ("layers of G: |gradient| / |parameters|", list(relative.items())),
            (
                "latent coordinates, the 16 that hear most: root mean square",
                [(f"z{k}", float(heard[k])) for k in order],
            ),
            (
                "sanity check: |rank correlation| of the maps, D's layers shuffled from the last on",
                [("(none)", 1.0), *((name, abs(signed)) for name, signed, _ in check)],
            ),
        ],
    )
    most, least = max(relative, key=relative.__getitem__), min(relative, key=relative.__getitem__)
    _, signed, absolute = check[-1]
    told = "what D has learned" if abs(signed) < UNLIKE else "more of the samples than of D"
    return [
        f"relative to its parameters, G's layer {most!r} hears D most ({relative[most]:.2g}) and {least!r} least "
        f"({relative[least]:.2g}); of {heard.numel()} latent coordinates {coordinates_heard(wish.latents):.0f} hear it",
        f"with all of D's layers shuffled, the maps' rank correlation with these is {signed:+.2f} ({absolute:+.2f} "
        f"without signs), so they tell {told}",
    ]


def _ranks(values: Tensor) -> Tensor:
    """Ranks within each row from 0, equal values at the mean of their ranks; shape (B, N)."""
    ordered = values.sort(dim=1).values
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (below + up_to - 1).double() / 2
