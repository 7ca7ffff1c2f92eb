"""What the processes of a run decide together, so that none of them waits for one that has left.

Every function here is called by all processes, in the same order. With one process each is next to free.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import gather

from gac_plugin.errors import SaidElsewhereError, UsageError


def require_one_run() -> None:
    """Refuse processes that were started together and know nothing of each other, or that share networks in parts.

    Raises:
        UsageError: a launcher started several processes and each believes to be alone; or the launcher asks for an
            engine that `train` does not serve.
    """
    state = PartialState()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and state.num_processes == 1:
        raise main_only(
            UsageError(
                f"{started} processes were started and each would train alone into one folder; without GPUs pass --cpu"
            )
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise main_only(
            UsageError(
                "gac train shares whole networks between processes (DDP) and not parts of them (FSDP); launch with "
                "accelerate launch --multi_gpu, or use GAC in a loop of your own"
            )
        )


def everyones(value: int) -> list[int]:
    """The value of each process, in the order of their ranks."""
    state = PartialState()
    if state.num_processes == 1:
        return [value]
    return gather(torch.tensor([value], device=state.device)).tolist()


def everyones_text(text: str) -> list[str]:
    """The text of each process, in the order of their ranks."""
    state = PartialState()
    if state.num_processes == 1:
        return [text]
    letters = text.encode()
    lengths = everyones(len(letters))
    # padded to the length of the longest, which everyone knows by now
    content = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=state.device)
    content[: len(letters)] = torch.tensor(list(letters), dtype=torch.uint8)
    rows = gather(content).reshape(len(lengths), -1).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def from_main(text: str) -> str:
    """The main process's text, in all of them."""
    return everyones_text(text)[0]


@contextmanager
def together() -> Iterator[None]:
    """A user's mistake that one process meets in the block ends it in all of them; the first of those tells it.

    Raises:
        UsageError: the mistake of this process.
        SaidElsewhereError: another process tells it.
    """
    mistake: UsageError | None = None
    try:
        yield
    except UsageError as error:
        mistake = error
    met = everyones(int(mistake is not None))
    if any(met):
        if mistake is not None and met.index(1) == PartialState().process_index:
            raise mistake
        raise SaidElsewhereError("another process met a mistake and tells it") from mistake


def main_only(mistake: UsageError) -> UsageError:
    """Of a mistake that all processes know, what this one is to raise, so that it is told once."""
    return mistake if PartialState().is_main_process else SaidElsewhereError(str(mistake))


def leave(code: int) -> NoReturn:
    """End this process: at once, if it is one of several that a launcher started.

    A thread of torch's gloo lives on after the process group is destroyed, and may still hold what was exchanged last.
    If it lets go of a tensor while Python takes itself apart, the process aborts, and its launcher ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
