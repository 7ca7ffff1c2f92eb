"""Small networks of every adapter, and samples for them.

As a program, `python -m torch.distributed.run --nproc_per_node 2 tests/adapter_samples.py FILE`, it takes two steps
with the networks of each in two processes, and writes how far they moved.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gac_plugin import GAC, ConjugateGradient
from gac_plugin.training.networks import Recipe, adapter_names, find_adapter
from gac_plugin.training.processes import leave

DEFAULT = {"sample_shape": [3, 16, 16], "latent_size": 5, "width": 8, "depth": 2, "output": "tanh"}
SMALL: dict[str, dict[str, Any]] = {
    "speech": {"sample_shape": [1, 1024]},
    "text": {"sample_shape": [5, 7]},
    "timm": {"backbone": "test_convnext", "resolution": 32},
}
"""By adapter, what differs from the default."""
CODECS: dict[str, dict[str, Any]] = {
    "speech": {"sample_rate": 8000, "length": 1024},
    "text": {"letters": "\0abcdef", "length": 5},
}
"""By adapter, its codec, where its samples are no images."""
BATCH = 8


def recipe(name: str, classes: int = 0) -> Recipe:
    """A small recipe of an adapter."""
    arguments = DEFAULT | SMALL.get(name, {}) | ({"classes": classes} if classes else {})
    return Recipe(name, arguments, CODECS.get(name, {}))


def samples(made: Recipe, count: int) -> Tensor:
    """Samples as its data might be, the same at every call: those of another generator."""
    torch.manual_seed(5)
    z, classes = torch.randn(count, made.latent_size), made.classes
    conditions = {"labels": torch.arange(count) % classes} if classes else {}
    with torch.no_grad():
        return made.generator()(z, **conditions)


def two_steps(name: str, accelerator: Accelerator | None = None) -> float:
    """Train two steps, in several processes each with its share of every batch; how far the parameters moved."""
    made = recipe(name)
    torch.manual_seed(1)
    networks = made.generator(), made.discriminator()
    start = [p.detach().clone() for network in networks for p in network.parameters()]
    prepared = (
        *networks,
        ConjugateGradient(networks[0].parameters(), 1e-3),
        torch.optim.Adam([p for p in networks[1].parameters() if p.requires_grad], 1e-3, betas=(0.0, 0.99)),
    )
    share, shares = 0, 1
    if accelerator is not None:
        share, shares, prepared = accelerator.process_index, accelerator.num_processes, accelerator.prepare(*prepared)
    gac = GAC(*prepared, penalty="r1+r2", accelerator=accelerator)
    real = samples(made, BATCH)
    for seed in range(2):
        z = torch.randn(BATCH, made.latent_size, generator=torch.Generator().manual_seed(seed))
        gac.step(real.chunk(shares)[share], z.chunk(shares)[share])
    end = [p.detach() for network in networks for p in network.parameters()]
    if accelerator is not None:
        for value in end:
            everywhere = accelerator.gather(value.unsqueeze(0))
            assert torch.equal(everywhere[0], everywhere[1]), f"{name}: the processes differ"
        accelerator.free_memory()
    return max(float((a - b).abs().max()) for a, b in zip(start, end, strict=True))


def main(file: Path) -> None:
    """Every adapter in turn, if two processes are at work."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.num_processes
    for name in adapter_names():
        find_adapter(name)
    moved = {name: two_steps(name, accelerator) for name in adapter_names()}
    if accelerator.is_main_process:
        file.write_text(json.dumps(moved))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
