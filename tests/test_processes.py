"""Several processes: the parameters are those of one process with the whole batch, for every recipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from two_processes import CASES, networks, train

PROGRAM = """
import atexit, sys
from gac_plugin.training.processes import leave
atexit.register(print, "taken apart")
print("told", end=" ")
leave(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Every case trained by two gloo processes, each with half of every batch."""
    file = tmp_path_factory.mktemp("two") / "parameters.safetensors"
    program = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run([*launch, program, file], capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return load_file(file)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_half_the_batch_each_equal_one_with_all_of_it(in_two_processes, name):
    case = CASES[name]
    # a window of batches equals the whole batch at once, except where each forward pass leaves a trace in D
    in_windows = case.spectral and case.accumulation > 1
    expected = train(case, Accelerator(cpu=True) if in_windows else None)
    AcceleratorState._reset_state(reset_partial_state=True)
    start = {
        f"{role}.{key}": value.detach()
        for role, network in zip("GD", networks(case), strict=True)
        for key, value in network.named_parameters()
    }
    for role in "GD":
        moved = max(float((expected[key] - start[key]).abs().max()) for key in expected if key.startswith(role))
        assert moved > 0.01, f"{role} has not moved, so that nothing is compared"
    tolerance = 1e-9 if case.dtype == torch.float64 else 1e-5
    for key, value in expected.items():
        torch.testing.assert_close(in_two_processes[f"{name} {key}"], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("code", [0, 2, 130])
@pytest.mark.parametrize(("started", "said"), [("1", "told taken apart\n"), ("2", "told ")])
def test_one_of_several_leaves_at_once_and_says_all_it_had_to(started, said, code):
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(code)],
        env={**os.environ, "WORLD_SIZE": started},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (finished.returncode, finished.stdout) == (code, said), finished.stderr
