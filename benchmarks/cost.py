"""What does a training step cost? GAC against the loops that people use, and against its own arithmetic in a flat loop.

    python -m benchmarks.cost                                       about 16 minutes
    python -m benchmarks.cost --default                             about five
    python -m benchmarks.cost --device cuda --dtype bfloat16        about two, with larger networks as well
    python -m benchmarks.cost --device cuda --graphs                half a minute

writes results/cost.json, plots/cost-DEVICE-DTYPE.png and COST.md.

All contenders of a case (`cost_steps.py`) step the same two networks on the same batches, in turns within each round,
the order shifted from round to round; a ratio is that of two contenders' times within one round. Learning rate 0, so
that all of them always meet the same networks. On one thread CPU time is taken, else wall-clock time.

Floating-point operations are those of matrix products and convolutions, counted as they run. Peak memory is what
tensors hold at the worst moment, parameters, gradients and optimizer states among them; on the CPU without the scratch
space that a kernel takes for itself.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import cost_page
from benchmarks.cells import add_device, add_out, name_of
from benchmarks.cost_steps import CONTENDERS, DEFAULT, LAZY, Game, Step, default
from gac_plugin.adapters import dcgan, mimicry, mlp
from gac_plugin.protocols import Adapter
from gac_plugin.training.files import write_json

LATENT, SEED, WARM = 64, 0, 2
PEOPLE = ("textbook", "dcgan example", "r3gan")
BASES = ("textbook", "r3gan", "flat fresh", "flat fused", "textbook, captured")
COMPILED = ("textbook", "flat fresh", "fresh", "flat fused", "fused")
CAPTURED = ("textbook", "r3gan", "flat fresh", "fresh", "flat fused", "fused", "fresh, lazy", "fused, lazy")

Report = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Networks and how they are measured.

    Attributes:
        title: for tables.
        adapter: what builds them.
        shape: of a sample.
        width, depth: of both networks.
        batch: number of samples.
        turn: steps of a contender within a round, a multiple of the penalty's interval.
        rounds: that count.
    """

    title: str
    adapter: Adapter
    shape: tuple[int, int, int]
    width: int
    depth: int
    batch: int
    turn: int
    rounds: int


CASES = {
    "mlp": Case("MLP, 28 x 28, width 256, batch 64", mlp.adapter, (1, 28, 28), 256, 2, 64, 5 * LAZY, 100),
    "dcgan": Case("DCGAN, 3 x 32 x 32, width 64, batch 32", dcgan.adapter, (3, 32, 32), 64, 3, 32, LAZY, 12),
    "residual": Case("residual, 3 x 32 x 32, width 32, batch 16", mimicry.adapter, (3, 32, 32), 32, 2, 16, LAZY, 12),
}


ON_ACCELERATOR = {
    "large dcgan": Case(
        "large DCGAN, 3 x 64 x 64, width 128, batch 64", dcgan.adapter, (3, 64, 64), 128, 4, 64, 5 * LAZY, 5
    ),
    "large residual": Case(
        "large residual, 3 x 32 x 32, width 128, batch 64", mimicry.adapter, (3, 32, 32), 128, 2, 64, 5 * LAZY, 5
    ),
    **{name: replace(case, turn=5 * LAZY, rounds=5) for name, case in CASES.items()},
}
"""With turns in which the default metric, too, has all that recurs: it turns its bases in every tenth step."""


def cases_on(device: str) -> dict[str, Case]:
    return CASES if device == "cpu" else ON_ACCELERATOR


Contenders = Mapping[str, Callable[[Game], Step]]


def contenders_on(device: str) -> Contenders:
    return CONTENDERS if device == "cpu" else {**CONTENDERS, DEFAULT: default}


def make_game(
    case: Case,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    capturable: bool = False,
) -> Game:
    """Networks with fresh weights, and Adam for each with rate 0."""
    torch.manual_seed(SEED)
    arguments = {"sample_shape": case.shape, "latent_size": LATENT, "width": case.width, "depth": case.depth}
    builders = case.adapter.generator, case.adapter.discriminator
    networks: list[nn.Module] = [build(**arguments, output="tanh").to(device, dtype) for build in builders]
    if compiled:
        for network in networks:
            network.compile()
    options = {"lr": 0.0, "betas": (0.0, 0.99), "foreach": True, "capturable": capturable}
    return Game(*networks, *(torch.optim.Adam(network.parameters(), **options) for network in networks), LATENT)


