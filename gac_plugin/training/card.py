"""The card of a generator: a page for people, with the metadata that the Hub reads.

`gac train` leaves it in `generator/README.md`, with USER/NAME where the name on the Hub will stand.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from torch import nn

from gac_plugin import __version__
from gac_plugin.training.config import EMBEDDED, Config, read_config
from gac_plugin.training.data import codec_of
from gac_plugin.training.data.columns import IMAGES
from gac_plugin.training.files import write_whole
from gac_plugin.training.generate import generate
from gac_plugin.training.hub import RECIPE, WEIGHTS, read_recipe
from gac_plugin.training.judging.measures import MEASURES
from gac_plugin.training.networks import GROUP, Recipe, find_adapter

CARD, PICTURE, EVALUATION, METRICS = "README.md", "samples.png", "evaluation.json", "metrics.jsonl"
MEMORISATION, PAIRS_PICTURE = "memorisation.json", "memorisation.png"
"""What `gac evaluate` leaves in a run, beside its evaluation."""
TRAINING = "training.json"
"""The settings of the run, where they are published: its `config.json`, a name which the network's own has."""
PLACEHOLDER = "USER/NAME"
COUNT = 64
"""Samples in the picture: those that `gac sample` makes without further flags."""
TEXTS_SHOWN = 16
APART = (
    *("dataset", "tracker", "report", "cpu", "workers", "memory", "max_unreadable"),
    *("log_every", "sample_every", "checkpoint_every", "keep_checkpoints"),
)
"""Settings that say nothing of how the generator came to be, or are told elsewhere on the card."""


class Kind(NamedTuple):
    """What the Hub and people call samples from a type of column."""

    task: str
    samples: str
    tag: str


KINDS = {
    IMAGES: Kind("unconditional-image-generation", "images", "image-generation"),
    "Audio": Kind("text-to-audio", "audio clips", "audio-generation"),
    "string": Kind("text-generation", "texts", "text-generation"),
}
OTHER = Kind("other", "samples", "generative")


def write_card(run: Path, generator: nn.Module, recipe: Recipe, device: torch.device | str = "cpu") -> None:
    """Write `generator/README.md` and the picture of samples that it shows.

    Args:
        run: the run folder, with the generator in it.
        generator: with its weights.
        recipe: how it was built.
        device: where it is.

    Raises:
        UsageError: a file cannot be written.
    """
    draw_samples(run / "generator" / PICTURE, generator, recipe, device)
    text = model_card(run)
    write_whole(run / "generator" / CARD, lambda temporary: temporary.write_bytes(text.encode()))  # type: ignore[arg-type]


def draw_samples(path: Path, generator: nn.Module, recipe: Recipe, device: torch.device | str = "cpu") -> None:
    """Write the picture of a card; see `write_card`."""
    codec_of(recipe).write(path, generate(generator, recipe, COUNT, seed=0, device=device))


