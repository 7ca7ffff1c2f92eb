"""How fast do samples come, and does training ever wait for them?

    python benchmarks/data.py MNIST_FOLDER CIFAR_FOLDER                  writes results/data.json and DATA.md
    python benchmarks/data.py MNIST_FOLDER CIFAR_FOLDER --only feeds     the same, measuring one section anew

Every feed in `FEEDS` gives endless shuffled float batches of a folder in Hub layout; a new one is a line there. Each
measurement is a process of its own; the feeds take turns within a round. For Linux.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from datasets import load_dataset
from torch import Tensor
from torch.utils.data import DataLoader

from gac_plugin.training import Config, loop, train
from gac_plugin.training.data import load_data
from gac_plugin.training.data.feed import Feed

HERE = Path(__file__).parent
COMMAND = "python benchmarks/data.py MNIST_FOLDER CIFAR_FOLDER"
BATCH, WARM_UP, SECONDS = 64, 5, 1.0
THREADS = 1
"""Of torch: two that share their cores with anything else wait for each other at every operation."""
PREPARED = 5_000
"""Rows that are prepared for the feeds of other columns, which take long to make."""
WORDS = {1: "one CPU core", 2: "two CPU cores", 4: "four CPU cores", 8: "eight CPU cores"}
Batches = Iterator[Tensor]


# ---- feeds: folder -> float batches in [-1, 1], shape (64, C, H, W)


def ours(folder: str, **settings: Any) -> Batches:
    """What `gac train` does."""
    config = Config(dataset=folder, batch_size=BATCH, cpu=True, **settings)
    stream = Feed(config, load_data(config), 0, 1, torch.device("cpu")).batches()
    return (samples for samples, _ in stream)


def transformed(folder: str, workers: int) -> Batches:
    """`set_transform` with one picture after the other to a float tensor, as in many a tutorial."""
    column, rows = images(folder)

    def to_float(batch: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
        return {"pixels": [channels_first(np.asarray(picture)).float() / 127.5 - 1 for picture in batch[column]]}

    rows.set_transform(to_float)
    return (batch["pixels"] for batch in endless(rows, workers))


def formatted(folder: str, workers: int) -> Batches:
    """`with_format("torch")`, and the batch to float."""
    column, rows = images(folder)
    return (batch[column].float() / 127.5 - 1 for batch in endless(rows.with_format("torch"), workers))


def array_column(folder: str) -> Batches:
    """The pixels in an `Array3D` column."""
    pixels = decoded(folder)
    features = datasets.Features({"pixels": datasets.Array3D(pixels.shape[1:], "uint8")})
    rows = datasets.Dataset.from_dict({"pixels": pixels}, features=features).with_format("torch", dtype=torch.uint8)
    return (batch["pixels"].float() / 127.5 - 1 for batch in endless(rows, 0))


def bytes_column(folder: str) -> Batches:
    """The pixels in a column of bytes, read a batch at a time."""
    pixels = decoded(folder)
    rows = datasets.Dataset.from_dict({"pixels": [image.tobytes() for image in pixels]})

    def collate(cells: dict[str, list[bytes]]) -> Tensor:
        batch = torch.frombuffer(bytearray(b"".join(cells["pixels"])), dtype=torch.uint8)
        return batch.reshape(-1, *pixels.shape[1:]).float() / 127.5 - 1

    while True:
        order = torch.randperm(len(rows))
        for first in range(0, len(rows) - BATCH + 1, BATCH):
            yield collate(rows[order[first : first + BATCH].tolist()])


def images(folder: str) -> tuple[str, datasets.Dataset]:
    """The training split with its column of images alone, and the column's name."""
    rows = load_dataset(folder)["train"]
    (column,) = (name for name, feature in rows.features.items() if isinstance(feature, datasets.Image))
    return column, rows.select_columns(column)


def decoded(folder: str) -> np.ndarray:
    """The first rows of the training split: uint8, shape (N, C, H, W)."""
    column, rows = images(folder)
    return np.stack([channels_first(np.asarray(row[column])).numpy() for row in rows.select(range(PREPARED))])


