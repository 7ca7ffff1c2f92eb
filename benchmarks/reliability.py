"""Does a run survive what machines do to it: kills, signals, damaged files, a full disk; and what do checkpoints cost?

    python benchmarks/reliability.py                 writes results/reliability.json and RELIABILITY.md
    python benchmarks/reliability.py --only kills    the same, measuring one section anew

Every section returns findings; one that failed says how, and the command then ends with 1. For Linux.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from gac_plugin.errors import UsageError, exit_code
from gac_plugin.training import (
    Config,
    load_discriminator,
    load_generator,
    newest_intact,
    read_checkpoint,
    train,
)
from gac_plugin.training.checkpoint import Checkpoint
from gac_plugin.training.loop import _Run
from gac_plugin.training.packing import pack

HERE, TESTS = Path(__file__).parent, Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
import two_processes  # noqa: E402
from faults import corrupt  # noqa: E402

COMMAND = "python benchmarks/reliability.py"
TINY = Config(
    steps=400,
    batch_size=16,
    latent_size=16,
    width=16,
    log_every=5,
    sample_every=100,
    evaluation_samples=0,
    checkpoint_every=10,
    cpu=True,
)
LANES, KILLED_RUNS = 2, 4
MOMENTS = 3
"""How often each signal is sent."""
UNREAD = ("README.md", "samples.png")
"""What stands beside a network and is not loaded with it."""
ROUNDS = 5
PICKLES = ("optimizer.bin", "pytorch_model.bin", "random_states_0.pkl", "scheduler.bin", "model.pt")
COMPLETE, UNDER_WAY = re.compile(r"step-(\d{7})"), re.compile(r"\.step-\d{7}\.(new|old)")
GOING_ON, SAVED = re.compile(r"going on from .*, step (\d+)$", re.M), re.compile(r"step (\d+) saved; go on")
PATIENCE = 300
METRICS_LIMIT = 4000
"""Bytes that hold a run's configuration but not the metrics of 30 steps."""
IN_A_SMALL_FILE_SYSTEM = (
    *("unshare", "--map-root-user", "--mount", "sh", "-c"),
    """
mount -t tmpfs none "$0" && cp -r "$1" "$0/run" || exit 99
mount -o "remount,size=$(($(df -k --output=used "$0" | tail -1) + $3))k" "$0" || exit 99
copy=$2
shift 3
"$@"
code=$?
cp -r "$0/run" "$copy"
exit $code
""",
)
"""What stands where, the run, where to copy it to afterwards, kilobytes of room for it, and a command."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `work`: a folder to work in."""

    work: Path
    kills: int = 200
    corruptions: int = 1000
    seed: int = 0

    def random(self, *case: object) -> Random:
        """Numbers of a case, the same at every run."""
        return Random(" ".join(map(str, (self.seed, *case))))


@dataclass(frozen=True)
class Finding:
    """A line of the table. `figures` are for programs; `failures` are empty where all went as it should."""

    what: str
    count: str
    result: str
    how: str
    figures: dict[str, Any]
    failures: list[str] = field(default_factory=list)


# ---- runs in processes of their own


def processes() -> multiprocessing.context.ForkServerContext:
    """Where processes come from that have imported everything and done nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gac_plugin.training", "gac_plugin.adapters.mlp", "torch._dynamo"])
    return context


class Life:
    """`gac train` in such a process; what it says goes to a file.

    multiprocessing asks all children for their exit codes whenever one starts, and an exit code can be read only once:
    in threads that takes a lock.
    """

    _lock = threading.Lock()

    def __init__(self, config: Config, log: Path) -> None:
        self._process = processes().Process(target=_train_here, args=(config, log))
        with self._lock:
            self._process.start()

    def wait(self, seconds: float) -> int | None:
        """The exit code; None if it is still running after so many seconds."""
        multiprocessing.connection.wait([self._process.sentinel], seconds)
        with self._lock:
            return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        with self._lock:
            self._process.kill()


def _train_here(config: Config, log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    sys.exit(exit_code(lambda: train(config)))


def finish(config: Config) -> tuple[int | None, str]:
    """Run to the end: the exit code, and what was said."""
    log = Path(f"{config.output_dir}.log")
    return Life(config, log).wait(PATIENCE), log.read_text()


def program(config: Config, count: int = 1) -> list[str]:
    """The command line of a run in so many processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m"] if count > 1 else []
    flags = []
    for item in fields(Config):
        value = getattr(config, item.name)
        if value != item.default:
            flag = "--" + item.name.replace("_", "-")
            flags += [flag] if value is True else [flag, str(value)]
    return [sys.executable, "-m", *launcher, "gac_plugin.train", *flags]


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command with one thread, which says what it says to a file; it is dead when the block ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def call(command: list[str], log: Path) -> tuple[int, str]:
    """The exit code of a command, and what it said."""
    with running(command, log) as process:
        code = process.wait(PATIENCE)
    return code, log.read_text()


