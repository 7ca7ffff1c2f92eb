"""The command line as a user meets it: what it prints, what it writes, and one line for every mistake."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file, save_file

from gac_plugin import BETAS, LOSSES, METRICS, REFINEMENTS, refine
from gac_plugin.cli import _parser, main
from gac_plugin.train import main as train_main
from gac_plugin.training import load_discriminator, load_generator
from gac_plugin.training.judging.features import FEATURES

ROOT = Path(__file__).parents[1]
QUICK = ["--steps", "4", "--width", "8", "--evaluation-samples", "40", "--cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *QUICK, "--output-dir", str(folder)]) == 0
    return folder


def test_training_ends_with_a_table(tmp_path, capsys):
    assert main(["train", *QUICK, "--output-dir", str(tmp_path / "run")]) == 0
    out, progress = capsys.readouterr()
    assert re.search(r"Frechet distance +\d+\.\d\d +\(two halves of the real samples: \d+\.\d\d\)", out)
    assert re.search(r"features +64 features of a classifier trained on this data set \(accuracy \d\d\.\d%", out)
    assert re.search(r"samples +40 generated, 360 real", out)
    for name in ("kernel distance", "precision", "recall", "density", "coverage", "seconds", "generator"):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE)
    assert re.search(r"loss D \d.*loss G \d.*D\(x\) 0\.\d+ D\(G\(z\)\) 0\.\d+", progress)


def test_the_module_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "gac_plugin.train", *QUICK, "--output-dir", str(tmp_path / "run"), "--rule", "pr+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Frechet distance" in done.stdout
    assert "beta 0." in done.stderr
    assert (tmp_path / "run" / "generator" / "model.safetensors").is_file()


def test_a_run_without_an_output_folder_takes_the_next_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert main(["train", *QUICK]) == 0
        assert f"runs/digits-{number}/generator" in capsys.readouterr().out


def test_samples_are_written_as_a_picture(run, tmp_path, capsys):
    out = tmp_path / "deep" / "grid.png"
    assert main(["sample", str(run), "--n", "6", "--out", str(out), "--columns", "3"]) == 0
    assert capsys.readouterr().out == f"6 samples in {out}\n"
    with Picture.open(out) as picture:
        assert picture.size == (3 * 52 + 4, 2 * 52 + 4)


def test_a_class_can_be_asked_for(run, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main(["train", *QUICK, "--conditional", "--output-dir", folder]) == 0
    pictures = []
    for label in ("3", "3", "4"):
        assert main(["sample", folder, "--out", str(tmp_path / "grid.png"), "--label", label]) == 0
        pictures.append((tmp_path / "grid.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    capsys.readouterr()
    for model, wanted in ((folder, "has the classes 0 to 9"), (str(run), "was trained without classes")):
        assert main(["sample", model, "--out", str(tmp_path / "other.png"), "--label", "10"]) == 2
        assert capsys.readouterr().err == f"gac: error: --label 10 does not fit: the generator {wanted}\n"
    assert not (tmp_path / "other.png").exists()


def test_samples_repeat_for_a_seed(run, tmp_path):
    pictures = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["sample", str(run), "--out", str(tmp_path / f"{name}.png"), "--seed", seed]) == 0
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_an_evaluation_is_a_table_and_a_file(run, tmp_path, capsys):
    file = tmp_path / "deep" / "evaluation.json"
    capsys.readouterr()
    assert main(["evaluate", str(run), "--dataset", "digits", "--json", str(file), "--bootstrap", "3"]) == 0
    out = capsys.readouterr().out
    values = json.loads(file.read_text())
    for title, name in (("Frechet distance", "frechet"), ("kernel distance", "kernel"), ("coverage", "coverage")):
        figure, low, high, floor = re.search(rf"^{title} +(\S+) +(\S+) to (\S+) +(\S+)$", out, re.MULTILINE).groups()
        shown = [float(number.replace(",", "")) for number in (figure, low, high, floor)]
        expected = [values[name], *values["intervals"][name], values["floors"][name]]
        assert shown == pytest.approx(expected, rel=1e-3, abs=0.5), name
    assert re.search(r"^samples +40 generated, 360 real of 'test'$", out, re.MULTILINE)
    assert re.search(r"^intervals +95% intervals by 3 half-samples", out, re.MULTILINE)
    assert values["memorisation"]["verdict"] in out
    assert main(["evaluate", str(run), "--bootstrap", "0", "--no-memorisation", "--features", "pixels"]) == 0
    out = capsys.readouterr().out
    assert "interval" not in out
    assert "memorisation" not in out
    assert re.search(r"^features +64 principal components", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no generator in 'nowhere'"),
        (["RUN", "--features", "fid"], "unknown features 'fid'.*; choose one of: classifier, pixels, timm, inception"),
        (["RUN", "--samples", "7"], r"--samples must be at least 8 and below 2\^32, got 7"),
        (["RUN", "--bootstrap", "-1"], r"--bootstrap must be at least 0 and below 2\^32, got -1"),
        (["RUN", "--test-split", "nosuch"], "has no split 'nosuch'; it has: train, test"),
        (["RUN", "--test-split", "test[:5]"], r"5 samples in split 'test\[:5\]' are too few to evaluate against"),
    ],
)
def test_an_evaluating_mistake_is_one_line(run, capsys, arguments, message):
    assert main(["evaluate", *(str(run) if argument == "RUN" else argument for argument in arguments)]) == 2
    assert re.fullmatch(rf"gac: error: .*{message}.*\n", _err(capsys))


def test_info_lists_every_table(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["losses"]) == set(LOSSES)
    assert set(facts["rules"]) == set(BETAS)
    assert set(facts["metrics"]) == set(METRICS)
    assert set(facts["features"]) == set(FEATURES)
    assert set(facts["refinements"]) == set(REFINEMENTS)
    assert {"mlp", "dcgan"} <= set(facts["adapters"])
    assert torch.__version__.startswith(facts["versions"]["torch"])
    assert facts["devices"][0].startswith("cpu")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*LOSSES, *BETAS, *METRICS, "article", "mlp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "bec"], r"unknown loss 'bec' \(did you mean 'bce'\?\); choose one of: bce, .*hinge"),
        (["--lr-generator", "-0.1"], r"--lr-generator must be at least 0 .*, got -0\.1"),
        (["--steps", "ten"], r"argument --steps: invalid int value: 'ten'; see gac train --help"),
        (["--speed", "9"], r"unrecognized arguments: --speed 9"),
        (["--dataset", "./none"], r"no folder './none'"),
        (["--column", "photo"], r"no column 'photo' in the data set; its columns: image \(Image\), label"),
        (["--batch-size", "5000"], r"1437 samples, fewer than one batch of 5000; pass a --batch-size of at most 1437"),
        (["--adapter", "dcgan", "--depth", "4"], r"halve the image 4 times, which 8x8 does not allow"),
        (["--preset", "paper"], r"unknown preset 'paper'"),
        (["--config", "none.json"], r"cannot read the settings in none\.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", [["train"], None], ids=["gac train", "python -m"])
def test_a_mistake_is_one_line_code_2_and_leaves_nothing(tmp_path, monkeypatch, capsys, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = train_main(arguments) if command is None else main([*command, *arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert code == 2
    assert re.search(message, err)
    assert err.startswith("gac: error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "--output-dir", str(tmp_path / "file" / "run")]) == 2
    assert re.fullmatch(r"gac: error: cannot write to .*: Not a directory; choose another --output-dir\n", _err(capsys))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no generator in 'nowhere'"),
        (["RUN", "--n", "0"], "--n must be between 1 and 100000, got 0"),
        (["RUN", "--columns", "0"], "--columns must be between 1 and 100000, got 0"),
        (["RUN", "--out", "grid.txt"], r"--out must end in one of \.png.*; got 'grid\.txt'"),
        (["RUN", "--out", "FILE/grid.png"], r"cannot write .*grid\.png: .*; choose a folder you can write to"),
    ],
)
def test_a_sampling_mistake_is_one_line(run, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    names = {"RUN": str(run), "FILE/grid.png": str(tmp_path / "file" / "grid.png")}
    assert main(["sample", *(names.get(argument, argument) for argument in arguments)]) == 2
    assert re.fullmatch(rf"gac: error: .*{message}.*\n", _err(capsys))


def test_weights_with_nan_are_said_not_drawn(run, tmp_path, capsys):
    file = run / "generator" / "model.safetensors"
    weights = load_file(file)
    spoiled = tmp_path / "model"
    spoiled.mkdir()
    (spoiled / "config.json").write_text((run / "generator" / "config.json").read_text())
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, spoiled / "model.safetensors")
    assert main(["sample", str(spoiled), "--out", str(tmp_path / "grid.png")]) == 2
    assert "not finite" in _err(capsys)
    assert not (tmp_path / "grid.png").exists()


def _err(capsys) -> str:
    return capsys.readouterr().err


def commands_shown() -> list[str]:
    """Lines in the code blocks of the documentation that call gac."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("*/**/README.md")), *sorted((ROOT / "gac_plugin").rglob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line[line.index("gac ") :] for line in lines if line.startswith("gac ") or "&& gac " in line})


