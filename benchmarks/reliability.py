"""Does a run survive what machines do to it: kills, signals, damaged files, a full disk; and what do checkpoints cost?

    python -m benchmarks.reliability                 writes results/reliability.json and RELIABILITY.md
    python -m benchmarks.reliability --only kills    the same, measuring one section anew

Every section returns findings; one that failed says how, and the command then ends with 1. For Linux.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import torch

from benchmarks.reliability_cost import equality, save_cost
from benchmarks.reliability_damage import corruptions, disk_full, pickles
from benchmarks.reliability_runs import Finding, Options, say
from benchmarks.reliability_stops import kills, resume, signals

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.reliability"

SECTIONS: dict[str, Callable[[Options], list[Finding]]] = {
    "kills": kills,
    "corruptions": corruptions,
    "signals": signals,
    "disk-full": disk_full,
    "pickles": pickles,
    "save-cost": save_cost,
    "equality": equality,
    "resume": resume,
}


def measure(names: list[str], kills: int = 200, corruptions: int = 1000, seed: int = 0) -> dict[str, list[Finding]]:
    """The findings of some sections; each works in a folder that is taken away."""
    found = {}
    for name in names:
        say(f"{name}, seed {seed}")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="gac-reliability-") as work:
            found[name] = SECTIONS[name](Options(Path(work), kills, corruptions, seed))
        say(f"  {time.perf_counter() - began:.0f} s")
        for finding in found[name]:
            say("".join(f"  FAILED: {failure}\n" for failure in finding.failures) + f"  {finding.result}")
    return found


def surroundings() -> dict[str, Any]:
    """What the figures were measured with."""
    versions = {"torch": torch.__version__, "accelerate": accelerate.__version__, "python": platform.python_version()}
    return {**versions, "CPUs": len(os.sched_getaffinity(0))}


def table(report: dict[str, Any]) -> str:
    """RELIABILITY.md."""
    lines = [
        "# What a run survives",
        "",
        f"Made by `{COMMAND}` ({', '.join(f'{name} {value}' for name, value in report['with'].items())}; "
        f"seed {report['seed']}). The figures are in [results/reliability.json](results/reliability.json).",
        "",
        "| what | how many | result | how it was measured |",
        "|---|---|---|---|",
    ]
    for name in SECTIONS:
        for finding in report["findings"].get(name, []):
            result = ("**FAILED** " if finding["failures"] else "") + finding["result"]
            cells = (finding["what"], finding["count"], result, finding["how"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--corruptions", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    only = "measure these alone and keep what else stands in the results, if it was measured with the same versions"
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=only)
    help_out = "folder that gets results/reliability.json and RELIABILITY.md (default: the folder of this script)"
    parser.add_argument("--out", type=Path, default=HERE, help=help_out)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.only, arguments.kills, arguments.corruptions, arguments.seed)
    file = arguments.out / "results" / "reliability.json"
    report = {"command": COMMAND, "with": surroundings(), "seed": arguments.seed, "findings": {}}
    earlier = json.loads(file.read_text()) if file.exists() else report
    if (earlier["with"], earlier["seed"]) == (report["with"], report["seed"]):
        report["findings"] = earlier["findings"]
    report["findings"] |= {name: [asdict(finding) for finding in findings] for name, findings in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    (arguments.out / "RELIABILITY.md").write_text(table(report))
    return int(any(finding.failures for findings in found.values() for finding in findings))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
