"""Reports: one file with everything that there is to see of a run, and nothing that calls for anything else."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import time
import wave
from dataclasses import fields
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import adapter_samples
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image as Picture

from gac_plugin.cli import _parser, main
from gac_plugin.errors import UsageError
from gac_plugin.training.config import Config, make_config
from gac_plugin.training.data import load_data
from gac_plugin.training.files import write_json
from gac_plugin.training.hub import load_discriminator, load_generator, save_network
from gac_plugin.training.judging.evaluate import make_features
from gac_plugin.training.judging.memorisation import draw_pairs, memorisation
from gac_plugin.training.loop import train
from gac_plugin.training.publish import pack
from gac_plugin.training.report import LiveReport, train_command, write_reports
from gac_plugin.training.report import page as module
from gac_plugin.training.report.charts import HEIGHT, WIDTH, draw_charts, number, thinned
from gac_plugin.training.report.run import LARGEST_PICTURE, MOST_SOUND, read_run, show

pytestmark = pytest.mark.usefixtures("reports")
SMALL = [
    "--steps",
    "60",
    "--width",
    "16",
    "--log-every",
    "10",
    "--sample-every",
    "20",
    "--checkpoint-every",
    "0",
    "--cpu",
]
HOSTILE = "</script><img src=x onerror=alert(1)>\"'"
VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """A page taken apart: elements with their attributes and text, and whether every one is closed."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def section(self, name: str) -> str:
        """The source of a section."""
        return re.search(rf'<section aria-labelledby="{name}">.*?</section>', self.source, re.DOTALL)[0]


