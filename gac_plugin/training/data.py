"""Finding the samples of a data set: embedded, a local folder, or on the Hub; images, or what an adapter reads.

Every data set goes through `datasets.load_dataset`. The column is found by its type, and the codec by the column.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from datasets import Audio, Dataset, load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Codec, Encoder, Medium
from gac_plugin.training.config import EMBEDDED, Config
from gac_plugin.training.images import ImageCodec, Stored, stored_images
from gac_plugin.training.networks import Recipe, adapter_names, find_adapter
from gac_plugin.training.source import Decoded, Source, first_line, sample

IMAGES = "Image"


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated against.

    Attributes:
        train: the training samples.
        test: those of the test split, always in memory. Where there is no test split, the training samples stand for
            it: the same object, or 10,000 of them where they are not in memory (see `sample`).
        codec: what the samples are.
        adapter: the adapter whose networks make such samples; None leaves the choice to `choose_recipe`.
    """

    train: Source
    test: Decoded
    codec: Codec
    adapter: str | None

    @property
    def classes(self) -> int:
        """The number of classes, 0 where there are no labels or some are missing (below 0)."""
        labels = self.train.labels
        return 0 if labels is None or int(labels.min()) < 0 else int(labels.max()) + 1


def codec_of(recipe: Recipe) -> Codec:
    """The codec of the samples that a recipe's networks make.

    Raises:
        UsageError: its adapter is not installed, or what stands in the recipe does not describe a codec.
    """
    medium = find_adapter(recipe.adapter).medium
    if medium is None:
        return ImageCodec(tuple(recipe.arguments["sample_shape"]), recipe.arguments["output"])
    try:
        return medium.load(recipe.codec)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"the recipe's codec is not one of adapter {recipe.adapter!r}: {first_line(error)}; load the config.json "
            "that was saved with the weights"
        ) from error


def load_data(config: Config, device: torch.device | str = "cpu") -> Data:
    """The samples that a configuration names.

    Args:
        config: names the data set, and says whether training images are decoded by workers or into memory.
        device: where to keep training samples that are in memory.

    Raises:
        UsageError: no such data set or split; no column that can be read, or several; no rows; images of mixed sizes
            without `config.image_size`; a cell that cannot be decoded; labels asked for where there are none.
    """
    splits = _load(config.dataset)
    if config.split not in splits:
        raise UsageError(f"data set {config.dataset!r} has no split {config.split!r}; it has: {', '.join(splits)}")
    rows = splits[config.split]
    if len(rows) == 0:
        raise UsageError(f"split {config.split!r} of data set {config.dataset!r} is empty")
    column, adapter = _column(rows, config)
    medium = None if adapter is None else find_adapter(adapter).medium
    has_test = config.test_split in splits and config.test_split != config.split
    tested = splits[config.test_split] if has_test else None
    data = (
        _images(rows, tested, column, config, device, adapter)
        if medium is None
        else _encoded(rows, tested, column, config, device, adapter, medium)
    )
    if config.conditional and not data.classes:
        raise UsageError(
            f"--conditional needs a class label for every row, and data set {config.dataset!r} has none; leave it out"
        )
    return data


def _images(
    rows: Dataset, tested: Dataset | None, column: str, config: Config, device: torch.device | str, adapter: str | None
) -> Data:
    stored = stored_images(rows, column, _labels(rows), config.split, config.image_size)
    train: Decoded | Stored = stored if config.workers else stored.in_memory().to(device)
    if tested is None:
        test = train if isinstance(train, Decoded) else sample(train)
    else:
        test = stored_images(
            tested, _column(tested, config)[0], _labels(tested), config.test_split, config.image_size
        ).in_memory()
        if 3 in (train.sample_shape[0], test.sample_shape[0]):
            train, test = train.in_colour(), test.in_colour()
        if train.sample_shape != test.sample_shape:
            raise UsageError(
                f"images of the splits {config.split!r} and {config.test_split!r} differ in shape: "
                f"{train.sample_shape} and {test.sample_shape}; pass --image-size"
            )
    return Data(train, test, ImageCodec(train.sample_shape, config.output), adapter)


