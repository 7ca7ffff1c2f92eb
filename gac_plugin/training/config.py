"""The one description of a run: flags, a JSON or YAML file and Python all make a `Config`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml

from gac_plugin.betas import BETAS
from gac_plugin.errors import UsageError, resolve
from gac_plugin.losses import LOSSES, SCORES
from gac_plugin.metric import METRICS
from gac_plugin.strategy import SCHEDULES
from gac_plugin.training.schedules import Schedule
from gac_plugin.training.stopping import Goal

EMBEDDED, TEST = "digits", "test"
FEWEST_TO_EVALUATE = 8
OPTIMIZERS = ("conjugate", "adam")
OUTPUT_RANGES = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}


GROUPS = {
    "dataset": "data and run folder",
    "adapter": "networks",
    "loss": "the game",
    "optimizer": "optimizers, rates, averages",
    "steps": "the run",
    "log_every": "figures and pictures",
    "checkpoint_every": "checkpoints, resuming, stopping",
}
"""Titles of the help text, each by the setting it starts with."""


def setting(default: Any, text: str) -> Any:
    """A field of `Config` with the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """A training run. Every field is a flag of `gac train`; its help text is beside it.

    Raises:
        UsageError: a value is out of range or a name is unknown.
    """

    dataset: str = setting(
        EMBEDDED,
        "'digits' (embedded), a data set's name on the Hub, or a folder: parquet, csv, json, tar (webdataset), images "
        "or sounds, one folder for each class",
    )
    subset: str | None = setting(None, "configuration of a data set that has several")
    revision: str | None = setting(None, "branch, tag or commit of a data set on the Hub")
    split: str = setting("train", "split to train on, or a part of one: train[:90%]")
    test_split: str = setting(TEST, "split to evaluate against, likewise; the training split if there is no 'test'")
    column: str | None = setting(None, "column with the samples; found by its type where only one fits")
    label_column: str | None = setting(None, "column with the class labels; found by its type where only one fits")
    conditional: bool = setting(False, "tell both networks the class labels of the data set")
    streaming: bool = setting(False, "read training samples as they are needed, for data larger than memory and disk")
    shuffle_buffer: int = setting(10_000, "samples that streaming shuffles together; twice as many are in memory")
    image_size: int | None = setting(None, "resize and centre-crop images to this many pixels square")
    workers: int = setting(
        0,
        "processes that decode images as they are needed; 0: decode all first, into memory or a file",
    )
    memory: float = setting(
        4.0, "GB of a split's decoded images to hold in memory; more are decoded into a file of the datasets cache"
    )
    max_unreadable: int = setting(100, "rows of a split that may be damaged, and are left out; 0: none")
    output_dir: str | None = setting(None, "run folder; default: the next free runs/DATASET-N")
    overwrite: bool = setting(False, "replace the run that --output-dir holds")

    adapter: str | None = setting(
        None, "networks; default: for images mlp up to 1,024 values a sample and dcgan above, else what reads the data"
    )
    options: str | None = setting(None, "options of the adapter's own, KEY=VALUE,KEY=VALUE (see gac info)")
    latent_size: int = setting(64, "size of a latent")
    width: int | None = setting(None, "hidden units (mlp) or channels at full size; default: the adapter's")
    depth: int | None = setting(None, "hidden layers (mlp) or halvings; default: the adapter's")
    output: str = setting("tanh", "generator's output and data range: tanh for [-1, 1], sigmoid for [0, 1]")

    loss: str = setting("bce", "the discriminator's loss, and the generator's unless --score is given")
    score: str | None = setting(None, "what the generator ascends; default: the loss's own")
    schedule: str = setting("fresh", "fresh: covectors of the updated D; fused: out of D's own backward pass")
    r1: float = setting(1.0, "weight of the gradient penalty at real samples; 0 for none")
    r2: float = setting(1.0, "weight of the gradient penalty at generated samples; 0 for none")
    penalty_interval: int = setting(4, "steps from one penalty to the next; its weight grows by the same factor")
    penalty_schedule: str = setting("constant", "how r1 and r2 change over the run: SHAPE or SHAPE:SHARE, as for rates")

    optimizer: str = setting("conjugate", "the generator's optimizer: conjugate, or torch's adam")
    rule: str = setting("none", "conjugacy rule of the conjugate optimizer")
    metric: str = setting("kronecker", "metric of the conjugate optimizer")
    beta_max: float = setting(0.5, "bound on the conjugacy rule's |beta|")
    lr_generator: float = setting(4e-3, "the generator's learning rate")
    lr_discriminator: float = setting(1e-3, "the discriminator's learning rate (torch's adam)")
    beta1: float = setting(0.0, "first-moment decay of torch's adam")
    beta2: float = setting(0.99, "second-moment decay of both optimizers")
    lr_schedule: str = setting(
        "linear", "how both rates change over the run: linear (to zero), cosine or constant; cosine:0.1 ends at a tenth"
    )
    warmup: int = setting(0, "steps over which both rates rise from 0")
    max_norm: float | None = setting(None, "bound on the norm of each network's gradient")
    ema: float = setting(0.995, "decay of the running average of the generator, which makes the samples; 0 for none")

    ema_schedule: str = setting("constant", "how 1 - ema changes over the run: SHAPE or SHAPE:SHARE, as for rates")

    steps: int = setting(10_000, "training steps")
    batch_size: int = setting(64, "samples in a batch, in each process")
    accumulation: int = setting(1, "batches whose gradients make one step")
    seed: int = setting(0, "seed of weights, batches and latents")
    mixed_precision: str = setting("no", "no, bf16 or fp16, as in accelerate")
    cpu: bool = setting(False, "stay on the CPU where there is an accelerator")
    log_every: int = setting(100, "steps from one line of metrics.jsonl to the next")
    sample_every: int = setting(1_000, "steps from one sample picture to the next")
    evaluation_samples: int = setting(5_000, "generated samples in an evaluation; 0 for none")
    evaluate_every: int = setting(
        0, "steps from one evaluation to the next; 0: at the end, and for --until with checkpoints"
    )
    tracker: str | None = setting(None, "trackers of accelerate to log to as well, such as tensorboard or wandb,mlflow")
    report: bool = setting(True, "keep report.html, and maps/ for it, up to date while training (see gac report)")

    checkpoint_every: int = setting(1_000, "steps from one checkpoint to the next; 0 for none")
    keep_checkpoints: int = setting(3, "newest checkpoints to keep; the best evaluated one is kept as well")
    resume: str | None = setting(
        None, "auto: go on from the newest intact checkpoint of --output-dir, or start; or the folder of a checkpoint"
    )
    until: str | None = setting(None, "stop once an evaluation reaches frechet=X, precision=X or recall=X")
    max_hours: float | None = setting(None, "stop, with a checkpoint, after so many hours")
    max_skipped: int = setting(
        10, "steps in a row that may be left out because a loss or gradient is not finite; 0: do not look"
    )

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
        for name in ("lr_schedule", "ema_schedule", "penalty_schedule"):
            Schedule.parse(getattr(self, name), _flag(name))
        for name in ("max_norm", "max_hours"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UsageError(f"{_flag(name)} must be above 0, got {getattr(self, name)}")
        if self.until is not None:
            Goal.parse(self.until)
            if not self.evaluation_samples:
                raise UsageError("--until needs evaluations to look at; pass --evaluation-samples of at least 8")
        if self.resume == "auto" and self.output_dir is None:
            raise UsageError("--resume auto needs --output-dir, the folder of the run to go on with")
        if self.resume is not None and self.overwrite:
            raise UsageError("--resume goes on with a run and --overwrite replaces it; pass one of them")
        if self.optimizer == "adam" and self.rule != "none":
            raise UsageError(f"--rule {self.rule} needs --optimizer conjugate; torch's adam takes no rule")
        parse_options(self.options)
        if self.streaming and self.workers:
            raise UsageError("--streaming reads by itself; leave out --workers")
        if not self.dataset:
            raise UsageError("--dataset is empty; give a folder, the name of a data set on the Hub, or 'digits'")
        if 0 < self.evaluation_samples < FEWEST_TO_EVALUATE:
            raise UsageError(
                f"--evaluation-samples must be 0 or at least {FEWEST_TO_EVALUATE}, got {self.evaluation_samples}"
            )

    @property
    def adapter_options(self) -> dict[str, Any]:
        """`options` by name; see `parse_options`."""
        return parse_options(self.options)

    @property
    def evaluation_interval(self) -> int:
        """Steps from one evaluation to the next, 0 for none before the end; for a goal, as often as checkpoints."""
        if not self.evaluation_samples:
            return 0
        return self.evaluate_every or (0 if self.until is None else self.checkpoint_every or 1_000)

    def to_json(self) -> dict[str, Any]:
        """Field names and JSON values of everything but where the run goes, so that it can be run again elsewhere."""
        return {name: value for name, value in asdict(self).items() if name not in _PLACE}

    def require_same_run(self, earlier: Mapping[str, Any]) -> None:
        """Refuse to go on with a run under other settings than it began with, but for those in `MAY_CHANGE`.

        Args:
            earlier: `to_json` of the run's configuration.

        Raises:
            UsageError: a setting differs; the message gives both values.
        """
        for name, value in self.to_json().items():
            if name in earlier and name not in MAY_CHANGE and earlier[name] != value:
                raise UsageError(
                    f"the run to resume has {_flag(name)} {earlier[name]} and not {value}; pass the same, or start a "
                    "new run with another --output-dir"
                )


_PLACE = ("output_dir", "overwrite", "resume")
MAY_CHANGE = frozenset(
    (
        *("steps", "until", "max_hours", "max_skipped", "workers", "memory", "max_unreadable"),
        *("cpu", "tracker", "report"),
        *("log_every", "sample_every", "evaluate_every", "evaluation_samples", "checkpoint_every", "keep_checkpoints"),
    )
)
"""Settings under which a run may be resumed that differ from those it began with."""

_LEAST: dict[str, float] = {
    **dict.fromkeys(("image_size", "shuffle_buffer", "latent_size", "width", "depth", "penalty_interval"), 1),
    **dict.fromkeys(("steps", "batch_size", "accumulation", "log_every", "sample_every", "keep_checkpoints"), 1),
    **dict.fromkeys(("r1", "r2", "beta_max", "lr_generator", "lr_discriminator", "beta1", "beta2", "ema"), 0),
    **dict.fromkeys(("evaluation_samples", "evaluate_every", "checkpoint_every", "seed", "workers"), 0),
    **dict.fromkeys(("warmup", "max_skipped", "max_unreadable", "memory"), 0),
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
        "lr_schedule": "constant",
        "beta1": 0.5,
        "beta2": 0.999,
        "r1": 0.0,
        "r2": 0.0,
        "ema": 0.0,
        "evaluation_samples": 10_000,
    },
    "speech": {
        "conditional": True,
        "batch_size": 16,
        "metric": "adam",
        "lr_generator": 1e-3,
        "r1": 0.1,
        "r2": 0.1,
        "steps": 8_000,
    },
    "text": {"metric": "adam", "lr_generator": 2e-3, "steps": 3_000},
}


