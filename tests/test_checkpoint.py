"""Checkpoints: exact, whole or absent, verified, never unpickled."""

import errno
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import corrupt
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import lr_scheduler

from gac_plugin import GAC, ConjugateGradient
from gac_plugin.errors import UsageError
from gac_plugin.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    newest_intact,
    read_checkpoint,
)


class Box:
    """Anything with a state."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def same(a, b):
    """Whether two states agree in every type, key, order and bit."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8).tolist() for t in (a, b)]
        return raw[0] == raw[1]
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        noted = [getattr(state, "_metadata", None) for state in (a, b)]
        return same(list(a.items()), list(b.items())) and (noted[0] is None or same(*noted))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def save(folder, step=500, parts=None, facts=None, texts=None, **options):
    """Write one checkpoint and return its folder."""
    with Checkpoints(folder, options.pop("keep", 3)) as checkpoints:
        parts = {"box": Box({"a": torch.arange(3.0)})} if parts is None else parts
        checkpoints.save(step, parts, facts or {}, texts or {}, **options)
    return folder / f"step-{step:07d}"


def round_trip(folder, state):
    return read_checkpoint(save(folder, parts={"box": Box(state)})).states["box"]


def python(code, *arguments):
    """Run code in a process of its own, which the system may kill or limit."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)


def steps(folder):
    return sorted(path.name for path in folder.iterdir())


VALUES = {
    "integers": [0, -1, 2**80, True, False, None],
    "floats": [0.1, -0.0, 1e-320, math.inf, -math.inf, math.nan, 3.0],
    "strings": ["", "$tensor", "ü\n", "\ud800", "nan"],
    "nested": ({"a": [(), [], {}, (1, (2.5,))]}, [[1], {"b": None}]),
    "integer keys": {3: "c", 1: "a", 2: {"x": {0: torch.tensor(1.0)}}},
    "other keys": {True: 1, None: 2, 1.5: 3, math.inf: 4, "1.5": 5, 7: 6},
    "markers": {"$tensor": "a", "$dict": [[1, 2]], "$": {"$float": "nan"}, "$metadata": 3},
    "one marker": {"a": 1, "$tuple": [1]},
    "counter": Counter({30: 1, 10: 2}),
    "ordered": OrderedDict([("b", 1), (2, OrderedDict())]),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(tmp_path, name):
    assert same(round_trip(tmp_path, {"value": VALUES[name]}), {"value": VALUES[name]})


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, torch.bool], ids=str)
def test_tensors_of_every_type_come_back(tmp_path, dtype):
    values = torch.tensor([[0.0, 1.0, 3.0], [7.0, 0.0, 100.0]])
    state = {
        "byte first": torch.tensor(3, dtype=torch.uint8),
        "matrix": values.to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "turned": values.to(dtype).T,
        "double": torch.tensor(0.1, dtype=torch.float64),
    }
    assert same(round_trip(tmp_path, state), state)


def test_odd_tensors_come_back(tmp_path):
    base = torch.randn(4, 6)
    nan = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000], dtype=torch.int64).to(torch.int32).view(torch.float32)
    state = {
        "shared": [base, base, base[1:, ::2], base.T],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "bits": nan,
        "with gradient": nn.Parameter(torch.randn(2)),
        "a": {"b": torch.tensor(1.0)},
        "a.b": torch.tensor(2.0),
        "\ud800": torch.tensor(3.0),
    }
    assert same(round_trip(tmp_path, state), state)
    assert same(round_trip(tmp_path, {"__metadata__": torch.tensor(1.0)}), {"__metadata__": torch.tensor(1.0)})
    assert same(round_trip(tmp_path, torch.tensor(1.0)), torch.tensor(1.0))


def test_tensor_names_read_naturally(tmp_path):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    folder = save(tmp_path, parts={"optimizer": optimizer})
    tensors = load_file(folder / "optimizer.safetensors")
    assert set(tensors) == {"state.0.step", "state.0.exp_avg", "state.0.exp_avg_sq"}
    assert torch.equal(tensors["state.0.exp_avg"], optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize(
    ("state", "entry"),
    [
        ({"a": [1, {2, 3}]}, r"'box'.*entry 'a\.1' is a set"),
        ({"a": {"f": max}}, r"entry 'a\.f' is a builtin_function_or_method"),
        ({"a": np.float64(1)}, r"entry 'a' is a float64"),
        ({"a": {(1, 2): 3}}, r"entry 'a' has a key that is a tuple"),
        ({"a": torch.eye(2).to_sparse()}, r"entry 'a' is a tensor of torch\.float32, torch\.sparse_coo"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, r"entry 'a' is a tensor of torch\.complex64"),
        ({"a": torch.zeros(1, device="meta")}, r"entry 'a' is a tensor of .* on meta"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, state, entry):
    with pytest.raises(UsageError, match=entry):
        save(tmp_path, parts={"box": Box(state)})
    assert steps(tmp_path) == []


def test_facts_and_texts_come_back(tmp_path):
    facts = {"epoch": 3, "best": math.inf, "seen": {7: (1, 2)}}
    texts = {"metrics.jsonl": '{"a": 1}\nü', "empty.txt": "", "crlf.txt": "a\r\nb"}
    checkpoint = read_checkpoint(save(tmp_path, 12345678, {}, facts, texts))
    assert (checkpoint.step, checkpoint.states) == (12345678, {})
    assert same(checkpoint.facts, facts)
    assert checkpoint.texts == texts
    assert (checkpoint.folder / "metrics.jsonl").read_text(encoding="utf-8") == texts["metrics.jsonl"]
    assert same(json.loads((checkpoint.folder / "facts.json").read_text())["epoch"], 3)


@pytest.mark.parametrize("name", ["../up", "a/b", "/root", "", ".hidden", "facts.json", "manifest.json", "box.json"])
def test_names_that_do_not_suit_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="choose a plain name that is not taken"):
        save(tmp_path, texts={name: ""})


def test_a_tensor_among_the_facts_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"tensor 'best\.fid'; make it a part"):
        save(tmp_path, facts={"best": {"fid": torch.tensor(1.0)}})


def test_at_least_one_is_kept(tmp_path):
    with pytest.raises(UsageError, match="keep at least one checkpoint, got 0"):
        Checkpoints(tmp_path, keep=0)


class Run:
    """A small GAN whose every part has state."""

    def __init__(self, optimizer, schedule, dtype=torch.float32):
        torch.manual_seed(11)
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        layers = spectral_norm(nn.Linear(4, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 1))
        self.discriminator = nn.Sequential(*layers).to(dtype)
        self.optimizer = optimizer(self.generator.parameters())
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), 0.01)
        self.schedule = schedule(self.optimizer)
        self.gac = GAC(
            self.generator, self.discriminator, self.optimizer, self.discriminator_optimizer, penalty="r1", latent=3
        )
        self.dtype = dtype

    @property
    def parts(self):
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
            "schedule": self.schedule,
            "gac": self.gac,
        }

    def train(self, start, stop):
        for step in range(start, stop):
            draw = torch.Generator().manual_seed(step)
            real, z = (torch.randn(6, size, generator=draw).to(self.dtype) for size in (4, 3))
            self.gac.step(real, z)
            self.schedule.step()

    def states(self):
        return {name: part.state_dict() for name, part in self.parts.items()}


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "cg adam": lambda p: ConjugateGradient(p, 0.01, rule="pr+", metric="adam"),
    "cg spectral": lambda p: ConjugateGradient(p, 0.01, rule="pr+", metric="spectral"),
    "cg kronecker": lambda p: ConjugateGradient(p, 0.01, rule="pr+", metric="kronecker"),
    "cg none": lambda p: ConjugateGradient(p, 0.01, rule="none"),
}
SCHEDULES = {
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 6, 6, 9], 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=30, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
}
CASES = [(optimizer, "multistep", torch.float32) for optimizer in OPTIMIZERS]
CASES += [("adam", schedule, torch.float32) for schedule in SCHEDULES]
CASES += [(f"cg {metric}", "cosine", torch.bfloat16) for metric in ("adam", "spectral", "kronecker")]


@pytest.mark.parametrize(("optimizer", "schedule", "dtype"), CASES)
@pytest.mark.parametrize("first", [0, 5])
def test_a_run_goes_on_bit_for_bit(tmp_path, optimizer, schedule, dtype, first):
    kinds = OPTIMIZERS[optimizer], SCHEDULES[schedule], dtype
    whole = Run(*kinds)
    whole.train(0, 10)

    before = Run(*kinds)
    before.train(0, first)
    folder = save(tmp_path, first, before.parts)
    assert same(read_checkpoint(folder).states, before.states())

    after = Run(*kinds)
    after.train(20, 23)  # whatever is not restored shows
    read_checkpoint(folder).restore(after.parts)
    after.train(first, 10)
    assert same(after.states(), whole.states())
    if optimizer.startswith("cg") and optimizer != "cg none":
        assert {state["inner"].dtype for state in after.optimizer.state.values()} == {torch.float32}


def test_a_gradient_scaler_goes_on(tmp_path):
    def make(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        parameter = nn.Parameter(torch.ones(2))
        return scaler, parameter, torch.optim.SGD([parameter], 0.1)

    def train(scaler, parameter, optimizer, factors):
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale((parameter * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    scaler, *rest = make(64.0)
    train(scaler, *rest, [1.0, math.inf, 1.0, 1.0])
    assert scaler.get_scale() == 32.0
    folder = save(tmp_path, parts={"scaler": scaler})
    again, *rest = make(2.0)
    read_checkpoint(folder).restore({"scaler": again})
    assert same(again.state_dict(), scaler.state_dict())
    train(again, *rest, [1.0])
    assert again.get_scale() == 64.0, "the third good step in a row doubles the scale"


def test_a_checkpoint_can_be_restored_twice(tmp_path):
    run = Run(OPTIMIZERS["cg adam"], SCHEDULES["multistep"])
    run.train(0, 3)
    checkpoint = read_checkpoint(save(tmp_path, parts=run.parts))
    expected = []
    for _ in range(2):
        checkpoint.restore(run.parts)
        run.train(3, 6)
        expected.append(read_checkpoint(save(tmp_path, parts=run.parts)).states)
    assert same(*expected)


def test_a_save_is_of_the_moment_it_is_called(tmp_path):
    """Also when memory is used again, after states have grown and have lost a tensor."""
    states = [
        {"a": torch.arange(5.0), "l": [1]},
        {"a": torch.arange(5.0) + 1, "l": [1, 2]},
        {"a": torch.arange(9.0), "b": torch.tensor(2), "l": []},
        {"b": torch.tensor(3), "l": [None]},
    ]
    kept = [{"a": torch.arange(5.0), "l": [1]}, {"a": torch.arange(5.0) + 1, "l": [1, 2]}]
    kept += [{"a": torch.arange(9.0), "b": torch.tensor(2), "l": []}, {"b": torch.tensor(3), "l": [None]}]
    facts = {"n": [0]}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, state in enumerate(states):
            checkpoints.save(step, {"box": Box(state)}, facts)
            for value in state.values():
                value.clear() if isinstance(value, list) else value.zero_()
            facts["n"][0] += 1
    for step, state in enumerate(kept):
        checkpoint = read_checkpoint(tmp_path / f"step-{step:07d}")
        assert same(checkpoint.states, {"box": state})
        assert checkpoint.facts == {"n": [step]}


def test_save_returns_while_the_disk_is_at_work(tmp_path, monkeypatch):
    go, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (go.wait(20), sync(handle)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, {})
    checkpoints.check()
    assert not (tmp_path / "step-0000001").exists()
    go.set()
    checkpoints.wait()
    assert (tmp_path / "step-0000001").exists()
    checkpoints.wait()


def test_the_last_save_of_a_process_that_just_ends_is_on_the_disk(tmp_path):
    code = (
        "import sys; from pathlib import Path; from gac_plugin.training.checkpoint import Checkpoints\n"
        "Checkpoints(Path(sys.argv[1])).save(7, {}, {'a': 1}); raise SystemExit(3)"
    )
    assert python(code, tmp_path).returncode == 3
    assert read_checkpoint(tmp_path / "step-0000007").facts == {"a": 1}


def test_files_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, Path.rename

    def note_sync(handle):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def note_rename(path, target):
        events.append(("rename", path.name, target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    save(tmp_path)
    temporary = ".step-0000500.new"
    files = ["box.safetensors", "box.json", "facts.json", "manifest.json", temporary]
    expected = [*(("sync", name) for name in files), ("rename", temporary, "step-0000500"), ("sync", tmp_path.name)]
    assert events == expected


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in (".step-0000500.new", ".step-12345678.old", ".step-5.new", ".mine", "step-0000400"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".step-0000300.old").write_text("a file")
    Checkpoints(tmp_path)
    assert steps(tmp_path) == [".mine", ".step-5.new", "step-0000400"]


KILLED = """
import os, signal, sys
from pathlib import Path
from gac_plugin.training.checkpoint import Checkpoints
count = 0
def counted(original, fatal):
    def call(*arguments, **options):
        global count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call
