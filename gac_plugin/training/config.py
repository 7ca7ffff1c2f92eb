"""The one description of a run: flags, a JSON file and Python all make a `Config`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from gac_plugin.betas import BETAS
from gac_plugin.errors import UsageError, resolve
from gac_plugin.losses import LOSSES, SCORES
from gac_plugin.metric import METRICS
from gac_plugin.strategy import SCHEDULES

EMBEDDED = "digits"
FEWEST_TO_EVALUATE = 8
OPTIMIZERS = ("conjugate", "adam")
OUTPUT_RANGES = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}


def setting(default: Any, text: str) -> Any:
    """A field of `Config` with the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """A training run. Every field is a flag of `gac train`; its help text is beside it.

    Raises:
        UsageError: a value is out of range or a name is unknown.
    """

    dataset: str = setting(EMBEDDED, "'digits' (embedded), a folder in Hub layout, or a data set's name on the Hub")
    split: str = setting("train", "split to train on")
    test_split: str = setting("test", "split to evaluate against; the training split where there is none")
    column: str | None = setting(None, "image column; found by its type where only one fits")
    image_size: int | None = setting(None, "resize and centre-crop images to this many pixels square")
    output_dir: str | None = setting(None, "run folder; default: the next free runs/DATASET-N")
    overwrite: bool = setting(False, "replace the run that --output-dir holds")

    adapter: str | None = setting(None, "networks; default: mlp for up to 1,024 values a sample, dcgan above")
    latent_size: int = setting(64, "size of a latent")
    width: int | None = setting(None, "hidden units (mlp, default 256) or channels at full size (dcgan, default 64)")
    depth: int | None = setting(None, "hidden layers (mlp, default 2) or halvings (dcgan, default 3)")
    output: str = setting("tanh", "generator's output and data range: tanh for [-1, 1], sigmoid for [0, 1]")

    loss: str = setting("bce", "the discriminator's loss, and the generator's unless --score is given")
    score: str | None = setting(None, "what the generator ascends; default: the loss's own")
    schedule: str = setting("fresh", "fresh: covectors of the updated D; fused: out of D's own backward pass")
    r1: float = setting(1.0, "weight of the gradient penalty at real samples; 0 for none")
    r2: float = setting(1.0, "weight of the gradient penalty at generated samples; 0 for none")
    penalty_interval: int = setting(4, "steps from one penalty to the next; its weight grows by the same factor")

    optimizer: str = setting("conjugate", "the generator's optimizer: conjugate, or torch's adam")
    rule: str = setting("none", "conjugacy rule of the conjugate optimizer")
    metric: str = setting("adam", "metric of the conjugate optimizer")
    beta_max: float = setting(0.5, "bound on the conjugacy rule's |beta|")
    lr_generator: float = setting(2e-3, "the generator's learning rate")
    lr_discriminator: float = setting(1e-3, "the discriminator's learning rate (torch's adam)")
    beta1: float = setting(0.0, "first-moment decay of torch's adam")
    beta2: float = setting(0.99, "second-moment decay of both optimizers")
    ema: float = setting(0.995, "decay of the running average of the generator, which makes the samples; 0 for none")

    steps: int = setting(10_000, "training steps")
    batch_size: int = setting(64, "samples in a batch, in each process")
    seed: int = setting(0, "seed of weights, batches and latents")
    mixed_precision: str = setting("no", "no, bf16 or fp16, as in accelerate")
    cpu: bool = setting(False, "stay on the CPU where there is an accelerator")
    log_every: int = setting(100, "steps from one line of metrics.jsonl to the next")
    sample_every: int = setting(1_000, "steps from one sample picture to the next")
    evaluation_samples: int = setting(5_000, "generated samples in the evaluation at the end; 0 for none")

    def __post_init__(self) -> None:
        for name, table, kind in (
            ("loss", LOSSES, "loss"),
            ("score", SCORES, "score"),
            ("rule", BETAS, "rule"),
            ("metric", METRICS, "metric"),
            ("schedule", dict.fromkeys(SCHEDULES), "schedule"),
            ("optimizer", dict.fromkeys(OPTIMIZERS), "optimizer"),
            ("output", OUTPUT_RANGES, "output"),
            ("mixed_precision", dict.fromkeys(("no", "bf16", "fp16")), "mixed precision"),
        ):
            if getattr(self, name) is not None:
                resolve(getattr(self, name), table, kind)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 2**32:
                raise UsageError(f"{_flag(name)} must be at least {least} and below 2^32, got {value}")
        for name, limit in (("beta1", 1), ("beta2", 1), ("ema", 1)):
            if getattr(self, name) >= limit:
                raise UsageError(f"{_flag(name)} must be below {limit}, got {getattr(self, name)}")
        if self.schedule == "fused" and self.mixed_precision == "fp16":
            raise UsageError("--schedule fused needs the range of float32 or bf16; pass --mixed-precision bf16")
        if self.optimizer == "adam" and self.rule != "none":
            raise UsageError(f"--rule {self.rule} needs --optimizer conjugate; torch's adam takes no rule")
        if not self.dataset:
            raise UsageError("--dataset is empty; give a folder, the name of a data set on the Hub, or 'digits'")
        if 0 < self.evaluation_samples < FEWEST_TO_EVALUATE:
            raise UsageError(
                f"--evaluation-samples must be 0 or at least {FEWEST_TO_EVALUATE}, got {self.evaluation_samples}"
            )

    @property
    def value_range(self) -> tuple[float, float]:
        """Lowest and highest value of a sample, the same for data and generator."""
        return OUTPUT_RANGES[self.output]

    def to_json(self) -> dict[str, Any]:
        """Field names and JSON values of everything but where the run goes, so that it can be run again elsewhere."""
        return {name: value for name, value in asdict(self).items() if name not in ("output_dir", "overwrite")}