@pytest.mark.parametrize("line", commands_shown(), ids=lambda line: line[:60])
def test_every_command_in_the_documentation_can_be_parsed(line):
    _parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--rate", "1", "--proximity", "0"], "latents"),
        (["--method", "dgflow-kl", "--rate", "200"], "latents"),
        (["--space", "sample", "--rate", "1"], "samples"),
    ],
    ids=["latents", "a flow", "samples"],
)
def test_refinement_writes_samples_and_says_what_it_did(run, tmp_path, capsys, options, what):
    folder, out = tmp_path / "deep", tmp_path / "deep" / "refined.png"
    assert main(["sample", str(run), "--n", "6", "--seed", "3", "--out", str(folder / "before.png")]) == 0
    arguments = ["refine", str(run), "--steps", "4", "--n", "6", "--seed", "3", *options]
    capsys.readouterr()
    assert main([*arguments, "--out", str(out)]) == 0
    said = re.fullmatch(
        r"6 samples in (.*): mean logit (-?\d+\.\d{3}) -> (-?\d+\.\d{3}), "
        rf"{what} moved (\d+\.\d{{3}}) in the mean, 4 evaluations of D's gradient\n",
        capsys.readouterr().out,
    )
    assert said[1] == str(out)
    assert float(said[3]) > float(said[2])
    assert float(said[4]) > 0
    assert out.read_bytes() != (folder / "before.png").read_bytes()
    assert main([*arguments, "--out", str(folder / "again.png")]) == 0
    assert (folder / "again.png").read_bytes() == out.read_bytes()


