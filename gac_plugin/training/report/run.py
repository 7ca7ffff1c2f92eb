"""What a report tells of one run: everything in its folder that can be read, and a note of what cannot."""

import base64
import io
import json
import math
import re
import tempfile
import time
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image as Picture
from safetensors import SafetensorError, safe_open

from gac_plugin.errors import UsageError
from gac_plugin.training.card import EVALUATION, MEMORISATION, PAIRS_PICTURE
from gac_plugin.training.config import Config, make_config, read_config
from gac_plugin.training.files import MARK
from gac_plugin.training.hub import WEIGHTS, read_recipe
from gac_plugin.training.journal import ENVIRONMENT, METRICS
from gac_plugin.training.judging.findings import findings, read_metrics
from gac_plugin.training.judging.maps import explain
from gac_plugin.training.report.charts import thinned

STAGES = 24
"""Steps whose samples and maps are shown, over all runs of a page."""
LARGEST_PICTURE, LONGEST_SIDE = 200_000, 1_000
"""Bytes of a file and pixels of a side above which a picture is made smaller."""
MOST_PIXELS = 40_000_000
SMALL = 300
"""Pictures less wide are shown enlarged, each pixel a square."""
MOST_SOUND = 600_000
"""Bytes of sound."""
MOST_TEXTS, LONGEST_TEXT = 24, 300
EXPLAINED = 8
"""Samples whose maps are drawn."""
LATELY = 600
"""Seconds since the last line of metrics in which a run without a generator is taken to be running."""
EARLIER = 60
"""Seconds by which a generator is older than that line if it is one from before the run was resumed."""
MOST_WEIGHTS = 50_000_000
"""Of both networks together, above which no maps are drawn: a run must not wait for its report at the end."""
MAPS = {
    "maps.png": "Samples, and what D wants changed in them",
    "refine.png": "On the way through refine",
    "training.png": "Along training",
    "layers.png": "Where it arrives in G",
}
LARGEST = 1e30
"""What is larger counts as not finite."""
STEP = re.compile(r"step-(\d{7,18})\.(?:png|txt)")
USUAL = ("too short", "nothing unusual")
"""Findings that are no trouble."""

UNREADABLE: tuple[type[Exception], ...] = (
    *(UsageError, OSError, SyntaxError, ValueError, EOFError, RuntimeError, ArithmeticError),
    *(wave.Error, Picture.DecompressionBombError),
)
"""What comes of files that are damaged, or of networks that do not fit together."""

T = TypeVar("T")