for folder in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        fatal = int(Path(folder).name)
        os.fsync, os.rmdir, os.unlink = (counted(call, fatal) for call in (os.fsync, os.rmdir, os.unlink))
        Path.rename = counted(Path.rename, fatal)
        checkpoints = Checkpoints(Path(folder), keep=2)
        checkpoints.save(3, {}, {"a": 3})
        checkpoints.wait()
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_a_kill_at_any_moment_leaves_the_others_intact(tmp_path):
    """The process is killed at each call that syncs, renames or removes, in turn; also where it replaces the step."""
    folders = [tmp_path / kind / str(fatal) for kind in ("new", "replaced") for fatal in range(1, 20)]
    for folder in folders:
        for step in (1, 2, 3) if folder.parent.name == "replaced" else (1, 2):
            save(folder, step, {}, {"a": step})
    statuses = python(KILLED, *folders).stdout.split()
    assert set(statuses) == {"0", str(int(signal.SIGKILL))}
    for folder, status in zip(folders, statuses, strict=True):
        newest = newest_intact(folder, pytest.fail)  # nothing half-made or half-removed shows
        assert newest.step in ((3,) if status == "0" else (2, 3))
        assert newest.facts == {"a": newest.step}
        Checkpoints(folder)
        assert all(name.startswith("step-") for name in steps(folder))
    assert steps(folders[-1]) == ["step-0000002", "step-0000003"]


