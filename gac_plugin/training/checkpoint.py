"""Checkpoints: safetensors and JSON, nothing pickled; whole or absent on the disk; verified before a byte is used.

step-0000500/  NAME.safetensors  NAME.json  (both for each part)  facts.json  texts  manifest.json

The manifest holds the size and SHA-256 of every other file, and a digest of itself.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from safetensors.torch import load
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training.packing import Stage, pack, unpack

FORMAT = 1
MANIFEST, FACTS = "manifest.json", "facts.json"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
STEP_NAME = re.compile(r"step-([0-9]{7,})")
LEFT_OVER = re.compile(r"\.step-[0-9]{7,}\.(new|old)")


class Stateful(Protocol):
    """What a checkpoint keeps the state of: a module, an optimizer, a scheduler, a gradient scaler, `GAC`."""

    def state_dict(self) -> Any:
        """Dicts, lists, tuples, tensors and scalars, nested."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Continue from a `state_dict`."""
        ...


class DamagedCheckpoint(UsageError):  # noqa: N818
    """A checkpoint that cannot be trusted; the message says which, and what is wrong with which file."""


class Checkpoints:
    """Writes checkpoints into a folder, in the background; for one process, the main one.

    Each is written under another name, brought to the disk and renamed, so that a kill at any moment leaves the others
    as they are. It writes in a thread of its own, which the interpreter waits for when it exits.

    Args:
        folder: made at the first save. What a killed process left half-written in it is removed.
        keep: how many of the newest stay.

    Raises:
        UsageError: `keep` is below 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise UsageError(f"keep at least one checkpoint, got {keep}")
        self.folder, self.keep = folder, keep
        self._stages: dict[str, Stage] = {}
        self._thread: Thread | None = None
        self._error: Exception | None = None
        for name in _names(folder):
            if LEFT_OVER.fullmatch(name):
                _remove(folder / name)

    def save(
        self,
        step: int,
        parts: Mapping[str, Stateful],
        facts: Mapping[str, Any],
        texts: Mapping[str, str] = {},
        keep_also: Collection[int] = (),
    ) -> None:
        """Copy the state as it is now and return; the rest happens in the background.

        Waits for the write before it, if that is still under way.

        Args:
            step: names the checkpoint; one of the same step is replaced.
            parts: their states are kept, under names that suit a file.
            facts: numbers, strings, lists, dicts: anything but tensors.
            texts: contents of more files, by file name.
            keep_also: steps whose checkpoints stay, besides the newest.

        Raises:
            UsageError: a state or a name cannot be written; or the write before this one failed.
        """
        self.wait()
        _require_names([*_part_files(parts), FACTS, MANIFEST, *texts])
        packed_facts, misplaced = pack(dict(facts), "facts")
        if misplaced:
            raise UsageError(f"the facts of a checkpoint hold the tensor {next(iter(misplaced))!r}; make it a part")
        trees: dict[str, Any] = {}
        views: list[Tensor] = []
        tensors: list[Tensor] = []
        for name, part in parts.items():
            trees[name], found = pack(part.state_dict(), name)
            if name not in self._stages or not self._stages[name].fits(found):
                self._stages[name] = Stage(found)
            views += self._stages[name].views
            tensors += found.values()
        _copy(views, tensors)
        arguments = step, trees, packed_facts, dict(texts), frozenset(keep_also)
        self._thread = Thread(target=self._run, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return once the write under way is on the disk.

        Raises:
            UsageError: it could not be written. It is told once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def forget_after(self, step: int) -> None:
        """Take away the checkpoints of later steps, which a run that goes on from `step` will make again."""
        for found in _steps(self.folder):
            if found > step:
                self._discard(found)

    def check(self) -> None:
        """Raise what a write that has ended went wrong with, without waiting for one under way; see `wait`."""
        if self._error is not None:
            self.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the error of the block is the one to tell
            self._thread.join()

    def _run(self, step: int, *content: Any) -> None:
        try:
            self._write(step, *content)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            self._error = UsageError(
                f"cannot write the checkpoint {self.folder / _folder_name(step)}: {error.strerror or error}; "
                f"{'free some space' if full else 'make its folder writable'}, then go on with --resume auto"
            )
            self._error.__cause__ = error
        except Exception as error:
            self._error = error

    def _write(
        self, step: int, trees: dict[str, Any], facts: Any, texts: dict[str, str], keep_also: frozenset[int]
    ) -> None:
        final = self.folder / _folder_name(step)
        temporary, old = self.folder / f".{final.name}.new", self.folder / f".{final.name}.old"
        try:
            _remove(temporary)
            temporary.mkdir(parents=True)
            entries = {
                name: _write_file(temporary / name, *pieces) for name, pieces in self._files(trees, facts, texts)
            }
            manifest = {"format": FORMAT, "step": step, "parts": [*trees], "files": entries}
            _write_file(temporary / MANIFEST, _canonical({**manifest, "digest": _digest(manifest)}))
            _sync_folder(temporary)
            _retire(final, old)
            temporary.rename(final)
            _sync_folder(self.folder)
            _remove(old)
        finally:
            _remove(temporary)
        self._prune(step, keep_also)

    def _files(
        self, trees: dict[str, Any], facts: Any, texts: dict[str, str]
    ) -> Iterator[tuple[str, tuple[bytes | memoryview, ...]]]:
        for name, tree in trees.items():
            weights, rest = _part_files([name])
            stage = self._stages[name]
            yield weights, (stage.header, stage.data.numpy().data)
            yield rest, (_json(tree),)
        yield FACTS, (_json(facts),)
        for name, text in texts.items():
            yield name, (text.encode(errors="surrogatepass"),)

    def _prune(self, step: int, keep_also: frozenset[int]) -> None:
        # later ones, which a run that went back has yet to overtake, neither count nor go
        steps = [found for found in _steps(self.folder) if found <= step]
        for found in steps[self.keep :]:
            if found not in keep_also:
                self._discard(found)

    def _discard(self, step: int) -> None:
        name = _folder_name(step)
        _retire(self.folder / name, self.folder / f".{name}.old")
        _remove(self.folder / f".{name}.old")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified; nothing is restored yet.

    Attributes:
        folder: where it stands.
        step: of the run.
        facts, texts: as they were saved.
        states: what `state_dict` of each part gave, its tensors on the CPU.
    """

    folder: Path
    step: int
    facts: dict[str, Any]
    texts: dict[str, str]
    states: dict[str, Any]

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Load the states into the parts.

        Raises:
            UsageError: the checkpoint has not just these parts, and nothing was changed; or a state does not fit.
        """
        if parts.keys() != self.states.keys():
            raise UsageError(
                f"the checkpoint {self.folder} holds {', '.join(sorted(self.states))}, and the run has "
                f"{', '.join(sorted(parts))}; resume with the settings of the run that wrote it"
            )
        for name, part in parts.items():
            try:
                part.load_state_dict(deepcopy(self.states[name]))  # a part may go on working in what it is given
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
                raise UsageError(
                    f"the state of {name!r} in the checkpoint {self.folder} does not fit: {reason}; resume with the "
                    "settings of the run that wrote it"
                ) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, verifying the bytes of every file before anything is made of them.

    Raises:
        DamagedCheckpoint: a file is missing or differs from what was written; the folder's name tells another step; or
            a newer version wrote it.
    """
    manifest = _read_manifest(folder)
    files = {}
    for name, entry in manifest["files"].items():
        files[name] = data = _read(folder, name, entry["size"])
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise _damaged(folder, f"{name} does not hold what was written")
    states = {}
    for part in manifest["parts"]:
        weights, rest = _part_files([part])
        states[part] = _parse(folder, rest, files.pop(rest), files.pop(weights))
    facts = _parse(folder, FACTS, files.pop(FACTS))
    texts = {name: data.decode(errors="surrogatepass") for name, data in files.items()}
    return Checkpoint(folder, manifest["step"], facts, texts, states)


