"""Train a GAN with GAC: `gac train`, `python -m gac_plugin.train`, or `accelerate launch -m gac_plugin.train`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from accelerate import PartialState

from gac_plugin.errors import exit_code
from gac_plugin.training.config import GROUPS, PRESETS, Config, field_type, make_config, read_config
from gac_plugin.training.files import MARK, REPORT
from gac_plugin.training.journal import METRICS
from gac_plugin.training.judging.evaluate import Evaluation
from gac_plugin.training.judging.findings import Finding, findings, read_metrics
from gac_plugin.training.judging.measures import MEASURES
from gac_plugin.training.loop import Result, train
from gac_plugin.training.processes import leave
from gac_plugin.training.stopping import Stop


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"gac: error: {message}; see {self.prog} --help\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `Config`, and where the others come from."""
    parser.add_argument("--preset", default="default", metavar="NAME", help=f"start from: {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file of settings, such as a run's config.json")
    group: argparse._ActionsContainer = parser
    for item in fields(Config):
        group = parser.add_argument_group(GROUPS[item.name]) if item.name in GROUPS else group
        flag, text, kind = "--" + item.name.replace("_", "-"), item.metadata["help"], field_type(item.type)
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **options)
        else:
            shown = "" if item.default is None else f" (default: {item.default})"
            metavar = {int: "N", float: "X"}.get(kind, "NAME")
            group.add_argument(flag, type=kind, metavar=metavar, help=text.replace("%", "%%") + shown, **options)


def run(arguments: argparse.Namespace) -> None:
    """Train by parsed arguments and print the table of results, and what the figures say.

    Raises:
        UsageError: see `make_config` and `train`.
    """
    names = {item.name for item in fields(Config)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    config = make_config(flags, arguments.preset, arguments.config, earlier_settings(flags))
    result = train(config)
    if PartialState().is_main_process and result.stopped is not Stop.TERMINATED:
        evaluation = result.evaluation.to_json() if result.evaluation else None
        told = findings(read_metrics(result.folder / METRICS), config, evaluation)
        sys.stdout.write(summary(result) + spoken(told))


def earlier_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that the flags ask to go on with, so that none of them needs to be said again."""
    mark = Path(flags.get("output_dir", "")) / MARK
    return read_config(mark) if flags.get("resume") == "auto" and "output_dir" in flags and mark.is_file() else {}


def summary(result: Result) -> str:
    """The closing table: figures of merit with what is needed to judge them, speed, and where the files are."""
    rows = []
    if (evaluation := result.evaluation) is not None:
        rows += [
            ("Frechet distance", f"{evaluation.frechet:.2f}  (two halves of the real samples: {evaluation.floor:.2f})"),
            *_measures(evaluation),
            *((name.replace("_", " "), f"{value:.3f}") for name, value in evaluation.figures.items()),
        ]
        if evaluation.recognised is not None:
            known = f"  (real samples: {evaluation.recognised_real:.3f})"
            rows.append(("recognised", f"{evaluation.recognised:.3f}{known}"))
        rows += [
            ("features", evaluation.features),
            ("samples", f"{evaluation.generated_samples:,} generated, {evaluation.real_samples:,} real"),
        ]
    ends = {Stop.GOAL: "the goal of --until is reached", Stop.TIME: "the time of --max-hours is up"}
    if result.stopped in ends:
        rows.append(("stopped", f"at step {result.step:,}: {ends[result.stopped]}"))
    rows += [
        ("seconds", f"{result.seconds:.1f} of training"),
        ("samples per second", f"{result.samples_per_second:,.0f}"),
        ("samples in", str(result.folder / "samples")),
        ("generator", str(result.folder / "generator")),
    ]
    if (result.folder / REPORT).is_file():
        rows.append(("report", str(result.folder / REPORT)))
    width = max(len(name) for name, _ in rows)
    return "\n" + "".join(f"{name:<{width}}  {value}\n" for name, value in rows)


def _measures(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The figures that every evaluation has, but for the Frechet distance."""
    told = {one.title: getattr(evaluation, name) for name, one in MEASURES.items() if name != "frechet"}
    return [(title, f"{value:.3f}") for title, value in told.items() if value is not None]


def spoken(told: Sequence[Finding]) -> str:
    """The findings, one a line, below the table."""
    return "\nfindings\n" + "".join(f"  {finding.text}\n" for finding in told)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m gac_plugin.train`; returns the exit code."""
    parser = OneLineParser(prog="gac train", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    leave(main())
