"""Published GAN packages with GAC swapped in: the changed lines, 50 steps before and after, the ratio of their cost.

    python -m benchmarks.packages        writes results/packages.json; needs pip install -e ".[packages,test]"

In the script `before` a package's own networks are trained by its own trainer, unmodified. After it stands one script
for each depth of the swap: `optimizer` (ConjugateGradient for Adam) and `step` (GAC's). What differs between
the two is what a user changes; it is printed and stored.

Cost is CPU seconds of one thread per training step, the median over the steps of a run. A round runs all scripts of a
package in turn; the ratio is taken in each round, and its median over the rounds is reported. Real data: scikit-learn's
digits and wines.
"""

import argparse
import difflib
import inspect
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.packages_scripts import SCRIPTS, Losses, wines

STEPS, ROUNDS, SEEDS, EPOCHS, ROWS = 50, 3, 3, 300, 5_000


def installed() -> list[str]:
    """The packages of `SCRIPTS` that are installed here."""
    return [package for package in SCRIPTS if find_spec(package.replace("-", "_")) is not None]


def changed_lines(before: Callable[..., Any], after: Callable[..., Any]) -> list[str]:
    """What a user changes: lines of the script `before` with a -, lines of `after` with a +, blank ones left out."""
    sources = [inspect.getsource(script).splitlines()[1:] for script in (before, after)]
    lines = list(difflib.unified_diff(*sources, n=0, lineterm=""))[2:]
    return [line for line in lines if not line.startswith("@@") and line[1:].strip()]


class Run(NamedTuple):
    losses: Losses
    seconds: float
    """of one thread, for one training step: the median over the run"""


def run(script: Callable[[int], Losses], steps: int, seed: int) -> Run:
    """One script in an empty folder, its steps timed at the optimizers, two of which step in every training step."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    stamps: list[float] = []
    here = Path.cwd()
    clock = register_optimizer_step_post_hook(lambda *_: stamps.append(time.process_time()))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        os.chdir(folder)
        try:
            losses = script(steps)
        finally:
            os.chdir(here)
            clock.remove()
    ends = stamps[1::2]
    return Run(losses, statistics.median(after - before for before, after in pairwise(ends)))


def compare(package: str, steps: int = STEPS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Lines changed, first and last losses and cost of every script of a package."""
    scripts = SCRIPTS[package]
    runs = [{depth: run(script, steps, seed) for depth, script in scripts.items()} for seed in range(rounds)]
    figures: dict[str, Any] = {"version": version(package), "steps": steps, "rounds": rounds}
    for depth, script in scripts.items():
        curves = np.array([turn[depth].losses for turn in runs])
        figures[depth] = {
            "changed lines": changed_lines(scripts["before"], script),
            "all losses finite": bool(np.isfinite(curves).all()),
            "first losses (D, G)": curves[:, 0].mean(axis=0).round(3).tolist(),
            "last losses (D, G)": curves[:, -1].mean(axis=0).round(3).tolist(),
            "CPU seconds per step": round(statistics.median(turn[depth].seconds for turn in runs), 4),
            "ratio of cost": round(statistics.median(t[depth].seconds / t["before"].seconds for t in runs), 2),
        }
    return figures


# ---- how good the rows are: the distance of each column's distribution, and of the correlations between columns


def total_variation(real: pd.DataFrame, other: pd.DataFrame, discrete: list[str]) -> float:
    """Mean over the columns of TV = 1/2 sum_k |p_k - q_k|, k over categories, or over the real ones' deciles."""

    def shares(column: pd.Series) -> pd.Series:
        values: Any = column
        if column.name not in discrete:
            values = np.searchsorted(real[column.name].quantile(np.arange(1, 10) / 10), column)
        return pd.Series(values).value_counts(normalize=True)

    distances = [shares(real[name]).sub(shares(other[name]), fill_value=0).abs().sum() / 2 for name in real]
    return float(np.mean(distances))


def correlation_gap(real: pd.DataFrame, other: pd.DataFrame) -> float:
    """Mean |r - r'| over the pairs of columns."""
    gap = (real.corr() - other.corr()).abs().to_numpy()
    return float(np.nanmean(gap[np.triu_indices_from(gap, k=1)]))


def quality(seeds: int = SEEDS, epochs: int = EPOCHS) -> dict[str, Any]:
    """ctgan's rows before and after the swap, both with ctgan's default settings, over the seeds."""
    from ctgan import CTGAN

    from gac_plugin.adapters.tables import GACCTGAN

    table, discrete = wines(), ["target"]
    shuffled = table.sample(frac=1, random_state=0)
    independent = table.apply(np.random.default_rng(0).permutation)
    pairs = {
        "half of the real rows against the other half": [(shuffled[::2], shuffled[1::2])],
        "each real column shuffled by itself": [(table, independent)],
    }
    for name, model in (("before", CTGAN), ("step", GACCTGAN)):
        pairs[name] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            np.random.seed(seed)
            synthesizer = model(epochs=epochs, enable_gpu=False)
            synthesizer.fit(table, discrete)
            pairs[name].append((table, synthesizer.sample(ROWS)))
    return {
        name: {
            "total variation": [round(total_variation(*pair, discrete), 3) for pair in both],
            "correlation gap": [round(correlation_gap(*pair), 3) for pair in both],
        }
        for name, both in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packages.json")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("packages", nargs="*", default=installed(), help="default: all that are installed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")  # of packages that were written for older versions of torch and torchvision
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for package in options.packages:
        setting = {"torch": torch.__version__, "python": platform.python_version()}
        report[package] = compare(package, rounds=options.rounds) | setting
        for depth in list(SCRIPTS[package])[1:]:
            print(f"\n{package} {report[package]['version']}, {depth}", *report[package][depth].items(), sep="\n  ")
        if package == "ctgan":
            report[package]["quality"] = quality()
            print("\nctgan's rows", json.dumps(report[package]["quality"], indent=2), sep="\n")
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
