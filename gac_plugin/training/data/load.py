"""The samples of a data set as a run takes them: in memory, decoded as they are needed, or streamed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from datasets import Audio, Image
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Codec, Encoder, Medium
from gac_plugin.training.config import TEST, Config
from gac_plugin.training.data.columns import Labels, find_column, find_labels
from gac_plugin.training.data.decoding import decode as decode_image
from gac_plugin.training.data.decoding import fitted
from gac_plugin.training.data.images import ImageCodec, Stored, stored_images
from gac_plugin.training.data.source import KNOWN, Decoded, Source, first_line, in_memory
from gac_plugin.training.data.splits import (
    FAILURES,
    ROWS_THAT_TELL,
    Rows,
    cannot_load,
    fetched,
    first_rows,
    open_split,
    open_splits,
)
from gac_plugin.training.data.streaming import Stream
from gac_plugin.training.data.unreadable import Unreadable, UnreadableError
from gac_plugin.training.networks import Recipe, find_adapter


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated against.

    Attributes:
        train: the training samples.
        test: those of the test split, or of a split larger than `Config.memory` 10,000 (see `sample`): always in
            memory. Where there is no test split, the training samples stand for it, the same object if possible.
        codec: what the samples are.
        adapter: the adapter whose networks make such samples; None leaves the choice to `choose_recipe`.
    """

    train: Source | Stream
    test: Decoded
    codec: Codec
    adapter: str | None

    @property
    def classes(self) -> int:
        """The number of classes, 0 where there are no labels or some are missing (below 0)."""
        if isinstance(self.train, Stream):
            return self.train.classes
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
        config: names the data set, and says whether training samples are decoded into memory, by workers, or streamed.
        device: where to keep training samples that are in memory.

    Raises:
        UsageError: no such data set or split; no column that can be read, or several; no rows; images of mixed sizes
            without `config.image_size`; more rows than `config.max_unreadable` that cannot be decoded; decoded pixels
            that fit neither into `config.memory` nor on the disk; labels asked for where there are none.
    """
    splits = open_splits(config)
    train = _split(open_split(splits, config.split, config), config.split, config)
    test = None
    if config.test_split != config.split and (config.test_split in splits or config.test_split != TEST):
        test = _split(open_split(splits, config.test_split, config), config.test_split, config, train.labels)
    adapter = find_column(train.rows.features, config)[1]
    medium = None if adapter is None else find_adapter(adapter).medium
    if config.streaming:
        data = _streamed(train, test, config, adapter, medium)
    elif medium is None:
        data = _images(train, test, config, device, adapter)
    else:
        data = _encoded(train, test, config, device, adapter, medium)
    if config.conditional and not data.classes:
        raise UsageError(
            f"--conditional needs a class label for every row, which data set {config.dataset!r} does not have; "
            "leave it out, or name the column with --label-column"
        )
    return data


@dataclass(frozen=True)
class _Split:
    """The rows of a split, and which of their columns are read."""

    rows: Rows
    name: str
    column: str
    labels: Labels | None

    @property
    def feature(self) -> Any:
        return self.rows.features[self.column]

    def class_numbers(self) -> Tensor | None:
        """Of all rows, in memory."""
        return (
            None if self.labels is None or self.labels.column not in self.rows.features else self.labels.of(self.rows)
        )

    def undecoded(self) -> Rows:
        """The rows with the columns that are read, and the samples as they are in the files."""
        kept = [self.column] if self.labels is None else [self.column, self.labels.column]
        rows = self.rows.select_columns(kept)
        if isinstance(self.feature, Audio | Image):
            rows = rows.cast_column(self.column, type(self.feature)(decode=False))
        return rows


def _split(rows: Rows, name: str, config: Config, labels: Labels | None = None) -> _Split:
    return _Split(rows, name, find_column(rows.features, config)[0], labels or find_labels(rows, config))


def _images(
    train: _Split, test: _Split | None, config: Config, device: torch.device | str, adapter: str | None
) -> Data:
    memory, main = config.memory * 1e9, PartialState(cpu=config.cpu).is_main_process
    stored = _stored(train, config)
    real: Decoded | Stored = stored if config.workers else stored.decoded(memory, main).to(device)
    if test is None:
        held_out = in_memory(real)
    else:
        held_out = in_memory(_stored(test, config).decoded(memory, main))
        if 3 in (real.sample_shape[0], held_out.sample_shape[0]):
            real, held_out = real.in_colour(), held_out.in_colour()
        if real.sample_shape != held_out.sample_shape:
            raise UsageError(
                f"images of the splits {train.name!r} and {test.name!r} differ in shape: "
                f"{real.sample_shape} and {held_out.sample_shape}; pass --image-size"
            )
    return Data(real, held_out, ImageCodec(real.sample_shape, config.output), adapter)


def _stored(split: _Split, config: Config) -> Stored:
    return stored_images(
        split.rows, split.column, split.class_numbers(), split.name, config.image_size, config.max_unreadable
    )


def _encoded(
    train: _Split,
    test: _Split | None,
    config: Config,
    device: torch.device | str,
    adapter: str | None,
    medium: Medium,
) -> Data:
    codec = medium.fit(_cells(train), _codec_options(config, medium))
    real = _in_memory(train, codec, config)
    held_out = real if test is None else _in_memory(test, codec, config)
    return Data(real.to(device), held_out, codec, adapter)


def _codec_options(config: Config, medium: Medium) -> dict[str, Any]:
    return {name: value for name, value in config.adapter_options.items() if name in medium.options}


def _in_memory(split: _Split, codec: Encoder, config: Config) -> Decoded:
    values, readable = [], torch.ones(len(split.rows), dtype=torch.bool)
    unreadable = Unreadable(split.name, len(split.rows), config.max_unreadable)
    for index, cell in enumerate(_cells(split)):
        try:
            values.append(codec.encode(cell))
        except UsageError as error:
            unreadable.add({index: str(error)})
            readable[index] = False
    if PartialState(cpu=config.cpu).is_main_process:
        unreadable.tell("are left out")
    labels = split.class_numbers()
    return Decoded(torch.stack(values), None if labels is None else labels[readable], split.name, unreadable)


def _cells(split: _Split) -> Iterator[Any]:
    """The undecoded cells of a column."""
    try:
        yield from split.undecoded()[split.column]
    except UnicodeDecodeError as error:
        raise UsageError(f"column {split.column!r} holds text that is not UTF-8: {error}; convert it") from error


def _streamed(train: _Split, test: _Split | None, config: Config, adapter: str | None, medium: Medium | None) -> Data:
    codec, decode = _image_reader(train, config) if medium is None else _encoder(train, config, medium)
    real = replace(_stream(train, decode, config), labelled=config.conditional)
    held_out = (real if test is None else _stream(test, decode, config)).sample(KNOWN)
    return Data(real, held_out, codec, adapter)


def _stream(split: _Split, decode: Callable[[Any], Tensor], config: Config) -> Stream:
    labels = split.labels if split.labels is not None and split.labels.column in split.rows.features else None
    return Stream(
        split.undecoded(),
        split.column,
        None if labels is None else labels.column,
        decode,
        0 if labels is None else labels.count,
        config.shuffle_buffer,
        Unreadable(split.name, limit=config.max_unreadable),
    )


def _image_reader(split: _Split, config: Config) -> tuple[Codec, Callable[[Any], Tensor]]:
    """How the images of a stream are read; the first ones tell their shape, in colour if any one is."""
    feature = split.feature  # a copy, each time it is asked for
    found, reason = [], "there are none"
    for cell in _first_cells(split, ROWS_THAT_TELL, config):
        try:
            found.append(decode_image(cell, feature, config.image_size))
        except UnreadableError as error:
            reason = str(error)
    if not found:
        raise UsageError(f"none of the first {ROWS_THAT_TELL} images of split {split.name!r} can be read: {reason}")
    shape = (3 if any(image.ndim == 3 for image in found) else 1, *found[0].shape[:2])

    def decode(cell: Any) -> Tensor:
        # fetched first: a connection that breaks off is not a damaged image
        image = decode_image(fetched(cell), feature, config.image_size)
        return torch.tensor(fitted(image, shape, f"an image of split {split.name!r}"))

    return ImageCodec(shape, config.output), decode


def _encoder(split: _Split, config: Config, medium: Medium) -> tuple[Codec, Callable[[Any], Tensor]]:
    codec = medium.fit(_first_cells(split, KNOWN, config), _codec_options(config, medium))

    def encode(cell: Any) -> Tensor:
        try:
            return codec.encode(fetched(cell))
        except UsageError as error:
            raise UnreadableError(str(error)) from error

    return codec, encode


def _first_cells(split: _Split, count: int, config: Config) -> list[Any]:
    """The first undecoded cells of a stream."""
    rows = first_rows(split.undecoded(), count, config)
    try:
        return [fetched(row[split.column]) for row in rows]
    except FAILURES as error:
        raise cannot_load(config, error) from error