def newest_intact(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a folder that can be trusted, or None where there is none at all.

    Args:
        folder: of `Checkpoints`; it need not exist.
        say: told of each damaged one, in one line.

    Raises:
        UsageError: there are checkpoints, and all are damaged.
    """
    steps = _steps(folder)
    for step in steps:
        try:
            return read_checkpoint(folder / _folder_name(step))
        except DamagedCheckpoint as error:
            say(f"{error}; looking for an older one")
    if steps:
        raise UsageError(
            f"no checkpoint in {folder} is intact; choose another --output-dir, or pass --overwrite to begin again"
        )
    return None


def _folder_name(step: int) -> str:
    return f"step-{step:07d}"


def _part_files(parts: Collection[str]) -> list[str]:
    return [f"{part}{suffix}" for part in parts for suffix in (".safetensors", ".json")]


def _require_names(names: list[str]) -> None:
    for name in names:
        if not PLAIN_NAME.fullmatch(name) or names.count(name) > 1:
            raise UsageError(f"a checkpoint cannot hold the file {name!r}: choose a plain name that is not taken")


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}; choose another --output-dir") from error


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, the newest first."""
    found = (STEP_NAME.fullmatch(name) for name in _names(folder))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _copy(views: list[Tensor], tensors: list[Tensor]) -> None:
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    if tensors:
        torch._foreach_copy_(views, tensors, non_blocking=bool(devices))
    for device in devices:
        torch.cuda.current_stream(device).synchronize()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(manifest)).hexdigest()


