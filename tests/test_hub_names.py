"""Networks by their name on the Hub: two files of one commit are fetched, and every failure is one line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gac_plugin.cli import main
from gac_plugin.errors import UsageError
from gac_plugin.training import from_pretrained, load_discriminator, load_generator
from gac_plugin.training.hub import read_recipe, save_network
from gac_plugin.training.networks import Recipe

RECIPE = Recipe("mlp", {"sample_shape": [1, 4, 4], "latent_size": 3, "width": 5, "depth": 1, "output": "tanh"})


def write_model(folder: Path, seed: int = 0) -> torch.nn.Module:
    """A repository's files, with more beside them than a load needs."""
    torch.manual_seed(seed)
    generator = RECIPE.generator()
    save_network(folder, generator, RECIPE)
    save_network(folder / "discriminator", RECIPE.discriminator(), RECIPE)
    for name in ("README.md", "modeling.py", "pytorch_model.bin"):
        (folder / name).write_text("not to be fetched")
    return generator.eval()


@pytest.fixture
def model(hub, tmp_path):
    """The stand-in with ada/model, and its generator."""
    generator = write_model(tmp_path / "model")
    hub.add_folder("ada/model", tmp_path / "model", "model")
    return hub, generator, tmp_path / "model"


def downloads(hub) -> set[str]:
    return {request.path for request in hub.requests if request.method == "GET" and request.status == 200}


def test_a_name_gives_the_generator_and_fetches_two_files(model):
    hub, generator, _ = model
    loaded = from_pretrained("ada/model")
    z = torch.randn(7, 3)
    assert not loaded.training
    assert torch.equal(loaded(z), generator(z))
    sha = hub.repos["model", "ada/model"].refs["main"]
    assert downloads(hub) == {"/ada/model/resolve/main/config.json", f"/ada/model/resolve/{sha}/model.safetensors"}
    assert read_recipe("ada/model") == RECIPE


def test_a_discriminator_comes_from_its_own_folder(model):
    assert load_discriminator("ada/model")(torch.randn(2, 1, 4, 4)).shape == (2, 1)
    assert all("/discriminator/" in path for path in downloads(model[0]))


def test_a_revision_is_what_it_was(model):
    hub, generator, folder = model
    first = hub.repos["model", "ada/model"].refs["main"]
    second = write_model(folder, seed=1)
    hub.add_folder("ada/model", folder, "model")
    z = torch.randn(2, 3)
    assert torch.equal(load_generator("ada/model")(z), second(z))
    assert torch.equal(load_generator("ada/model", revision=first)(z), generator(z))
    assert not torch.equal(second(z), generator(z))


def test_a_commit_between_the_two_files_changes_nothing(model, monkeypatch):
    hub, generator, folder = model
    fetch = "gac_plugin.training.hub.hf_hub_download"
    from gac_plugin.training import hub as module

    plain = module.hf_hub_download

    def overtaken(repo_id, name, **more):
        path = plain(repo_id, name, **more)
        write_model(folder, seed=1)
        hub.add_folder("ada/model", folder, "model")
        return path

    monkeypatch.setattr(fetch, overtaken)
    z = torch.randn(2, 3)
    assert torch.equal(load_generator("ada/model")(z), generator(z))


