"""Runs that are stopped: killed at random moments, sent signals, and gone on with."""

import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.reliability_runs import (
    GOING_ON,
    LANES,
    MOMENTS,
    PATIENCE,
    SAVED,
    TINY,
    Finding,
    Life,
    Options,
    call,
    complete,
    differences,
    finish,
    outcome,
    program,
    say,
    signal_at,
    still_there,
    under_way,
)
from gac_plugin.training import Config

KILLED_RUNS = 4


@dataclass
class _Tally:
    kills: int = 0
    half_written: int = 0
    resumes: int = 0
    lost: int = 0
    ends: int = 0
    failures: list[str] = field(default_factory=list)


def kills(options: Options) -> list[Finding]:
    """SIGKILL at random moments; half of them wait for a save to begin."""
    folder = options.work / "kills"
    folder.mkdir()
    whole = [replace(TINY, seed=options.seed + n, output_dir=str(folder / f"whole-{n}")) for n in range(KILLED_RUNS)]
    began = time.perf_counter()
    with ThreadPoolExecutor(LANES) as pool:
        for code, said in pool.map(finish, whole):
            assert code == 0, f"ended with {code}: {said}"
        seconds = (time.perf_counter() - began) * LANES / KILLED_RUNS
        expected = [outcome(Path(config.output_dir or "")) for config in whole]
        shares = [options.kills * (lane + 1) // LANES - options.kills * lane // LANES for lane in range(LANES)]

        def work(lane: int) -> _Tally:
            return _kill_on_and_on(folder / f"lane-{lane}", shares[lane], options, seconds, expected)

        lanes = list(pool.map(work, range(LANES)))
    total = {name: sum(getattr(lane, name) for lane in lanes) for name in ("kills", "half_written", "resumes", "ends")}
    lost = max(lane.lost for lane in lanes)
    failures = [failure for lane in lanes for failure in lane.failures]
    if lost or total["kills"] != options.kills:
        failures.append(f"{total['kills']} kills, {lost} steps lost")
    result = (
        f"{len(failures)} failures; at most {lost} steps lost beyond the last checkpoint; {total['ends']} of "
        f"{total['ends'] + sum('differs' in failure for failure in failures)} runs ended bit-identical"
    )
    return [
        Finding(
            "SIGKILL at random moments, then `--resume auto`",
            f"{total['kills']} kills, {total['half_written']} of them with a save half written; "
            f"{total['resumes']} resumes seen",
            result,
            f"`gac train`, {TINY.steps} steps, a checkpoint every {TINY.checkpoint_every}; half of the kills at a "
            "random time from the start of the process, half a few milliseconds after a save began; each end compared "
            "with a run that was never killed: weights, optimizers, metrics, pictures",
            {**total, "steps lost": lost},
            failures,
        )
    ]


def _kill_on_and_on(
    folder: Path, wanted: int, options: Options, seconds: float, expected: list[dict[str, Any]]
) -> _Tally:
    folder.mkdir()
    tally, random, number = _Tally(), options.random(folder.name), 0
    while tally.kills < wanted:
        kind = number % KILLED_RUNS
        run = folder / f"run-{number}"
        config = replace(TINY, seed=options.seed + kind, output_dir=str(run), resume="auto")
        number += 1
        code: int | None = None
        owed = 0
        while code is None:
            before = under_way(run)
            (folder / "log").write_text("")  # what the life before said is not this one's, however short it is
            life = Life(config, folder / "log")
            if tally.kills < wanted:
                _wait_for_a_moment(life, run, random, seconds)
                life.kill()
            ended = life.wait(PATIENCE)
            said = (folder / "log").read_text()
            resumed = GOING_ON.search(said)
            if resumed:
                tally.resumes += 1
                tally.lost = max(tally.lost, owed - int(resumed[1]))
            if ended not in (0, -signal.SIGKILL) or "is damaged" in said:
                tally.failures.append(f"{run.name} ended with {ended}: {said[-500:]}")
                break
            if ended == 0:
                code = 0
                if owed and not resumed:
                    tally.lost = max(tally.lost, owed)
                continue
            tally.kills += 1
            tally.half_written += bool(under_way(run) - before)
            owed = max([owed, *complete(run)])
            if tally.kills % 20 == 0:
                say(f"  {folder.name}: {tally.kills} kills")
        if code == 0:
            wrong = differences(run, expected[kind])
            tally.ends += not wrong
            tally.failures += [f"{run.name} differs in {', '.join(wrong)}"] if wrong else []
        shutil.rmtree(run)
    return tally


def _wait_for_a_moment(life: Life, run: Path, random: Random, seconds: float) -> None:
    """A random time, up to half of what a whole run takes; or until just after a save has begun."""
    if random.random() < 0.5:
        life.wait(random.uniform(0, seconds / 2))
        return
    for _ in range(random.randint(1, 4)):
        before = {name for name, *_ in under_way(run)}
        while life.wait(0) is None and not {name for name, *_ in under_way(run)} - before:
            time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.02))


