"""What a run writes while it trains: its configuration, figures, pictures from fixed latents, and trackers."""

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor, nn

from gac_plugin import __version__
from gac_plugin.cotangent import evaluating
from gac_plugin.errors import UsageError, resolve
from gac_plugin.protocols import Codec
from gac_plugin.strategy import Stats
from gac_plugin.training.config import Config
from gac_plugin.training.files import MARK, append_line, clear_run, sweep_run, write_json, write_whole
from gac_plugin.training.generate import render
from gac_plugin.training.health import Health, diversity, nearest_distance

GRID = 64
METRICS, ENVIRONMENT = "metrics.jsonl", "environment.json"
SHOWN = {"loss_d": "loss D", "loss_g": "loss G", "d_real": "D(x)", "d_fake": "D(G(z))", "beta": "beta"}


def tracker_names(wanted: str | None) -> list[str]:
    """Names of trackers out of a list with commas, all of them installed; accelerate drops the others without a word.

    Raises:
        UsageError: a name is unknown, or its package is not installed.
    """
    known = {str(kind): kind for kind in LoggerType if str(kind) != "all"}
    names = [name.strip() for name in (wanted or "").split(",") if name.strip()]
    installed = {str(kind) for kind in get_available_trackers()}
    for name in names:
        resolve(name, dict.fromkeys(known), "tracker")
        if name not in installed:
            raise UsageError(f"tracker {name!r} is not installed; pip install {name}, or leave out --tracker {name}")
    return names


class Journal:
    """Writes `config.json`, `environment.json`, `metrics.jsonl`, `samples/`, and tells trackers; for the main process.

    Args:
        config: of the run.
        codec: of its samples.
        classes: how many of them take turns in `samples/`; 0 where training is not conditional.
        folder: of the run.
        accelerator: knows the trackers.
        health: told of the figures that are written.
        real: GRID real samples or fewer, on the training device; what diversity is measured against.
    """

    def __init__(
        self,
        config: Config,
        codec: Codec,
        classes: int,
        folder: Path,
        accelerator: Accelerator,
        health: Health,
        real: Tensor,
    ) -> None:
        self.config, self.codec, self.folder = config, codec, folder
        self.accelerator, self.health = accelerator, health
        latents = torch.randn(GRID, config.latent_size, generator=torch.Generator().manual_seed(config.seed))
        self.latents = latents.to(accelerator.device)
        self.labels = torch.arange(GRID, device=accelerator.device) % classes if classes else None
        self.real_distance, self.compared = nearest_distance(real), len(real)
        self.latest: Stats = {}

    def begin(self, metrics: str | None = None) -> None:
        """Start to write: clear the folder of an earlier run, or go on with the metrics of the run resumed."""
        if metrics is None:
            clear_run(self.folder)
        else:
            sweep_run(self.folder)
            write_whole(self.folder / METRICS, lambda temporary: _write_text(temporary, metrics))
        write_json(self.folder / MARK, self.config.to_json())
        write_json(self.folder / ENVIRONMENT, self._environment())
        if self.accelerator.log_with:
            settings = {name: "" if value is None else value for name, value in self.config.to_json().items()}
            self.accelerator.init_trackers("gac", settings)

    def note(self, step: int, stats: Stats, seconds: float, generator: nn.Module, extra: Mapping[str, Any]) -> str:
        """Write a line of metrics.

        Args:
            step, seconds: of training so far.
            stats: of this step; those of earlier steps stand in for what this one has not measured.
            generator: as it is now, not its average.
            extra: more to write.

        Returns:
            The figures as text, for a progress bar.

        Raises:
            UsageError: a figure is not finite, and steps like that are not left out; or the line cannot be written.
        """
        self.take(stats)
        tensors = {**self.latest, **self._diversity(generator)}
        values = dict(zip(tensors, torch.stack([v.float() for v in tensors.values()]).tolist(), strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        record = {"step": step, "seconds": round(seconds, 3), **values, **dict.fromkeys(bad), **extra}
        alarms = self.health.observe(step, values)
        append_line(self.folder / METRICS, json.dumps(record | ({"alarms": alarms} if alarms else {})))
        self.accelerator.log({name: value for name, value in record.items() if isinstance(value, (int, float))}, step)
        if bad and not self.config.max_skipped:  # else the step was left out, and those in a row are counted
            raise UsageError(
                f"training diverged: {', '.join(bad)} not finite at step {step}; lower --lr-generator and "
                "--lr-discriminator, or raise --r1 and --r2"
            )
        return " ".join(f"{name} {values[key]:.2f}" for key, name in SHOWN.items() if key in values)

    @torch.no_grad()
    def _diversity(self, generator: nn.Module) -> Stats:
        if self.compared < 2:
            return {}
        conditions = {} if self.labels is None else {"labels": self.labels[: self.compared]}
        with evaluating(generator):
            samples = generator(self.latents[: self.compared], **conditions)
        return {"diversity": diversity(samples, self.real_distance)}

    def _environment(self) -> dict[str, str]:
        """What the run is made with, beside its settings."""
        device = self.accelerator.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return {
            "gac-plugin": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in ("torch", "accelerate")},
            "device": f"{device.type} ({kind})",
            "processes": str(self.accelerator.num_processes),
        }

    def take(self, stats: Stats) -> None:
        """Remember a step's statistics."""
        self.latest.update(stats)

    def draw(self, step: int, generator: nn.Module) -> None:
        """Write what the generator makes of the fixed latents, as the data's usual file and as a picture."""
        stored = render(generator, self.codec, self.latents, self.labels)
        for suffix in dict.fromkeys((self.codec.suffixes[0], ".png")):
            self.codec.write(self.folder / "samples" / f"step-{step:07d}{suffix}", stored)

    def text(self) -> str:
        """The metrics so far, for a checkpoint."""
        file = self.folder / METRICS
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def state_dict(self) -> dict[str, Tensor]:
        """The latest statistics."""
        return self.latest

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self.latest = {name: value.to(self.accelerator.device) for name, value in state.items()}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
