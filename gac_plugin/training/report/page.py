"""The report of a run, or of several side by side: one HTML file that holds everything and asks nobody for anything.

It stays small: at most `STAGES` steps are shown along training, a picture that is large is made smaller, and sounds and
texts are cut; the page says where that is so.
"""

import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from gac_plugin import __version__
from gac_plugin.errors import UsageError
from gac_plugin.training.config import Config
from gac_plugin.training.files import COMPARISON, REPORT, write_whole
from gac_plugin.training.judging.measures import MEASURES
from gac_plugin.training.report.charts import draw_charts, number, thinned
from gac_plugin.training.report.run import LATELY, STAGES, Told, read_run

FLAG = re.compile(r"--[a-z][\w-]*")
SAID = {"None": "none", "True": "on", "False": "off"}
"""How settings are read out."""
MOST_RUNS = 6
"""Runs in one page; each has its colour and its dashes."""
PAGES = (".html", ".htm")
FEWEST_STAGES = 4
"""Of each run, however many there are."""
EVERY = 30
"""Seconds from one refresh to the next, at least."""
SHARE = 0.01
"""Of the time of training that refreshing takes, at most."""
RELOAD = 60
"""Seconds after which the page of a run that goes on loads itself again, unless it has been as it is for `LATELY`."""
EXPLAINED = {
    "frechet": "how far apart generated and real samples are, as normal distributions of features; lower is better",
    "kernel": "the same without the assumption of normal distributions; lower is better, below 0 by chance",
    "precision": "share of generated samples near a real one: do single samples look real?",
    "recall": "share of real samples near a generated one: how much of the data is reached?",
    "density": "as precision, and 1 where generated samples lie as densely as real ones",
    "coverage": "as recall, share of real samples with a generated one near",
    "recognised": "share of samples that a classifier takes for the class that was asked for",
    "uniqueness": "share of different texts among the generated ones",
    "novelty": "share of those that are no training sample",
    "js_bigrams": "Jensen-Shannon distance of the pairs of letters from those of held-out texts; lower is better",
    "js_trigrams": "the same of three letters in a row",
    "d_gap": "D's mean logit on training samples minus on held-out ones; far above 0, D knows its samples by heart",
}
TITLES = {name: one.title for name, one in MEASURES.items()} | {"d_gap": "D's gap"}
FLOOR = "_floor"
"""End of the name of a codec's figure that is the floor of another one."""
APART = (
    *("features", "split", "floor", "floors", "real_samples", "generated_samples", "recognised_real"),
    *("intervals", "interval_method", "resamples"),
)
"""What stands in an evaluation beside the figures."""
WAY = ("features", "real_samples", "generated_samples")
"""What must be the same for figures to compare."""


