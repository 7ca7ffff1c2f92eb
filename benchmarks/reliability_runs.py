"""Runs of the benchmark of reliability: in processes of their own, and what they leave behind."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any

import torch

from gac_plugin.errors import exit_code
from gac_plugin.training import Config, train
from gac_plugin.training.checkpoint import Checkpoint
from gac_plugin.training.packing import pack

TESTS = Path(__file__).parents[1] / "tests"

TINY = Config(
    steps=400,
    lr_schedule="constant",  # some runs are cut short by a smaller number of steps
    batch_size=16,
    latent_size=16,
    width=16,
    log_every=5,
    sample_every=100,
    evaluation_samples=0,
    checkpoint_every=10,
    cpu=True,
)
LANES, MOMENTS = 2, 3
"""Runs at a time, and how often each signal is sent."""
COMPLETE, UNDER_WAY = re.compile(r"step-(\d{7})"), re.compile(r"\.step-\d{7}\.(new|old)")
GOING_ON, SAVED = re.compile(r"going on from .*, step (\d+)$", re.M), re.compile(r"step (\d+) saved; go on")
PATIENCE = 300


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `work`: a folder to work in."""

    work: Path
    kills: int = 200
    corruptions: int = 1000
    seed: int = 0

    def random(self, *case: object) -> Random:
        """Numbers of a case, the same at every run."""
        return Random(" ".join(map(str, (self.seed, *case))))


@dataclass(frozen=True)
class Finding:
    """A line of the table. `figures` are for programs; `failures` are empty where all went as it should."""

    what: str
    count: str
    result: str
    how: str
    figures: dict[str, Any]
    failures: list[str] = field(default_factory=list)


# ---- runs in processes of their own


def processes() -> multiprocessing.context.ForkServerContext:
    """Where processes come from that have imported everything and done nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gac_plugin.training", "gac_plugin.adapters.mlp", "torch._dynamo"])
    return context


class Life:
    """`gac train` in such a process; what it says goes to a file.

    multiprocessing asks all children for their exit codes whenever one starts, and an exit code can be read only once:
    in threads that takes a lock.
    """

    _lock = threading.Lock()

    def __init__(self, config: Config, log: Path) -> None:
        self._process = processes().Process(target=_train_here, args=(config, log))
        with self._lock:
            self._process.start()

    def wait(self, seconds: float) -> int | None:
        """The exit code; None if it is still running after so many seconds."""
        multiprocessing.connection.wait([self._process.sentinel], seconds)
        with self._lock:
            return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        with self._lock:
            self._process.kill()


def _train_here(config: Config, log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    sys.exit(exit_code(lambda: train(config)))


def finish(config: Config) -> tuple[int | None, str]:
    """Run to the end: the exit code, and what was said."""
    log = Path(f"{config.output_dir}.log")
    return Life(config, log).wait(PATIENCE), log.read_text()


def program(config: Config, count: int = 1) -> list[str]:
    """The command line of a run in so many processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m"] if count > 1 else []
    flags = []
    for item in fields(Config):
        value = getattr(config, item.name)
        if value != item.default:
            flag = "--" + item.name.replace("_", "-")
            flags += [flag] if value is True else [flag, str(value)]
    return [sys.executable, "-m", *launcher, "gac_plugin.train", *flags]


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command with one thread, which says what it says to a file; it is dead when the block ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def call(command: list[str], log: Path) -> tuple[int, str]:
    """The exit code of a command, and what it said."""
    with running(command, log) as process:
        code = process.wait(PATIENCE)
    return code, log.read_text()


def signal_at(config: Config, step: int, number: int, count: int = 1) -> tuple[int, str]:
    """Start a run, send it a signal once it has come so far; its exit code, and what it said."""
    log = Path(f"{config.output_dir}.log")
    metrics = Path(config.output_dir or "") / "metrics.jsonl"
    with running(program(config, count), log) as process:
        while process.poll() is None and (not metrics.exists() or last_step(metrics) < step):
            time.sleep(0.002)
        process.send_signal(number)
        code = process.wait(PATIENCE)
    return code, log.read_text()


def last_step(metrics: Path) -> int:
    """The step of the last whole line."""
    lines = metrics.read_text().rpartition("\n")[0].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def still_there(text: str) -> list[int]:
    """Processes with a text in their command line, other than this one."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and text.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return [number for number in found if number != os.getpid()]


# ---- what runs leave behind


def step_folder(step: int) -> str:
    return f"step-{step:07d}"


def complete(run: Path) -> list[int]:
    """Steps of the checkpoints that stand under their final names, in rising order."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(match[1]) for match in map(COMPLETE.fullmatch, names) if match)


def under_way(run: Path) -> set[tuple[str, int, int]]:
    """Checkpoints half written or half removed: names, and what tells them from others of the same name."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(run / "checkpoints"):
            with contextlib.suppress(FileNotFoundError):
                if UNDER_WAY.fullmatch(entry.name):
                    status = entry.stat()
                    found.add((entry.name, status.st_ino, status.st_mtime_ns))
    return found


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves that must repeat: all but its configuration and the clock."""
    newest = run / "checkpoints" / step_folder(complete(run)[-1])
    files = [
        *(path for part in ("generator", "discriminator", "samples") for path in (run / part).iterdir()),
        *(path for path in newest.iterdir() if path.name not in ("facts.json", "manifest.json", "metrics.jsonl")),
    ]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{name: value for name, value in record.items() if name != "seconds"} for record in records]
    return {"metrics": timeless, **{str(path.relative_to(run)): path.read_bytes() for path in files}}


def differences(run: Path, expected: dict[str, Any]) -> list[str]:
    """Names of what a run left that is not as expected, to the last bit."""
    found = outcome(run)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def equal_checkpoints(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints hold the same, to the last bit."""
    (tree_a, tensors_a), (tree_b, tensors_b) = (pack(checkpoint.states, "states") for checkpoint in (a, b))
    same = (a.step, a.facts, a.texts, tree_a) == (b.step, b.facts, b.texts, tree_b)
    return same and all(torch.equal(value, tensors_b[name]) for name, value in tensors_a.items())


def say(text: str) -> None:
    print(text, flush=True)