def report(*folders: Path) -> Page:
    return Page(write_reports(folders)[-1])


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(reports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "first"
    flags = ["--evaluation-samples", "100", "--evaluate-every", "30"]
    assert main(["train", *SMALL, *flags, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def begun(folder: Path, lines: int = 3, **settings) -> Path:
    """A run that is under way: settings and figures, and nothing else."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 100, **settings}))
    records = [{"step": 1 + 10 * index, "loss_d": 1.0 + index, "loss_g": 0.5} for index in range(lines)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def asked_for(flags: list[str]) -> Config:
    """The settings that `gac train` takes from its flags."""
    given = vars(_parser().parse_args(["train", *flags]))
    names = {item.name for item in fields(Config)}
    return make_config({name: value for name, value in given.items() if name in names}, given["preset"])


def draw(path: Path, size: tuple[int, int] = (20, 20), noise: bool = False) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) * np.uint8(noise)
    path.parent.mkdir(exist_ok=True)
    Picture.fromarray(pixels).save(path)


# What training leaves


def test_training_leaves_a_report_and_says_where(tmp_path, capsys):
    assert main(["train", *SMALL, "--evaluation-samples", "0", "--output-dir", str(tmp_path / "run")]) == 0
    told = capsys.readouterr()
    assert re.search(rf"^report +{tmp_path}/run/report\.html$", told.out, re.MULTILINE)
    assert "no report" not in told.err
    page = Page(tmp_path / "run" / "report.html")
    assert "60 of 60; finished" in page.text
    assert "data-reload" not in page.source.split("<script>")[1]


def test_a_run_can_go_without(tmp_path, capsys):
    flags = ["--evaluation-samples", "0", "--no-report", "--output-dir", str(tmp_path / "run")]
    assert main(["train", *SMALL, *flags]) == 0
    assert not re.search("^report", capsys.readouterr().out, re.MULTILINE)
    assert not (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "maps").exists()


@pytest.mark.parametrize("adapter", ["mlp", "dcgan"])
def test_looking_does_not_change_training(tmp_path, adapter):
    def weights(name, **settings):
        small = {"steps": 12, "width": 8, "sample_every": 3, "log_every": 4, "evaluation_samples": 0, "cpu": True}
        done = train(Config(**small, adapter=adapter, output_dir=str(tmp_path / name), **settings))
        networks = load_generator(done.folder), load_discriminator(done.folder)
        metrics = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
        return [v for network in networks for v in network.state_dict().values()], metrics

    looked, told = weights("looked")
    blind, untold = weights("blind", report=False)
    assert all(torch.equal(a, b) for a, b in zip(looked, blind, strict=True))
    assert [{**line, "seconds": 0} for line in told] == [{**line, "seconds": 0} for line in untold]
    assert len(list((tmp_path / "looked" / "maps").iterdir())) == 4


def test_maps_are_drawn_with_the_samples_of_their_step(trained):
    for part in ("samples", "maps"):
        assert sorted(path.name for path in (trained / part).iterdir()) == [f"step-00000{n}.png" for n in (20, 40, 60)]
    with (
        Picture.open(trained / "maps" / "step-0000060.png") as last,
        Picture.open(trained / "maps" / "step-0000020.png") as first,
    ):
        assert last.size == first.size
        assert np.any(np.asarray(last) != np.asarray(first))


def test_publishing_sends_neither_maps_nor_report(trained):
    assert not any("maps" in name or name.endswith(".html") for name in pack(trained, "ada/digits", True).files)


def test_a_report_that_cannot_be_written_is_one_line_and_no_reason_to_end(tmp_path, capsys, monkeypatch):
    def fail(path, runs):
        raise UsageError(f"cannot write {path}: No space left on device; free some space")

    monkeypatch.setattr(module, "_write", fail)
    assert main(["train", *SMALL, "--evaluation-samples", "0", "--output-dir", str(tmp_path / "run")]) == 0
    told = capsys.readouterr()
    assert re.findall(r"gac: (no report.*)", told.err) == [
        f"no report: cannot write {tmp_path}/run/report.html: No space left on device; free some space"
    ]
    assert (tmp_path / "run" / "generator").is_dir()


def test_a_run_that_diverges_is_reported_as_not_finished(tmp_path):
    wild = {"loss": "wasserstein", "r1": 0.0, "r2": 0.0, "lr_generator": 1e9, "lr_discriminator": 1e9, "max_skipped": 3}
    small = {"steps": 50, "log_every": 1, "width": 8, "evaluation_samples": 0, "cpu": True}
    with pytest.raises(UsageError, match="diverged"):
        train(Config(**wild, **small, output_dir=str(tmp_path / "run")))
    page = Page(tmp_path / "run" / "report.html")
    assert "of 50; not finished" in page.text
    assert "steps left out" in page.text
    assert "data-reload" not in page.source.split("<script>")[1]


def test_the_report_is_refreshed_while_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0)
    monkeypatch.setattr(module, "SHARE", 1e9)
    seen = []
    write = module._write
    monkeypatch.setattr(module, "_write", lambda path, runs: (seen.append(runs[0]), write(path, runs)))
    settings = {"steps": 25, "log_every": 10, "sample_every": 20, "width": 8, "evaluation_samples": 0, "cpu": True}
    train(Config(**settings, output_dir=str(tmp_path / "run")))
    assert [(run.step, run.running, run.finished) for run in seen] == [
        (1, True, False),
        (10, True, False),
        (20, True, False),
        (25, True, False),
        (25, False, True),
    ]
    assert [len(run.stages) for run in seen] == [0, 0, 1, 2, 2]
    assert [bool(run.maps) for run in seen] == [False] * 4 + [True]


def test_refreshing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock, written = [0.0], []
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))

    def read(folder, running):
        written.append((clock[0], running))
        clock[0] += 2.0

    monkeypatch.setattr(module, "read_run", read)
    monkeypatch.setattr(module, "_write", lambda path, runs: None)
    live = LiveReport(tmp_path, print)
    while clock[0] < 1000:
        live.refresh()
        clock[0] += 1.0
    assert [when for when, _ in written] == [30.0, 232.0, 434.0, 636.0, 838.0], "after 30 s, then each 2 s in 200"
    live.close()
    assert written[-1][1] is False
    assert all(running for _, running in written[:-1])


# The page


def test_the_page_holds_everything(trained):
    page = report(trained)
    titles = ["Findings", "Samples along training", "Curves", "Evaluation", "Nearest training samples", "What D wants"]
    for title in (*titles, "Recipe", "Again"):
        assert re.search(rf"<h2[^>]*>{title}</h2>", page.source), title
    stages = [e["data-step"] for e in page.all("figure") if e["class"].startswith("stage")]
    assert stages == ["20", "40", "60"]
    assert sum(e["class"] == "stage current" for e in page.all("figure")) == 1
    charts = re.findall(r"<title id=[^>]*>(.*?) over the steps", page.source)
    assert charts[:4] == ["Losses", "D&#39;s answers", "D&#39;s accuracy", "Diversity"]
    assert charts[4:] == [
        "Norms",
        "Length of G&#39;s steps",
        "Directions",
        "Frechet distance",
        "Precision and recall",
        "D&#39;s gap",
    ]
    evaluation = json.loads((trained / "evaluation.json").read_text())
    for name, title in (("frechet", "Frechet distance"), ("coverage", "coverage"), ("d_gap", "D&#39;s gap")):
        row = re.search(rf"<tr><th[^>]*>{title}<.*?</tr>", page.section("evaluation"), re.DOTALL)[0]
        assert f"<b>{number(evaluation[name])}</b>" in row
        assert name == "d_gap" or f">{number(evaluation['floors'][name])}<" in row
    for title in ("Samples, and what D wants changed in them", "On the way through refine", "Where it arrives in G"):
        assert title in page.text
    assert "so they tell" in page.text
    assert "device cpu" in page.text
    assert f"gac evaluate {trained}" in page.text


def test_the_page_asks_for_nothing(trained):
    page = report(trained)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;")
    assert not re.search(r"https?://|//[a-z]", re.sub(r"data:[\w/;,+=]+", "", page.source))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert attributes.get("src") is None or attributes["src"].startswith("data:")
        assert attributes.get("href") is None or attributes["href"].startswith("#")


def test_the_page_can_be_read_by_all(trained):
    page = report(trained)
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for drawing in page.all("svg"):
        named = all(part in ids for part in (drawing.get("aria-labelledby") or "-").split())
        assert drawing.get("aria-hidden") == "true" or (drawing["role"] == "img" and named)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert 'name="viewport"' in page.source
    assert page.source.count("<details>") == len(re.findall("<svg viewBox", page.source)) + 1


def test_a_chart_stays_in_its_field_and_keeps_its_peaks():
    peak = 7777
    records = [
        {"step": n, "loss_d": 90.0 if n == peak else 1.0, "update": 10.0 ** -(n // 2500)} for n in range(1, 10_001)
    ]
    losses, steps = draw_charts({"run": records})
    [line] = losses.lines
    assert 200 < len(line.points) < 500
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line.points)
    assert min(line.points, key=lambda point: point[1])[0] == pytest.approx(52 + (420 - 64) * peak / 10_000, abs=0.1)
    assert (
        line.summary
        == "loss of D: first 1 at step 1, lowest 1 at step 1, highest 90 at step 7,777, last 1 at step 10,000"
    )
    assert [label for _, label in losses.x_ticks] == ["0", "5k", "10k"]
    assert [label for _, label in losses.y_ticks] == ["0", "50", "100"]
    assert steps.scale == "logarithmic scale"
    assert [label for _, label in steps.y_ticks] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    gaps = np.diff([y for y, _ in steps.y_ticks])
    assert gaps == pytest.approx(np.full(4, gaps[0]), abs=0.11)
    assert len(losses.rows) == 40
    assert (losses.rows[0][0], losses.rows[-1][0], losses.rows_of) == ("1", "10,000", 10_000)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-14, 2e-14], [-3.0, 4e29], [0.1, 0.1 + 1e-17]])
def test_any_values_make_a_chart(values):
    [chart] = draw_charts({"run": [{"step": n, "loss_d": value} for n, value in enumerate(values)]})
    assert all(0 <= y <= HEIGHT for _, y in chart.lines[0].points)
    assert 2 <= len({label for _, label in chart.y_ticks}) <= 8


def test_thinning_keeps_the_ends():
    assert thinned(range(100), 4) == [0, 33, 66, 99]
    assert thinned(range(3), 4) == [0, 1, 2]


def test_alarms_and_skipped_steps_are_marked(tmp_path):
    folder = begun(tmp_path / "run")
    lines = [
        {"step": 10, "loss_d": 1.0},
        {"step": 20, "loss_d": None, "skipped": 2},
        {"step": 30, "loss_d": 1.0, "skipped": 2, "alarms": ["collapsed"]},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(folder)
    marks = re.findall(r'class="mark" d="M([\d.]+) 12[^>]*><title>(.*?)<', page.source)
    assert [text for _, text in marks] == ["2 steps left out", "loss_d not finite", "collapsed"]
    assert [float(x) for x, _ in marks] == pytest.approx([52 + 356 * 2 / 3] * 2 + [408], abs=0.1)
    assert "step 20: 2 steps left out" in page.text


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--steps", "7", "--conditional", "--dataset", "a b/c'd", "--r1", "0", "--options", "a=1,b=x"],
        ["--preset", "article", "--rule", "pr+", "--optimizer", "conjugate", "--no-report"],
    ],
)
def test_the_command_gives_the_same_settings_again(flags):
    settings = asked_for(flags)
    words = shlex.split(train_command(settings.to_json()))
    assert words[:2] == ["gac", "train"]
    assert asked_for(words[2:]) == settings


def test_a_codecs_floor_stands_beside_its_figure(tmp_path):
    folder = begun(tmp_path / "run")
    (folder / "evaluation.json").write_text('{"js_bigrams": 0.25, "js_bigrams_floor": 0.125, "other_floor": 3}')
    os.utime(folder / "metrics.jsonl", (0, 0))
    rows = re.findall(r"<tr><th scope=.row.*?</tr>", report(folder).section("evaluation"), re.DOTALL)
    assert [re.findall(r'<td class="number">(?:<b>)?([^<]*)', row) for row in rows] == [
        ["0.25", "0.125"],
        ["3", number(None)],
    ]


def test_settings_that_differ_come_first(run):
    page = report(run)
    first, everything = page.section("recipe").split("All settings")
    assert re.findall(r"<code>(--[\w-]+)</code>", first) == [
        "--width",
        "--steps",
        "--cpu",
        "--log-every",
        "--sample-every",
        "--evaluation-samples",
        "--evaluate-every",
        "--checkpoint-every",
    ]
    assert "--lr-generator" in everything


# Samples of other kinds


def test_texts_are_read_and_cannot_bring_markup_into_the_page(tmp_path):
    folder = begun(tmp_path / f"a {HOSTILE.replace('/', '')}", dataset=HOSTILE, split="{{ 7 * 7 }}", adapter=HOSTILE)
    (folder / "samples" / "step-0000010.txt").write_text("old\n")
    (folder / "samples" / "step-0000020.txt").write_text(f"{HOSTILE}\n\x00\x1b[31m\n" + "x" * 5000 + "\nline\n" * 100)
    (folder / "evaluation.json").write_text(json.dumps({HOSTILE: 1.0, "features": HOSTILE, "frechet": HOSTILE}))
    (folder / "memorisation.json").write_text(json.dumps({"verdict": HOSTILE, "features": HOSTILE}))
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    os.utime(folder / "metrics.jsonl", (0, 0))
    page = report(folder)
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.source.count("<script") == page.source.count("</script>") == 2
    assert "</script><img" not in page.source
    assert page.text.count(HOSTILE) >= 7
    assert "{{ 7 * 7 }}" in page.text
    assert "x" * 300 in page.text
    assert "x" * 301 not in page.text
    assert "\x1b" not in page.source
    assert "\0" not in page.source
    stages = re.findall(r'data-step="(\d+)">.*?</figure>', page.section("samples"), re.DOTALL)
    assert stages == ["10", "20"]
    assert page.section("samples").count("<li>") == 1 + 24


@pytest.mark.parametrize("seconds", [0.5, 100.0])
def test_sounds_are_played_and_cut_where_they_are_long(tmp_path, seconds):
    folder = begun(tmp_path / "run")
    frames = np.random.default_rng(0).integers(-99, 99, int(8000 * seconds), dtype=np.int16).tobytes()
    with wave.open(str(folder / "samples" / "step-0000010.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(frames)
    page = report(folder)
    [audio] = page.all("audio")
    assert audio["src"].startswith("data:audio/wav;base64,")
    with wave.open(io.BytesIO(base64.b64decode(audio["src"].split(",")[1]))) as file:
        heard = file.readframes(file.getnframes())
        assert file.getframerate() == 8000
    assert heard == frames[:MOST_SOUND]
    assert ("the first 38 seconds of them" in page.text) == (seconds > 38)


@pytest.mark.parametrize("adapter", ["text", "speech"])
def test_other_kinds_of_samples_have_their_maps(tmp_path, adapter):
    folder, recipe = begun(tmp_path / "run"), adapter_samples.recipe(adapter, 3)
    for name, network in (("generator", recipe.generator()), ("discriminator", recipe.discriminator())):
        save_network(folder / name, network, recipe)
    page = report(folder)
    assert "Where it arrives in G" in page.text
    assert f"adapter {adapter}" in page.text


# What is missing or damaged


def test_a_run_under_way_is_shown_as_far_as_it_is(tmp_path):
    folder = begun(tmp_path / "run")
    draw(folder / "samples" / "step-0000010.png")
    page = report(folder)
    assert "step 21 of 100" in page.text
    assert 'data-reload="60"' in page.source
    assert "Once the run is finished" in page.text
    assert [image["width"] for image in page.all("img")] == ["20"]
    assert 'class="small"' in page.source
    os.utime(folder / "metrics.jsonl", (time.time() - 3600,) * 2)
    page = report(folder)
    assert "data-reload" not in page.source.split("<script>")[1]
    assert "of 100; not finished" in page.text


def test_a_run_resumed_does_not_show_what_the_earlier_generator_came_to(trained):
    told = read_run(trained, running=True)
    assert (told.evaluation, told.memorisation, told.maps) == ({}, {}, [])
    assert module._glance(told)[2] == ("Frechet distance", number(told.records[-1]["frechet"]), "at step 60")
    assert len(told.stages) == 3


def test_a_run_that_was_resumed_goes_on_though_an_earlier_generator_stands_there(run):
    now, weights = time.time(), run / "generator" / "model.safetensors"
    for seconds, running in ((-600, True), (-30, False), (30, False)):
        os.utime(run / "metrics.jsonl", (now - 60,) * 2)
        os.utime(weights, (now - 60 + seconds,) * 2)
        assert read_run(run).running is running
    os.utime(run / "metrics.jsonl", (now - 3600,) * 2)
    os.utime(weights, (now - 7200,) * 2)
    stopped = read_run(run)
    assert (stopped.running, stopped.finished, stopped.evaluation, stopped.maps) == (False, False, {}, [])
    assert "of 60; not finished" in report(run).text


def test_a_run_of_several_processes_says_how_to_start_as_many(run):
    assert "torchrun" not in report(run).source
    environment = json.loads((run / "environment.json").read_text())
    write_json(run / "environment.json", {**environment, "processes": "3"})
    assert "torchrun --nproc_per_node 3 -m gac_plugin.train in place of gac train" in report(run).text


def test_a_folder_that_looks_like_a_flag_is_none_in_the_commands(run, monkeypatch):
    run.rename(run.with_name("-x"))
    monkeypatch.chdir(run.parent)
    [page] = write_reports([Path("-x")])
    assert "<code>gac evaluate ./-x</code>" in page.read_text("utf-8")


@pytest.mark.parametrize("lines", [0, 1])
def test_a_run_with_hardly_any_figures_is_shown(tmp_path, lines):
    page = report(begun(tmp_path / "run", lines))
    assert page.text.count(f"{lines} lines of metrics are too few to tell") == 2  # at a glance, and among the findings
    assert ("No figures yet" in page.text) == (lines == 0)
    assert len(re.findall('<circle class="dot', page.source)) == 2 * lines


def test_a_run_that_has_just_begun_is_shown(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 5}')
    page = report(tmp_path)
    assert "No pictures yet" in page.text
    assert "No figures yet" in page.text


def test_runs_of_other_versions_are_shown(run):
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(
        json.dumps({"steps": settings["steps"], "width": 16, "of_the_future": [1], "seed": 3})
    )
    (run / "environment.json").unlink()
    shutil.rmtree(run / "maps")
    (run / "evaluation.json").write_text('{"frechet": 3.5, "floor": NaN, "precision": null, "recall": "high"}')
    lines = [
        '{"step": 1, "loss_d": NaN}',
        '{"step": 2, "loss_d": null, "norm_c": 1e999}',
        '{"step": 3, "loss_d": "much"}',
    ]
    (run / "metrics.jsonl").write_text(
        "\n".join(
            [*lines, f'{{"step": 4, "loss_g": {10**400}, "alarms": 5}}', f'{{"step": {10**400}}}', '{"step": -7}', ""]
        )
    )
    page = report(run)
    assert "Left out of this page" not in page.text
    assert "<b>3.5</b>" in page.section("evaluation")
    assert "--seed" in page.section("recipe").split("All settings")[0]
    assert "No figures yet" in page.text


def spoilt_json(path: Path) -> None:
    path.write_text('{"frechet": ')


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("evaluation.json", spoilt_json),
        ("memorisation.json", lambda path: path.write_text("[1]")),
        ("memorisation.png", lambda path: path.write_text("no picture")),
        ("environment.json", lambda path: path.write_bytes(b"\xff")),
        ("metrics.jsonl", lambda path: path.write_text("no figures\n{}\n")),
        ("samples/step-0000040.png", cut),
        ("samples/step-0000060.wav", lambda path: path.write_text("no sound")),
        ("samples/step-0000060.txt", lambda path: path.write_bytes(b"\xff\xfe")),
        ("maps/step-0000060.png", cut),
        ("generator/config.json", spoilt_json),
        ("generator/model.safetensors", cut),
        ("discriminator/model.safetensors", cut),
    ],
)
def test_a_damaged_file_is_left_out_and_told(run, capsys, name, spoil):
    spoil(run / name)
    assert main(["report", str(run)]) == 0
    page = Page(run / "report.html")
    missing = re.search(r"Left out of this page.*?<ul[^>]*>(.*?)</ul>", page.source, re.DOTALL)[1]
    what = {"generator": "(networks|cotangent maps)", "discriminator": "(networks|cotangent maps)"}
    assert re.search(what.get(name.split("/")[0], re.escape(name)), missing)
    assert capsys.readouterr().err == ""


def test_settings_that_no_longer_hold_are_told(tmp_path):
    page = report(begun(tmp_path / "run", loss="of another age"))
    assert "Left out of this page" in page.text
    assert "of another age" in page.section("recipe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is no run folder; give the --output-dir of gac train"),
        (["run/generator"], "'run/generator' is no run folder"),
        (["run", "nowhere"], "'nowhere' is no run folder"),
        (["run", "run/../run"], "a run is named twice"),
        (["bad"], "cannot read the settings in bad/config.json"),
        (list("abcdefg"), "at most 6 runs stand side by side, got 7"),
        (["run", "--out", "run/config.json/page.html"], "cannot write run/config.json/page.html"),
        (["run", "--out", "run/generator/model.safetensors"], "--out must end in one of .html, .htm; got"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(run, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(run.parent)
    (run / "report.html").unlink()
    (run.parent / "bad").mkdir()
    (run.parent / "bad" / "config.json").write_text("{")
    assert main(["report", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gac: error: {message}")
    assert told.count("\n") == 1
    assert list(run.parent.rglob("*.html")) == []


# Size


def test_large_networks_do_not_make_a_run_wait_for_its_maps(run, monkeypatch):
    assert "On the way through refine" in report(run).text
    monkeypatch.setattr("gac_plugin.training.report.run.MOST_WEIGHTS", 10)
    page = report(run)
    assert "On the way through refine" not in page.text
    assert "cotangent maps: they take long with networks as large as these; gac explain draws them" in page.text


def test_the_page_stays_small_however_long_the_run(tmp_path):
    folder = begun(tmp_path / "run", lines=3000)
    for step in range(1, 101):
        draw(folder / "samples" / f"step-{step:07d}.png", (300, 300), noise=step == 1)
        if step > 1:
            shutil.copy(folder / "samples" / "step-0000001.png", folder / "samples" / f"step-{step:07d}.png")
    page = report(folder)
    stages = [int(e["data-step"]) for e in page.all("figure") if e["class"].startswith("stage")]
    assert len(stages) == 24
    assert (stages[0], stages[-1]) == (1, 100)
    assert set(np.diff(stages)) == {4, 5}
    assert "24 of 100 steps, evenly spaced, to keep this page small" in page.text
    assert len(page.source) < 24 * 4 / 3 * LARGEST_PICTURE


def test_large_pictures_are_made_smaller_and_small_ones_stay_as_they_are(tmp_path):
    draw(tmp_path / "small.png")
    assert base64.b64decode(show(tmp_path / "small.png").source.split(",")[1]) == (tmp_path / "small.png").read_bytes()
    draw(tmp_path / "large.png", (300, 2400))
    shown = show(tmp_path / "large.png")
    with Picture.open(io.BytesIO(base64.b64decode(shown.source.split(",")[1]))) as picture:
        assert picture.size == (shown.width, shown.height) == (1000, 125)
    draw(tmp_path / "noise.png", (800, 800), noise=True)
    data = base64.b64decode(show(tmp_path / "noise.png").source.split(",")[1])
    assert LARGEST_PICTURE / 3 < len(data) <= LARGEST_PICTURE


def test_a_picture_of_too_many_pixels_is_not_opened(run):
    Picture.new("1", (8000, 8000)).save(run / "samples" / "step-0000040.png")
    assert any("8000 x 8000 pixels are too many" in text for text in read_run(run).missing)


# Memorisation


def test_a_planted_memoriser_and_a_healthy_run_are_told_apart(run, tmp_path):
    """Verdicts as `gac evaluate` leaves them; that it finds them is shown in test_memorisation.py."""
    data, draws = load_data(Config()), torch.Generator().manual_seed(0)
    pixels, held_out = data.train.values, data.test.values
    copies = pixels[torch.randint(len(pixels), (400,), generator=draws)]
    half = len(held_out) // 2
    unlike = {"run": (copies, held_out), "healthy": (held_out[:half], held_out[half:])}
    shutil.copytree(run, tmp_path / "healthy")
    features = make_features(data.train, data.test, 0, torch.device("cpu"), "pixels")
    for name, (generated, others) in unlike.items():
        found, pairs = memorisation(features, pixels, others, generated)
        write_json(tmp_path / name / "memorisation.json", found.to_json())
        draw_pairs(tmp_path / name / "memorisation.png", generated, pixels, pairs)
    sick, healthy = report(run), report(tmp_path / "healthy")
    assert "copies of training samples found" in sick.text
    assert "The generator gives back training samples: 100% of samples" in sick.section("findings")
    assert "copies of training samples no sign" in healthy.text
    assert "gives back training samples" not in healthy.text
    for page in (sick, healthy):
        assert any(image["alt"].startswith("Pairs of a generated sample") for image in page.all("img"))


# Several runs


@pytest.fixture
def several(trained, tmp_path):
    flags = ["--steps", "40", "--width", "8", "--r1", "0.5", "--log-every", "20", "--sample-every", "40", "--cpu"]
    other = ["--evaluation-samples", "40", "--no-report", "--output-dir", str(tmp_path / "second")]
    assert main(["train", *flags, *other]) == 0
    return Path(shutil.copytree(trained, tmp_path / "first")), tmp_path / "second"


def test_several_runs_stand_side_by_side(several, capsys):
    capsys.readouterr()
    assert main(["report", *map(str, several)]) == 0
    written = [several[0] / "report.html", several[1] / "report.html", several[0] / "comparison.html"]
    assert capsys.readouterr().out.splitlines() == [f"report in {path}" for path in written]
    assert all(Page(path).text for path in written[:2])
    page = Page(written[2])
    assert "2 runs side by side" in page.text
    assert json.loads(re.search(r"steps = (\[.*?\])", page.source)[1]) == [20, 40, 60]
    stages = [e["data-step"] for e in page.all("figure") if e["class"].startswith("stage")]
    assert stages == ["20", "40", "60", "40"]
    first = re.search(r'<figure class="chart">\n<h3>Loss of D</h3>.*?</figure>', page.source, re.DOTALL)[0]
    assert re.findall(r'<polyline class="line (l\d)"', first) == ["l0", "l1"]
    assert re.findall(r"</svg>\s*(\w+) <b>", first) == ["first", "second"]
    differing = page.section("recipe").split("All settings")[0]
    assert re.findall(r"<code>(--[\w-]+)</code>", differing) == [
        "--width",
        "--r1",
        "--steps",
        "--log-every",
        "--sample-every",
        "--evaluation-samples",
        "--evaluate-every",
        "--report",
        "--checkpoint-every",
    ]
    assert re.search(r"--r1<.*?<td[^>]*>1.0</td><td[^>]*>0.5</td><td>1.0</td>", differing)
    for run in several:
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert f"<b>{number(evaluation['frechet'])}</b>" in page.section("evaluation")


def test_figures_that_do_not_compare_are_told(several):
    assert "These figures do not compare" in report(*several).text
    (several[1] / "evaluation.json").write_text((several[0] / "evaluation.json").read_text())
    assert "These figures do not compare" not in report(*several).text


def test_runs_of_the_same_name_are_told_apart(several, tmp_path):
    twin = tmp_path / "elsewhere" / "first"
    shutil.copytree(several[0], twin)
    page = report(several[0], twin)
    assert str(several[0]) in page.text
    assert str(twin) in page.text


def test_a_page_can_be_written_elsewhere_and_opened(run, several, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    (run / "report.html").unlink()
    assert main(["report", str(run), "--out", str(tmp_path / "a page.html"), "--open"]) == 0
    assert opened == [f"{tmp_path.as_uri()}/a%20page.html"]
    assert not (run / "report.html").exists()
    assert main(["report", *map(str, several), "--out", str(tmp_path / "both.html")]) == 0
    assert "2 runs" in Page(tmp_path / "both.html").text
    assert not (several[1] / "report.html").exists()
    assert not (several[0] / "comparison.html").exists()