def test_refinement_is_that_of_the_library(run, tmp_path, capsys):
    arguments = ["refine", str(run), "--steps", "5", "--n", "3", "--rate", "0.2", "--prior", "0.1", "--rule", "none"]
    arguments += ["--proximity", "0.3"]
    assert main([*arguments, "--out", str(tmp_path / "refined.png")]) == 0
    generator, discriminator, reports = load_generator(run), load_discriminator(run), []
    latents = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    refined = refine(generator, discriminator, latents, 5, 0.2, 0.1, "none", proximity=0.3, report=reports.append)
    (told,) = reports
    figures = f"{told.logit_before.mean():.3f} -> {told.logit_after.mean():.3f}, latents moved {told.moved.mean():.3f}"
    assert figures in capsys.readouterr().out
    with torch.no_grad():
        pixels = ((generator(refined)[:, 0] + 1) * 127.5).round().to(torch.uint8)
    with Picture.open(tmp_path / "refined.png") as picture:
        for index, image in enumerate(pixels.numpy()):
            left, top = 4 + 52 * (index % 2), 4 + 52 * (index // 2)
            tile = Picture.fromarray(image).resize((48, 48), Picture.Resampling.BICUBIC)
            assert picture.crop((left, top, left + 48, top + 48)).tobytes() == tile.tobytes()


def test_a_calibrated_discriminator_is_left_beside_the_runs_own(run, tmp_path):
    def refined(name, *options):
        assert main(["refine", str(folder), "--n", "4", "--out", str(tmp_path / name), *options]) == 0
        return (tmp_path / name).read_bytes()

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    own = refined("own.png")
    calibrated = refined("calibrated.png", "--calibrate", "3", "--rate", "0.05")
    left = load_discriminator(folder / "calibrated").state_dict()
    assert refined("again.png", "--discriminator", str(folder / "calibrated"), "--rate", "0.05") == calibrated
    assert refined("anew.png", "--calibrate", "3", "--rate", "0.05") == calibrated
    assert refined("taken.png", "--rate", "0.05") == calibrated, "a calibrated one is taken where there is one"
    assert refined("after.png", "--discriminator", str(folder / "discriminator")) == own
    own_samples = refined("samples.png", "--space", "sample", "--rate", "9")
    assert refined("others.png", "--space", "sample", "--rate", "9", "--discriminator", str(run)) == own_samples
    refined("more.png", "--calibrate", "4")
    for other in (load_discriminator(run), load_discriminator(folder / "calibrated")):
        assert any(not torch.equal(value, left[name]) for name, value in other.state_dict().items())


PLACES = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1)]


