"""Opening a data set: the embedded one, a folder of any format that `datasets` reads, or one on the Hub."""

import errno
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any, TypeAlias

import fsspec
import pyarrow as pa
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetInfo,
    DownloadManager,
    Features,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError, DatasetsError

from gac_plugin.errors import UsageError
from gac_plugin.training.config import EMBEDDED, Config
from gac_plugin.training.data.source import first_line
from gac_plugin.training.remote import CLIENT_ERRORS, persistently

Rows: TypeAlias = Dataset | IterableDataset
FAILURES = (*CLIENT_ERRORS, DatasetsError)
"""What `datasets` raises when a data set is not there or cannot be read, or the network fails."""
REMOTE = ("hf://", "https://")
"""Beginnings of addresses that are read; a data set of others' could name any place."""
ROWS_THAT_TELL = 100
"""Rows of a stream from which the types of its columns are read where the files do not tell them."""
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
LONGEST_REASON = 300


def open_splits(config: Config) -> Mapping[str, Rows]:
    """The splits of the data set that a configuration names; with `config.streaming` they are streams.

    Private and gated data sets are opened with the token that `hf auth login` has stored, or that of HF_TOKEN.

    Raises:
        UsageError: there is no such data set, subset or revision, or it cannot be read.
    """
    return _load(config)


def open_split(splits: Mapping[str, Rows], name: str, config: Config) -> Rows:
    """A split, or a part of one, such as "train[:90%]"; its columns have types.

    Raises:
        UsageError: there is no such split or part, it is empty, or a part of a stream is asked for.
    """
    rows = splits[name] if name in splits else _part(splits, name, config)
    if isinstance(rows, IterableDataset):
        return _typed(rows, name, config)
    if len(rows) == 0:
        raise UsageError(f"split {name!r} of data set {config.dataset!r} is empty")
    return rows


def _part(splits: Mapping[str, Rows], name: str, config: Config) -> Rows:
    if name.partition("[")[0] not in splits:
        raise UsageError(f"data set {config.dataset!r} has no split {name!r}; it has: {', '.join(splits)}")
    if config.streaming:
        raise UsageError(f"a stream is read from its beginning to its end; pass a whole split in place of {name!r}")
    try:
        parts = ReadInstruction.from_spec(name).to_absolute({split: len(rows) for split, rows in splits.items()})
    except (AssertionError, ValueError) as error:
        raise UsageError(
            f"{name!r} is no part of a split: {first_line(error)}; write train[:90%] or train[100:]"
        ) from error
    return concatenate_datasets([splits[part.splitname].select(range(part.from_ or 0, part.to)) for part in parts])


def first_rows(rows: IterableDataset, count: int, config: Config) -> list[dict[str, Any]]:
    """The first rows of a stream, at most `count`.

    Raises:
        UsageError: they cannot be read.
    """
    try:
        return list(rows.take(count))
    except FAILURES as error:
        raise cannot_load(config, error) from error


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


def _load(config: Config) -> Mapping[str, Rows]:
    source = dataset_path(config.dataset)
    if config.revision is not None and Path(source).is_dir():
        raise UsageError(f"--revision {config.revision} is for data sets on the Hub; {config.dataset!r} is a folder")
    load = partial(_streams if config.streaming else _tables, source, config)
    try:
        return load() if Path(source).is_dir() else persistently(load)
    except FAILURES as error:
        raise cannot_load(config, error) from error


def _streams(source: str, config: Config) -> Mapping[str, IterableDataset]:
    builder = load_dataset_builder(source, config.subset, revision=config.revision)
    if _is_folder_of_sounds(builder):
        return {name: _sounds(builder, files).to_iterable_dataset() for name, files in _sound_files(builder).items()}
    if hasattr(builder.config, "decode_num_threads"):  # else images on the Hub come decoded, or as an error
        builder.config.decode_num_threads = 0
    return builder.as_streaming_dataset()


def _tables(source: str, config: Config) -> Mapping[str, Dataset]:
    builder = load_dataset_builder(source, config.subset, revision=config.revision)
    if _is_folder_of_sounds(builder):
        fetched = DownloadManager().download(_sound_files(builder))
        return {name: _sounds(builder, files, fetched[name]) for name, files in _sound_files(builder).items()}
    builder.download_and_prepare()
    return builder.as_dataset()


def _is_folder_of_sounds(builder: DatasetBuilder) -> bool:
    files = [PurePosixPath(file).name for found in (builder.config.data_files or {}).values() for file in found]
    return builder.name == "audiofolder" and not any(file.startswith("metadata.") for file in files)


def _sound_files(builder: DatasetBuilder) -> dict[str, list[str]]:
    """The sound files of each split, by their paths."""
    return {
        str(split): [file for file in files if file.lower().endswith(tuple(builder.EXTENSIONS))]
        for split, files in builder.config.data_files.items()
    }


def _sounds(builder: DatasetBuilder, files: Sequence[str], places: Sequence[str] | None = None) -> Dataset:
    """Sound files as rows, whose classes are the names of their folders if there are several in a split.

    `datasets` makes tables of sounds with torchcodec alone, which needs FFmpeg.

    Args:
        builder: knows all the files.
        files: of one split.
        places: where they can be read; by default where they are.
    """
    found = [{PurePosixPath(file).parent.name for file in files} for files in _sound_files(builder).values()]
    folders = sorted(set[str]().union(*found))
    features = Features({"audio": Audio(decode=False), "label": ClassLabel(names=folders)})
    columns = {
        "audio": [{"bytes": None, "path": place} for place in places or files],
        "label": [folders.index(PurePosixPath(file).parent.name) for file in files],
    }
    rows = Dataset(pa.table(columns, schema=features.arrow_schema), DatasetInfo(features=features))
    return rows if max(map(len, found)) > 1 else rows.remove_columns("label")


def fetched(cell: Any) -> Any:
    """An undecoded cell with the bytes of its file, where that is not on this machine.

    Raises:
        One of `FAILURES`: the file cannot be had.
    """
    if isinstance(cell, Mapping) and cell.get("bytes") is None and str(cell.get("path")).startswith(REMOTE):
        return {**cell, "bytes": persistently(partial(_content, cell["path"]))}
    return cell


def _content(address: str) -> bytes:
    with fsspec.open(address, "rb") as file:
        return file.read()


def cannot_load(config: Config, error: Exception) -> UsageError:
    """What to tell of a data set that `datasets` or the Hub does not give."""
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    reason = first_line(error) if cause is error else shorten(str(cause), LONGEST_REASON, placeholder=" ...")
    if isinstance(cause, OSError) and cause.errno in NO_PLACE:
        mend = "set HF_HOME to a folder that has the space and that you can write to"
    elif cause is not error:
        mend = "repair its files"
    elif "Config name is missing" in reason or "BuilderConfig" in reason:
        mend = "choose a configuration with --subset"
    elif "doesn't exist on the Hub or cannot be accessed" in reason or "gated" in reason:
        mend = "check the name; for a private or gated one, log in with hf auth login or set HF_TOKEN"
    else:
        mend = "check the name or folder, and that it holds rows"
    return UsageError(f"cannot load data set {config.dataset!r}: {reason}; {mend}")


def _typed(rows: IterableDataset, split: str, config: Config) -> IterableDataset:
    """The stream with types of its columns: those of the files, or else those of its first rows."""
    if rows.features is not None:
        return rows
    first = first_rows(rows, ROWS_THAT_TELL, config)
    if not first:
        raise UsageError(f"split {split!r} of data set {config.dataset!r} is empty")
    return rows.cast(Features.from_arrow_schema(pa.Table.from_pylist(first).schema))
