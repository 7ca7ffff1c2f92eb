"""Random numbers go on where they were: Python's, NumPy's, PyTorch's, of every process."""

import random

import numpy as np
import pytest
import torch

from gac_plugin.errors import UsageError
from gac_plugin.training.checkpoint import Checkpoints, read_checkpoint
from gac_plugin.training.random_states import RandomStates, random_state, set_random_state

CPU = torch.device("cpu")


def draws() -> tuple[list[float], ...]:
    return (
        [random.random(), random.gauss(0, 1), random.getrandbits(70)],
        np.random.standard_normal(3).tolist(),
        torch.randn(3).tolist(),
    )


@pytest.mark.parametrize("odd", [0, 1])
def test_random_draws_go_on(tmp_path, odd):
    """With and without a normal deviate in store, which Python and NumPy make in pairs."""
    random.seed(3)
    np.random.seed(4)
    for _ in range(odd):
        random.gauss(0, 1)
        np.random.standard_normal()
    states = RandomStates()
    states.collect()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"random": states}, {})
    expected = draws()
    assert draws() != expected
    read_checkpoint(tmp_path / "step-0000001").restore({"random": RandomStates()})
    assert draws() == expected


def test_shapes_do_not_depend_on_the_state():
    before = {name: value.shape for name, value in random_state(CPU).items()}
    random.gauss(0, 1)
    assert {name: value.shape for name, value in random_state(CPU).items()} == before


def test_each_process_takes_its_own_row():
    """A row of a larger tensor is a view, which torch's generator would read from the wrong place."""
    states = RandomStates()
    states.collect()
    own = states.state_dict()
    torch.manual_seed(77)
    expected = torch.randn(2).tolist()
    torch.manual_seed(77)
    other = random_state(CPU)
    several = {name: torch.stack([other[name], own[name][0]]) for name in own}
    states.load_state_dict(several)
    assert torch.randn(2).tolist() == expected, "row 0 belongs to this process"


def test_a_process_that_the_checkpoint_does_not_know_keeps_its_own():
    states = RandomStates()
    states.collect()
    before = draws()
    states.load_state_dict(states.state_dict())
    states.load_state_dict({name: rows[:0] for name, rows in states.state_dict().items()})
    assert draws() == before


def test_random_state_of_another_kind_of_device_is_refused():
    state = random_state(CPU)
    random.seed(5)
    before = random.getstate()
    with pytest.raises(UsageError, match="resume on the kind of device that it was saved on"):
        set_random_state(state | {"cuda": torch.zeros(16, dtype=torch.uint8)}, CPU)
    assert random.getstate() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_is_drawn_from_exactly():
    cuda = torch.device("cuda")
    state = random_state(cuda)
    expected = torch.randn(5, device=cuda).tolist()
    set_random_state(state, cuda)
    assert torch.randn(5, device=cuda).tolist() == expected
