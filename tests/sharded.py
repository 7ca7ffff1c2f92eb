"""One recipe of the method trained from fixed numbers, on networks that `fully_shard` has split or on whole ones.

As a program, `python -m torch.distributed.run --nproc_per_node 2 tests/sharded.py FILE`, it runs every case in two
processes, without `accelerate`, and writes what the parameters, gathered, came to.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from gac_plugin import GAC, METRICS, ConjugateGradient, GradientPenalty
from gac_plugin.training.processes import leave

STEPS, BATCH, LATENT, SHAPE = 14, 8, 3, (1, 2, 3)
SPOILED = {7: float("nan"), 12: float("inf")}
"""At these steps the last real sample, which the last process gets, is not finite."""

LAYOUTS = ("whole", "layers", "kept", "copied")
"""A network sharded as one; each layer by itself; the same, everything kept gathered that can be; not split, copied."""


@dataclass(frozen=True)
class Case:
    """A recipe. `layout`: see `LAYOUTS`; `spoiled`: see `SPOILED`."""

    schedule: str = "fresh"
    rule: str = "pr+"
    metric: str = "adam"
    loss: str = "bce"
    layout: str = "whole"
    penalty: bool = True
    max_norm: float | None = None
    spoiled: bool = False

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


CASES = {
    str(case): case
    for schedule in ("fresh", "fused")
    for case in (
        *(Case(schedule, rule, metric) for rule, metric in zip(("none", "pr+", "hz", "fr"), METRICS, strict=True)),
        *(Case(schedule, rule) for rule in ("none", "pr+", "hz")),
        Case(schedule, metric="spectral"),
        *(Case(schedule, layout=layout) for layout in LAYOUTS),
        Case(schedule, layout="layers", penalty=False),
        Case(schedule, loss="relativistic", penalty=False),
        Case(schedule, max_norm=0.05),
        Case(schedule, spoiled=True, penalty=False),
    )
}


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    """A generator and a discriminator, the same at every call; no size but the samples' is even."""
    torch.manual_seed(1)
    generator = nn.Sequential(
        nn.Linear(LATENT, 5),
        nn.Tanh(),
        nn.Linear(5, 6),
        nn.Unflatten(1, SHAPE),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
    )
    generator.append(nn.Conv2d(3, 1, 1))
    discriminator = nn.Sequential(nn.Conv2d(1, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(10, 7), nn.Tanh())
    discriminator.append(nn.Linear(7, 1))
    return generator.double(), discriminator.double()


def batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Real samples and latents of each step, the whole of them."""
    numbers = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        real = 1 + 0.5 * torch.randn(BATCH, *SHAPE, generator=numbers, dtype=torch.float64)
        z = torch.randn(BATCH, LATENT, generator=numbers, dtype=torch.float64)
        if case.spoiled and step in SPOILED:
            real[-1, 0, 0, 0] = SPOILED[step]
        yield real, z


@cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """The processes; of two sizes the first is that of the copies and the second that of the shards."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])


def shard(network: nn.Sequential, layout: str) -> None:
    """Share the network between the processes."""
    mesh = mesh_of((2, 1) if layout == "copied" else (2,))
    settings = {"reshard_after_forward": False} if layout == "kept" else {}
    if layout != "whole":
        for layer in network:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh, **settings)
    fully_shard(network, mesh=mesh, **settings)
    if layout == "kept":
        network.set_reshard_after_backward(False)
    shares = [parameter.to_local().numel() / parameter.numel() for parameter in network.parameters()]
    assert all(share == 1 for share in shares) if layout == "copied" else any(0 < share < 1 for share in shares)


def train(case: Case, share: int = 0, shares: int = 1) -> dict[str, Tensor]:
    """The parameters of both networks after all steps; each of several processes takes its share of every batch."""
    generator, discriminator = networks()
    if shares > 1:
        shard(generator, case.layout)
        shard(discriminator, case.layout)
    gac = GAC(
        generator,
        discriminator,
        ConjugateGradient(generator.parameters(), 5e-3, rule=case.rule, metric=case.metric),
        torch.optim.Adam(discriminator.parameters(), 5e-3, betas=(0.0, 0.99)),
        loss=case.loss,
        schedule=case.schedule,
        penalty=GradientPenalty(0.5, 0.5, 3) if case.penalty else None,
        max_norm=case.max_norm,
        skip_nonfinite=case.spoiled and shares > 1,
    )
    for real, z in batches(case):
        if shares > 1 or torch.isfinite(real).all():  # what one would do by hand
            gac.step(real.chunk(shares)[share], z.chunk(shares)[share])
    assert gac.skipped == (len(SPOILED) if case.spoiled and shares > 1 else 0)
    return {
        f"{role}.{name}": (parameter.full_tensor() if shares > 1 else parameter).detach().clone()
        for role, network in (("G", generator), ("D", discriminator))
        for name, parameter in network.named_parameters()
    }


def main(file: Path) -> None:
    """Run every case and write the parameters, if two processes are at work."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    share, shares = dist.get_rank(), dist.get_world_size()
    assert shares == 2, shares
    found = {
        f"{name} {key}": value for name, case in CASES.items() for key, value in train(case, share, shares).items()
    }
    if share == 0:
        save_file(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