def _encoded(
    rows: Dataset,
    tested: Dataset | None,
    column: str,
    config: Config,
    device: torch.device | str,
    adapter: str | None,
    medium: Medium,
) -> Data:
    options = {name: value for name, value in config.adapter_options.items() if name in medium.options}
    codec = medium.fit(_cells(rows, column), options)
    train = _in_memory(rows, column, codec, config.split)
    test = train if tested is None else _in_memory(tested, column, codec, config.test_split)
    return Data(train.to(device), test, codec, adapter)


def _in_memory(rows: Dataset, column: str, codec: Encoder, split: str) -> Decoded:
    values = []
    for index, cell in enumerate(_cells(rows, column)):
        try:
            values.append(codec.encode(cell))
        except UsageError as error:
            raise UsageError(f"row {index} of split {split!r}: {error}") from error
    return Decoded(torch.stack(values), _labels(rows), split)


def _cells(rows: Dataset, column: str) -> Iterator[Any]:
    """The undecoded cells of a column."""
    if isinstance(rows.features[column], Audio):
        rows = rows.cast_column(column, Audio(decode=False))
    try:
        yield from rows.select_columns(column)[column]
    except UnicodeDecodeError as error:
        raise UsageError(f"column {column!r} holds text that is not UTF-8: {error}; convert it") from error


def dataset_path(dataset: str) -> str:
    """What to hand to `datasets.load_dataset`: the embedded data set's folder, or the path or Hub name as given.

    Raises:
        UsageError: something that can only be a local path does not exist.
    """
    if dataset == EMBEDDED:
        return str(files("gac_plugin") / "digits")
    local = Path(dataset).expanduser()
    if local.is_file():
        raise UsageError(f"{dataset!r} is a file; give the folder that holds the data set")
    if local.is_dir():
        return str(local)
    if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise UsageError(f"no folder {dataset!r}; give a folder in Hub layout, a data set on the Hub, or {EMBEDDED!r}")
    return dataset


def _load(dataset: str) -> Mapping[str, Dataset]:
    source = dataset_path(dataset)
    try:
        return load_dataset(source)
    except (OSError, ValueError, DatasetsError) as error:
        reason = error.__cause__ if isinstance(error.__cause__, UnicodeDecodeError) else error
        raise UsageError(
            f"cannot load data set {dataset!r}: {first_line(reason)}; check the name or folder, and that it holds rows"
        ) from error


def _column(rows: Dataset, config: Config) -> tuple[str, str | None]:
    """The column with the samples, and the adapter that reads its type; None for images, which several do."""
    kinds = {name: _kind(feature) for name, feature in rows.features.items()}
    listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if config.column is not None and config.column not in kinds:
        raise UsageError(f"no column {config.column!r} in the data set; its columns: {listing}")
    if config.adapter is not None:
        medium = find_adapter(config.adapter).medium
        readers = {IMAGES if medium is None else medium.column: config.adapter}
    elif IMAGES in kinds.values() and kinds.get(config.column or "", IMAGES) == IMAGES:
        readers = {IMAGES: ""}
    else:
        readers = {IMAGES: "", **_readers()}
    chosen = {config.column: kinds[config.column]} if config.column is not None else kinds
    for kind, adapter in readers.items():
        fitting = [name for name, found in chosen.items() if found == kind]
        if len(fitting) > 1:
            raise UsageError(f"several {kind} columns: {', '.join(fitting)}; choose one with --column")
        if fitting:
            return fitting[0], adapter or None
    what = f"column {config.column!r}" if config.column is not None else "the data set"
    reader = f"adapter {config.adapter!r}" if config.adapter is not None else "an installed adapter"
    raise UsageError(f"{what} holds nothing that {reader} reads ({', '.join(readers)}); columns: {listing}")


def _readers() -> dict[str, str]:
    """Types of columns other than images, each with the first adapter that reads it; plain text comes last."""
    found: dict[str, str] = {}
    for name in adapter_names():
        with suppress(UsageError):  # one that cannot be imported does not stand in the others' way
            medium = find_adapter(name).medium
            if medium is not None:
                found.setdefault(medium.column, name)
    return dict(sorted(found.items(), key=lambda entry: entry[0] == "string"))


def _kind(feature: Any) -> str:
    name = type(feature).__name__
    return str(feature.dtype).removeprefix("large_") if name == "Value" else name


def _labels(rows: Dataset) -> Tensor | None:
    for name, feature in rows.features.items():
        if type(feature).__name__ == "ClassLabel":
            return torch.tensor(rows.select_columns(name).with_format("numpy")[:][name], dtype=torch.int64)
    return None
