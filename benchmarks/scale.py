"""How does the cost of a step grow? With the batch, the resolution, the width of the networks, and with processes.

    python -m benchmarks.scale       writes results/scale.json, plots/scale.png and a part of COST.md; about 4 minutes

Sweeps: DCGAN's networks, one thread, `fresh` and `fused` against the textbook loop, in turns as in `cost.py`.

Processes: two of them with one thread each, over gloo, each with the whole batch (weak scaling). They take turns within
each round: the first process alone, with networks of its own, while the other waits; then both, with networks that
`accelerate` shares. The efficiency is the ratio of the two wall-clock times of one round. Beside them two bounds: both
at work with nothing shared, and with one all-reduce of each network's gradients and nothing else.

Eight and 64 GPUs: on paper, from counted operations and bytes, and from rates that are assumed.
"""

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, multiprocessing

from benchmarks import cost_page
from benchmarks.cells import add_out
from benchmarks.cost import (
    CASES,
    WARM,
    Case,
    count_operations,
    interleave,
    machine,
    make_batches,
    make_game,
    ratio,
    run,
    turns_of,
)
from benchmarks.cost_steps import CONTENDERS, LAZY, Game, Step
from gac_plugin.training.files import write_json

Report = dict[str, Any]

BASE = replace(CASES["dcgan"], width=16, batch=32, turn=2, rounds=15)
SWEEPS = {
    "batch": [replace(BASE, batch=size) for size in (4, 16, 64, 256)],
    "resolution": [replace(BASE, shape=(3, size, size), depth=depth) for size, depth in ((16, 2), (32, 3), (64, 4))],
    "width": [replace(BASE, width=width) for width in (8, 16, 32, 64)],
}
NAMES = ("textbook", "fresh", "fused")
APART, EXCHANGED = "`fresh`, nothing shared", "`fresh`, all-reduces alone"
SHARED = {
    "mlp": replace(CASES["mlp"], rounds=60),
    "dcgan": replace(CASES["dcgan"], rounds=12),
}
LARGE = replace(
    BASE, title="DCGAN, 3 x 64 x 64, width 64, batch 64 a GPU", shape=(3, 64, 64), depth=4, width=64, batch=64
)
RATES = {
    "operations/s of a GPU": 50e12,
    "bytes/s within a machine of 8": 200e9,
    "bytes/s of a GPU between machines": 25e9,
}
"""Assumed, not measured: what a large GPU does on convolutions in 16 bits, and what all-reduce gets out of links."""


def sweep(cases: list[Case], rounds: int | None) -> list[Report]:
    """Each case's textbook time, the quartiles of the ratios to it, and the ratios of operations."""
    found = []
    for case in cases:
        game, batches = make_game(case), make_batches(case, case.turn)
        steps = {name: CONTENDERS[name](game) for name in NAMES}
        for step in steps.values():
            run(step, batches[:1])
        operations = {name: count_operations(step, batches[:1]) for name, step in steps.items()}
        times = interleave(turns_of(steps, batches), case.turn, rounds or case.rounds, time.process_time)
        sizes = {"batch": case.batch, "resolution": case.shape[1], "width": case.width}
        parameters = sum(p.numel() for network in (game.generator, game.discriminator) for p in network.parameters())
        found.append(
            {"sizes": sizes, "parameters": parameters, "seconds": statistics.median(times["textbook"])}
            | {"ratio": {name: ratio(times[name], times["textbook"]) for name in NAMES[1:]}}
            | {"operations": {name: operations[name] / operations["textbook"] for name in NAMES[1:]}}
        )
        print(found[-1], flush=True)
    return found


# ---- processes


def share(name: str, game: Game, accelerator: Accelerator) -> Step:
    """A step of networks that the processes share: GAC, or the textbook loop, whose two backward passes are its own."""
    prepared = accelerator.prepare(game.generator, game.discriminator, game.optimizer_g, game.optimizer_d)
    return CONTENDERS[name](Game(*prepared, game.latent))


def exchanging(step: Step, game: Game) -> Step:
    """A step of its own networks, then one all-reduce for each of as many numbers as it has gradients."""
    sizes = (sum(p.numel() for p in network.parameters()) for network in (game.discriminator, game.generator))
    gradients = [torch.zeros(size) for size in sizes]

    def both(real: Tensor) -> None:
        step(real)
        for one in gradients:
            distributed.all_reduce(one)

    return both


