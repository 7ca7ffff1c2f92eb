"""Opening a data set: the embedded one, a folder of any format that `datasets` reads, or one on the Hub."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from gac_plugin.errors import UsageError
from gac_plugin.training.config import EMBEDDED, Config
from gac_plugin.training.source import first_line

Rows: TypeAlias = Dataset | IterableDataset
FAILURES = (OSError, ValueError, DatasetsError)
"""What `datasets` raises when a data set is not there or cannot be read, or the network fails."""
ROWS_THAT_TELL = 100
"""Rows of a stream from which the types of its columns are read where the files do not tell them."""


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
        UsageError: there is no such split, it is empty, or a part of a stream is asked for.
    """
    whole, bracket, _ = name.partition("[")
    if whole not in splits:
        raise UsageError(f"data set {config.dataset!r} has no split {whole!r}; it has: {', '.join(splits)}")
    if bracket and config.streaming:
        raise UsageError(f"a stream is read from its beginning to its end; pass {whole!r} in place of {name!r}")
    rows = _load(config, name) if bracket else splits[whole]
    if isinstance(rows, IterableDataset):
        return _typed(rows, name, config)
    if len(rows) == 0:
        raise UsageError(f"split {name!r} of data set {config.dataset!r} is empty")
    return rows


def first_rows(rows: IterableDataset, count: int, config: Config) -> list[dict[str, Any]]:
    """The first rows of a stream, at most `count`.

    Raises:
        UsageError: they cannot be read.
    """
    try:
        return list(rows.take(count))
    except FAILURES as error:
        raise _cannot_load(config, error) from error


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


def _load(config: Config, split: str | None = None) -> Mapping[str, Rows]:
    source = dataset_path(config.dataset)
    if config.revision is not None and Path(source).is_dir():
        raise UsageError(f"--revision {config.revision} is for data sets on the Hub; {config.dataset!r} is a folder")
    try:
        return load_dataset(source, config.subset, split=split, revision=config.revision, streaming=config.streaming)
    except FAILURES as error:
        raise _cannot_load(config, error) from error


def _cannot_load(config: Config, error: Exception) -> UsageError:
    reason = first_line(error.__cause__ if isinstance(error.__cause__, UnicodeDecodeError) else error)
    mend = "check the name or folder, and that it holds rows"
    if "config" in reason.lower():
        mend = "choose a configuration with --subset"
    elif "doesn't exist on the Hub or cannot be accessed" in reason or "gated" in reason:
        mend = "check the name; for a private or gated one, log in with hf auth login or set HF_TOKEN"
    return UsageError(f"cannot load data set {config.dataset!r}: {reason}; {mend}")


def _typed(rows: IterableDataset, split: str, config: Config) -> IterableDataset:
    """The stream with types of its columns: those of the files, or else those of its first rows."""
    if rows.features is not None:
        return rows
    first = first_rows(rows, ROWS_THAT_TELL, config)
    if not first:
        raise UsageError(f"split {split!r} of data set {config.dataset!r} is empty")
    return rows.cast(Features.from_arrow_schema(pa.Table.from_pylist(first).schema))
