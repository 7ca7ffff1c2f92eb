"""`gac evaluate`: a run or a published model against real samples, with what is needed to judge the figures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Codec
from gac_plugin.training.card import EVALUATION, MEMORISATION, PAIRS_PICTURE, kind_of, write_card
from gac_plugin.training.config import FEWEST_TO_EVALUATE, Config, make_config, read_config
from gac_plugin.training.data import codec_of, load_data
from gac_plugin.training.data.source import KNOWN, Decoded, in_memory, sample
from gac_plugin.training.data.streaming import Stream
from gac_plugin.training.files import MARK, write_json
from gac_plugin.training.hub import WEIGHTS, load_discriminator, load_generator, network_folder, read_recipe
from gac_plugin.training.judging.evaluate import Evaluation, evaluate, generated_samples, make_features
from gac_plugin.training.judging.features import Features, find_kind
from gac_plugin.training.judging.measures import MEASURES, how_sure
from gac_plugin.training.judging.memorisation import Memorisation, discriminator_gap, draw_pairs, memorisation
from gac_plugin.training.networks import Recipe, find_adapter

RESAMPLES = 100
DATA_SETTINGS = ("dataset", "subset", "split", "test_split", "column", "label_column", "image_size")
"""The settings of `Config` that say which real samples to compare with."""


@dataclass(frozen=True)
class Assessment:
    """What `assess` found.

    Attributes:
        evaluation: with intervals.
        memorisation: None where nothing was held out, or it was not asked for.
        written: the run folder, where its files now tell this; else None.
    """

    evaluation: Evaluation
    memorisation: Memorisation | None
    written: Path | None

    def to_json(self) -> dict[str, Any]:
        """The evaluation's names and values, and under "memorisation" the other's."""
        told = {"memorisation": self.memorisation.to_json()} if self.memorisation else {}
        return {**self.evaluation.to_json(), **told}


@dataclass(frozen=True)
class _Real:
    """Real samples as stored, and as pictures; `labels` are those of all training samples."""

    train: Decoded
    test: Decoded
    train_pictures: Decoded
    test_pictures: Decoded
    labels: Tensor | None

    @property
    def held_out(self) -> bool:
        return self.train.split != self.test.split


def assess(
    model: str | Path,
    data: Mapping[str, Any] = {},
    features: str | None = None,
    samples: int | None = None,
    seed: int | None = None,
    resamples: int = RESAMPLES,
    memorise: bool = True,
    revision: str | None = None,
) -> Assessment:
    """Evaluate a generator, and look for training samples among what it makes.

    Of a run, with its own data and the default features, `evaluation.json`, `memorisation.json`, the picture of the
    closest pairs and the card are written anew; else nothing is.

    Args:
        model: run folder, saved generator, or "user/name" on the Hub.
        data: values of `DATA_SETTINGS`; those left out are the run's, or the defaults for another data set.
        features: see `make_features`.
        samples: generated ones; by default as many as the run evaluates.
        seed: of latents, classifier and resamples; by default the run's.
        resamples: for the intervals; 0 for none.
        memorise: whether to look for training samples.
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: there is no such model, no data set is named, or its samples are not of the generator's kind; too
            few samples; see also `load_data` and `make_features`.
    """
    _require_numbers(samples, seed, resamples)
    kind = None if features is None else find_kind(features)[0]
    folder = network_folder(model, "generator", revision)
    recipe = read_recipe(folder)
    run = folder.parent if folder.name == "generator" and (folder.parent / MARK).is_file() else None
    config = _config(str(model), run, recipe, data)
    count, seed = (
        samples or config.evaluation_samples or Config.evaluation_samples,
        config.seed if seed is None else seed,
    )

    device, codec = PartialState(cpu=config.cpu).device, codec_of(recipe)
    real = _load_real(config, recipe, codec, device)
    generator = load_generator(folder).to(device)
    stored, labels = generated_samples(generator, recipe, real.labels, count, seed, device)
    pictures, test = codec.pictures(stored), real.test_pictures.values.to(device)

    def named(name: str | None) -> Features:
        few = sample(real.train_pictures, KNOWN)
        return make_features(few, real.test_pictures, seed, device, name, kind_of(recipe).samples)

    space = named(features)
    figures = codec.figures(real.train.values.cpu(), real.test.values.cpu(), stored.cpu())
    evaluation = evaluate(space, test, pictures, labels, figures, real.test.split, resamples, seed)
    copies = None
    if memorise and real.held_out:
        unseen = named("pixels") if kind is None or kind.learned else space
        copies = memorisation(unseen, real.train_pictures.values.to(device), test, pictures)
    finding = copies[0] if copies else None
    if run is None or data or features is not None:
        return Assessment(evaluation, finding, None)

    if (run / "discriminator" / WEIGHTS).is_file():
        discriminator = load_discriminator(run).to(device)
        gap = discriminator_gap(discriminator, codec, real.train, real.test, device, bool(recipe.classes))
        evaluation = replace(evaluation, d_gap=gap)
    write_json(run / EVALUATION, evaluation.to_json())
    if copies:
        write_json(run / MEMORISATION, copies[0].to_json())
        draw_pairs(run / PAIRS_PICTURE, pictures, real.train_pictures.values, copies[1])
    write_card(run, generator, recipe, device)
    return Assessment(evaluation, finding, run)


def _require_numbers(samples: int | None, seed: int | None, resamples: int) -> None:
    for flag, value, least in (
        ("--samples", samples, FEWEST_TO_EVALUATE),
        ("--seed", seed, 0),
        ("--bootstrap", resamples, 0),
    ):
        if value is not None and not least <= value < 2**32:
            raise UsageError(f"{flag} must be at least {least} and below 2^32, got {value}")


def _config(model: str, run: Path | None, recipe: Recipe, data: Mapping[str, Any]) -> Config:
    """What says which real samples to load: the run's settings, or for another data set the defaults."""
    settings = {"adapter": recipe.adapter} if run is None else read_config(run / MARK)
    if run is None and "dataset" not in data:
        raise UsageError(f"{model!r} is no run folder and does not tell its data; name them with --dataset")
    if data.get("dataset", settings.get("dataset")) != settings.get("dataset"):
        settings = {name: value for name, value in settings.items() if name not in DATA_SETTINGS}
        height, width = recipe.arguments["sample_shape"][-2:]
        if find_adapter(recipe.adapter).medium is None and height == width:
            settings["image_size"] = height
    return make_config({**data, "workers": 0, "conditional": False}, earlier=settings)


