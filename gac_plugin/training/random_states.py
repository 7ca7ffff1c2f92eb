"""The state of the random number generators that a network may draw from, of every process."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from gac_plugin.errors import UsageError


class RandomStates:
    """The state of every random number generator of every process, for a checkpoint.

    `state_dict` gives what `collect`, which all processes call, has gathered; so the main process alone may write it.
    """

    def __init__(self) -> None:
        self._collected: dict[str, Tensor] = {}

    def collect(self) -> None:
        """Gather the states as they are now."""
        process = PartialState()
        own = {name: tensor[None] for name, tensor in random_state(process.device).items()}
        if process.num_processes > 1:
            own = {name: gather(tensor.to(process.device)).cpu() for name, tensor in own.items()}
        self._collected = own

    def state_dict(self) -> dict[str, Tensor]:
        """By generator, tensors of shape (processes, ...)."""
        return self._collected

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set this process's generators to its row; a process that the checkpoint does not know keeps its own."""
        process = PartialState()
        if all(process.process_index < len(rows) for rows in state.values()):
            # clones, since torch reads the state of its generator from where a view's memory starts
            own = {name: rows[process.process_index].clone() for name, rows in state.items()}
            set_random_state(own, process.device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of every random generator of this process.

    Args:
        device: whose own generator is meant, besides those of Python, NumPy and PyTorch's CPU.

    Returns:
        CPU tensors, whose shapes depend on the kind of device alone, so that processes can gather them.
    """
    _, words, normal = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    key, position = numpy["state"]["key"].tolist(), numpy["state"]["pos"]
    state = {  # words of 32 bits fit into float64
        "python": _numbers([*words, normal is not None, 0.0 if normal is None else normal]),
        "numpy": _numbers([*key, position, numpy["has_gauss"], numpy["gauss"]]),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*_index(device))
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Continue from a `random_state`.

    Raises:
        UsageError: it was taken with another kind of device.
    """
    expected = {"python", "numpy", "torch", device.type} - {"cpu"}
    if state.keys() != expected:
        raise UsageError(
            f"the random state holds {', '.join(sorted(state))}, and a run on {device.type} needs "
            f"{', '.join(sorted(expected))}; resume on the kind of device that it was saved on"
        )
    *integers, normal = state["python"].tolist()
    *words, has_normal = map(int, integers)
    random.setstate((3, tuple(words), normal if has_normal else None))
    *integers, normal = state["numpy"].tolist()
    *key, position, has_normal = map(int, integers)
    twister = {"key": np.array(key, dtype=np.uint32), "pos": position}
    np.random.set_state({"bit_generator": "MT19937", "state": twister, "has_gauss": has_normal, "gauss": normal})
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type], *_index(device))


def _numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one of these