_LEAST: dict[str, float] = {
    **dict.fromkeys(("image_size", "latent_size", "width", "depth", "penalty_interval"), 1),
    **dict.fromkeys(("steps", "batch_size", "log_every", "sample_every"), 1),
    **dict.fromkeys(("r1", "r2", "beta_max", "lr_generator", "lr_discriminator", "beta1", "beta2", "ema"), 0),
    **dict.fromkeys(("evaluation_samples", "seed"), 0),
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # the networks and rates of the article that the method comes from
    "article": {
        "latent_size": 100,
        "width": 128,
        "depth": 1,
        "adapter": "mlp",
        "output": "sigmoid",
        "optimizer": "adam",
        "lr_generator": 2e-4,
        "lr_discriminator": 2e-4,
        "beta1": 0.5,
        "beta2": 0.999,
        "r1": 0.0,
        "r2": 0.0,
        "ema": 0.0,
        "evaluation_samples": 10_000,
    },
}


def make_config(
    flags: Mapping[str, Any] | None = None, preset: str = "default", file: str | Path | None = None
) -> Config:
    """A `Config` from, in rising order of precedence, the defaults, a preset, a JSON file and flags.

    Args:
        flags: values by field name.
        preset: a name in `PRESETS`.
        file: path of a JSON object, such as a run's `config.json`.

    Raises:
        UsageError: an unknown key, a value of the wrong type, or a file that cannot be read.
    """
    values = {**resolve(preset, PRESETS, "preset"), **(read_config(file) if file else {}), **(flags or {})}
    types = {item.name: item.type for item in fields(Config)}
    for key, value in values.items():
        if key not in types:
            near = get_close_matches(key, types, n=1)
            raise UsageError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        values[key] = _typed(key, value, types[key])
    return Config(**values)


def read_config(file: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UsageError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the settings in {file}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} must hold a JSON object of settings, got a {type(values).__name__}")
    return values


def field_type(annotation: Any) -> type:
    """The plain type of a field: `int` for `int` and for `int | None`."""
    return get_args(annotation)[0] if isinstance(annotation, UnionType) else annotation


def _typed(key: str, value: Any, annotation: Any) -> Any:
    kind = field_type(annotation)
    if value is None and isinstance(annotation, UnionType):
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{key} must be of type {kind.__name__}, got {value!r}")
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