def make_batches(case: Case, count: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Stand-ins for real samples, in the generator's range."""
    return [torch.rand(case.batch, *case.shape, device=device, dtype=dtype) * 2 - 1 for _ in range(count)]


def run(step: Step, batches: Sequence[Tensor]) -> None:
    """A step on each batch."""
    for real in batches:
        step(real)


# ---- time


def wall() -> float:
    """Seconds of the clock, with all that the device was given done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def turns_of(steps: Mapping[str, Step], batches: Sequence[Tensor]) -> dict[str, Callable[[], None]]:
    """A turn of each contender: a step on each batch."""
    return {name: partial(run, step, batches) for name, step in steps.items()}


def interleave(
    turns: Mapping[str, Callable[[], None]], steps: int, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a step of every contender, whose turns have so many steps, for each of the rounds that count."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds + WARM):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            turns[name]()
            if number >= WARM:
                times[name].append((clock() - began) / steps)
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios within rounds."""
    return statistics.quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)


# ---- operations


class _Counter(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def count_operations(step: Step, batches: Sequence[Tensor]) -> int:
    """Floating-point operations of matrix products and convolutions, two for each multiplication and addition.

    `torch.utils.flop_counter.FlopCounterMode` has the same formulas and does not work with `torch.autograd.grad`.
    """
    with _Counter() as counter:
        run(step, batches)
    return counter.total


# ---- memory


def peak_memory(make_step: Callable[[], Step], batches: Sequence[Tensor]) -> int:
    """Bytes that tensors hold at the worst moment, from the making of the networks through a step on each batch."""
    if batches[0].is_cuda:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(make_step(), batches)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(make_step(), batches)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


# ---- all of it


def measure(
    case: Case, contenders: Contenders, device: str, dtype: torch.dtype, threads: Sequence[int], rounds: int
) -> Report:
    """Operations a step, peak memory, and times by the number of threads, of all contenders."""
    print(case.title, flush=True)
    batches = make_batches(case, case.turn, device, dtype)
    for contender in contenders.values():  # the libraries' own memory, which is taken at first use, is nobody's
        run(start(contender, case, device, dtype), batches[:1])
    memory = {
        name: peak_memory(partial(start, contender, case, device, dtype), batches[:LAZY])
        for name, contender in contenders.items()
    }
    game = make_game(case, device, dtype)
    steps = {name: contender(game) for name, contender in contenders.items()}
    for step in steps.values():
        run(step, batches)
    operations = {name: count_operations(step, batches) / case.turn for name, step in steps.items()}
    turns, times = turns_of(steps, batches), {}
    for number in threads:
        torch.set_num_threads(number)
        clock = time.process_time if (number, device) == (1, "cpu") else wall
        times[str(number)] = summary(interleave(turns, case.turn, rounds, clock))
        print(f"{number} threads\n{told(times[str(number)])}", flush=True)
    return {"title": case.title, "operations": operations, "memory": memory, "times": times}


def start(contender: Callable[[Game], Step], case: Case, device: str, dtype: torch.dtype) -> Step:
    """A contender's step with networks of its own."""
    return contender(make_game(case, device, dtype))


def measure_default(case: Case, device: str, dtype: torch.dtype, rounds: int | None) -> Report:
    """What `gac train` does beside what people do, on one thread, in turns in which the metric has all that recurs."""
    contenders = {**{name: CONTENDERS[name] for name in PEOPLE}, DEFAULT: default}
    whole = replace(case, turn=5 * LAZY, rounds=case.rounds // 2)
    return measure(whole, contenders, device, dtype, [1], rounds or whole.rounds)


def measure_compiled(case: Case, device: str, dtype: torch.dtype, rounds: int) -> Report:
    """Some contenders with the networks as they are and through `torch.compile`, on one thread."""
    torch.set_num_threads(1)
    batches, steps, seconds = make_batches(case, case.turn, device, dtype), {}, {}
    for name, compiled in product(COMPILED, (False, True)):
        title = f"{name}, compiled" if compiled else name
        steps[title] = CONTENDERS[name](make_game(case, device, dtype, compiled))
        began = time.perf_counter()
        run(steps[title], batches)
        seconds[title] = time.perf_counter() - began
    clock = time.process_time if device == "cpu" else wall
    times = summary(interleave(turns_of(steps, batches), case.turn, rounds, clock))
    print(f"{case.title}, compiled\n{told(times)}", flush=True)
    return {"title": case.title, "first turn, seconds": seconds, "times": times}


def measure_captured(case: Case, device: str, dtype: torch.dtype, rounds: int) -> Report:
    """Some contenders step by step, and a turn of them as one CUDA graph, which launches all kernels at once."""
    torch.set_num_threads(1)
    batches = make_batches(case, LAZY, device, dtype)
    steps = {name: CONTENDERS[name](make_game(case, device, dtype, capturable=True)) for name in CAPTURED}
    turns = turns_of(steps, batches)
    turns |= {f"{name}, captured": capture(turn).replay for name, turn in turns.items()}
    times = summary(interleave(turns, LAZY, rounds, wall))
    print(f"{case.title}, captured\n{told(times)}", flush=True)
    return {"title": case.title, "times": times}


def capture(turn: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The kernels of a turn as a graph, after turns on a stream of their own, as capturing demands."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            turn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    return graph


def summary(times: Mapping[str, Sequence[float]]) -> Report:
    """Of each contender the median seconds a step, and the quartiles of its ratios to those in `BASES`."""
    return {
        name: {"seconds": statistics.median(seconds)}
        | {base: ratio(seconds, times[base]) for base in BASES if base in times}
        for name, seconds in times.items()
    }


def told(found: Report) -> str:
    lines = []
    for name, figures in found.items():
        ratios = (
            f"{base} {middle:.3f} ({low:.3f} to {high:.3f})" for base, (low, middle, high) in list(figures.items())[1:]
        )
        lines.append(f"  {name:<26} {1e3 * figures['seconds']:8.2f} ms, to {', '.join(ratios)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", choices=ON_ACCELERATOR, help="one case; the figures of the others stay")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="rounds that count (default: on a CPU 100 of the MLP, else 12; on accelerators 5; half for --default)",
    )
    add_device(parser)
    parser.add_argument("--dtype", default="float32", help="of networks and samples, for example bfloat16")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2); others stay"
    )
    parser.add_argument("--default", action="store_true", help="only this: what `gac train` does, on one thread")
    parser.add_argument("--compile", action="store_true", help="only this: torch.compile on the MLP's networks")
    parser.add_argument("--graphs", action="store_true", help="only this: CUDA graphs of the small networks' steps")
    add_out(parser)
    arguments = parser.parse_args()
    dtype, file = getattr(torch, arguments.dtype), arguments.out / "results" / "cost.json"
    report: Report = json.loads(file.read_text()) if file.exists() else {}
    found = report.setdefault(f"{arguments.device}, {arguments.dtype}", {})
    found["machine"] = machine(arguments.device)
    cases, place = cases_on(arguments.device), (arguments.device, dtype)
    if arguments.only and arguments.only not in cases:
        parser.error(f"{arguments.only!r} is measured on accelerators alone; on the CPU there are {', '.join(cases)}")
    if arguments.default:
        for name in [arguments.only] if arguments.only else CASES:
            found.setdefault("default", {})[name] = measure_default(cases[name], *place, arguments.rounds)
            save(report, arguments.out)
        return
    if arguments.compile:
        found["compiled"] = measure_compiled(cases["mlp"], *place, arguments.rounds or cases["mlp"].rounds)
        save(report, arguments.out)
        return
    if arguments.graphs:
        found["captured"] = [
            measure_captured(cases[name], *place, arguments.rounds or CASES["mlp"].rounds) for name in CASES
        ]
        save(report, arguments.out)
        return
    for name in [arguments.only] if arguments.only else cases:
        case = cases[name]
        rounds = arguments.rounds or case.rounds
        measured = measure(case, contenders_on(arguments.device), *place, arguments.threads, rounds)
        measured["times"] = {**found.get(name, {}).get("times", {}), **measured["times"]}
        found[name] = measured
        save(report, arguments.out)


def save(report: Report, out: Path) -> None:
    """Write the figures, and the page and the plot that show them."""
    write_json(out / "results" / "cost.json", report)
    cost_page.write(out)


def machine(device: str) -> str:
    name = f"{os.cpu_count()} CPU cores, {platform.machine()}" if device == "cpu" else name_of(device)
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