def write_reports(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write `report.html` into each run, and of several a comparison, `comparison.html`, into the first one.

    Args:
        folders: of the runs, `MOST_RUNS` at most.
        out: the one file to write instead: the report of a single run, or the comparison.

    Returns:
        The files that were written, the comparison last.

    Raises:
        UsageError: a folder holds no run, there are too many, or a file cannot be written.
    """
    if len(folders) > MOST_RUNS:
        raise UsageError(f"at most {MOST_RUNS} runs stand side by side, got {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("a run is named twice; name each one once")
    if out is not None and out.suffix.lower() not in PAGES:
        raise UsageError(f"--out must end in one of {', '.join(PAGES)}; got {str(out)!r}")
    runs = [read_run(folder) for folder in folders]
    pages = {run.folder / REPORT: [run] for run in runs} if out is None else {}
    if len(runs) > 1:
        each = max(FEWEST_STAGES, STAGES // len(runs))
        pages[out or folders[0] / COMPARISON] = _apart([replace(run, stages=thinned(run.stages, each)) for run in runs])
    elif out is not None:
        pages[out] = runs
    for path, told in pages.items():
        _write(path, told)
    return list(pages)


class LiveReport:
    """Keeps the report of a run up to date while it trains, for a small share of the time.

    A report that cannot be written is told, and is no reason for a run to end.

    Args:
        folder: of the run.
        say: told of what went wrong, in one line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self._due = time.monotonic() + EVERY

    def refresh(self) -> None:
        """Write it again if the last time is long enough ago."""
        start = time.monotonic()
        if start >= self._due:
            self._attempt(running=True)
            end = time.monotonic()
            self._due = end + max(EVERY, (end - start) / SHARE)

    def close(self) -> None:
        """Write it for the last time, with the maps."""
        self._attempt(running=False)

    def _attempt(self, running: bool) -> None:
        try:
            _write(self.folder / REPORT, [read_run(self.folder, running)])
        except Exception as error:
            self.say(f"no report: {' '.join(str(error).split()) or type(error).__name__}")


def train_command(settings: dict[str, Any]) -> str:
    """The call of `gac train` that gives these settings, as a shell takes it."""
    words = ["gac", "train"]
    for item in fields(Config):
        value, flag = settings.get(item.name, item.default), item.name.replace("_", "-")
        if value == item.default or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif str(value).startswith("-"):
            words.append(f"--{flag}={value}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def _write(path: Path, runs: Sequence[Told]) -> None:
    page = _page(runs)
    write_whole(path, lambda temporary: temporary.write_bytes(page.encode("utf-8", "replace")))  # type: ignore[arg-type]


@cache
def _template() -> Template:
    page = PackageLoader("gac_plugin.training.report", ".")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=page, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "sentence": _sentence, "quoted": _quoted}
    environment.filters |= {"glance": _glance, "command": train_command}
    return environment.get_template("page.html.jinja")


def _page(runs: Sequence[Told]) -> str:
    return _template().render(
        runs=runs,
        charts=draw_charts({run.name: run.records for run in runs}, runs[0].marks if len(runs) == 1 else ()),
        evaluation=_evaluation(runs),
        settings=_settings(runs),
        steps=sorted({stage.step for run in runs for stage in run.stages}),
        running=any(run.running for run in runs),
        reload=RELOAD,
        lately=LATELY,
        until=round(time.time()) + LATELY,
        nothing=number(None),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )


def _apart(runs: list[Told]) -> list[Told]:
    """Runs of the same name are told apart by their folders."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs


def _glance(run: Told) -> list[tuple[str, str, str]]:
    """What a run came to: what, how much, and what to make of it."""
    seconds = run.records[-1].get("seconds") if run.records else None
    return [
        ("steps", number(run.step), f"of {number(run.settings['steps'])}; {_state(run)}"),
        ("time of training", _duration(seconds), ""),
        (TITLES["frechet"], *_frechet(run)),
        ("copies of training samples", *_copies(run)),
        ("findings", str(len(run.findings)), "" if run.findings else "; ".join(run.remarks)),
    ]


def _state(run: Told) -> str:
    if run.running:
        return "running"
    if not run.finished:
        return "not finished"
    wanted = run.settings["steps"]
    return "ended before its last step" if isinstance(wanted, int) and run.step < wanted else "finished"


def _frechet(run: Told) -> tuple[str, str]:
    along = [record for record in run.records if "frechet" in record]
    if "frechet" in run.evaluation:
        floor = number(run.evaluation.get("floor"))
        note = f"floor {floor}: what two halves of the real samples give, as good as it gets"
        return number(run.evaluation["frechet"]), note
    return (number(along[-1]["frechet"]), f"at step {along[-1]['step']:,}") if along else ("not measured", "")


def _copies(run: Told) -> tuple[str, str]:
    if not run.memorisation:
        return "not examined", "gac evaluate does it"
    return "found" if run.memorisation.get("memorises") else "no sign", "see nearest training samples"


def _evaluation(runs: Sequence[Told]) -> dict[str, Any]:
    """The table of figures: for each one its title, meaning, and for each run value, interval and floor."""
    named = dict.fromkeys(name for run in runs for name in run.evaluation if name not in APART)
    named = {name: None for name in named if name.removesuffix(FLOOR) == name or name.removesuffix(FLOOR) not in named}
    order = [*filter(named.__contains__, EXPLAINED), *(name for name in named if name not in EXPLAINED)]
    rows = [
        (
            TITLES.get(name, name.replace("_", " ")),
            EXPLAINED.get(name, ""),
            [_measured(run.evaluation, name) for run in runs],
        )
        for name in order
    ]
    ways = {tuple(str(run.evaluation.get(key)) for key in WAY) for run in runs if run.evaluation}
    sure = any(interval for _, _, cells in rows for _, interval, _ in cells)
    return {"rows": rows, "comparable": len(ways) < 2, "sure": sure}


def _measured(evaluation: dict[str, Any], name: str) -> tuple[str, str, str]:
    """Value, interval and floor of a figure, as text."""
    floors, intervals = (
        found if isinstance(found := evaluation.get(key), dict) else {} for key in ("floors", "intervals")
    )
    known = {"frechet": evaluation.get("floor"), "recognised": evaluation.get("recognised_real"), **floors}
    known.setdefault(name, evaluation.get(f"{name}{FLOOR}"))
    edges = intervals.get(name)
    interval = " to ".join(map(number, edges)) if isinstance(edges, list) else ""
    return number(evaluation.get(name)), interval, number(known.get(name))


def _settings(runs: Sequence[Told]) -> dict[str, list[tuple[str, list[str], str, str]]]:
    """Rows of a table of settings: flag, value in each run, default, meaning; those to look at first, and all."""
    rows, first = [], []
    for item in fields(Config):
        if item.name not in runs[0].settings:
            continue
        values = [run.settings.get(item.name, item.default) for run in runs]
        *shown, usual = [SAID.get(str(value), str(value)) for value in (*values, item.default)]
        rows.append((f"--{item.name.replace('_', '-')}", shown, usual, item.metadata["help"]))
        differs = len(set(shown)) > 1 if len(runs) > 1 else shown[0] != usual
        if differs:
            first.append(rows[-1])
    return {"first": first, "all": rows}


def _sentence(text: Any) -> Markup:
    """With a capital letter, and flags that are not broken in two."""
    return Markup(FLAG.sub(r"<code>\g<0></code>", str(escape(str(text)[:1].upper() + str(text)[1:]))))


def _quoted(folder: Path) -> str:
    """As a shell takes it, and `gac` not for a flag."""
    return shlex.quote(f"./{folder}" if str(folder).startswith("-") else str(folder))


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return number(None)
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{seconds:.3g} s"