def signal_at(config: Config, step: int, number: int, count: int = 1) -> tuple[int, str]:
    """Start a run, send it a signal once it has come so far; its exit code, and what it said."""
    log = Path(f"{config.output_dir}.log")
    metrics = Path(config.output_dir or "") / "metrics.jsonl"
    with running(program(config, count), log) as process:
        while process.poll() is None and (not metrics.exists() or last_step(metrics) < step):
            time.sleep(0.002)
        process.send_signal(number)
        code = process.wait(PATIENCE)
    return code, log.read_text()


def last_step(metrics: Path) -> int:
    """The step of the last whole line."""
    lines = metrics.read_text().rpartition("\n")[0].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def still_there(text: str) -> list[int]:
    """Processes with a text in their command line, other than this one."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and text.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return [number for number in found if number != os.getpid()]


# ---- what runs leave behind


def step_folder(step: int) -> str:
    return f"step-{step:07d}"


def complete(run: Path) -> list[int]:
    """Steps of the checkpoints that stand under their final names, in rising order."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(match[1]) for match in map(COMPLETE.fullmatch, names) if match)


def under_way(run: Path) -> set[tuple[str, int, int]]:
    """Checkpoints half written or half removed: names, and what tells them from others of the same name."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(run / "checkpoints"):
            with contextlib.suppress(FileNotFoundError):
                if UNDER_WAY.fullmatch(entry.name):
                    status = entry.stat()
                    found.add((entry.name, status.st_ino, status.st_mtime_ns))
    return found


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves that must repeat: all but its configuration and the clock."""
    newest = run / "checkpoints" / step_folder(complete(run)[-1])
    files = [
        *(path for part in ("generator", "discriminator", "samples") for path in (run / part).iterdir()),
        *(path for path in newest.iterdir() if path.name not in ("facts.json", "manifest.json", "metrics.jsonl")),
    ]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{name: value for name, value in record.items() if name != "seconds"} for record in records]
    return {"metrics": timeless, **{str(path.relative_to(run)): path.read_bytes() for path in files}}