def make_config(
    flags: Mapping[str, Any] | None = None,
    preset: str = "default",
    file: str | Path | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> Config:
    """A `Config` from, in rising order of precedence, the defaults, a preset, an earlier run, a file and flags.

    Args:
        flags: values by field name.
        preset: a name in `PRESETS`.
        file: path of a JSON or YAML file of settings, such as a run's `config.json`.
        earlier: the settings of the run to go on with.

    Raises:
        UsageError: an unknown key, a value of the wrong type, or a file that cannot be read.
    """
    values = {
        **resolve(preset, PRESETS, "preset"),
        **(earlier or {}),
        **(read_settings(file) if file else {}),
        **(flags or {}),
    }
    types = {item.name: item.type for item in fields(Config)}
    for key, value in values.items():
        if key not in types:
            near = get_close_matches(key, types, n=1)
            raise UsageError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        values[key] = _typed(key, value, types[key])
    return Config(**values)


def read_settings(file: str | Path) -> dict[str, Any]:
    """The settings in a JSON file or, by its suffix .yaml or .yml, a YAML file.

    YAML scalars are taken by the type of their setting, not by how they look: `no` is the precision of that name, and
    `2e-3` a number.

    Raises:
        UsageError: the file cannot be read, or does not hold an object of settings.
    """
    if Path(file).suffix.lower() not in (".yaml", ".yml"):
        return read_config(file)
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the settings in {file}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} must hold settings, one NAME: VALUE a line, got a {type(values).__name__}")
    types = {item.name: item.type for item in fields(Config)}
    return {key: _from_text(value, types[key]) if key in types else value for key, value in values.items()}


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


def parse_options(text: str | None) -> dict[str, Any]:
    """Options of an adapter by name, from KEY=VALUE,KEY=VALUE: numbers, true, false, and anything else as text.

    Raises:
        UsageError: the text is not of that form.
    """
    options: dict[str, Any] = {}
    for part in filter(str.strip, (text or "").split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise UsageError(f"--options must be KEY=VALUE,KEY=VALUE, got {part.strip()!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


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


def _from_text(text: Any, annotation: Any) -> Any:
    """A YAML scalar as the type of its setting, or as it is where it does not fit."""
    if isinstance(annotation, UnionType) and text in ("", "~", "null"):
        return None
    kind = field_type(annotation)
    if kind is bool:
        return {"true": True, "false": False}.get(str(text).lower(), text)
    try:
        return kind(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