def test_each_sample_stands_before_and_after_side_by_side(run, tmp_path):
    pictures = []
    for steps in ("0", "30"):
        out = tmp_path / f"{steps}.png"
        options = ["--n", "3", "--steps", steps, "--rate", "0.5", "--proximity", "0", "--compare", "--out", str(out)]
        assert main(["refine", str(run), *options]) == 0
        with Picture.open(out) as picture:
            assert picture.size == (4 * 52 + 4, 2 * 52 + 4)
            pictures.append([picture.crop((52 * x, 52 * y, 52 * x + 52, 52 * y + 52)).tobytes() for x, y in PLACES])
    (a, a_same, b, b_same, c, c_same), (a_before, a_after, b_before, b_after, c_before, c_after) = pictures
    assert [a, b, c] == [a_same, b_same, c_same] == [a_before, b_before, c_before]
    assert a != a_after
    assert b != b_after
    assert c != c_after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN/generator"], "no discriminator in '.*generator', and refinement needs one: name the run folder itself"),
        (["nowhere"], "no generator in 'nowhere'"),
        (["RUN", "--steps", "-1"], "--steps must be between 0 and 10000, got -1"),
        (["RUN", "--n", "0"], "--n must be between 1 and 100000, got 0"),
        (["RUN", "--label", "3"], "--label 3 does not fit: the generator was trained without classes"),
        (["RUN", "--out", "grid.txt"], r"--out must end in one of \.png.*; got 'grid\.txt'"),
        (["RUN", "--method", "newton"], "unknown method 'newton'; choose one of: conjugate, "),
        (["RUN", "--rule", "pr"], "unknown rule 'pr'"),
        (["RUN", "--rate", "0"], r"a positive rate, got .*rate=0\.0"),
        (["RUN", "--calibrate", "0"], "--calibrate must be between 1 and 10000, got 0"),
        (["RUN", "--calibrate", "2", "--space", "sample"], "--calibrate is for latents that move: leave out --space"),
        (
            ["RUN/generator", "--discriminator", "RUN", "--calibrate", "2"],
            "is no run folder and does not tell its data",
        ),
        (["RUN", "--discriminator", "RUN/generator"], "no discriminator in '.*generator', and refinement needs one"),
        (["RUN", "--space", "sample", "--method", "langevin"], "'langevin' moves latents, not samples"),
        (["RUN", "--method", "langevin", "--rate", "1e9", "--steps", "99"], "not finite any more, .* a smaller --rate"),
    ],
)
def test_a_refinement_mistake_is_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["refine", *(argument.replace("RUN", str(run)) for argument in arguments)]) == 2
    assert re.fullmatch(rf"gac: error: .*{message}.*\n", _err(capsys))
    assert list(tmp_path.iterdir()) == []


def test_a_model_on_the_hub_needs_its_discriminator_to_be_refined(run, tmp_path, hub, capsys):
    repository, arguments = (
        tmp_path / "repository",
        ["refine", "ada/model", "--n", "2", "--out", str(tmp_path / "a.png")],
    )
    shutil.copytree(run / "generator", repository)
    hub.add_folder("ada/model", repository, "model")
    assert main(arguments) == 2
    assert re.search("'ada/model' has no discriminator/.*; it was published without", _err(capsys))
    first = hub.repos["model", "ada/model"].refs["main"]
    shutil.copytree(run / "discriminator", repository / "discriminator")
    hub.add_folder("ada/model", repository, "model")
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("2 samples in ")
    assert main([*arguments, "--revision", first]) == 2


def test_the_class_of_refined_samples_can_be_asked_for(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main(["train", *QUICK, "--conditional", "--output-dir", folder]) == 0
    pictures = []
    for space, label in (("latent", "3"), ("latent", "4"), ("sample", "3")):
        options = ["--label", label, "--space", space, "--rate", "0.3", "--out", str(tmp_path / "grid.png")]
        assert main(["refine", folder, *options]) == 0
        pictures.append((tmp_path / "grid.png").read_bytes())
    assert len(set(pictures)) == 3