def test_the_newest_and_the_best_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, {}, {}, keep_also={2, 40})
    assert steps(tmp_path) == ["step-0000002", "step-0000005", "step-0000006"]


def test_going_back_does_not_lose_what_is_written_then(tmp_path):
    """A damaged later checkpoint is newer by name, and must not crowd out the ones that follow."""
    for step in (8, 9):
        save(tmp_path, step)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (4, 5):
            checkpoints.save(step, {}, {})
    assert steps(tmp_path) == ["step-0000005", "step-0000008", "step-0000009"]


@pytest.mark.parametrize("spoil", [lambda path: None, lambda path: (path / "box.json").unlink(), "file"])
def test_one_of_the_same_step_is_replaced(tmp_path, spoil):
    folder = save(tmp_path)
    (folder / "old").write_text("")
    if spoil == "file":
        shutil.rmtree(folder)
        folder.write_text("")
    else:
        spoil(folder)
    save(tmp_path, parts={"other": Box({"b": 2})})
    assert read_checkpoint(folder).states == {"other": {"b": 2}}
    assert steps(folder) == ["facts.json", "manifest.json", "other.json", "other.safetensors"]
    assert steps(tmp_path) == [folder.name]


@pytest.mark.parametrize("way", ["check", "save", "wait", "exit"])
@pytest.mark.parametrize(
    ("number", "mend"), [(errno.ENOSPC, "free some space"), (errno.EIO, "make its folder writable")]
)
def test_a_full_disk_is_told_and_harms_nothing(tmp_path, monkeypatch, way, number, mend):
    save(tmp_path, 1)
    sync, calls = os.fsync, []

    def fail(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"box": Box({"a": torch.ones(3)})}, {})
    checkpoints._thread.join()
    path = tmp_path / "step-0000002"
    line = f"cannot write the checkpoint {path}: {os.strerror(number)}; {mend}, then go on with --resume auto"
    ways = {"save": lambda: checkpoints.save(3, {}, {}), "exit": lambda: checkpoints.__exit__(None)}
    with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
        ways.get(way, getattr(checkpoints, way, None))()
    assert steps(tmp_path) == ["step-0000001"]
    checkpoints.check()  # told once
    checkpoints.save(3, {}, {})
    checkpoints.wait()
    assert newest_intact(tmp_path, pytest.fail).step == 3


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: os.write(-1, b""))

    def fail():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {}, {})
            raise KeyError("block")

    with pytest.raises(KeyError, match="block"):
        fail()
    assert steps(tmp_path) == [], "and the write had ended"


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from gac_plugin.training.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(2, {"linear": torch.nn.Linear(200, 200)}, {})
checkpoints.wait()
"""


def test_a_limit_of_the_system_on_files_is_told(tmp_path):
    """EFBIG from the kernel, in the middle of a large file."""
    save(tmp_path, 1)
    ended = python(LIMITED, tmp_path)
    assert ended.returncode == 1
    assert "File too large; free some space, then go on with --resume auto" in ended.stderr.splitlines()[-1]
    assert steps(tmp_path) == ["step-0000001"]
    read_checkpoint(tmp_path / "step-0000001")


def test_an_error_that_is_not_the_disks_is_raised_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: [][0])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, {})
    with pytest.raises(IndexError):
        checkpoints.wait()
    assert steps(tmp_path) == []


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint with parts of every kind, its texts and facts."""
    run = Run(OPTIMIZERS["cg adam"], SCHEDULES["multistep"])
    run.train(0, 3)
    facts, texts = {"epoch": 2, "best": {3: math.inf}}, {"metrics.jsonl": '{"step": 1}\n', "empty.txt": ""}
    return save(tmp_path_factory.mktemp("original"), 500, run.parts, facts, texts)