def differences(run: Path, expected: dict[str, Any]) -> list[str]:
    """Names of what a run left that is not as expected, to the last bit."""
    found = outcome(run)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def equal_checkpoints(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints hold the same, to the last bit."""
    (tree_a, tensors_a), (tree_b, tensors_b) = (pack(checkpoint.states, "states") for checkpoint in (a, b))
    same = (a.step, a.facts, a.texts, tree_a) == (b.step, b.facts, b.texts, tree_b)
    return same and all(torch.equal(value, tensors_b[name]) for name, value in tensors_a.items())


def say(text: str) -> None:
    print(text, flush=True)


# ---- sections


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


def corruptions(options: Options) -> list[Finding]:
    """Damage to checkpoints, and to the folders of finished networks."""
    config = replace(TINY, steps=30, seed=options.seed, output_dir=str(options.work / "intact"))
    code, said = finish(config)
    assert code == 0, said
    run = options.work / "intact"
    return [_damage_checkpoints(options, run), _damage_networks(options, run)]


def _damage_checkpoints(options: Options, run: Path) -> Finding:
    steps = complete(run)[::-1]
    intact = {step: read_checkpoint(run / "checkpoints" / step_folder(step)) for step in steps}
    detected, harmless, failures = 0, 0, []
    for case in range(options.corruptions):
        random, folder = options.random("checkpoint", case), options.work / "damaged"
        shutil.copytree(run / "checkpoints", folder)
        touched = steps[: random.choice((1, 1, 1, 2))]
        damage = [corrupt(folder / step_folder(step), random) for step in touched]
        told: list[str] = []
        try:
            found = newest_intact(folder, told.append)
        except Exception as error:
            failures.append(f"case {case}, {damage}: {error!r}")
        else:
            passed_over = [step for step in steps if found is None or step > found.step]
            named = [f"{step_folder(step)} is damaged: " in line for step, line in zip(passed_over, told, strict=False)]
            right = len(told) == len(passed_over) and all(named) and set(passed_over) <= set(touched)
            if found is None or not right or not equal_checkpoints(found, intact[found.step]):
                failures.append(f"case {case}, {damage}: {found and found.step}, {told}")
            detected += bool(passed_over)
            harmless += not passed_over
        shutil.rmtree(folder)
        if (case + 1) % 250 == 0:
            say(f"  {case + 1} damaged checkpoints")
    return Finding(
        "damaged checkpoints: truncated, bit-flipped, missing, swapped, zeroed, lengthened, replaced by folders or "
        "links, files added",
        f"{options.corruptions} seeded cases, in a quarter of them the two newest of three",
        f"{detected} detected, said, and the newest intact one used; {harmless} of no consequence (a file added), "
        f"content equal; {len(failures)} crashes or wrong loads",
        "`tests/faults.py` on checkpoints of a run; what `newest_intact` returns compared bit for bit with what was "
        "saved",
        {"detected": detected, "harmless": harmless},
        failures,
    )


def _damage_networks(options: Options, run: Path) -> Finding:
    z = torch.randn(8, TINY.latent_size, generator=torch.Generator().manual_seed(0))
    counts = {"detected": 0, "equal": 0}
    failures = []
    with torch.no_grad():
        expected = load_generator(run)(z)
        for case in range(options.corruptions):
            random, folder = options.random("network", case), options.work / "damaged"
            shutil.copytree(run / "generator", folder / "generator", ignore=shutil.ignore_patterns(*UNREAD))
            damage = corrupt(folder / "generator", random)
            try:
                equal = torch.equal(load_generator(folder)(z), expected)
            except UsageError:
                counts["detected"] += 1
            except Exception as error:
                failures.append(f"case {case}, {damage}: {error!r}")
            else:
                counts["equal"] += equal
                failures += [] if equal else [f"case {case}, {damage}: loaded with another output"]
            shutil.rmtree(folder)
    return Finding(
        "the same damage to the folder of a finished generator, then `load_generator`",
        f"{options.corruptions} seeded cases",
        f"{counts['detected']} refused in one line; {counts['equal']} of no consequence, outputs equal; "
        f"{len(failures)} crashes or wrong loads",
        "outputs compared bit for bit",
        counts,
        failures,
    )


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


def disk_full(options: Options) -> list[Finding]:
    """A limit of the system on the size of files, and a small file system that fills up."""
    config = replace(
        TINY, steps=20, sample_every=20, width=64, seed=options.seed, output_dir=str(options.work / "before")
    )
    code, said = finish(config)
    assert code == 0, said
    longer = replace(config, steps=60)
    expected_run = options.work / "never-full"
    code, said = finish(replace(longer, output_dir=str(expected_run)))
    assert code == 0, said
    expected = outcome(expected_run)
    sizes = [path.stat().st_size for path in (options.work / "before" / "checkpoints" / step_folder(20)).iterdir()]
    checkpoint = sum(-(-size // 4096) * 4 for size in sizes)
    limits = [options.random("limit", case).randrange(max(sizes) // 2, max(sizes)) for case in range(MOMENTS)]
    # kilobytes free beside what stands there already: from next to none to almost enough
    rooms = [options.random("room", case).randrange(12, checkpoint) for case in range(2 * MOMENTS)]
    trial = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", str(options.work)]
    small = subprocess.run(trial, check=False, stderr=subprocess.DEVNULL).returncode == 0

    limited = [("limit", limit, 0, longer) for limit in limits]
    limited.append(("metrics", METRICS_LIMIT, 0, replace(longer, log_every=1)))
    filled = [("room", 0, room, longer) for room in rooms] if small else []
    cases = [(f"{name}-{number}", *case) for number, (name, *case) in enumerate((*limited, *filled))]
    with ThreadPoolExecutor(LANES) as pool:
        told = list(pool.map(lambda case: _fill_up(options, longer, expected, *case), cases))
    failures = [failure for failure in told if failure]
    return [
        Finding(
            "the disk is full",
            f"{len(limited)} limits on the size of files" + f", {len(filled)} file systems too small" * small,
            f"{len(cases) - len(failures)} of {len(cases)}: one line, exit code 2, the previous checkpoint intact, the "
            "resumed run bit-identical",
            "`python -m gac_plugin.train` under RLIMIT_FSIZE, met while a checkpoint and once while metrics were "
            "written" + ("; and in a tmpfs with room for a part of a checkpoint" * small),
            {"limits": limits, "rooms": rooms if small else [], "failed": len(failures)},
            failures,
        )
    ]


def _fill_up(
    options: Options, after: Config, expected: dict[str, Any], name: str, limit: int, room: int, config: Config
) -> str | None:
    """Go on with a run where bytes in a file or kilobytes on the disk are short, and then, `after`, where not."""
    run, log = options.work / name / "run", options.work / f"{name}.log"
    run.parent.mkdir()
    if limit:
        shutil.copytree(options.work / "before", run)
        with running(program(replace(config, output_dir=str(run), resume="auto")), log) as process:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            code = process.wait(PATIENCE)
        said = log.read_text()
    else:
        mount = options.work / f"{name}-mount"
        mount.mkdir()
        inside = program(replace(config, output_dir=str(mount / "run"), resume="auto"))
        places = map(str, (mount, options.work / "before", run, room))
        code, said = call([*IN_A_SMALL_FILE_SYSTEM, *places, *inside], log)
    wrong = []
    errors = [line for line in said.splitlines() if line.startswith("gac: error: ")]
    if code != 2 or len(errors) != 1 or "Traceback" in said:
        wrong.append(f"ended with {code}: {said[-700:]}")
    kept = newest_intact(run / "checkpoints", wrong.append)
    if kept is None or kept.step < 20 or under_way(run):
        wrong.append(f"left {sorted(os.listdir(run / 'checkpoints'))}")
    code, said = finish(replace(after, output_dir=str(run), resume="auto"))
    if code != 0:
        wrong.append(f"resumed, it ended with {code}: {said[-500:]}")
    else:
        wrong += [f"differs in {part}" for part in differences(run, expected)]
    say(f"  {name}: {'; '.join(errors) or 'no error told'}".replace(str(options.work), ""))
    return f"{name}, {limit} B or {room} KiB: {'; '.join(wrong)}" if wrong else None


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def pickles(options: Options) -> list[Finding]:
    """Pickles that leave a mark when they are opened, where a run or a network is read."""
    config = replace(TINY, steps=20, seed=options.seed, output_dir=str(options.work / "planted"))
    run, mark = options.work / "planted", options.work / "mark"
    code, said = finish(config)
    assert code == 0, said
    bomb, failures, planted = pickle.dumps(Bomb(mark)), [], 0
    newest = run / "checkpoints" / step_folder(20)
    readers: dict[Path, Callable[[], object]] = {
        newest: lambda: newest_intact(newest.parent, lambda line: None),
        run / "generator": lambda: load_generator(run),
        run / "discriminator": lambda: load_discriminator(run),
    }
    for folder, read in readers.items():
        for name in (*PICKLES, *sorted(os.listdir(folder))):
            path = folder / name
            before = path.read_bytes() if path.exists() else None
            path.write_bytes(bomb)
            planted += 1
            with contextlib.suppress(UsageError):
                read()
            path.unlink() if before is None else path.write_bytes(before)
            if mark.exists():
                failures.append(f"{folder.name}/{name} was opened")
                mark.rmdir()
    for name in (*PICKLES, "random_states_0.pkl", "generator.safetensors"):
        (newest / name).write_bytes(bomb)
    code, said = finish(replace(config, resume="auto"))
    if code != 0 or mark.exists() or "is damaged" not in said:
        failures.append(f"resuming beside pickles ended with {code}: {said[-500:]}")
    pickle.loads(bomb)
    if not mark.exists():
        failures.append("the pickle does not work, so that nothing was tested")
    return [
        Finding(
            "a pickle planted in a checkpoint or a network's folder",
            f"{planted} places, and one resumed run",
            f"{len(failures)} opened",
            f"under the names {', '.join(PICKLES)}, and in place of every file; it makes a folder when it is opened",
            {"planted": planted, "opened": len(failures)},
            failures,
        )
    ]


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


# ---- the report


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
