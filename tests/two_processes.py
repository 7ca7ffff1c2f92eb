"""One recipe of the method trained from fixed numbers, in one process or in several: the same code for both.

As a program, `python -m torch.distributed.run --nproc_per_node 2 tests/two_processes.py FILE`, it runs every case and
writes what the parameters came to.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gac_plugin import BETAS, GAC, ConjugateGradient, GradientPenalty
from gac_plugin.training.processes import leave

STEPS, BATCH, LATENT, SIZE = 30, 16, 3, 4
SPOILED = {10: float("nan"), 20: float("inf")}
"""At these steps the last real sample, which the last process gets, is not finite."""


@dataclass(frozen=True)
class Case:
    """A recipe. `accumulation`: batches in a window; `spectral`: D with spectral norm; `spoiled`: see `SPOILED`."""

    schedule: str = "fresh"
    rule: str = "pr+"
    metric: str = "adam"
    loss: str = "bce"
    accumulation: int = 1
    spectral: bool = False
    penalty: bool = True
    max_norm: float | None = None
    spoiled: bool = False
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


CASES = {
    str(case): case
    for case in (
        *(Case(schedule, rule, accumulation=k) for schedule in ("fresh", "fused") for rule in BETAS for k in (1, 4)),
        *(Case(schedule, spectral=True, accumulation=k) for schedule in ("fresh", "fused") for k in (1, 4)),
        *(Case(schedule, loss=loss) for schedule in ("fresh", "fused") for loss in ("relativistic", "hinge")),
        *(Case(schedule, metric="spectral", accumulation=4) for schedule in ("fresh", "fused")),
        *(Case(schedule, penalty=False, max_norm=0.05) for schedule in ("fresh", "fused")),
        *(
            Case(schedule, penalty=False, spoiled=True, accumulation=k)
            for schedule in ("fresh", "fused")
            for k in (1, 4)
        ),
        *(
            Case(schedule, rule, accumulation=k, dtype=torch.float32)
            for schedule in ("fresh", "fused")
            for rule in ("none", "pr+", "hz")
            for k in (1, 4)
        ),
    )
}


def networks(case: Case) -> tuple[nn.Module, nn.Module]:
    """A generator and a discriminator, the same at every call."""
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), nn.Linear(8, SIZE))
    norm = spectral_norm if case.spectral else (lambda layer: layer)
    discriminator = nn.Sequential(norm(nn.Linear(SIZE, 8)), nn.Tanh(), norm(nn.Linear(8, 1)))
    return generator.to(case.dtype), discriminator.to(case.dtype)


def windows(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Real samples and latents of each step, the whole of them."""
    numbers = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        real = 1 + 0.5 * torch.randn(BATCH, SIZE, generator=numbers, dtype=torch.float64)
        z = torch.randn(BATCH, LATENT, generator=numbers, dtype=torch.float64)
        if case.spoiled and step in SPOILED:
            real[-1, 0] = SPOILED[step]
        yield real.to(case.dtype), z.to(case.dtype)


def train(case: Case, accelerator: Accelerator | None) -> dict[str, Tensor]:
    """The parameters of both networks after all steps; each process takes its share of every batch."""
    generator, discriminator = networks(case)
    optimizers = (
        ConjugateGradient(generator.parameters(), 2e-3, rule=case.rule, metric=case.metric),
        torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.0, 0.99)),
    )
    share, shares, parts = 0, 1, 1
    prepared = (generator, discriminator, *optimizers)
    if accelerator is not None:
        share, shares, parts = accelerator.process_index, accelerator.num_processes, case.accumulation
        accelerator.gradient_accumulation_steps = parts
        prepared = accelerator.prepare(*prepared)
    gac = GAC(
        *prepared,
        loss=case.loss,
        schedule=case.schedule,
        penalty=GradientPenalty(0.5, 0.5, 3) if case.penalty else None,
        accelerator=accelerator,
        max_norm=case.max_norm,
        skip_nonfinite=case.spoiled and accelerator is not None,
    )
    for real, z in windows(case):
        if accelerator is None:
            if torch.isfinite(real).all():  # what one would do by hand
                gac.step(real, z)
            continue
        for part_of_real, part_of_z in zip(real.chunk(parts), z.chunk(parts), strict=True):
            with accelerator.accumulate(*prepared[:2]):
                gac.step(part_of_real.chunk(shares)[share], part_of_z.chunk(shares)[share])
    assert gac.skipped == (len(SPOILED) if case.spoiled and accelerator is not None else 0)
    return {
        f"{role}.{name}": parameter.detach().clone()
        for role, network in (("G", generator), ("D", discriminator))
        for name, parameter in network.named_parameters()
    }


def main(file: Path) -> None:
    """Run every case and write the parameters, if two processes are at work."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.num_processes
    found = {}
    for name, case in CASES.items():
        for key, value in train(case, accelerator).items():
            everywhere = accelerator.gather(value.unsqueeze(0))
            assert torch.equal(everywhere[0], everywhere[1]), f"{name}: {key} differs between the processes"
            found[f"{name} {key}"] = value
        accelerator.free_memory()
    if accelerator.is_main_process:
        save_file(found, file)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