def weak_scaling(rank: int, port: int, folder: str, rounds: int | None) -> None:
    """One of two processes; the first one writes the efficiencies of all cases and contenders."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.set_num_threads(1)  # after accelerate, which sets as many as there are cores
    found: Report = {}
    for case in SHARED.values():
        batches = make_batches(case, case.turn)
        alone = {name: CONTENDERS[name](make_game(case)) for name in NAMES}
        pairs = {name: (alone[name], share(name, make_game(case), accelerator)) for name in NAMES}
        fresh = alone["fresh"]
        pairs |= {APART: (fresh, fresh), EXCHANGED: (fresh, exchanging(fresh, make_game(case)))}
        shares: dict[str, list[float]] = {name: [] for name in pairs}
        for number in range((rounds or case.rounds) + WARM):
            for name, (by_itself, together) in pairs.items():
                accelerator.wait_for_everyone()
                began = time.perf_counter()
                if rank == 0:
                    run(by_itself, batches)
                middle = time.perf_counter()
                accelerator.wait_for_everyone()
                resumed = time.perf_counter()
                run(together, batches)
                if number >= WARM:
                    shares[name].append((middle - began) / (time.perf_counter() - resumed))
        found[case.title] = {name: statistics.quantiles(ratios, n=4) for name, ratios in shares.items()}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    accelerator.end_training()


def measure_processes(rounds: int | None) -> Report:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(weak_scaling, (port, folder, rounds), nprocs=2)
        return json.loads((Path(folder) / "found.json").read_text())


# ---- on paper


def on_paper(gpus: int, operations: float, exchanged: float) -> dict[str, float]:
    """Share of a step that is computation, if all-reduce overlaps with nothing (the worst) and if with all it can.

        t_compute = operations / rate        t_exchange = 2 (n - 1) / n bytes / bandwidth        (ring all-reduce)

    Args:
        gpus: number of them, 8 in a machine.
        operations: of a step on one GPU.
        exchanged: bytes of gradients of a step.
    """
    link = RATES["bytes/s within a machine of 8" if gpus <= 8 else "bytes/s of a GPU between machines"]
    compute = operations / RATES["operations/s of a GPU"]
    exchange = 2 * (gpus - 1) / gpus * exchanged / link
    return {"worst": compute / (compute + exchange), "best": compute / max(compute, exchange)}


def paper() -> Report:
    """`fresh` and `fused` exchange each network's gradient once, the textbook loop D's a second time in the G step."""
    game, batches = make_game(LARGE), make_batches(LARGE, LAZY)
    d, g = (4 * sum(p.numel() for p in network.parameters()) for network in (game.discriminator, game.generator))
    found: Report = {"title": LARGE.title, "rates": RATES, "bytes": {"D": d, "G": g}, "steps": {}}
    for name in NAMES:
        step = CONTENDERS[name](game)
        run(step, batches[:1])
        operations, exchanged = count_operations(step, batches[:1]), (2 * d if name == "textbook" else d) + g
        gpus = {str(n): on_paper(n, operations, exchanged) for n in (8, 64)}
        found["steps"][name] = {"operations": operations, "bytes": exchanged, "efficiency": gpus}
    return found


SECTIONS: dict[str, Callable[[int | None], Report]] = {
    "sweeps": lambda rounds: {name: sweep(cases, rounds) for name, cases in SWEEPS.items()},
    "processes": measure_processes,
    "paper": lambda _: paper(),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", choices=SECTIONS, help="one part; the figures of the others stay")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds that count (default: 15, of processes 60 and 12)"
    )
    add_out(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.out / "results" / "scale.json"
    report: Report = json.loads(file.read_text()) if file.exists() else {}
    report["machine"] = machine("cpu")
    for name in [arguments.only] if arguments.only else SECTIONS:
        report[name] = SECTIONS[name](arguments.rounds)
        print(json.dumps(report[name], indent=2), flush=True)
    write_json(file, report)
    cost_page.write(arguments.out)


if __name__ == "__main__":
    main()