def model_card(
    run: Path,
    repo_id: str = PLACEHOLDER,
    license: str | None = None,
    discriminator: bool = False,
    training: bool = False,
    space: bool = False,
) -> str:
    """The text of a card, from the files of a run.

    Args:
        run: the run folder.
        repo_id: the name on the Hub.
        license: identifier of the licence of the weights, as the Hub and SPDX have it ("mit", "cc-by-4.0").
        discriminator, training, space: whether the discriminator, the recipe and a demo are published as well.

    Raises:
        UsageError: a file of the run cannot be read.
    """
    settings, recipe = {**Config().to_json(), **read_config(run / RECIPE)}, read_recipe(run / "generator")
    evaluation, memorisation = (
        read_config(run / name) if (run / name).is_file() else {} for name in (EVALUATION, MEMORISATION)
    )
    kind = kind_of(recipe)
    data = _metadata(run, settings, recipe, evaluation, repo_id, license)
    sections = {
        f"# {repo_id.split('/')[-1]}": _summary(run, settings, recipe, kind),
        "## How to load it": _loading(recipe, repo_id, kind, discriminator, space),
        "## What it was trained on": _data_set(run, settings),
        "## How it was trained": _training(run, settings, training),
        "## Figures": _figures(evaluation),
        "## Limitations": _limitations(kind, memorisation),
        "## Licence": _licence(license),
    }
    body = "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _metadata(
    run: Path,
    settings: Mapping[str, Any],
    recipe: Recipe,
    evaluation: Mapping[str, Any],
    repo_id: str,
    license: str | None,
) -> ModelCardData:
    kind, on_hub = kind_of(recipe), hub_data_set(run, settings["dataset"])
    tags = ["gan", "gac", "pytorch", kind.tag, *(["class-conditional"] if recipe.classes else [])]
    results = _results(run, settings, evaluation, kind)
    return ModelCardData(
        license=license,
        library_name="gac-plugin",
        pipeline_tag=kind.task,
        tags=tags,
        datasets=[on_hub] if on_hub else None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def kind_of(recipe: Recipe) -> Kind:
    """What a recipe's samples are called."""
    medium = find_adapter(recipe.adapter).medium
    return KINDS.get(IMAGES if medium is None else medium.column, OTHER)


def hub_data_set(run: Path, dataset: str) -> str | None:
    """The name of a run's data set on the Hub, None where it is embedded or a local folder.

    The card that training has left knows; a folder may have moved since.
    """
    card = run / "generator" / CARD
    if card.is_file():
        return dataset if dataset in _named_data_sets(card.read_text(encoding="utf-8", errors="replace")) else None
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return None
    return None if dataset == EMBEDDED or Path(dataset).exists() else dataset


def _named_data_sets(card: str) -> list[str]:
    with suppress(yaml.YAMLError, AttributeError, IndexError):  # a card without readable metadata names none
        return yaml.safe_load(card.split("---\n")[1]).get("datasets") or []
    return []


def data_set_name(run: Path, dataset: str) -> str:
    """What to call a run's data set: its name on the Hub, or its folder's name without the way to it."""
    return hub_data_set(run, dataset) or Path(dataset).name or "data"


def without_path(value: Any) -> Any:
    """A setting as others may see it: of an absolute path, its last part."""
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _results(run: Path, settings: Mapping[str, Any], evaluation: Mapping[str, Any], kind: Kind) -> list[EvalResult]:
    counts = {name: evaluation[name] for name in ("real_samples", "generated_samples") if name in evaluation}
    named = {"frechet": "Frechet distance", "precision": "Precision", "recall": "Recall"}
    found = {name: evaluation[name] for name in named if math.isfinite(evaluation.get(name, math.nan))}
    floor = {"between_two_halves_of_the_real_samples": evaluation.get("floor")}
    return [
        EvalResult(
            task_type=kind.task,
            dataset_type=hub_data_set(run, settings["dataset"]) or data_set_name(run, settings["dataset"]).lower(),
            dataset_name=data_set_name(run, settings["dataset"]),
            dataset_split=evaluation.get("split"),
            metric_type="frechet_distance" if name == "frechet" else name,
            metric_name=f"{named[name]} in {evaluation['features']}",
            metric_value=round(value, 4),
            metric_args={**counts, **(floor if name == "frechet" else {})},
        )
        for name, value in found.items()
    ]


def _summary(run: Path, settings: Mapping[str, Any], recipe: Recipe, kind: Kind) -> str:
    with safe_open(run / "generator" / WEIGHTS, framework="pt") as file:
        size = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    shape = " x ".join(map(str, recipe.arguments["sample_shape"]))
    told = f", of {recipe.classes} classes that can be asked for" if recipe.classes else ""
    data_set = data_set_name(run, settings["dataset"])
    lines = [
        f"A generator of {kind.samples} ({shape}{told}), trained from scratch on {data_set} with GAC, "
        "gradient ascent along the discriminator's conjugate gradient direction, by "
        f"gac-plugin {__version__}: the networks of its adapter `{recipe.adapter}`, {size:,} weights.",
        f"![{COUNT} samples]({PICTURE})",
        f"*{COUNT} samples, not picked: what `gac sample` makes without further flags.*",
    ]
    texts = sorted((run / "samples").glob("*.txt"))
    if texts:
        shown = texts[-1].read_text(encoding="utf-8").splitlines()[:TEXTS_SHOWN]
        lines[1:] = [
            "Not picked:",
            "\n".join(f"    {line}" for line in shown),
            f"![the same kind as pictures]({PICTURE})",
        ]
    return "\n\n".join(lines)


def _loading(recipe: Recipe, repo_id: str, kind: Kind, discriminator: bool, space: bool) -> str:
    packages = " ".join(dict.fromkeys(("gac-plugin", _package(recipe.adapter))))
    labels = f", labels=torch.arange({COUNT}) % {recipe.classes}" if recipe.classes else ""
    low = "[-1, 1]" if recipe.arguments["output"] == "tanh" else "[0, 1]"
    shape = ", ".join(map(str, recipe.arguments["sample_shape"]))
    suffix = codec_of(recipe).suffixes[0]
    lines = [
        f"```bash\npip install {packages}\ngac sample {repo_id} --n {COUNT} --out samples{suffix}\n```",
        "```python\nimport torch\nfrom gac_plugin.training import from_pretrained\n\n"
        f'generator = from_pretrained("{repo_id}")\n'
        f"samples = generator(torch.randn({COUNT}, generator.nz){labels})  # ({COUNT}, {shape}), in {low}\n```",
        "The weights are read from safetensors alone; nothing is unpickled, and no code of this repository is run.",
    ]
    if discriminator:
        lines.append(
            "The discriminator stands in `discriminator/`, so that samples can be refined: "
            f'`load_discriminator("{repo_id}")`.'
        )
    if space:
        lines.append(f"To try it in the browser: the Space [{repo_id}](https://huggingface.co/spaces/{repo_id}).")
    return "\n\n".join(lines)


def _package(adapter: str) -> str:
    """The package that provides an adapter."""
    found = (point.dist.name for point in entry_points(group=GROUP) if point.name == adapter and point.dist)
    return next(found, "gac-plugin")


def _data_set(run: Path, settings: Mapping[str, Any]) -> str:
    dataset, split = settings["dataset"], settings.get("split")
    if dataset == EMBEDDED:
        return (
            f"The split `{split}` of `{EMBEDDED}`, real handwritten digits of 8x8 pixels that come with gac-plugin: "
            "*Optical Recognition of Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
            "doi 10.24432/C50P49, CC BY 4.0."
        )
    on_hub = hub_data_set(run, dataset)
    if on_hub:
        return f"The split `{split}` of [{on_hub}](https://huggingface.co/datasets/{on_hub}) on the Hub."
    return f"The split `{split}` of `{data_set_name(run, dataset)}`, a data set in a folder of the author's own."


def _training(run: Path, settings: Mapping[str, Any], published: bool) -> str:
    rows = [("step reached", f"{steps_taken(run, settings):,}", "")]
    for item in fields(Config):
        value = settings.get(item.name, item.default)
        if item.name not in APART and (value != item.default or item.name in ("batch_size", "seed")):
            usual = "" if value == item.default else f"`{item.default}`"
            rows.append((f"`--{item.name.replace('_', '-')}`", f"`{without_path(value)}`", usual))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    again = f"\n\nAgain, or with other settings: `gac train --config {TRAINING}`." if published else ""
    return (
        f"What differs from the defaults of `gac train`:\n\n| setting | here | default |\n|---|---|---|\n{table}{again}"
    )


def steps_taken(run: Path, settings: Mapping[str, Any]) -> int:
    """The last step of a run, which may have ended before the number that was asked for."""
    file = run / METRICS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else settings["steps"]


def _figures(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return "None were taken."
    floors, intervals = evaluation.get("floors", {}), evaluation.get("intervals", {})
    about = {
        **{name: (one.title, one.meaning) for name, one in MEASURES.items()},
        "frechet": ("Frechet distance, lower is better", f"two halves of the real samples: {evaluation['floor']:.2f}"),
        "recognised": ("recognised", f"the same of real samples: {evaluation.get('recognised_real', math.nan):.3f}"),
        "d_gap": ("D's gap", "its mean logit on training samples minus on held-out ones"),
    }
    apart = (
        *("features", "split", "floor", "floors", "real_samples", "generated_samples", "recognised_real"),
        *("intervals", "interval_method", "resamples"),
    )
    rows = []
    for name, value in evaluation.items():
        if name in apart:
            continue
        title, note = about.get(name, (name.replace("_", " "), ""))
        if name in floors and name != "frechet":
            note += f"; two halves of the real samples: {floors[name]:.3f}"
        digits = 2 if name == "frechet" else 3
        cells = [title, f"{value:.{digits}f}", note]
        if intervals:
            cells.append(" to ".join(f"{edge:.{digits}f}" for edge in intervals.get(name, [])))
        rows.append(f"| {' | '.join(cells)} |")
    titles = ["figure", "value", "to judge it", *(["95% interval"] if intervals else [])]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *rows]
    sure = f" {evaluation['interval_method']}." if intervals else ""
    split = f" of split `{evaluation['split']}`" if "split" in evaluation else ""
    return "\n".join(lines) + (
        f"\n\nDistances are taken in {evaluation['features']}, between {evaluation['generated_samples']:,} generated "
        f"samples and {evaluation['real_samples']:,} real ones{split}.{sure} They depend on the features and on both "
        "numbers, so they compare with figures taken in the same way alone; this is not the FID of the literature."
    )


def _limitations(kind: Kind, memorisation: Mapping[str, Any]) -> str:
    copies = "Whether single training samples come back from it was not examined."
    if memorisation:
        copies = f"Whether single training samples come back from it: {memorisation['verdict']}."
    return (
        f"- It makes {kind.samples} like those of its data set and no others, with the gaps, errors and biases that "
        "those have.\n"
        "- A generative adversarial network can leave out rare kinds of samples; recall, where it was measured, tells "
        "how many it reaches.\n"
        f"- {copies}\n"
        "- It comes from one run with one seed."
    )


def _licence(license: str | None) -> str:
    if license:
        return f"The weights: `{license}`. The data set has terms of its own."
    return (
        "The author has named none for the weights, so ask before you use them for more than a look. The data set has "
        "terms of its own."
    )