class Shown(NamedTuple):
    """A picture as it stands in the page: a data URI, and its size in pixels."""

    source: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether it is shown enlarged."""
        return self.width <= SMALL


class Sound(NamedTuple):
    """A sound as it stands in the page: a data URI; and the seconds after which it was cut, 0 where it was not."""

    source: str
    cut: float


class Stage(NamedTuple):
    """What the fixed latents gave at a step: a picture of the samples or, of texts, the texts; and maps of a few."""

    step: int
    samples: Shown | None
    texts: list[str]
    maps: Shown | None


@dataclass
class Told:
    """A run as its report tells it; what is not there is None or empty.

    Attributes:
        name, folder: of the run.
        settings: all fields of `Config`, those that an older version did not have at their defaults.
        config: of the same settings.
        records: lines of metrics, finite numbers alone.
        running: whether it goes on.
        finished: whether it has left a generator; one from before it was resumed does not count.
        evaluation, memorisation, environment: what their files hold.
        findings: what is unusual, the gravest first.
        remarks: findings that are no trouble.
        marks: steps at which something happened, and what.
        stages: of training, the last one last; `stages_of` is how many there are in the folder.
        pairs: the closest pairs of generated and training samples.
        maps: titles and pictures of `explain`; `sentences` is what they show.
        sound: the last samples.
        networks: how they were built, in words.
        missing: what could not be read, and why.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    config: Config
    records: list[dict[str, Any]] = field(default_factory=list)
    running: bool = False
    finished: bool = False
    evaluation: dict[str, Any] = field(default_factory=dict)
    memorisation: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    stages_of: int = 0
    pairs: Shown | None = None
    maps: list[tuple[str, Shown]] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    sound: Sound | None = None
    networks: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last one that is known."""
        return self.records[-1]["step"] if self.records else 0

    def attempt(self, what: str, read: Callable[[], T]) -> T | None:
        """What `read` gives, or None and a note that this is missing."""
        try:
            return read()
        except UNREADABLE as error:
            told = " ".join(str(error).replace(f"{self.folder}/", "").split()) or type(error).__name__
            self.missing.append(f"{what}: {told}")
            return None


def read_run(folder: Path, running: bool | None = None) -> Told:
    """Read a run, and draw the maps of one that is finished.

    Args:
        folder: of the run.
        running: whether it goes on; None to tell by its files.

    Raises:
        UsageError: the folder holds no run.
    """
    if not (folder / MARK).is_file() or "steps" not in (settings := read_config(folder / MARK)):
        raise UsageError(f"{str(folder)!r} is no run folder; give the --output-dir of gac train")
    run = Told(folder.resolve().name, folder, {**Config().to_json(), **settings}, Config())
    known = {item.name: settings[item.name] for item in fields(Config) if item.name in settings}
    run.config = run.attempt(MARK, lambda: make_config(known)) or run.config
    generator, resumed = folder / "generator" / WEIGHTS, _was_resumed(folder)
    run.finished = generator.is_file() and not resumed
    run.running = not run.finished and _goes_on(folder) if running is None else running
    if not run.running and not resumed:  # else they tell of an earlier generator
        run.evaluation, run.memorisation = (_read_json(run, name) for name in (EVALUATION, MEMORISATION))
        if (folder / PAIRS_PICTURE).is_file():
            run.pairs = run.attempt(PAIRS_PICTURE, lambda: show(folder / PAIRS_PICTURE))
    run.environment = _read_json(run, ENVIRONMENT)
    _read_metrics(run)
    if run.memorisation.get("memorises"):
        verdict = str(run.memorisation.get("verdict", "")).removeprefix("memorises: ")
        run.findings.insert(0, f"the generator gives back training samples: {verdict}")
    _read_stages(run)
    sounds = sorted((folder / "samples").glob("step-*.wav"))
    if sounds:
        run.sound = run.attempt(f"samples/{sounds[-1].name}", lambda: _sound(sounds[-1]))
    run.networks = run.attempt("networks", lambda: _networks(folder)) or []
    if run.finished and not run.running:
        _draw_maps(run)
    return run


def show(path: Path) -> Shown:
    """A picture for the page: the file itself, or made smaller where it is large.

    Raises:
        OSError, SyntaxError, ValueError: it is damaged.
    """
    data = path.read_bytes()
    with Picture.open(io.BytesIO(data)) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
        picture.load()
        if picture.format == "PNG" and len(data) <= LARGEST_PICTURE and max(picture.size) <= LONGEST_SIDE:
            return Shown(_data_uri("image/png", data), *picture.size)
        smaller = picture.convert("RGB")
        side, data = LONGEST_SIDE, b""
        while not data or len(data) > LARGEST_PICTURE:
            smaller.thumbnail((side, side))
            file = io.BytesIO()
            smaller.save(file, "WEBP", quality=80)
            side, data = 3 * max(smaller.size) // 4, file.getvalue()
        return Shown(_data_uri("image/webp", data), *smaller.size)


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _goes_on(folder: Path) -> bool:
    file = folder / METRICS
    return file.is_file() and time.time() - file.stat().st_mtime < LATELY


def _was_resumed(folder: Path) -> bool:
    """Whether figures have come since the generator was written."""
    file, generator = folder / METRICS, folder / "generator" / WEIGHTS
    return file.is_file() and generator.is_file() and file.stat().st_mtime - generator.stat().st_mtime > EARLIER


def _read_json(run: Told, name: str) -> dict[str, Any]:
    if not (run.folder / name).is_file():
        return {}
    return run.attempt(name, lambda: _mapping(run.folder / name)) or {}


def _mapping(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no JSON object in it")
    return found


def _read_metrics(run: Told) -> None:
    file = run.folder / METRICS
    found = run.attempt(METRICS, lambda: read_metrics(file)) if file.is_file() else None
    lines = [line for line in found or [] if 0 <= line["step"] < LARGEST]
    run.records = [{**_numbers(line), "step": int(line["step"])} for line in lines]
    told = findings(run.records, run.config, run.evaluation)
    run.findings = [finding.text for finding in told if finding.name not in USUAL]
    run.remarks = [finding.text for finding in told if finding.name in USUAL]
    skipped = 0
    for line, record in zip(lines, run.records, strict=True):
        alarms = line.get("alarms")
        happened = [str(alarm) for alarm in alarms] if isinstance(alarms, list) else []
        if record.get("skipped", 0) > skipped:
            happened.append(f"{record['skipped'] - skipped:.0f} steps left out")
            skipped = record["skipped"]
        happened += [f"{key} not finite" for key, value in line.items() if value is None]
        run.marks += [(record["step"], text) for text in happened]


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
    }


def _read_stages(run: Told) -> None:
    samples = run.folder / "samples"
    steps = {int(found[1]) for path in samples.glob("step-*") if (found := STEP.fullmatch(path.name))}
    run.stages_of = len(steps)
    for step in thinned(sorted(steps), STAGES):
        name = f"step-{step:07d}"
        made, written, wanted = samples / f"{name}.png", samples / f"{name}.txt", run.folder / "maps" / f"{name}.png"
        texts = run.attempt(f"samples/{name}.txt", partial(_texts, written)) if written.is_file() else None
        picture = None if texts else run.attempt(f"samples/{name}.png", partial(show, made))
        maps = run.attempt(f"maps/{name}.png", partial(show, wanted)) if wanted.is_file() else None
        if texts or picture or maps:
            run.stages.append(Stage(step, picture, texts or [], maps))


def _texts(path: Path) -> list[str]:
    """The first lines of a file, each as far as it is short, without control characters."""
    lines = [line[:LONGEST_TEXT] for line in path.read_text("utf-8").splitlines()[:MOST_TEXTS]]
    return ["".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in line) for line in lines]


def _sound(path: Path) -> Sound:
    """The first `MOST_SOUND` bytes of a file."""
    with wave.open(str(path), "rb") as file:
        bytes_a_frame = file.getnchannels() * file.getsampwidth()
        count = min(file.getnframes(), MOST_SOUND // bytes_a_frame)
        cut = count / file.getframerate() if count < file.getnframes() else 0.0
        kind, frames = file.getparams(), file.readframes(count)
    if not frames:
        raise ValueError("no sound in it")
    short = io.BytesIO()
    with wave.open(short, "wb") as file:
        file.setparams(kind)
        file.writeframes(frames)
    return Sound(_data_uri("audio/wav", short.getvalue()), cut)


def _networks(folder: Path) -> list[str]:
    if not (folder / "generator" / WEIGHTS).is_file():
        return []
    recipe = read_recipe(folder / "generator")
    arguments = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in recipe.arguments.items())
    sizes = [
        f"{what} has {_weights(folder / what / WEIGHTS):,} weights"
        for what in ("generator", "discriminator")
        if (folder / what / WEIGHTS).is_file()
    ]
    return [f"adapter {recipe.adapter}: {arguments}", *sizes]


def _weights(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.parent.name}/{path.name}: {error}") from error


def _draw_maps(run: Told) -> None:
    parts = (run.folder / part / WEIGHTS for part in ("generator", "discriminator"))
    weights = run.attempt("networks", lambda: sum(_weights(file) for file in parts if file.is_file()))
    if weights is None:
        return
    if weights > MOST_WEIGHTS:
        run.missing.append("cotangent maps: they take long with networks as large as these; gac explain draws them")
        return
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        run.sentences = run.attempt("cotangent maps", lambda: explain(str(run.folder), out, EXPLAINED)) or []
        along = any(stage.maps for stage in run.stages)
        for name, title in MAPS.items():
            if (out / name).is_file() and not (along and name == "training.png"):
                run.maps.append((title, show(out / name)))