def signals(options: Options) -> list[Finding]:
    """SIGTERM and SIGINT to real programs."""
    base = replace(TINY, steps=600, checkpoint_every=200, seed=options.seed)
    whole = options.work / "unsignalled"
    code, said = finish(replace(base, output_dir=str(whole)))
    assert code == 0, said
    expected = outcome(whole)
    cases = [(number, case) for number in (signal.SIGTERM, signal.SIGINT) for case in range(MOMENTS)]

    def work(case: tuple[signal.Signals, int]) -> str | None:
        return _stop_and_resume(options, base, expected, *case)

    with ThreadPoolExecutor(LANES) as pool:
        failures = [failure for failure in pool.map(work, cases) if failure]
    count = f"{MOMENTS} random moments each"
    finding = Finding(
        "SIGTERM and SIGINT (Ctrl-C) while training",
        count,
        f"{len(cases) - len(failures)} of {len(cases)}: exit code 0 and 130, a checkpoint of the step at hand, and the "
        "resumed run bit-identical",
        "`python -m gac_plugin.train`, one process; compared with a run that was not stopped",
        {"cases": len(cases), "failed": len(failures)},
        failures,
    )
    return [finding, _stop_two_processes(options, base)]


def _stop_and_resume(
    options: Options, base: Config, expected: dict[str, Any], number: signal.Signals, case: int
) -> str | None:
    name = f"{number.name}-{case}"
    config = replace(base, output_dir=str(options.work / name))
    run = Path(config.output_dir or "")
    step = options.random(name).randrange(base.steps // 2)
    code, said = signal_at(config, step, number)
    saved = SAVED.search(said)
    if code != (0 if number == signal.SIGTERM else 130) or not saved or complete(run)[-1:] != [int(saved[1])]:
        return f"{name} at step {step} ended with {code} and checkpoints {complete(run)}: {said[-500:]}"
    code, said = finish(replace(config, resume="auto"))
    resumed = GOING_ON.search(said)
    if code != 0 or not resumed or resumed[1] != saved[1]:
        return f"{name}, resumed from step {saved[1]}, ended with {code}: {said[-500:]}"
    wrong = differences(run, expected)
    say(f"  {name}: stopped at step {saved[1]}, resumed")
    return f"{name} differs in {', '.join(wrong)}" if wrong else None


def _stop_two_processes(options: Options, base: Config) -> Finding:
    config = replace(base, output_dir=str(options.work / "launched"))
    run = Path(config.output_dir or "")
    launcher, said = signal_at(config, options.random("launcher").randrange(base.steps // 2), signal.SIGTERM, 2)
    stopped = complete(run)[-1:]
    saved = SAVED.search(said)
    left = still_there(str(run))
    code, told = call(program(replace(config, resume="auto"), 2), options.work / "launched.log")
    resumed = GOING_ON.search(told)
    whole = replace(base, output_dir=str(options.work / "launched-whole"))
    whole_code, whole_told = call(program(whole, 2), options.work / "launched-whole.log")
    failures = []
    if not saved or stopped != [int(saved[1])]:
        failures.append(f"SIGTERM to torchrun left {stopped}: {said[-500:]}")
    if left:
        failures.append(f"{len(left)} processes are left")
    if whole_code:
        failures.append(f"two processes that were not stopped ended with {whole_code}: {whole_told[-3000:]}")
    if code or not resumed or [int(resumed[1])] != stopped:
        failures.append(f"resuming in two processes ended with {code}: {told[-3000:]}")
    if not failures:
        failures += [f"differs in {name}" for name in differences(run, outcome(Path(whole.output_dir or "")))]
    return Finding(
        "SIGTERM to torchrun with two processes",
        "1 random moment",
        "not as it should be"
        if failures
        else "a checkpoint of the step at hand, no process left, the resumed run bit-identical; torchrun itself ends "
        f"with {launcher}, whatever its processes end with",
        "`python -m torch.distributed.run --nproc_per_node 2 -m gac_plugin.train`, gloo; compared with two processes "
        "that were not stopped",
        {"launcher": launcher, "left": len(left)},
        failures,
    )


def resume(options: Options) -> list[Finding]:
    """Interrupted and resumed against uninterrupted, for one and two processes with and without loader workers."""
    base = replace(TINY, steps=300, checkpoint_every=100, seed=options.seed)
    failures, cases = [], 0
    for count in (1, 2):
        whole = options.work / f"resume-{count}-whole"
        code, said = call(program(replace(base, output_dir=str(whole)), count), options.work / "whole.log")
        assert code == 0, said
        for workers in (0, 2):
            name = f"{count} processes, {workers} workers"
            cases += 1
            run = options.work / f"resume-{count}-{workers}"
            config = replace(base, output_dir=str(run), workers=workers)
            _, stopped = signal_at(config, options.random(name).randrange(base.steps // 2), signal.SIGTERM, count)
            log = options.work / f"resume-{count}-{workers}.log"
            code, said = call(program(replace(config, resume="auto"), count), log)
            resumed = GOING_ON.search(said)
            if not SAVED.search(stopped) or code != 0 or not resumed:
                failures.append(f"{name}: ended with {code}: {stopped[-500:]} {said[-500:]}")
                continue
            wrong = differences(run, outcome(whole))
            failures += [f"{name}: differs in {', '.join(wrong)}"] if wrong else []
            say(f"  {name}: stopped at step {resumed[1]}, resumed")
    return [
        Finding(
            "interrupted and resumed against uninterrupted",
            f"{cases} cases: 1 and 2 processes, 0 and 2 loader workers each",
            f"{cases - len(failures)} of {cases} bit-identical: weights, optimizers, metrics, pictures",
            "SIGTERM at a random step, then `--resume auto`; all workers' runs compared with the one without workers",
            {"cases": cases, "failed": len(failures)},
            failures,
        )
    ]
