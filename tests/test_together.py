"""What processes decide together, with two of them."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState

from gac_plugin.errors import SaidElsewhereError, UsageError, exit_code
from gac_plugin.training import Config, train
from gac_plugin.training.processes import everyones, from_main, main_only, require_one_run, together

PROGRAM = """
import sys
from accelerate import PartialState
from gac_plugin.errors import SaidElsewhereError, UsageError
from gac_plugin.training.processes import everyones, from_main, leave, main_only, together

state = PartialState(cpu=True)
rank = state.process_index
said = [state.num_processes, everyones(10 + rank), from_main(f"ta\\u00e9 {'x' * rank}")]
said.append(from_main("" if rank == 0 else "y"))
for failing in ({0}, {1}, {0, 1}, set()):
    try:
        with together():
            if rank in failing:
                raise UsageError(f"mistake of {rank}")
        said.append("fine")
    except SaidElsewhereError:
        said.append("elsewhere")
    except UsageError as error:
        said.append(str(error))
said.append(type(main_only(UsageError("all know"))).__name__)
everyone = []
for turn in range(2):  # one after the other
    everyones(0)
    if turn == rank:
        print(rank, said, flush=True)
state.destroy_process_group()
leave(0)
"""


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_two_processes_agree(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run([*launcher, program], capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    shared = "[2, [10, 11], 'ta\u00e9 ', '', "
    assert sorted(line for line in finished.stdout.splitlines() if line) == [
        f"0 {shared}'mistake of 0', 'elsewhere', 'mistake of 0', 'fine', 'UsageError']",
        f"1 {shared}'elsewhere', 'mistake of 1', 'elsewhere', 'fine', 'SaidElsewhereError']",
    ]


def test_a_mistake_in_two_processes_is_told_once(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = ["-m", "gac_plugin.train", "--cpu", "--column", "photo", "--output-dir", str(tmp_path / "run")]
    finished = subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode != 0
    assert finished.stderr.count("gac: error: no column 'photo' in the data set") == 1
    assert "exitcode  : 2" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_alone_it_costs_nothing_and_changes_nothing():
    PartialState(cpu=True)
    assert everyones(3) == [3]
    assert from_main("text") == "text"
    with together():
        pass
    with pytest.raises(UsageError, match=r"^mine$"), together():
        raise UsageError("mine")
    mistake = UsageError("x")
    assert main_only(mistake) is mistake


def test_what_another_process_tells_is_not_told_again(capsys):
    def command() -> None:
        raise SaidElsewhereError("x")

    assert exit_code(command) == 2
    assert capsys.readouterr().err == ""


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch):
    """torchrun without GPUs and without --cpu."""
    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"2 processes were started and each would train alone .* pass --cpu"):
        require_one_run()


def test_an_engine_that_shards_is_refused(monkeypatch):
    PartialState(cpu=True)
    require_one_run()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"shares whole networks between processes \(DDP\)"):
        require_one_run()


@pytest.mark.parametrize("launcher", ["notebook_launcher", "debug_launcher"])
def test_train_runs_in_accelerate_s_launchers(tmp_path, launcher):
    """In a process of their own, since they fork: two processes, one run."""
    program = tmp_path / "program.py"
    program.write_text(
        f"from accelerate import {launcher}\n"
        "from gac_plugin.training import Config, train\n"
        f"config = Config(output_dir={str(tmp_path / 'run')!r}, steps=3, width=8, evaluation_samples=0, cpu=True)\n"
        "if __name__ == '__main__':\n"
        f"    {launcher}(train, (config,), num_processes=2)\n"
    )
    finished = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (facts,) = (tmp_path / "run" / "checkpoints").glob("*/facts.json")
    assert '"processes":2' in facts.read_text().replace(" ", "")
    assert Path(tmp_path / "run" / "generator" / "model.safetensors").is_file()


def test_a_seed_near_the_end_of_its_range_works(tmp_path):
    train(Config(seed=2**32 - 1, steps=1, width=8, evaluation_samples=0, cpu=True, output_dir=str(tmp_path / "run")))
