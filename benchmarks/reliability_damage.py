"""What is damaged, full or planted: checkpoints, disks, pickles."""

import contextlib
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability_runs import (
    LANES,
    MOMENTS,
    PATIENCE,
    TESTS,
    TINY,
    Finding,
    Options,
    call,
    complete,
    differences,
    equal_checkpoints,
    finish,
    outcome,
    program,
    running,
    say,
    step_folder,
    under_way,
)
from gac_plugin.errors import UsageError
from gac_plugin.training import Config, load_discriminator, load_generator, newest_intact, read_checkpoint

sys.path.insert(0, str(TESTS))
from faults import corrupt

UNREAD = ("README.md", "samples.png")
"""What stands beside a network and is not loaded with it."""
PICKLES = ("optimizer.bin", "pytorch_model.bin", "random_states_0.pkl", "scheduler.bin", "model.pt")
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
