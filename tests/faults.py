"""Damage such as disks, interrupted copies and careless hands do to a checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random


def corrupt(folder: Path, random: Random) -> str:
    """Do one random damage to a file of a checkpoint; it never leaves the folder as it was.

    Returns:
        What was done, to name the case in a report.
    """
    path = random.choice(sorted(file for file in folder.iterdir() if file.is_file() and file.stat().st_size))
    return f"{path.name}: {random.choice(DAMAGES)(path, random)}"


def truncate(path: Path, random: Random) -> str:
    data = path.read_bytes()
    length = random.randrange(len(data))
    path.write_bytes(data[:length])
    return f"{length} of {len(data)} bytes left"


def flip(path: Path, random: Random) -> str:
    data = bytearray(path.read_bytes())
    bit = random.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} flipped"


def delete(path: Path, random: Random) -> str:
    path.unlink()
    return "deleted"


def swap(path: Path, random: Random) -> str:
    data = path.read_bytes()
    others = [file for file in sorted(path.parent.iterdir()) if file.is_file() and file.read_bytes() != data]
    other = random.choice(others)
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"swapped with {other.name}"


def zero(path: Path, random: Random) -> str:
    path.write_bytes(bytes(path.stat().st_size))
    return "zeros alone"


def replace_by_folder(path: Path, random: Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder instead"


def append(path: Path, random: Random) -> str:
    added = random.randbytes(random.randint(1, 64))
    with path.open("ab") as file:
        file.write(added)
    return f"{len(added)} bytes appended"


def dangle(path: Path, random: Random) -> str:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")
    return "a link to nowhere instead"


def link_elsewhere(path: Path, random: Random) -> str:
    elsewhere = path.parent.parent / f"moved-{random.randrange(10**9)}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    return "moved away, a link instead"


def plant(path: Path, random: Random) -> str:
    other = path.with_name(f"extra-{path.name}")
    other.write_bytes(path.read_bytes())
    return f"copied to {other.name}, which no manifest names"


DAMAGES: tuple[Callable[[Path, Random], str], ...] = (
    truncate,
    flip,
    delete,
    swap,
    zero,
    replace_by_folder,
    append,
    dangle,
    link_elsewhere,
    plant,
)