def _load_real(config: Config, recipe: Recipe, codec: Codec, device: torch.device) -> _Real:
    found = load_data(config, device)
    if (found.codec.to_json(), found.codec.sample_shape) != (recipe.codec, codec.sample_shape):
        shapes = ["x".join(map(str, one.sample_shape)) for one in (codec, found.codec)]
        raise UsageError(
            f"the generator makes samples of {shapes[0]}, and those of data set {config.dataset!r} are of "
            f"{shapes[1]} or encoded otherwise; name the data that it was trained on, or for images pass --image-size"
        )
    if len(found.test) < FEWEST_TO_EVALUATE:
        raise UsageError(
            f"{len(found.test)} samples in split {found.test.split!r} are too few to evaluate against; pass another "
            "--test-split"
        )
    train = found.train.sample(KNOWN) if isinstance(found.train, Stream) else in_memory(found.train)
    labels = train.labels if isinstance(found.train, Stream) else found.train.labels

    def pictured(stored: Decoded) -> Decoded:
        return replace(stored, values=codec.pictures(stored.values))

    return _Real(train, found.test, pictured(train), pictured(found.test), labels)


def table(assessment: Assessment) -> str:
    """What `gac evaluate` prints."""
    evaluation = assessment.evaluation
    rows = [("", "value", "95% interval" if evaluation.intervals else "", "real against real")]
    for name, one in MEASURES.items():
        low_high = evaluation.intervals.get(name)
        sure = "" if low_high is None else f"{_number(low_high[0])} to {_number(low_high[1])}"
        rows.append((one.title, _number(getattr(evaluation, name)), sure, _number(evaluation.floors[name])))
    if evaluation.recognised is not None and evaluation.recognised_real is not None:
        rows.append(("recognised", _number(evaluation.recognised), "", _number(evaluation.recognised_real)))
    if evaluation.d_gap is not None:
        rows.append(("D's gap", _number(evaluation.d_gap), "", ""))
    rows += [(name.replace("_", " "), _number(value), "", "") for name, value in evaluation.figures.items()]
    notes = [
        ("features", evaluation.features),
        (
            "samples",
            f"{evaluation.generated_samples:,} generated, {evaluation.real_samples:,} real of {evaluation.split!r}",
        ),
        ("real against real", "two halves of those real samples"),
    ]
    if evaluation.intervals:
        notes.append(("intervals", how_sure(evaluation.resamples)))
    if (finding := assessment.memorisation) is not None:
        notes.append(("memorisation", finding.verdict))
        notes.append(
            ("authenticity", f"{finding.authenticity:.0%} of generated, {finding.authenticity_real:.0%} of real")
        )
        notes.append(("", f"in {finding.features}, among {finding.training_samples:,} training samples"))
    if assessment.written is not None:
        files = (EVALUATION, MEMORISATION, PAIRS_PICTURE) if assessment.memorisation else (EVALUATION,)
        notes.append(("written", f"{', '.join(files)} and the card in {assessment.written}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    width = max(len(name) for name, _ in notes)
    return "\n".join([*lines, "", *(f"{name:<{width}}  {text}" for name, text in notes)]) + "\n"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
