"""What saves cost, and whether two processes do what one does."""

import contextlib
import io
import statistics
import sys
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from benchmarks.reliability_runs import TESTS, Finding, Options, call, say
from gac_plugin.training import Config, train
from gac_plugin.training.loop import _Run

sys.path.insert(0, str(TESTS))
import two_processes

ROUNDS = 5


def save_cost(options: Options) -> list[Finding]:
    """How long a save holds the training thread, and how much slower training is with saves; interleaved rounds."""
    mlp = Config(steps=2000, metric="adam", evaluation_samples=0, cpu=True, seed=options.seed)
    dcgan = replace(mlp, image_size=32, adapter="dcgan", steps=40)
    return [
        _cost_of_saves(options, "mlp, metric adam", mlp, (1000, 100), ROUNDS),
        _cost_of_saves(options, "dcgan, 32x32, metric adam", dcgan, (10,), ROUNDS),
    ]


def _cost_of_saves(options: Options, name: str, config: Config, intervals: tuple[int, ...], rounds: int) -> Finding:
    held: dict[int, list[float]] = {every: [] for every in (0, *intervals)}
    seconds: dict[int, list[float]] = {every: [] for every in (0, *intervals)}
    in_steps: list[float] = []
    original = _Run._save

    def timed(run: _Run, so_far: float) -> None:
        began = time.perf_counter()
        original(run, so_far)
        moments.append(time.perf_counter() - began)

    def measure(every: int, steps: int) -> float:
        settings = replace(config, checkpoint_every=every, steps=steps, output_dir=str(options.work / "cost"))
        with contextlib.redirect_stderr(io.StringIO()), mock.patch.object(_Run, "_save", timed):
            return train(replace(settings, overwrite=True)).seconds

    moments: list[float] = []
    measure(0, 5)  # imports and the like
    for number in range(rounds):
        for every in (0, *intervals):
            moments.clear()
            seconds[every].append(measure(every, config.steps))
            held[every].append(statistics.median(moments) if moments else 0.0)
            in_steps += [moment * config.steps / seconds[every][-1] for moment in moments]
        say(f"  {name}: round {number + 1} of {rounds}")
    step = statistics.median(seconds[0]) / config.steps
    figures: dict[str, Any] = {"a save in steps": statistics.median(in_steps), "longest save in steps": max(in_steps)}
    parts = []
    for every in intervals:
        slower = statistics.median(a / b for a, b in zip(seconds[every], seconds[0], strict=True))
        spread = [a / b for a, b in zip(seconds[every], seconds[0], strict=True)]
        share = statistics.median(held[every]) / (every * step)
        figures[f"every {every}"] = {"share held": share, "time with / without": slower, "of each round": spread}
        parts.append(
            f"every {every:,} steps: held for {share:.3%} of the time, training takes {slower:.3f} times as long "
            f"(rounds: {min(spread):.3f} to {max(spread):.3f})"
        )
    return Finding(
        f"cost of saves: {name}",
        f"{rounds} rounds of {config.steps:,} steps, {len(in_steps)} saves",
        f"a save holds training for {figures['a save in steps']:.2f} steps (median; longest "
        f"{figures['longest save in steps']:.1f}); " + "; ".join(parts),
        "torch in one thread, the writing in another; with and without saves in turn, medians",
        figures,
    )


def equality(options: Options) -> list[Finding]:
    """Two processes with half of every batch each against one with all of it."""
    file = options.work / "parameters.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    code, said = call([*launcher, str(TESTS / "two_processes.py"), str(file)], options.work / "equality.log")
    assert code == 0, said[-2000:]
    found, largest = load_file(file), {torch.float64: 0.0, torch.float32: 0.0}
    for name, case in two_processes.CASES.items():
        # a window of batches equals the whole batch at once, except where each forward pass leaves a trace in D
        in_windows = case.spectral and case.accumulation > 1
        expected = two_processes.train(case, Accelerator(cpu=True) if in_windows else None)
        AcceleratorState._reset_state(reset_partial_state=True)
        for key, value in expected.items():
            difference = float((found[f"{name} {key}"] - value).abs().max())
            largest[case.dtype] = max(largest[case.dtype], difference if difference == difference else float("inf"))
    figures = {str(dtype).removeprefix("torch."): value for dtype, value in largest.items()}
    failures = [f"{kind}: {value}" for kind, value in figures.items() if not value < {"float64": 1e-9}.get(kind, 1e-5)]
    return [
        Finding(
            "two processes with half of every batch each against one with all of it",
            f"{len(two_processes.CASES)} recipes, {two_processes.STEPS} steps",
            f"parameters differ by at most {figures['float64']:.1e} in float64 and {figures['float32']:.1e} in float32",
            "`tests/two_processes.py`, gloo; every rule, both schedules, accumulation, spectral norm, steps left out",
            figures,
            failures,
        )
    ]