def test_random_damage_is_detected_or_harmless(tmp_path, original):
    intact, harmless, detected = read_checkpoint(original), set(), 0
    for seed in range(200):
        folder = tmp_path / str(seed) / original.name
        shutil.copytree(original, folder)
        damage = corrupt(folder, random.Random(seed))
        try:
            found = read_checkpoint(folder)
        except DamagedCheckpoint as error:
            detected += str(error).startswith(f"the checkpoint {folder} is damaged: ") and "\n" not in str(error)
        else:
            harmless.add(damage.split(", ")[-1])
            for field in ("step", "facts", "texts", "states"):
                assert same(getattr(found, field), getattr(intact, field)), damage
    assert harmless == {"which no manifest names"}
    assert detected > 150


def test_every_bit_of_the_manifest_counts(tmp_path):
    folder = save(tmp_path)
    data = (folder / "manifest.json").read_bytes()
    for index in range(len(data)):
        for bit in range(8):
            changed = data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]
            (folder / "manifest.json").write_bytes(changed)
            with pytest.raises(DamagedCheckpoint):
                read_checkpoint(folder)
    for same_content in (data + b"\n", b" " + data, data.replace(b": ", b":"), data.replace(b"{", b'{"step": 1,', 1)):
        (folder / "manifest.json").write_bytes(same_content)
        with pytest.raises(DamagedCheckpoint):
            read_checkpoint(folder)
    (folder / "manifest.json").write_bytes(data)
    read_checkpoint(folder)


