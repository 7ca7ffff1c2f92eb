"""What the benchmarks of quality share: cells in a work folder, worker processes of one thread, flags, and files."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from gac_plugin.training.files import write_json

HERE = Path(__file__).parent
Task = tuple[Any, ...]
"""A function and its arguments, all of which can be sent to another process."""


class Cells:
    """Results under their names: one JSON file each, so that nothing is computed twice and a stopped run goes on.

    Args:
        work: the folder of the files.
        pool: computes what is missing, in the order of the tasks.
    """

    def __init__(self, work: Path, pool: Executor) -> None:
        self.work = work
        self.pool = pool

    def of(self, tasks: Mapping[str, Task]) -> list[Any]:
        """What each of the tasks gives, a JSON value."""
        files = [self.work / f"{name}.json" for name in tasks]
        waiting = [
            self.pool.submit(_remember, file, *task)
            for file, task in zip(files, tasks.values(), strict=True)
            if not file.exists()
        ]
        for one in waiting:
            one.result()
        return [json.loads(file.read_text()) for file in files]


def _remember(file: Path, compute: Callable[..., Any], *arguments: Any) -> None:
    write_json(file, compute(*arguments))
    print(f"  {file.parent.name}/{file.stem}", flush=True)


def single_threaded() -> None:
    """For a worker: one thread, and no warnings among the lines of results."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def workers(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("spawn"), single_threaded)


def new_parser(doc: str | None, seeds: int, sizes: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The flags that all of these benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for finished cells, kept")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"(default: {seeds})")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of one thread each (default: 2)")
    parser.add_argument("--size", choices=sizes, default="full", help="smoke: tiny, says nothing (default: full)")
    add_out(parser)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where networks are trained."""
    parser.add_argument("--device", default="cpu", help="that networks are trained on, such as cuda (default: cpu)")


def suffix(device: str) -> str:
    """What sets the cells of another device than the CPU apart."""
    return "" if device == "cpu" else f"-{device}"


def name_of(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def place_of(device: str) -> str:
    """What a page tells of where networks were trained."""
    return device if device == "cpu" else f"{name_of(device)} with torch {torch.__version__}"


def add_out(parser: argparse.ArgumentParser) -> None:
    """Where the page, the figures and the plots go."""
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        metavar="FOLDER",
        help="gets the page, results/ and plots/ (default: the folder of this script)",
    )


def write_report(out: Path, name: str, report: Mapping[str, Any], page: str) -> None:
    """NAME.md and results/name.json in the folder."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write_json(out / "results" / f"{name}.json", {**versions, **report})
    (out / f"{name.upper()}.md").write_text(page)
    print(out / f"{name.upper()}.md", flush=True)


def save_plot(out: Path, name: str, figure: Figure) -> None:
    """plots/name.png in the folder."""
    (out / "plots").mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "plots" / f"{name}.png", dpi=120)


def new_figure(rows: int, columns: int, width: float = 6.0, height: float = 4.5) -> tuple[Figure, Any]:
    """A figure and its axes, shape (rows, columns)."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