def channels_first(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def endless(rows: datasets.Dataset, workers: int) -> Iterator[Any]:
    while True:
        yield from DataLoader(
            rows, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )


@dataclass(frozen=True)
class Contender:
    """A line of the tables. `loop`: whether the training loop is measured with it as well."""

    open: Callable[[str], Batches]
    loop: bool = True


FEEDS: Mapping[str, Contender] = {
    "ours, decoded once into memory (default)": Contender(ours),
    "ours, decoded once into a mapped file (`--memory 0`)": Contender(partial(ours, memory=0.0)),
    "ours, decoded as needed (`--workers 2`)": Contender(partial(ours, workers=2)),
    "ours, read as needed (`--streaming`)": Contender(partial(ours, streaming=True)),
    "`set_transform` + DataLoader": Contender(partial(transformed, workers=0)),
    "`set_transform` + DataLoader, 2 workers": Contender(partial(transformed, workers=2)),
    '`with_format("torch")` + DataLoader': Contender(partial(formatted, workers=0), loop=False),
    '`with_format("torch")` + DataLoader, 2 workers': Contender(partial(formatted, workers=2), loop=False),
    "`Array3D` column + DataLoader": Contender(array_column, loop=False),
    "column of bytes, a batch at a time": Contender(bytes_column, loop=False),
}


# ---- measurements, each in a process of its own


def feed_rate(feed: str, folder: str) -> dict[str, float]:
    """Rows per second, seconds to the first batch, and megabytes that this process grew by at its largest."""
    before, began = memory("VmRSS"), time.perf_counter()
    stream = FEEDS[feed].open(folder)
    next(stream)
    first = time.perf_counter() - began
    for _ in islice(stream, WARM_UP):
        pass
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < SECONDS:
        next(stream)
        count += 1
    found = {
        "rows per second": count * BATCH / seconds,
        "seconds to the first batch": first,
        "MB at most": memory("VmHWM") - before,
        "MB of them in files": memory("RssFile"),
    }
    del stream
    return found | {"MB in each worker at most": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3}


def memory(what: str) -> float:
    """Megabytes of this process, by a name of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) / 1e3
    raise KeyError(what)


def loop_wait(feed: str, folder: str, steps: int) -> dict[str, float]:
    """Seconds of a step of `gac train`, and of it those in which it waits for the batch; without the first steps."""
    waits, ends = [], []

    class Timed(Feed):
        def batches(self) -> Iterator[tuple[Tensor, None]]:
            stream = FEEDS[feed].open(folder)
            while True:
                began = time.perf_counter()
                batch = next(stream)
                ends.append(time.perf_counter())
                waits.append(ends[-1] - began)
                yield batch, None

    with tempfile.TemporaryDirectory() as output:
        # the run's own images, which it never reads, are in a file from an earlier run
        settings = {"steps": steps, "evaluation_samples": 0, "checkpoint_every": 0, "log_every": steps, "memory": 0.0}
        settings["metric"] = "adam"  # the quicker step, which waits the larger share
        with mock.patch.object(loop, "Feed", Timed):
            train(Config(dataset=folder, output_dir=f"{output}/run", cpu=True, **settings))
    skipped = steps // 10
    step = (ends[-1] - ends[skipped]) / (len(ends) - 1 - skipped)
    wait = statistics.mean(waits[skipped + 1 :])
    return {"step": step, "wait": wait, "share": wait / step}


def _here(measure: Callable[..., dict[str, float]], cache: str, answer: Any, arguments: tuple[Any, ...]) -> None:
    set_start_method("fork", force=True)  # for the workers of loaders, as it is where nothing was said
    torch.set_num_threads(THREADS)
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    datasets.disable_progress_bars()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    answer.send(measure(*arguments))


def alone(measure: Callable[..., dict[str, float]], cache: Path, *arguments: Any) -> dict[str, float]:
    """Measure in a process that has imported everything and done nothing yet."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["gac_plugin.training", "gac_plugin.adapters.mlp", "gac_plugin.adapters.dcgan"])
    ours_end, theirs = context.Pipe()
    process = context.Process(target=_here, args=(measure, str(cache), theirs, arguments))
    process.start()
    theirs.close()
    try:
        return ours_end.recv()
    finally:
        process.join()


def medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Median of each figure, and all rounds of the first."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]} | {"rounds": rounds}


def in_turn(
    names: list[str], rounds: int, measure: Callable[..., dict[str, float]], *arguments: Any
) -> dict[str, dict[str, Any]]:
    """Measure every name once a round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            found[name].append(measure(name, *arguments))
            told = ", ".join(f"{what} {value:,.5g}" for what, value in found[name][-1].items())
            print(f"  round {number + 1}, {name}: {told}", flush=True)
    return {name: medians(taken) for name, taken in found.items()}


# ---- the page


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{WORDS.get(cores, f'{cores} CPU cores')}, torch {torch.__version__} in one thread"


def spread(result: Mapping[str, Any], name: str, form: Callable[[float], str]) -> str:
    """The median, and the smallest and largest round."""
    values = [one[name] for one in result["rounds"]]
    return f"{form(result[name])} ({form(min(values))} to {form(max(values))})"


def page(report: Mapping[str, Any]) -> str:
    """DATA.md."""
    lines = [
        "# Does training wait for its data?",
        "",
        "```bash",
        COMMAND,
        "```",
        "",
        f"{report['machine']}; {report['rounds']} rounds, in each of which the feeds took turns, every measurement a "
        "process of its own; medians, and in brackets the smallest and the largest round. The machine's load when a "
        f"section began was {' and '.join(f'{load:.1f}' for load in report['load'].values())} (0: nothing else ran). "
        f"Batches of {BATCH}, shuffled, float32. MNIST is in PNG files, and CIFAR-10 a copy in JPEG files.",
        "",
    ]
    for title, results in report["feeds"].items():
        lines += [
            f"## {title}",
            "",
            "| feed | rows per second | seconds to the first batch | MB at most | in each worker |",
            "|---|---|---|---|---|",
        ]
        for name, result in results.items():
            workers = result["MB in each worker at most"]
            lines.append(
                f"| {name} | {spread(result, 'rows per second', '{:,.0f}'.format)} | "
                f"{result['seconds to the first batch']:.2f} | "
                f"{result['MB at most']:,.0f}, {result['MB of them in files']:,.0f} of them in files | "
                f"{f'{workers:,.0f}' if workers else ''} |"
            )
        lines.append("")
    lines += [
        "Memory is what the process grew by at its largest, after everything was imported. Pages of files are counted; "
        "the system drops them when others want the memory. The time to the first batch is without the imports; the "
        "data set's Arrow files, and for the mapped file the pixels, were in the cache from an earlier run. The last "
        f"two feeds hold the first {PREPARED:,} rows, decoded for them beforehand, which is in their time. A worker's "
        "figure is its whole size, most of which it shares with the process that it came from.",
        "",
        "## In the training loop",
        "",
        "`gac train` with its default recipe but metric `adam`, MNIST with `mlp`, CIFAR-10 with `dcgan`. The wait is "
        "the time in which the loop asks for its next batch, the step all of the time from one batch to the next. What "
        "reads beside the loop, a stream's thread or workers, takes processor time from the step, which the wait does "
        "not show: compare the steps as well.",
        "",
        "| recipe | feed | step, ms | wait, ms | wait / step |",
        "|---|---|---|---|---|",
    ]
    for title, results in report["waits"].items():
        for name, result in results.items():
            lines.append(
                f"| {title} | {name} | {1e3 * result['step']:.2f} | {1e3 * result['wait']:.3f} | "
                f"{spread(result, 'share', '{:.1%}'.format)} |"
            )
    return "\n".join(lines) + "\n"


def feeds(mnist: str, cifar: str, rounds: int, cache: Path) -> dict[str, Any]:
    """Every feed by itself."""
    found = {}
    for title, folder in {"MNIST, 28x28": mnist, "CIFAR-10, 32x32x3": cifar}.items():
        print(title, flush=True)
        for feed in list(FEEDS)[:2]:  # an earlier run, which leaves Arrow files and pixels in the cache
            alone(feed_rate, cache, feed, folder)
        found[title] = in_turn(list(FEEDS), rounds, partial(alone, feed_rate, cache), folder)
    return found


def waits(mnist: str, cifar: str, rounds: int, cache: Path) -> dict[str, Any]:
    """Feeds in the training loop."""
    names, found = [name for name, feed in FEEDS.items() if feed.loop], {}
    for title, folder, steps in (("MNIST, mlp", mnist, 200), ("CIFAR-10, dcgan", cifar, 6)):
        print(title, flush=True)
        found[title] = in_turn(names, rounds, partial(alone, loop_wait, cache), folder, steps)
    return found


SECTIONS = {section.__name__: section for section in (feeds, waits)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("mnist", metavar="MNIST_FOLDER", help="MNIST in Hub layout")
    parser.add_argument("cifar", metavar="CIFAR_FOLDER", help="CIFAR-10 in Hub layout")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--only", choices=SECTIONS, help="keep the figures of the other section")
    arguments = parser.parse_args()
    file = HERE / "results" / "data.json"
    report: dict[str, Any] = {}
    for name in [arguments.only] if arguments.only else SECTIONS:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as work:
            found = SECTIONS[name](arguments.mnist, arguments.cifar, arguments.rounds, Path(work))
        report = json.loads(file.read_text()) if file.exists() else {}
        report |= {
            "command": COMMAND,
            "machine": machine(),
            "rounds": arguments.rounds,
            "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, datasets)}},
            "load": report.get("load", {}) | {name: load},
            name: found,
        }
        file.write_text(json.dumps(report, indent=2) + "\n")
    if SECTIONS.keys() <= report.keys():
        (HERE / "DATA.md").write_text(page(report))


if __name__ == "__main__":
    main()
