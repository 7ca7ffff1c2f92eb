"""The main job: train a generator on a data set with GAC, and leave a run folder behind.

config.json  metrics.jsonl  samples/step-N.png  generator/  discriminator/  evaluation.json
"""

import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gac_plugin.conjugate import ConjugateGradient
from gac_plugin.cotangent import evaluating
from gac_plugin.errors import UsageError
from gac_plugin.penalties import GradientPenalty
from gac_plugin.strategy import GAC, Stats
from gac_plugin.training.config import FEWEST_TO_EVALUATE, Config
from gac_plugin.training.data import batches, load_images, to_pixels
from gac_plugin.training.evaluate import Evaluation, evaluate, make_features
from gac_plugin.training.files import MARK, clear_run, next_run, run_folder, write_grid, write_json
from gac_plugin.training.hub import save_network
from gac_plugin.training.networks import Recipe, choose_recipe

GRID = 64
GENERATION_BATCH = 1000


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        folder: the run folder.
        generator: the trained generator, the running average where there is one, in evaluation mode.
        recipe: how its networks were built.
        evaluation: None where none was asked for.
        seconds: of training, without loading data and evaluating.
        samples_per_second: real samples seen in a second, over all processes.
    """

    folder: Path
    generator: nn.Module
    recipe: Recipe
    evaluation: Evaluation | None
    seconds: float
    samples_per_second: float


def train(config: Config) -> Result:
    """Train by a configuration; in several processes, call it in each.

    Raises:
        UsageError: see `load_images`, `run_folder` and `GAC`; or training diverged.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.cpu)
    set_seed(config.seed)
    path = Path(config.output_dir) if config.output_dir else next_run(Path(config.dataset).name)
    main = accelerator.is_main_process
    with run_folder(path, config.overwrite) if main else nullcontext(path) as folder:
        real, test = load_images(config)
        if config.evaluation_samples and len(test.pixels) < FEWEST_TO_EVALUATE:
            raise UsageError(
                f"{len(test.pixels)} images in split {test.split!r} are too few to evaluate against; "
                "pass --evaluation-samples 0, or another --test-split"
            )
        recipe = choose_recipe(config, real.sample_shape)
        generator, discriminator = recipe.generator(), recipe.discriminator()
        gac = _make_gac(config, generator, discriminator, accelerator)
        average = _running_average(config, generator).to(accelerator.device)
        stream = batches(
            real.pixels.to(accelerator.device),
            config.batch_size,
            config.value_range,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        set_seed(config.seed, device_specific=True)  # each process draws latents of its own
        journal = _Journal(config, folder, average.module, accelerator.device) if main else None
        start = time.perf_counter()
        progress = tqdm(
            islice(stream, config.steps),
            total=config.steps,
            desc=str(folder),
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file wants a line now and then
        )
        for step, batch in enumerate(progress, start=1):
            stats = gac.step(batch)
            average.update_parameters(accelerator.unwrap_model(gac.generator))
            if journal:
                shown = journal.note(step, stats, time.perf_counter() - start)
                if shown:
                    progress.set_postfix_str(shown, refresh=False)
        seconds = time.perf_counter() - start

        accelerator.wait_for_everyone()
        evaluation = None
        if main:
            save_network(folder / "generator", average.module, recipe)
            save_network(folder / "discriminator", accelerator.unwrap_model(gac.discriminator), recipe)
            if config.evaluation_samples:
                pixels = generate(average.module, recipe, config.evaluation_samples, config.seed, accelerator.device)
                features = make_features(real, test, config.seed, accelerator.device)
                evaluation = evaluate(features, test.pixels.to(accelerator.device), pixels)
                write_json(folder / "evaluation.json", evaluation.to_json())
    seen = config.steps * config.batch_size * accelerator.num_processes
    return Result(folder, average.module.eval(), recipe, evaluation, seconds, seen / seconds)


def generate(generator: nn.Module, recipe: Recipe, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Images from a generator, the same for the same seed.

    Args:
        generator: used in evaluation mode.
        recipe: tells its latent size and value range.
        count: how many.
        seed: fixes the latents, drawn on the CPU.
        device: where the generator is.

    Returns:
        uint8 pixels, shape (count, C, H, W), on the device.
    """
    latents = torch.randn(count, recipe.latent_size, generator=torch.Generator().manual_seed(seed))
    return render(generator, latents.to(device), recipe.value_range)


@torch.no_grad()
def render(generator: nn.Module, latents: Tensor, value_range: tuple[float, float]) -> Tensor:
    """uint8 pixels (N, C, H, W) of latents (N, latent_size), in evaluation mode and in parts of 1,000."""
    with evaluating(generator):
        return torch.cat([to_pixels(generator(part), value_range) for part in latents.split(GENERATION_BATCH)])


def _make_gac(config: Config, generator: nn.Module, discriminator: nn.Module, accelerator: Accelerator) -> GAC:
    betas = (config.beta1, config.beta2)
    generator_optimizer: torch.optim.Optimizer
    if config.optimizer == "conjugate":
        generator_optimizer = ConjugateGradient(
            generator.parameters(),
            config.lr_generator,
            rule=config.rule,
            metric=config.metric,
            beta_max=config.beta_max,
            beta2=config.beta2,
        )
    else:
        generator_optimizer = torch.optim.Adam(generator.parameters(), config.lr_generator, betas)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), config.lr_discriminator, betas)
    prepared = accelerator.prepare(generator, discriminator, generator_optimizer, discriminator_optimizer)
    generator, discriminator, generator_optimizer, discriminator_optimizer = prepared
    return GAC(
        generator,
        discriminator,
        generator_optimizer,
        discriminator_optimizer,
        loss=config.loss,
        score=config.score,
        penalty=GradientPenalty(config.r1, config.r2, config.penalty_interval),
        schedule=config.schedule,
        accelerator=accelerator,
        latent=config.latent_size,
    )


def _running_average(config: Config, generator: nn.Module) -> AveragedModel:
    # decay 0 keeps a plain copy of the generator: the average is then the network itself
    return AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema))


class _Journal:
    """What a run writes while it trains: its configuration, figures, and pictures from fixed latents."""

    def __init__(self, config: Config, folder: Path, generator: nn.Module, device: torch.device) -> None:
        self.config, self.folder, self.generator = config, folder, generator
        seed = torch.Generator().manual_seed(config.seed)
        self.latents = torch.randn(GRID, config.latent_size, generator=seed).to(device)
        self.latest: Stats = {}

    def note(self, step: int, stats: Stats, seconds: float) -> str | None:
        """Take a step's statistics; on the steps where they are written, return them as text."""
        config = self.config
        if step == 1:  # nothing is written before a first step has gone through
            clear_run(self.folder)
            write_json(self.folder / MARK, config.to_json())
        self.latest.update(stats)
        if step % config.sample_every == 0 or step == config.steps:
            write_grid(
                self.folder / "samples" / f"step-{step:07d}.png",
                render(self.generator, self.latents, config.value_range),
            )
        if step > 1 and step % config.log_every and step != config.steps:
            return None
        values = dict(zip(self.latest, torch.stack([v.float() for v in self.latest.values()]).tolist(), strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        self._append({"step": step, "seconds": round(seconds, 3), **values, **dict.fromkeys(bad)})
        if bad:
            raise UsageError(
                f"training diverged: {', '.join(bad)} not finite at step {step}; lower --lr-generator and "
                "--lr-discriminator, or raise --r1 and --r2"
            )
        names = {"loss_d": "loss D", "loss_g": "loss G", "d_real": "D(x)", "d_fake": "D(G(z))", "beta": "beta"}
        return " ".join(f"{name} {values[key]:.2f}" for key, name in names.items() if key in values)

    def _append(self, record: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