def test_a_folder_comes_before_a_name(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    local = write_model(tmp_path / "ada" / "model", seed=2)
    z = torch.randn(2, 3)
    assert torch.equal(load_generator("ada/model")(z), local(z))
    (tmp_path / "ada" / "other").mkdir()
    with pytest.raises(UsageError, match="no generator in 'ada/other'"):
        load_generator("ada/other")
    with pytest.raises(UsageError, match="a revision is for a name on the Hub"):
        load_generator("ada/model", revision="v1")
    assert model[0].requests == []


@pytest.mark.parametrize(
    "path", ["./model", "../model", "~/model", "/ada/model", "ada/model/generator", "model", "a b/c"]
)
def test_what_can_only_be_a_path_is_never_asked_of_the_hub(hub, path):
    with pytest.raises(UsageError, match="no generator in"):
        load_generator(path)
    with pytest.raises(UsageError, match="no generator in"):
        load_generator(Path("ada/model"))
    assert hub.requests == []


def test_a_private_model_wants_a_token(hub, tmp_path, monkeypatch):
    write_model(tmp_path)
    hub.add_folder("ada/model", tmp_path, "model", private=True)
    for token in (None, "hf_reader"):
        with pytest.raises(UsageError, match=r"no such repository on the Hub, or it is private; .*hf auth login"):
            load_generator("ada/model", token=token)
    with pytest.raises(UsageError, match="does not know the token") as caught:
        load_generator("ada/model", token="hf_unknown_to_all")
    assert "hf_unknown" not in str(caught.value)
    load_generator("ada/model", token="hf_writer")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    load_generator("ada/model")


def test_a_gated_model_says_where_to_ask(hub, tmp_path):
    write_model(tmp_path)
    hub.add_folder("ada/model", tmp_path, "model", gated=True)
    with pytest.raises(UsageError, match=rf"ask at {hub.endpoint}/ada/model, then `hf auth login`"):
        load_generator("ada/model", token="hf_reader")


FAULTS = [
    ("(HEAD|GET) .*", 401, "does not know the token"),
    ("(HEAD|GET) .*", 403, "the token may not do this"),
    ("HEAD .*", 404, "there is no folder 'ada/model', and no such repository on the Hub, or it is private"),
    ("(HEAD|GET) .*", 429, "wait a few minutes"),
    ("(HEAD|GET) .*", 500, "out of order (status 500)"),
    ("(HEAD|GET) .*", 503, "out of order (status 503)"),
    ("GET .*safetensors", 500, "out of order (status 500)"),
    ("(HEAD|GET) .*", "drop", "the Hub cannot be reached, or the connection broke off"),
    ("GET .*safetensors", "drop", "the Hub cannot be reached, or the connection broke off"),
    ("GET .*safetensors", "half", "the Hub cannot be reached, or the connection broke off"),
]


@pytest.mark.parametrize(("pattern", "fault", "message"), FAULTS, ids=lambda value: str(value)[:20])
def test_every_failure_is_one_line(model, tmp_path, capsys, monkeypatch, pattern, fault, message):
    hub, _, _ = model
    hub.always(pattern, fault)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert main(["sample", "ada/model", "--out", str(tmp_path / "grid.png")]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("gac: error: ")
    assert err.count("\n") == 1
    assert "hf_writer" not in out + err
    assert not (tmp_path / "grid.png").exists()
    hub.clear()
    assert main(["sample", "ada/model", "--out", str(tmp_path / "grid.png")]) == 0


def test_a_cache_that_cannot_be_written_is_not_taken_for_the_hub(model, monkeypatch):
    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gac_plugin.training.hub.hf_hub_download", full)
    with pytest.raises(
        UsageError, match=r"cannot keep the files of 'ada/model' in .*: No space left on device; set HF_H"
    ):
        load_generator("ada/model")


def test_a_failure_that_passes_is_not_told(model):
    hub, generator, _ = model
    hub.fail("HEAD .*config", 503, 502, "drop")
    hub.fail("GET .*safetensors", "half", "drop")
    z = torch.randn(2, 3)
    assert torch.equal(load_generator("ada/model")(z), generator(z))


def test_what_was_fetched_once_is_there_without_the_hub(model):
    hub, generator, _ = model
    load_generator("ada/model")
    hub.always(".*", 503)
    z = torch.randn(2, 3)
    assert torch.equal(load_generator("ada/model")(z), generator(z))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("ada/none", None, "there is no folder 'ada/none', and no such repository on the Hub, or it is private"),
        ("ada/model", "v9", "'ada/model' has no revision 'v9'; give one of its branches, tags or commits"),
        ("ada/pickle", None, "'ada/pickle' has no model.safetensors, and pytorch_model.bin is never opened"),
        ("ada/words", None, "'ada/words' has no config.json and no model.safetensors: it does not hold a generator"),
    ],
)
def test_what_is_not_there_is_named(model, tmp_path, name, revision, message):
    hub, _, folder = model
    (folder / "model.safetensors").unlink()
    hub.add_folder("ada/pickle", folder, "model")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "README.md").write_text("# words")
    hub.add_folder("ada/words", tmp_path / "words", "model")
    with pytest.raises(UsageError) as caught:
        load_generator(name, revision=revision)
    assert str(caught.value).startswith(message)
    assert not any(path.endswith((".bin", ".py", ".md")) for path in downloads(hub))


def test_a_model_without_its_discriminator_says_so(hub, tmp_path):
    save_network(tmp_path, RECIPE.generator(), RECIPE)
    hub.add_folder("ada/model", tmp_path, "model")
    with pytest.raises(
        UsageError, match=r"no discriminator/config\.json .*its discriminator; it was published without"
    ):
        load_discriminator("ada/model")


@pytest.mark.parametrize("change", ["missing", "extra", "bit"])
def test_weights_from_the_hub_are_as_strict_as_local_ones(model, change):
    hub, _, folder = model
    file = folder / "model.safetensors"
    if change == "bit":
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    else:
        weights = load_file(file)
        weights.update(other=torch.zeros(1)) if change == "extra" else weights.pop(sorted(weights)[0])
        save_file(weights, file)
    hub.add_folder("ada/model", folder, "model")
    with pytest.raises(UsageError, match=r"the weights in .*model\.safetensors .*damaged"):
        load_generator("ada/model")


def test_an_adapter_that_is_not_installed_is_named(model, capsys):
    hub, _, folder = model
    settings = json.loads((folder / "config.json").read_text()) | {"adapter": "stylish"}
    (folder / "config.json").write_text(json.dumps(settings))
    hub.add_folder("ada/model", folder, "model")
    assert main(["sample", "ada/model"]) == 2
    err = capsys.readouterr().err
    assert "unknown adapter 'stylish', whose networks these are: install the package that provides it" in err
    assert err.count("\n") == 1


def test_offline_mode_is_named(hub):
    program = "from gac_plugin.cli import main; raise SystemExit(main(['sample', 'ada/model']))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "there is no folder 'ada/model', and 'ada/model' is not in the cache, and HF_HUB_OFFLINE" in done.stderr
    assert "forbids to ask the Hub; unset it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert hub.requests == []
