"""Decoded pixels of a split in a file of the datasets cache, whole or absent, mapped into memory."""

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training.data.unreadable import Unreadable
from gac_plugin.training.files import cannot_write, write_json

FORMAT = 1
"""To be raised with any change of what is decoded to what, or of how it is stored."""


def pixel_file(
    what: str, shape: tuple[int, ...], decode: Callable[[], Iterable[np.ndarray]], unreadable: Unreadable
) -> Tensor:
    """The pixels in the file for a split: decoded into it where it is missing, incomplete or foreign.

    Whoever comes second, in the same run or in another one, waits for the first and takes its file.

    Args:
        what: tells these pixels from any others.
        shape: (N, C, H, W), N the rows of the split; a file that is found may have another C.
        decode: makes the pixels of the rows that can be read, in order, uint8, shape (n, C, H, W) each.
        unreadable: the rows that cannot; `decode` adds to them, or what is known of the file that is found.

    Returns:
        uint8, shape (M, C, H, W) without the rows that cannot be read; not to be written to.

    Raises:
        UsageError: the file cannot be written; or more rows than may be so cannot be read.
    """
    name = hashlib.sha256(f"{FORMAT} {what}".encode()).hexdigest()[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "gac-plugin" / f"{name}.pixels"
    facts = path.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = _read_facts(facts, path, shape)
            if found is None:
                facts.unlink(missing_ok=True)
                count = _write(path, shape, decode())
                found = {"format": FORMAT, "shape": [count, *shape[1:]], "unreadable": unreadable.reasons}
                write_json(facts, found)
            pixels = np.memmap(path, np.uint8, "r", shape=tuple(found["shape"]))
    except OSError as error:
        raise UsageError(
            f"{cannot_write(path, error)}, name another one by HF_DATASETS_CACHE, raise --memory, or decode images "
            "as they are needed with --workers 2"
        ) from error
    unreadable.add({int(row): reason for row, reason in found["unreadable"].items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # samples are never written to
        return torch.from_numpy(pixels)


def _read_facts(facts: Path, path: Path, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """What is known of a file of pixels; None if it is not whole, or not what was asked for."""
    try:
        found = json.loads(facts.read_text(encoding="utf-8"))
        count, channels, *size = found["shape"]
        fits = (count + len(found["unreadable"]), *size) == (shape[0], *shape[2:]) and channels in (1, 3)
        whole = path.stat().st_size == math.prod(found["shape"])
        return found if found["format"] == FORMAT and fits and whole else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> int:
    """Write pixels under another name and rename them; returns the number of images."""
    if shutil.disk_usage(path.parent).free < math.prod(shape):
        raise OSError(errno.ENOSPC, f"{math.prod(shape) / 1e9:.1f} GB of decoded pixels do not fit")
    temporary, count = path.with_suffix(".new"), 0
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part.data)
                count += len(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count
