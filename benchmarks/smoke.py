"""Does every benchmark still run? All of them at tiny size, on the embedded digits, into a temporary folder.

    python -m benchmarks.smoke

Each must end well and leave its JSON and, where it writes one, its page. The figures say nothing. About two minutes on
two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK, OUT = "WORK", "OUT"
TINY = ("--size", "smoke", "--processes", "1", "--seeds", "2", "--work", WORK, "--out", OUT)


@dataclass(frozen=True)
class Script:
    """A benchmark, its arguments (WORK and OUT stand for temporary folders), and what it leaves in OUT."""

    name: str
    arguments: Sequence[str]
    leaves: Sequence[str]


SCRIPTS = (
    Script(
        "quality",
        ("digits", "digits", *TINY),
        ("results/quality.json", "QUALITY.md", "plots/quality.png"),
    ),
    Script("coverage", ("digits", *TINY), ("results/coverage.json", "COVERAGE.md", "plots/coverage-hard.png")),
    Script(
        "ablation",
        (
            "digits",
            *TINY,
            "--variants",
            "schedule fused",
            "rule pr+ on a common batch",
            "metric spectral",
            "score exp(l over 2)",
            "penalty none",
            "running average 0",
            "steps of G for one D 2 pullbacks of the same covectors",
        ),
        ("results/ablation.json", "ABLATION.md", "plots/ablation.png"),
    ),
    Script(
        "cost",
        ("--only", "mlp", "--rounds", "2", "--threads", "1", "--out", OUT),
        ("results/cost.json", "COST.md", "plots/cost-cpu-float32.png"),
    ),
    Script("cost", ("--default", "--only", "mlp", "--rounds", "2", "--out", OUT), ("results/cost.json", "COST.md")),
    Script("games", ("--out", OUT), ("results/games.json",)),
    Script("diagnostics", ("--rounds", "1"), ()),
)


def failures(script: Script) -> list[str]:
    """Run a script; what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        out.mkdir()
        places = {WORK: str(Path(folder, "work")), OUT: str(out)}
        command = [sys.executable, "-m", f"benchmarks.{script.name}", *(places.get(a, a) for a in script.arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(f"{script.name}: {time.perf_counter() - start:.0f} s", flush=True)
        if done.returncode:
            return [f"{script.name} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"]
        return [f"{script.name}: {file} {wrong}" for file in script.leaves if (wrong := flaw(out / file))]


def flaw(file: Path) -> str:
    """What is wrong with a file that a benchmark left; empty if nothing is."""
    if not file.exists() or not file.stat().st_size:
        return "is missing or empty"
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(), parse_constant=refuse)
        except ValueError as error:
            return f"is not JSON: {error}"
    if file.suffix == ".md" and not file.read_text().startswith("# "):
        return "has no title"
    return ""


def refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def main() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = [failure for failures_ in pool.map(failures, SCRIPTS) for failure in failures_]
    print("\n".join(found) or "all benchmarks run")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