def rewrite_manifest(folder, **changes):
    """Forge a manifest that is sound in itself."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    del manifest["digest"]
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def entry(path):
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_forged_manifest_reads_nothing_elsewhere(tmp_path):
    folder = save(tmp_path / "run")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    rewrite_manifest(folder, files=files)
    assert read_checkpoint(folder).texts == {}, "a forged manifest is what this test makes"
    for name in ("../../secret.txt", str(secret), "a/../../../secret.txt", "..", ""):
        rewrite_manifest(folder, files=files | {name: entry(secret)})
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json does not hold"):
            read_checkpoint(folder)
    (folder / "link.txt").symlink_to(secret)
    rewrite_manifest(folder, files=files | {"link.txt": entry(secret)})
    with pytest.raises(DamagedCheckpoint, match=r"link\.txt is not a file"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "500"},
        {"step": None},
        {"parts": ["box", "absent"]},
        {"parts": ["box", "box"]},
        {"parts": 3},
        {"parts": [3]},
        {"files": {}},
        {"files": ["box.json"]},
        {"files": {"facts.json": 3}},
        {"format": 0},
        {"format": "1"},
        {"format": None},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, changes):
    folder = save(tmp_path)
    rewrite_manifest(folder, **changes)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        read_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "3", "[]", "{}", "null", "[" * 100_000, '{"format": 1}', "\x00"])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    folder = save(tmp_path)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        read_checkpoint(folder)


@pytest.mark.parametrize("text", ['{"$unknown": 1}', '{"$tensor": "b"}', '{"$tuple": 3}', '{"$dict": [3]}', "nonsense"])
def test_a_state_that_was_not_packed_is_refused(tmp_path, text):
    folder = save(tmp_path)
    (folder / "box.json").write_text(text)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    rewrite_manifest(folder, files=files | {"box.json": entry(folder / "box.json")})
    with pytest.raises(DamagedCheckpoint, match=r"box\.json does not hold a state"):
        read_checkpoint(folder)


def test_a_newer_format_is_told(tmp_path):
    folder = save(tmp_path)
    rewrite_manifest(folder, format=2)
    with pytest.raises(DamagedCheckpoint, match="has format 2, and this gac-plugin reads up to 1; install a newer one"):
        read_checkpoint(folder)


def test_the_step_is_that_of_the_folders_name(tmp_path, monkeypatch):
    folder = save(tmp_path)
    monkeypatch.chdir(folder)
    assert read_checkpoint(Path()).step == 500
    renamed = folder.rename(tmp_path / "step-0000600")
    with pytest.raises(DamagedCheckpoint, match=r"step-0000600 is damaged: manifest\.json is that of step 500"):
        read_checkpoint(renamed)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("forged", [False, True])
def test_nothing_is_unpickled(tmp_path, forged):
    folder, mark = save(tmp_path / "run"), str(tmp_path / "mark")
    bomb = pickle.dumps(Bomb(mark))
    for name in ("optimizer.bin", "pytorch_model.bin", "random_states_0.pkl", "scheduler.bin", "box.pt"):
        (folder / name).write_bytes(bomb)
    assert same(read_checkpoint(folder).states, {"box": {"a": torch.arange(3.0)}}), "extra files are not looked at"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name in ("box.safetensors", "box.json", "facts.json", "manifest.json"):
        (folder / name).write_bytes(bomb)
        if forged and name != "manifest.json":
            rewrite_manifest(folder, files=files | {name: entry(folder / name)})
        with pytest.raises(DamagedCheckpoint):
            read_checkpoint(folder)
        shutil.rmtree(folder)
        save(tmp_path / "run")
    assert not os.path.exists(mark)
    pickle.loads(bomb)
    assert os.path.exists(mark), "the bomb works"


def test_the_newest_intact_one_is_found(tmp_path):
    for step in (9_999_999, 10_000_000, 10_000_001):
        save(tmp_path, step, {}, {"step": step}, keep=9)
    (tmp_path / "step-10000000" / "facts.json").unlink()
    (tmp_path / "step-10000001" / "manifest.json").write_text("")
    (tmp_path / "step-99999999.bak").mkdir()
    (tmp_path / ".step-99999999.new").mkdir()
    said, path = [], tmp_path / "step-1000000"
    assert newest_intact(tmp_path, said.append).facts == {"step": 9_999_999}
    assert said == [
        f"the checkpoint {path}1 is damaged: manifest.json is not a manifest; looking for an older one",
        f"the checkpoint {path}0 is damaged: facts.json cannot be read: No such file or directory; "
        "looking for an older one",
    ]


def test_no_checkpoint_is_not_a_damaged_one(tmp_path):
    assert newest_intact(tmp_path / "absent", pytest.fail) is None
    (tmp_path / "notes").mkdir()
    assert newest_intact(tmp_path, pytest.fail) is None
    (tmp_path / "step-0000001").write_text("a file")
    with pytest.raises(UsageError, match=r"no checkpoint in .* is intact; choose another --output-dir, or pass --over"):
        newest_intact(tmp_path, lambda line: None)
    with pytest.raises(UsageError, match=r"cannot read .*step-0000001: Not a directory; choose another --output-dir"):
        newest_intact(tmp_path / "step-0000001", pytest.fail)


@pytest.mark.parametrize("names", [["box"], ["box", "other", "third"], []])
def test_other_parts_are_refused_before_anything_changes(tmp_path, names):
    folder = save(tmp_path, parts={"box": Box({"a": 1}), "other": Box({})})
    boxes = {name: Box("untouched") for name in names}
    with pytest.raises(UsageError, match=r"holds box, other, and the run has .*; resume with the settings"):
        read_checkpoint(folder).restore(boxes)
    assert all(box.state == "untouched" for box in boxes.values())


def test_a_part_that_does_not_fit_is_named(tmp_path):
    folder = save(tmp_path, parts={"generator": nn.Linear(2, 3)})
    with pytest.raises(UsageError, match=r"^the state of 'generator' in .* does not fit: size mismatch for bias: .*$"):
        read_checkpoint(folder).restore({"generator": nn.Linear(2, 4)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_is_copied_exactly(tmp_path):
    cuda = torch.device("cuda")
    states = [{"a": torch.randn(1000, 1000, device=cuda), "step": torch.tensor(3.0)} for _ in range(3)]
    kept = [{name: tensor.cpu().clone() for name, tensor in state.items()} for state in states]
    with Checkpoints(tmp_path) as checkpoints:
        for step, state in enumerate(states):
            checkpoints.save(step, {"box": Box(state)}, {})
            state["a"].zero_()
    for step, state in enumerate(kept):
        checkpoint = read_checkpoint(tmp_path / f"step-{step:07d}")
        assert same(checkpoint.states["box"], state)
