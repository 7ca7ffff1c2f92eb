"""Networks split by `fully_shard`: the parameters are those of one process with the whole batch, for every recipe."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded import CASES, networks, train

if not hasattr(torch.cpu.Stream, "record_event"):
    pytest.skip(f"torch {torch.__version__} has no fully_shard for the CPU", allow_module_level=True)


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Every case trained by two gloo processes, each with half of every batch and half of the parameters."""
    file = tmp_path_factory.mktemp("sharded") / "parameters.safetensors"
    program = Path(__file__).with_name("sharded.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run([*launch, program, file], capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return load_file(file)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_half_of_everything_equal_one_with_all_of_it(in_two_processes, name):
    expected = train(CASES[name])
    for role, network in zip("GD", networks(), strict=True):
        start = {f"{role}.{key}": value.detach() for key, value in network.named_parameters()}
        moved = max(float((expected[key] - value).abs().max()) for key, value in start.items())
        assert moved > 0.01, f"{role} has not moved, so that nothing is compared"
    for key, value in expected.items():
        torch.testing.assert_close(in_two_processes[f"{name} {key}"], value, rtol=0, atol=1e-9)
