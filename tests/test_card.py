"""The card of a generator: what a person reads, and metadata that the Hub takes."""

import io
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import card_errors
from huggingface_hub import ModelCard
from PIL import Image as Picture

from gac_plugin import __version__
from gac_plugin.cli import main
from gac_plugin.training import Config, train
from gac_plugin.training.card import model_card

QUICK = {"steps": 3, "width": 8, "evaluation_samples": 40, "cpu": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "run"
    train(Config(**QUICK, output_dir=str(folder), loss="hinge", r1=0.25))
    return folder


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_training_leaves_a_card_and_a_picture(run):
    card = (run / "generator" / "README.md").read_text()
    assert card == model_card(run)
    assert card_errors(card, "model") == []
    with Picture.open(run / "generator" / "samples.png") as picture:
        assert picture.size == (8 * 52 + 4, 8 * 52 + 4)


def test_the_picture_is_what_sample_makes(run, tmp_path):
    assert main(["sample", str(run), "--out", str(tmp_path / "samples.png")]) == 0
    assert (tmp_path / "samples.png").read_bytes() == (run / "generator" / "samples.png").read_bytes()


def test_a_person_finds_everything_on_it(run):
    text = model_card(run, "ada/small-digits", license="mit", discriminator=True, training=True, space=True)
    for expected in (
        "# small-digits\n",
        "![64 samples](samples.png)",
        f"gac-plugin {__version__}",
        'from_pretrained("ada/small-digits")',
        "gac sample ada/small-digits --n 64",
        "(64, 1, 8, 8), in [-1, 1]",
        "doi 10.24432/C50P49, CC BY 4.0",
        "| `--loss` | `hinge` | `bce` |",
        "| `--r1` | `0.25` | `1.0` |",
        "| `--steps` | `3` | `10000` |",
        "not the FID of the literature",
        "40 generated samples and 360 real ones",
        "## Limitations",
        "The weights: `mit`.",
        'load_discriminator("ada/small-digits")',
        "gac train --config training.json",
        "https://huggingface.co/spaces/ada/small-digits",
    ):
        assert expected in text, expected
    assert "lr-generator" not in text, "the defaults are not listed"
    assert "USER/NAME" not in text
    plain = model_card(run, "ada/small-digits")
    for left_out in ("load_discriminator", "training.json", "/spaces/", "`mit`"):
        assert left_out not in plain


def test_the_figures_are_those_of_the_evaluation(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    text = model_card(run)
    row = re.search(
        r"\| Frechet distance, lower is better \| ([\d.]+) \| two halves of the real samples: ([\d.]+) \|", text
    )
    assert float(row[1]) == pytest.approx(evaluation["frechet"], abs=0.006)
    assert float(row[2]) == pytest.approx(evaluation["floor"], abs=0.006)
    metrics = metadata(text)["model-index"][0]["results"][0]["metrics"]
    values = {metric["name"].split(" in ")[0]: metric["value"] for metric in metrics}
    assert values["Frechet distance"] == pytest.approx(evaluation["frechet"], abs=1e-4)
    assert set(values) == {"Frechet distance", "Precision", "Recall"}
    assert all("features of a classifier" in metric["name"] for metric in metrics)
    assert metrics[0]["args"]["generated_samples"] == 40
    assert metrics[0]["args"]["real_samples"] == 360
    assert "fid" not in str(metrics).lower()


def test_the_metadata(run):
    data = metadata(model_card(run, "ada/small", license="cc-by-4.0"))
    assert data["license"] == "cc-by-4.0"
    assert data["library_name"] == "gac-plugin"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert "gan" in data["tags"]
    assert data["model-index"][0]["name"] == "small"
    assert "datasets" not in data
    assert "license" not in metadata(model_card(run))
    assert ModelCard(model_card(run)).data.eval_results[0].metric_type == "frechet_distance"


def changed(run: Path, folder: Path, **settings) -> Path:
    """A copy of the run with other settings, and without the card of the first ones."""
    shutil.copytree(run, folder)
    (folder / "generator" / "README.md").unlink()
    values = json.loads((run / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_data_set_on_the_hub_is_named_and_a_local_folder_keeps_its_place_to_itself(run, tmp_path):
    text = model_card(changed(run, tmp_path / "a", dataset="ada/letters"))
    assert metadata(text)["datasets"] == ["ada/letters"]
    assert "[ada/letters](https://huggingface.co/datasets/ada/letters)" in text
    local = tmp_path / "secret" / "letters"
    local.mkdir(parents=True)
    for dataset in (str(local), str(tmp_path / "gone" / "letters"), "~/secret/letters", "../secret/letters"):
        text = model_card(changed(run, tmp_path / dataset.replace("/", "-")[-20:], dataset=dataset))
        assert "datasets" not in metadata(text)
        assert "`letters`, a data set in a folder of the author's own" in text
        assert "secret" not in text
        assert str(tmp_path) not in text
        assert card_errors(text, "model") == []


def test_what_was_a_folder_in_training_is_not_taken_for_a_name_when_it_has_gone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ada" / "letters").mkdir(parents=True)
    folder = changed(run, tmp_path / "run", dataset="ada/letters")
    (folder / "generator" / "README.md").write_text(model_card(folder))
    shutil.rmtree(tmp_path / "ada")
    assert "datasets" not in metadata(model_card(folder))
    (folder / "generator" / "README.md").unlink()
    assert metadata(model_card(folder))["datasets"] == ["ada/letters"]
    (folder / "generator" / "README.md").write_text("# no metadata")
    assert "datasets" not in metadata(model_card(folder))


def test_a_path_among_the_settings_is_cut(run, tmp_path):
    text = model_card(changed(run, tmp_path / "a", column="/home/ada/column"))
    assert "| `--column` | `column` | `None` |" in text
    assert "/home" not in text


def test_a_run_without_an_evaluation_says_so(run, tmp_path):
    folder = changed(run, tmp_path / "a")
    (folder / "evaluation.json").unlink()
    text = model_card(folder)
    assert "None were taken." in text
    assert "model-index" not in metadata(text)
    assert card_errors(text, "model") == []


def test_a_conditional_generator_shows_how_a_class_is_asked_for(tmp_path):
    train(Config(**QUICK, output_dir=str(tmp_path / "run"), conditional=True))
    text = (tmp_path / "run" / "generator" / "README.md").read_text()
    assert "labels=torch.arange(64) % 10" in text
    assert "class-conditional" in metadata(text)["tags"]
    assert "| recognised |" in text
    assert card_errors(text, "model") == []


def test_text_is_shown_as_text(tmp_path):
    data = tmp_path / "names"
    data.mkdir()
    rows = "".join(f"{a}{b}{c}\n" for a in "abcd" for b in "efgh" for c in "ijkl")
    (data / "train.csv").write_text("name\n" + rows)
    settings = {**QUICK, "steps": 2, "evaluation_samples": 8, "batch_size": 8}
    train(Config(**settings, dataset=str(data), output_dir=str(tmp_path / "run")))
    text = (tmp_path / "run" / "generator" / "README.md").read_text()
    assert metadata(text)["pipeline_tag"] == "text-generation"
    shown = (tmp_path / "run" / "samples" / "step-0000002.txt").read_text().splitlines()
    assert f"    {shown[0]}\n    {shown[1]}\n" in text
    assert "--out samples.txt" in text
    assert "| uniqueness |" in text
    assert card_errors(text, "model") == []


def test_speech_is_called_audio(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="needs the extra 'speech'")
    clips = []
    for index in range(10):
        file = io.BytesIO()
        soundfile.write(file, np.sin(np.arange(2000) * (0.1 + 0.01 * index)), 8000, format="WAV")
        clips.append({"bytes": file.getvalue(), "path": None})
    schema = datasets.Features({"audio": datasets.Audio()}).arrow_schema  # datasets itself needs torchcodec to encode
    (tmp_path / "clips").mkdir()
    rows = pa.Table.from_pylist([{"audio": clip} for clip in clips], schema=schema)
    pq.write_table(rows, tmp_path / "clips" / "train-00000-of-00001.parquet")
    settings = {**QUICK, "steps": 1, "evaluation_samples": 0, "batch_size": 2}
    train(Config(**settings, dataset=str(tmp_path / "clips"), output_dir=str(tmp_path / "run")))
    text = (tmp_path / "run" / "generator" / "README.md").read_text()
    assert metadata(text)["pipeline_tag"] == "text-to-audio"
    assert "audio-generation" in metadata(text)["tags"]
    assert "--out samples.wav" in text
    assert card_errors(text, "model") == []


def test_the_embedded_digits_have_the_licence_that_the_card_says():
    assert "license: cc-by-4.0" in (files("gac_plugin") / "digits" / "README.md").read_text()
