"""Launching: the example files are valid, every flag they show exists, and two processes really are two."""

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import gac_plugin.training
from gac_plugin.train import OneLineParser, add_arguments

ROOM = Path(gac_plugin.training.__file__).parent
README, SLURM = ROOM / "README.md", ROOM / "launch" / "slurm.sh"
YAML = sorted((ROOM / "launch").glob("*.yaml"))
MARK = re.compile(r"\bgac train\b|-m gac_plugin\.train\b")


def commands(text: str) -> list[str]:
    """The lines of shell code, continued lines joined and comments left out."""
    joined = text.replace("\\\n", " ")
    return [line for line in (line.split(" #")[0].strip() for line in joined.splitlines()) if not line.startswith("#")]


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_commands() -> list[str]:
    """Every shell command of the page, of the Slurm script and of the launch files' comments."""
    blocks = [*code_blocks("bash"), SLURM.read_text(encoding="utf-8")]
    notes = [re.sub(r"^# *", "", line) for file in YAML for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for block in blocks for line in commands(block)] + [n for n in notes if n.startswith("accelerate ")]


def gac_arguments() -> list[list[str]]:
    """What each command passes to `gac train`."""
    found = [(line, MARK.search(line)) for line in shell_commands()]
    return [
        [word for word in shlex.split(line[mark.end() :]) if word not in ("&", "...")] for line, mark in found if mark
    ]


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(prog="gac train", allow_abbrev=False)
    add_arguments(made)
    return made


def test_the_page_and_the_script_show_commands():
    assert len(gac_arguments()) >= 10
    assert {file.name for file in YAML} >= {"one_machine.yaml", "several_machines.yaml"}


@pytest.mark.parametrize("arguments", gac_arguments(), ids=" ".join)
def test_every_flag_shown_is_one_of_gac_train(arguments):
    parser().parse_args(arguments)


@pytest.mark.parametrize(
    "line", [line for line in shell_commands() if line.startswith("accelerate launch")], ids=lambda line: line[:70]
)
def test_every_flag_shown_is_one_of_accelerate_launch(line):
    launched = launch_command_parser().parse_args(shlex.split(line)[2:])
    assert launched.module
    assert launched.training_script == "gac_plugin.train"


def test_every_flag_shown_is_one_of_torchrun():
    launcher = pytest.importorskip("torch.distributed.run").get_args_parser()
    lines = [line[line.index("torchrun ") :] for line in shell_commands() if "torchrun " in line]
    assert len(lines) >= 4
    for line in lines:
        launched = launcher.parse_args([word for word in shlex.split(line)[1:] if word != "&"])
        assert (launched.module, launched.training_script) == (True, "gac_plugin.train"), line


def test_the_settings_shown_from_python_are_fields_of_the_configuration():
    (block,) = (block for block in code_blocks("python") if "notebook_launcher" in block)
    shown = re.findall(r"Config\((.*)\)", block)
    flags = {action.dest for action in parser()._actions}
    assert shown
    assert {name for call in shown for name in re.findall(r"(\w+)=", call)} <= flags


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_a_launch_file_is_one_that_accelerate_reads(file):
    read, written = load_config_from_file(str(file)), yaml.safe_load(file.read_text(encoding="utf-8"))
    assert read.num_processes == written["num_processes"]
    assert read.num_processes % read.num_machines == 0
    assert str(getattr(read.distributed_type, "value", read.distributed_type)) == written["distributed_type"]
    assert read.mixed_precision in ("no", "bf16"), "fp16 cannot serve every schedule"
    assert not read.deepspeed_config, "DeepSpeed is refused"


def test_the_launch_files_say_what_their_names_say():
    names = ("one_machine.yaml", "several_machines.yaml")
    one, several = (load_config_from_file(str(ROOM / "launch" / name)) for name in names)
    assert (one.num_machines, several.num_machines) == (1, 2)
    assert one.num_processes > 1
    assert several.main_process_ip
    assert several.main_process_port
    assert several.machine_rank == 0


def test_the_slurm_script_is_valid_shell():
    subprocess.run(["bash", "-n", str(SLURM)], check=True, timeout=60)


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; else echo "$@" >> "$RECORD"; fi',
    # stands for srun and what it starts: records its arguments; told to stop, it takes a moment to save and ends with 1
    "srun": 'echo "$@" >> "$RECORD"; trap "sleep 0.3; echo saved >> $RECORD; exit 1" TERM\n'
    'if [ "$WORK" = forever ]; then touch "$RECORD.up"; while :; do sleep 0.05; done; fi; exit "$WORK"',
}


@pytest.fixture
def slurm(tmp_path):
    """Starts slurm.sh with stand-ins for srun and scontrol: what srun shall do -> the process, the file of records."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORD": str(record),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": "/shared/me",
    }

    def start(work: str) -> tuple[subprocess.Popen, Path]:
        return subprocess.Popen(["bash", str(SLURM)], env={**environment, "WORK": work}, cwd=tmp_path), record

    return start


@pytest.mark.parametrize("code", [0, 3])
def test_a_slurm_job_that_ends_by_itself_keeps_its_exit_code(slurm, code):
    job, record = slurm(str(code))
    assert job.wait(timeout=60) == code
    (launch,) = record.read_text().splitlines()
    assert "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d" in launch
    assert "--rdzv-endpoint node-a:29500 --rdzv-id 7 -m gac_plugin.train" in launch
    assert "--output-dir /shared/me/runs/" in launch


def test_a_slurm_job_told_to_stop_saves_and_goes_back_to_the_queue(slurm):
    job, record = slurm("forever")
    up = record.with_name("record.up")
    while not up.exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait(timeout=60) == 0
    assert record.read_text().splitlines()[1:] == ["saved", "requeue 7"]


WATCHED = """
import sys
from accelerate import PartialState
from gac_plugin.train import main
from gac_plugin.training.processes import leave

code, state = main(sys.argv[1:]), PartialState()
print(f"process {state.process_index} of {state.num_processes} ended with {code}\\n", end="", flush=True)
leave(code)
"""
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no", "--num_machines", "1")


@pytest.mark.parametrize(
    ("launcher", "environment", "flags", "processes"),
    [
        (TORCHRUN, {}, ["--mixed-precision", "bf16"], 2),
        ((*ACCELERATE, "--multi_gpu", "--main_process_port", "PORT"), {"ACCELERATE_USE_CPU": "true"}, [], 2),
        ((*ACCELERATE, "--cpu"), {}, [], 1),  # which is why the page warns of it
    ],
    ids=["torchrun, bf16", "accelerate launch", "accelerate launch --cpu"],
)
def test_as_many_processes_as_the_page_says_take_part_in_one_run(tmp_path, launcher, environment, flags, processes):
    # the module itself, and then each process says what it was
    program = tmp_path / "watched.py"
    program.write_text(WATCHED)
    with socket.create_server(("localhost", 0)) as free:  # versions of accelerate differ in what they make of port 0
        launcher = [str(free.getsockname()[1]) if word == "PORT" else word for word in launcher]
    settings = ["--steps", "3", "--cpu", "--width", "8", "--evaluation-samples", "0", "--batch-size", "16"]
    finished = subprocess.run(
        [sys.executable, "-m", *launcher, program, *settings, *flags, "--output-dir", tmp_path / "run"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    said = [line for line in finished.stdout.splitlines() if line.startswith("process ")]
    assert sorted(said) == [f"process {index} of {processes} ended with 0" for index in range(processes)]
    assert finished.stdout.count("samples per second") == 1, "the table is the main process's alone"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3]
    assert (tmp_path / "run" / "generator" / "model.safetensors").is_file()
