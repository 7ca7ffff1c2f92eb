"""Files that are whole or absent, run folders that are not left behind empty, and pictures."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image as Picture
from torch import Tensor

from gac_plugin.errors import UsageError

MARK = "config.json"
"""The file that tells a run folder."""
PARTS = ("samples", "maps", "checkpoints", "logs", "generator", "discriminator")
"""The folders in a run folder."""
CALIBRATED = "calibrated"
"""The folder in a run folder that holds a discriminator to refine with."""
REPORT, COMPARISON = "report.html", "comparison.html"
HALF_WRITTEN = re.compile(r"\.[\w-]+-[a-z0-9_]{8}\.\w+|\.tmp[A-Za-z0-9]{6}")
"""What `write_whole` calls a file until it is whole, and what safetensors (0.8) does."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
GAP, GAP_COLOUR = 4, "#606060"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name in its folder and rename it, so that readers see all of it or nothing.

    Args:
        path: where the file is to stand; its folder is made.
        write: called with the temporary path.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        try:
            write(Path(name))
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    except (ValueError, OverflowError, SystemError) as error:
        raise UsageError(f"cannot write {path}: {error}") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UsageError:
    """What to tell of a file that the system did not take."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    mend = "free some space" if full else "choose a folder you can write to"
    return UsageError(f"cannot write {path}: {error.strerror or error}; {mend}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, whole or not at all; see `write_whole`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))  # type: ignore[arg-type]


def write_grid(path: Path, pixels: Tensor, columns: int | None = None) -> None:
    """Write images side by side as one picture, each enlarged to at least about 48 pixels, with a gap between them.

    Args:
        path: where the picture is to stand; its suffix gives the format.
        pixels: uint8, shape (N, C, H, W), C = 1 or 3, N at least 1.
        columns: images in a row; the square root of N, rounded up, by default.
    """
    count, channels, height, width = pixels.shape
    columns = columns or int((count - 1) ** 0.5) + 1
    factor = max(1, round(48 / max(height, width)))
    height, width = height * factor + GAP, width * factor + GAP
    sheet = Picture.new(
        "L" if channels == 1 else "RGB", (columns * width + GAP, -(-count // columns) * height + GAP), GAP_COLOUR
    )
    for index, image in enumerate(pixels.cpu().permute(0, 2, 3, 1).numpy()):
        tile = Picture.fromarray(image[..., 0] if channels == 1 else image)
        row, column = divmod(index, columns)
        sheet.paste(
            tile.resize((tile.width * factor, tile.height * factor), Picture.Resampling.BICUBIC),
            (column * width + GAP, row * height + GAP),
        )
    write_whole(path, lambda temporary: sheet.save(temporary))


@contextmanager
def run_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Make the folder of a run; if the block fails before the run has written anything, take it away again.

    Args:
        path: the folder; its parents are made.
        overwrite: accept a folder that holds a run; `clear_run` takes the old one away once the new one works.

    Raises:
        UsageError: the folder holds a run or other files, or cannot be written.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        if path.is_dir() and any(path.iterdir()):
            if not (path / MARK).is_file():
                raise UsageError(f"{path} is not empty and holds no run; choose another --output-dir")
            if not overwrite:
                raise UsageError(f"{path} holds a run already; choose another --output-dir, or pass --overwrite")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        for folder in missing:
            _remove_if_empty(folder)
        raise UsageError(f"cannot write to {path}: {error.strerror or error}; choose another --output-dir") from error
    try:
        yield path
    except BaseException:
        for folder in missing:
            _remove_if_empty(folder)
        raise


def clear_run(folder: Path) -> None:
    """Take away the files of a run that stands in the folder; anything else in it is never touched."""
    for part in PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
    for part in ("metrics.jsonl", "evaluation.json", "environment.json", REPORT, MARK):
        (folder / part).unlink(missing_ok=True)
    sweep_run(folder)


def sweep_run(folder: Path) -> None:
    """Take away what a process that was killed has left half-written, and what was found of an earlier generator."""
    for part in ("memorisation.json", "memorisation.png"):
        (folder / part).unlink(missing_ok=True)
    shutil.rmtree(folder / CALIBRATED, ignore_errors=True)
    for place in (folder, *(folder / part for part in PARTS)):
        for path in place.glob(".*"):
            if HALF_WRITTEN.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


def next_run(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, ... that does not exist."""
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