def _write_file(path: Path, *pieces: bytes | memoryview) -> dict[str, Any]:
    """Bring bytes to the disk; their entry in the manifest."""
    checksum = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            checksum.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": sum(map(len, pieces)), "sha256": checksum.hexdigest()}


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _retire(path: Path, old: Path) -> None:
    """Give what stands there, if anything, a name that is no checkpoint's, so that one half removed never shows."""
    _remove(old)
    if os.path.lexists(path):
        path.rename(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _damaged(folder: Path, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"the checkpoint {folder} is damaged: {what}")


def _read(folder: Path, name: str, size: int | None = None) -> bytes:
    path = folder / name
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise _damaged(folder, f"{name} is not a file")
        if size not in (None, found.st_size):
            raise _damaged(folder, f"{name} has {found.st_size} bytes instead of {size}")
        return path.read_bytes()
    except OSError as error:
        raise _damaged(folder, f"{name} cannot be read: {error.strerror or error}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    data = _read(folder, MANIFEST)
    try:
        manifest = json.loads(data)
        newer = manifest["format"] > FORMAT
        intact = data == _canonical(manifest)  # white space counts too
        intact = intact and manifest.pop("digest") == _digest(manifest)
        intact = intact and (newer or _well_formed(manifest))
    except Exception as error:  # anything may stand there
        raise _damaged(folder, f"{MANIFEST} is not a manifest") from error
    if not intact:
        raise _damaged(folder, f"{MANIFEST} does not hold what was written")
    if newer:
        raise DamagedCheckpoint(
            f"the checkpoint {folder} has format {manifest['format']}, and this gac-plugin reads up to {FORMAT}; "
            "install a newer one"
        )
    if folder.resolve().name != _folder_name(manifest["step"]):
        raise _damaged(folder, f"{MANIFEST} is that of step {manifest['step']}")
    return manifest


def _well_formed(manifest: dict[str, Any]) -> bool:
    files, parts = manifest["files"], manifest["parts"]
    expected = [*_part_files(parts), FACTS]
    return (
        manifest["format"] == FORMAT
        and type(manifest["step"]) is int
        and all(PLAIN_NAME.fullmatch(name) and type(entry["size"]) is int for name, entry in files.items())
        and all(isinstance(entry["sha256"], str) for entry in files.values())
        and len(set(expected)) == len(expected)
        and files.keys() >= set(expected)
    )


def _parse(folder: Path, name: str, text: bytes, weights: bytes | None = None) -> Any:
    try:
        return unpack(json.loads(text), {} if weights is None else load(weights))
    except Exception as error:  # it is what was written, but not by `save`
        raise _damaged(folder, f"{name} does not hold a state") from error
