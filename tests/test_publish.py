"""Publishing: what is sent comes back bit for bit, nothing else leaves, and a failure leaves the run as it was."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import card_errors
from safetensors.torch import load_file, save_file

from gac_plugin.cli import main
from gac_plugin.demo import IN_TURN, Model
from gac_plugin.errors import UsageError
from gac_plugin.training import Config, load_discriminator, load_generator, push_to_hub, train
from gac_plugin.training.config import make_config
from gac_plugin.training.publish import described, pack
from gac_plugin.training.remote import asking
from gac_plugin.training.space import space_files

# huggingface_hub hands the body of a large file to its HTTP client in a way that the client calls outdated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

QUICK = {"steps": 3, "width": 8, "evaluation_samples": 40, "cpu": True}
FILES = {"model.safetensors", "config.json", "README.md", "samples.png", "training.json"}
TOKEN = "hf_writer"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("publish") / "run"
    train(Config(**QUICK, output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def other(trained, tmp_path_factory) -> Path:
    """A run with other weights."""
    folder = tmp_path_factory.mktemp("other") / "run"
    train(Config(**QUICK, output_dir=str(folder), seed=5))
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("gac_plugin.training.remote.WAITS", (0, 0))


@pytest.fixture
def logged_in(hub, monkeypatch):
    """The stand-in, to whose account ada the token in HF_TOKEN belongs."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def writes(hub) -> list[str]:
    """What was asked for that changes something."""
    return [f"{request.method} {request.path}" for request in hub.requests if request.method not in ("GET", "HEAD")]


def fresh(program: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a program in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)


def gac(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    program = "import sys; from gac_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
    return fresh(program, *arguments, environment=environment)


# ---- round trips


def test_published_and_loaded_in_a_fresh_process_samples_are_the_same_bit_for_bit(logged_in, run, tmp_path):
    z = torch.randn(16, 64)
    expected = load_generator(run)(z)
    torch.save(z, tmp_path / "z.pt")
    assert main(["sample", str(run), "--out", str(tmp_path / "before.png")]) == 0
    assert main(["publish", str(run), "ada/digits"]) == 0
    shutil.rmtree(run)
    program = (
        "import sys, torch\n"
        "from gac_plugin.cli import main\n"
        "from gac_plugin.training import from_pretrained\n"
        "z, x, picture = sys.argv[1:]\n"
        "torch.save(from_pretrained('ada/digits')(torch.load(z, weights_only=True)).detach(), x)\n"
        "sys.exit(main(['sample', 'ada/digits', '--out', picture]))"
    )
    done = fresh(program, *(str(tmp_path / name) for name in ("z.pt", "x.pt", "after.png")))
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), expected)
    assert (tmp_path / "after.png").read_bytes() == (tmp_path / "before.png").read_bytes()
    assert logged_in.files("ada/digits")["samples.png"] == (tmp_path / "before.png").read_bytes()


def test_what_arrives_is_what_was_named(logged_in, run):
    before = fingerprint(run)
    push_to_hub(run, "ada/digits", license="MIT")
    files = logged_in.files("ada/digits")
    assert set(files) == FILES
    for name in ("model.safetensors", "config.json", "samples.png"):
        assert files[name] == (run / "generator" / name).read_bytes()
    card = files["README.md"].decode()
    assert card_errors(card, "model") == []
    assert "license: mit" in card
    assert 'from_pretrained("ada/digits")' in card
    assert fingerprint(run) == before


def test_the_discriminator_goes_along_where_it_is_asked_for(logged_in, run):
    push_to_hub(run, "ada/digits", discriminator=True, recipe=False)
    assert set(logged_in.files("ada/digits")) == FILES - {"training.json"} | {
        "discriminator/model.safetensors",
        "discriminator/config.json",
    }
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(load_discriminator("ada/digits")(x), load_discriminator(run)(x))


def test_the_settings_train_again(logged_in, run, tmp_path):
    push_to_hub(run, "ada/digits")
    (tmp_path / "training.json").write_bytes(logged_in.files("ada/digits")["training.json"])
    config = make_config(file=tmp_path / "training.json")
    assert config == Config(**QUICK)
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    assert main(["train", "--config", str(tmp_path / "training.json"), "--output-dir", str(tmp_path / "again")]) == 0
    again, first = (load_file(folder / "generator" / "model.safetensors") for folder in (tmp_path / "again", run))
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_text_makes_the_round_trip(logged_in, tmp_path):
    data = tmp_path / "names"
    data.mkdir()
    (data / "train.csv").write_text("name\n" + "".join(f"{a}{b}{c}\n" for a in "abcd" for b in "efgh" for c in "ijkl"))
    settings = {**QUICK, "steps": 2, "evaluation_samples": 8, "batch_size": 8}
    train(Config(**settings, dataset=str(data), output_dir=str(tmp_path / "run")))
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "before.txt")]) == 0
    push_to_hub(tmp_path / "run", "ada/names")
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(data)
    assert main(["sample", "ada/names", "--out", str(tmp_path / "after.txt")]) == 0
    assert (tmp_path / "after.txt").read_bytes() == (tmp_path / "before.txt").read_bytes()
    settings = json.loads(logged_in.files("ada/names")["training.json"])
    assert settings["dataset"] == "./names"
    assert all(str(tmp_path).encode() not in content for content in logged_in.files("ada/names").values())


ADAPTER = """
from torch import nn
from gac_plugin.protocols import Adapter


class Generator(nn.Linear):
    def __init__(self, sample_shape, latent_size, width, depth, output):
        super().__init__(latent_size, sample_shape[1] * sample_shape[2])
        self.nz, self.shape = latent_size, sample_shape

    def forward(self, z):
        return super().forward(z).tanh().reshape(-1, *self.shape)


def discriminator(sample_shape, latent_size, width, depth, output):
    return nn.Sequential(nn.Flatten(), nn.Linear(sample_shape[1] * sample_shape[2], 1))


adapter = Adapter("elsewhere", Generator, discriminator, "straight lines by somebody else")
"""


def test_somebody_elses_networks_make_the_round_trip_and_are_named_where_they_are_missing(logged_in, tmp_path, capsys):
    site = tmp_path / "site"
    (site / "elsewhere_gan-1.0.dist-info").mkdir(parents=True)
    (site / "elsewhere_gan.py").write_text(ADAPTER)
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: elsewhere-gan\nVersion: 1.0\n",
        "entry_points.txt": "[gac_plugin.adapters]\nelsewhere = elsewhere_gan:adapter\n",
    }
    for name, text in metadata.items():
        (site / "elsewhere_gan-1.0.dist-info" / name).write_text(text)
    there = os.environ | {"PYTHONPATH": str(site)}
    before, after, folder = str(tmp_path / "before.png"), str(tmp_path / "after.png"), str(tmp_path / "run")
    commands = [
        [
            "train",
            "--adapter",
            "elsewhere",
            "--cpu",
            "--steps",
            "2",
            "--evaluation-samples",
            "0",
            "--output-dir",
            folder,
        ],
        ["sample", folder, "--out", before],
        ["publish", folder, "ada/lines"],
    ]
    program = f"import sys; from gac_plugin.cli import main; sys.exit(sum(map(main, {commands!r})))"
    for done in (fresh(program, environment=there), gac("sample", "ada/lines", "--out", after, environment=there)):
        assert done.returncode == 0, done.stderr
    assert Path(before).read_bytes() == Path(after).read_bytes()
    assert "pip install gac-plugin elsewhere-gan" in logged_in.files("ada/lines")["README.md"].decode()
    assert main(["sample", "ada/lines", "--out", after]) == 2
    err = capsys.readouterr().err
    assert "unknown adapter 'elsewhere', whose networks these are: install the package" in err
    assert err.count("\n") == 1


# ---- what is sent


def test_a_dry_run_shows_all_and_asks_nothing(hub, run, capsys):
    before = fingerprint(run)
    assert (
        main(["publish", str(run), "ada/digits", "--dry-run", "--private", "--discriminator", "--license", "mit"]) == 0
    )
    out = capsys.readouterr().out
    assert hub.requests == []
    assert fingerprint(run) == before
    assert "nothing was sent; to be sent to the model ada/digits, main:\n  if it is made: private\n" in out
    shown = {name: (int(size.replace(",", "")), digest) for name, size, digest in LINE.findall(out)}
    push_to_hub(run, "ada/digits", discriminator=True, license="mit", token=TOKEN)
    sent = hub.files("ada/digits")
    assert shown == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in sent.items()}
    assert sent["README.md"].decode() in out


LINE = re.compile(r"^  (\S+) +([\d,]+) bytes  sha256 (\w{64})$", re.MULTILINE)


def test_nothing_but_the_named_files_is_sent(logged_in, run):
    (run / "generator" / "passwords.txt").write_text("secret")
    (run / "generator" / "pytorch_model.bin").write_text("secret")
    (run / ".env").write_text("secret")
    push_to_hub(run, "ada/digits")
    assert set(logged_in.files("ada/digits")) == FILES
    assert all(b"secret" not in request.body for request in logged_in.requests)


SENT = [f"generator/{name}" for name in ("model.safetensors", "config.json", "README.md", "samples.png")]


@pytest.mark.parametrize("name", [*SENT, "config.json", "evaluation.json", "metrics.jsonl"])
def test_a_link_out_of_the_run_is_not_followed(logged_in, run, tmp_path, name):
    elsewhere = tmp_path / Path(name).name
    shutil.move(run / name, elsewhere)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(UsageError, match=rf"{name} is a link to a file outside of the run"):
        push_to_hub(run, "ada/digits")
    assert logged_in.requests == []


def test_a_card_that_somebody_wrote_on_is_kept(logged_in, run):
    file = run / "generator" / "README.md"
    file.write_text(file.read_text() + "\nMy own words about USER/NAME.\n")
    push_to_hub(run, "ada/digits", license="cc0-1.0")
    card = logged_in.files("ada/digits")["README.md"].decode()
    assert card.endswith("\nMy own words about ada/digits.\n")
    assert "license: cc0-1.0" in card
    assert "USER/NAME" not in card
    file.write_text("---\nlicense: [\n---\n# x\n")
    with pytest.raises(UsageError, match=r"the metadata at the head of .*README\.md cannot be read"):
        push_to_hub(run, "ada/digits", license="mit")


def test_a_run_from_before_there_were_cards_gets_one(logged_in, run):
    picture = (run / "generator" / "samples.png").read_bytes()
    (run / "generator" / "README.md").unlink()
    (run / "generator" / "samples.png").unlink()
    push_to_hub(run, "ada/digits")
    assert logged_in.files("ada/digits")["samples.png"] == picture
    assert not (run / "generator" / "samples.png").exists()


def test_where_the_data_were_stays_here(logged_in, run, tmp_path, monkeypatch):
    settings = json.loads((run / "config.json").read_text())
    for dataset, shared in {"/home/ada/letters": "./letters", "data/letters": "./letters", "~/l": "./l"}.items():
        (run / "config.json").write_text(json.dumps({**settings, "dataset": dataset, "column": "/home/ada/column"}))
        files = pack(run, "ada/digits").files
        assert json.loads(files["training.json"])["dataset"] == shared
        assert json.loads(files["training.json"])["column"] == "column"
        texts = [content for name, content in files.items() if name.endswith((".md", ".json"))]
        assert not any(b"/home" in text or b"~/" in text or b"data/letters" in text for text in texts)


def test_weights_that_are_damaged_or_not_finite_never_leave(logged_in, run):
    file = run / "generator" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UsageError, match="are damaged"):
        push_to_hub(run, "ada/digits")
    file.write_bytes(whole)
    weights = load_file(file)
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, file)
    with pytest.raises(UsageError, match="not finite"):
        push_to_hub(run, "ada/digits")
    file.write_bytes(whole)
    (run / "discriminator" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UsageError, match="damaged"):
        push_to_hub(run, "ada/digits", discriminator=True)
    assert logged_in.requests == []


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "x"], "'x' is not the name of a repository; give USER/NAME, such as ada/digits"),
        (["RUN", "a b"], "'a b' is not the name of a repository"),
        (["RUN", "../x"], "'../x' is not the name of a repository"),
        (["RUN", "ada/a b"], "'ada/a b' is not the name of a repository"),
        (["RUN", "ada/x/y"], "'ada/x/y' is not the name of a repository"),
        (["RUN", "ada/a--b"], "'ada/a--b' is not the name of a repository"),
        (["nowhere", "ada/x"], "'nowhere' is no run folder with a finished generator; give the --output-dir"),
        (["RUN/generator", "ada/x"], "is no run folder with a finished generator"),
        (["RUN", "ada/x", "--license", "my own"], "--license must be an identifier such as mit"),
        (["RUN", "ada/x", "--pull-request", "--space"], "leave out --space and --revision"),
    ],
)
def test_a_mistake_is_one_line_before_any_request(logged_in, run, capsys, arguments, message):
    assert main(["publish", *(argument.replace("RUN", str(run)) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("gac: error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert logged_in.requests == []


def test_a_licence_that_the_hub_does_not_know_is_told(logged_in, run):
    with pytest.raises(UsageError, match=r'Invalid metadata in README\.md\. - "license" must be one of'):
        push_to_hub(run, "ada/digits", license="mine-alone")
    assert logged_in.files("ada/digits") == {}


# ---- what is there already


def test_a_different_model_is_not_overwritten(logged_in, run, other):
    push_to_hub(other, "ada/digits")
    before = logged_in.files("ada/digits")
    count = len(writes(logged_in))
    with pytest.raises(
        UsageError, match=r"'ada/digits' holds a different model already \(model\.safetensors\); pass --f"
    ):
        push_to_hub(run, "ada/digits")
    assert logged_in.files("ada/digits") == before
    assert writes(logged_in)[count:] == [], "refused by the listing alone"
    assert not any("/resolve/" in request.path for request in logged_in.requests), "nothing was downloaded"
    push_to_hub(run, "ada/digits", force=True)
    assert logged_in.files("ada/digits")["model.safetensors"] == (run / "generator/model.safetensors").read_bytes()


def test_a_discriminator_stays_with_its_generator_and_goes_with_it(logged_in, run, other):
    push_to_hub(run, "ada/digits", discriminator=True)
    push_to_hub(run, "ada/digits", license="mit")
    assert "discriminator/model.safetensors" in logged_in.files("ada/digits"), "the generator is the same"
    push_to_hub(other, "ada/digits", force=True)
    assert not [path for path in logged_in.files("ada/digits") if path.startswith("discriminator/")]


def test_a_repository_that_was_made_in_between_is_looked_at_as_well(logged_in, run, other):
    push_to_hub(other, "ada/digits")
    before = logged_in.files("ada/digits")
    logged_in.fail("GET /api/models", 404)
    with pytest.raises(UsageError, match="holds a different model already"):
        push_to_hub(run, "ada/digits")
    assert any(request.status == 409 for request in logged_in.requests)
    assert logged_in.files("ada/digits") == before


def test_somebodys_model_of_another_kind_is_not_overwritten(logged_in, run, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    (tmp_path / "bert" / "pytorch_model.bin").write_text("weights")
    logged_in.add_folder("ada/bert", tmp_path / "bert", "model")
    with pytest.raises(UsageError, match=r"\(config\.json, pytorch_model\.bin\)"):
        push_to_hub(run, "ada/bert")


def test_the_same_again_is_no_commit(logged_in, run):
    first = push_to_hub(run, "ada/digits").urls
    commits = len(logged_in.repos["model", "ada/digits"].commits)
    assert push_to_hub(run, "ada/digits").urls == first
    assert len(logged_in.repos["model", "ada/digits"].commits) == commits
    push_to_hub(run, "ada/digits", license="mit")  # another card
    assert len(logged_in.repos["model", "ada/digits"].commits) == commits + 1


def test_a_pull_request_changes_nothing_and_may_be_anybodys(hub, run, other):
    push_to_hub(other, "ada/digits", token=TOKEN)
    before = hub.files("ada/digits")
    done = push_to_hub(run, "ada/digits", pull_request=True, token="hf_reader")
    assert done.urls == (f"{hub.endpoint}/ada/digits/discussions/1",)
    assert hub.files("ada/digits") == before
    proposed = hub.files("ada/digits", revision="refs/pr/1")
    assert proposed["model.safetensors"] == (run / "generator" / "model.safetensors").read_bytes()
    z = torch.randn(2, 64)
    assert torch.equal(load_generator("ada/digits", revision="refs/pr/1")(z), load_generator(run)(z))
    with pytest.raises(UsageError, match="there is no model 'ada/none' to propose anything to"):
        push_to_hub(run, "ada/none", pull_request=True, token=TOKEN)


def test_a_branch_is_begun_and_main_stays(logged_in, run, other):
    push_to_hub(other, "ada/digits")
    before = logged_in.files("ada/digits")
    push_to_hub(run, "ada/digits", revision="bigger")
    assert logged_in.files("ada/digits") == before
    z = torch.randn(2, 64)
    assert torch.equal(load_generator("ada/digits", revision="bigger")(z), load_generator(run)(z))
    with pytest.raises(UsageError, match="holds a different model"):
        push_to_hub(other, "ada/digits", revision="bigger")


def test_a_private_model_is_private_from_the_start(logged_in, run, monkeypatch):
    push_to_hub(run, "ada/digits", private=True)
    assert logged_in.repos["model", "ada/digits"].private
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(UsageError, match="or it is private"):
        load_generator("ada/digits")


def test_what_is_public_is_not_taken_for_private(logged_in, run, other):
    push_to_hub(run, "ada/digits")
    with pytest.raises(UsageError, match="'ada/digits' exists and is public; make it private on its page"):
        push_to_hub(run, "ada/digits", private=True)


def test_a_push_in_between_is_an_error_and_not_lost(logged_in, run, monkeypatch):
    from gac_plugin.training import publish

    push_to_hub(run, "ada/digits")
    operations = publish._operations

    def overtaken(parcel, found):
        logged_in.repos["model", "ada/digits"].commit("main", {})
        return operations(parcel, found)

    monkeypatch.setattr(publish, "_operations", overtaken)
    with pytest.raises(UsageError, match="somebody changed 'ada/digits' in the meantime, and nothing was sent"):
        push_to_hub(run, "ada/digits", license="mit")
    assert logged_in.files("ada/digits") == {}


# ---- failures


@pytest.mark.parametrize(
    "step", ["GET /api/models", "create", "validate-yaml", "preupload", "lfs/objects", "PUT", "verify"]
)
@pytest.mark.parametrize("fault", [503, "drop", "half"], ids=str)
def test_a_failure_that_passes_is_overcome(logged_in, run, step, fault):
    logged_in.fail(step, fault)
    push_to_hub(run, "ada/digits")
    assert set(logged_in.files("ada/digits")) == FILES


@pytest.mark.parametrize("fault", [500, 503, "drop", "half"], ids=str)
def test_a_commit_is_made_once(logged_in, run, fault):
    push_to_hub(run, "ada/other")
    logged_in.fail("POST .*commit", fault)
    done = push_to_hub(run, "ada/digits")
    repo = logged_in.repos["model", "ada/digits"]
    assert set(logged_in.files("ada/digits")) == FILES
    assert len(repo.commits) == 2, "the first one is the Hub's"
    assert done.urls == (f"{logged_in.endpoint}/ada/digits/commit/{repo.refs['main']}",)


FAULTS = [
    (".*", 401, "the Hub does not know the token, or wants one"),
    (".*", 403, "the token may not do this with 'ada/digits'"),
    ("POST", 402, "the Hub wants a subscription"),
    ("POST", 404, "there is no 'ada/digits' on the Hub, or it is private"),
    ("POST .*create", 409, "the Hub is out of order (its answer cannot be read)"),
    ("POST .*commit", 409, "the Hub refused 'ada/digits' (status 409): ordered by the test\n"),
    ("POST .*commit", 412, "somebody changed 'ada/digits' in the meantime"),
    ("POST .*commit", 413, "too large"),
    (".*", 429, "the Hub has had too many requests"),
    (".*", 500, "the Hub is out of order (status 500)"),
    ("POST .*create", 502, "the Hub is out of order (status 502)"),
    ("POST .*validate", 503, "the Hub is out of order (status 503)"),
    ("POST .*preupload", 504, "the Hub is out of order (status 504)"),
    ("POST .*lfs", 500, "the Hub is out of order (status 500)"),
    ("PUT", 500, "the Hub is out of order (status 500)"),
    ("PUT", 403, "the token may not do this with 'ada/digits'"),
    ("POST .*commit", 503, "the Hub is out of order (status 503)"),
    (".*", "drop", "the Hub cannot be reached, or the connection broke off"),
    ("POST .*create", "drop", "the Hub cannot be reached, or the connection broke off"),
    ("PUT", "drop", "the Hub cannot be reached, or the connection broke off"),
    ("POST .*commit", "drop", "the Hub cannot be reached, or the connection broke off"),
    ("GET", "half", "the Hub cannot be reached, or the connection broke off"),
]


@pytest.mark.parametrize(("pattern", "fault", "message"), FAULTS, ids=lambda value: str(value)[:16])
def test_every_failure_is_one_line_and_leaves_the_run_as_it_was(
    logged_in, run, capsys, caplog, pattern, fault, message
):
    before = fingerprint(run)
    logged_in.always(pattern, fault)
    assert main(["publish", str(run), "ada/digits"]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("gac: error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert fingerprint(run) == before
    assert TOKEN not in err + caplog.text
    logged_in.clear()
    assert main(["publish", str(run), "ada/digits"]) == 0, "and it works as soon as the Hub does"
    assert set(logged_in.files("ada/digits")) == FILES


def test_others_namespaces_are_refused(hub, run, monkeypatch, capsys):
    for token, message in (
        (None, "wants one"),
        ("hf_reader", "the token may not do this"),
        ("hf_gone", "does not know"),
    ):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        assert main(["publish", str(run), "ada/digits"]) == 2
        assert message in capsys.readouterr().err
    assert hub.repos == {}


def test_the_token_goes_into_one_header_and_nowhere_else(hub, run, capfd, caplog, tmp_path):
    caplog.set_level("DEBUG")
    push_to_hub(run, "ada/digits", token=TOKEN, discriminator=True)
    hub.always("POST", 403)
    with pytest.raises(UsageError) as caught:
        push_to_hub(run, "ada/digits", token=TOKEN, force=True, license="mit")
    told = [str(caught.value), caplog.text, *capfd.readouterr()]
    assert not any(TOKEN in text for text in told)
    for request in hub.requests:
        headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in f"{request.path} {headers}"
        assert TOKEN.encode() not in request.body
    assert any(TOKEN in request.headers.get("authorization", "") for request in hub.requests)
    for folder in (run, Path(os.environ["HF_HOME"])):
        assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("secret", "token"), [("hf_" + 17 * "aZ", None), ("of-a-form-of-its-own", "of-a-form-of-its-own")]
)
def test_a_token_in_what_the_client_says_is_cut_out(secret, token):
    with pytest.raises(UsageError) as caught, asking("ada/digits", token):
        raise OSError(f"cannot send 'Authorization: Bearer {secret}'")
    assert "cannot send 'Authorization: Bearer hf_***'" in str(caught.value)


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, run, other):
    push_to_hub(other, "ada/digits", token=TOKEN)
    hub.fail("POST .*commit", "half")
    with pytest.raises(UsageError, match="the connection broke off"):
        push_to_hub(run, "ada/digits", pull_request=True, token=TOKEN)
    assert [name for name in hub.repos["model", "ada/digits"].refs if name.startswith("refs/pr")] == ["refs/pr/1"]


def test_without_a_terminal_there_are_no_progress_bars(logged_in, run):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    logged_in.fail("PUT", 500)  # of which the client would tell on its own
    done = gac("publish", str(run), "ada/digits", environment=environment)
    assert done.returncode == 0
    assert re.fullmatch(r"published: http\S+\nno licence is named; .*\n", done.stdout)
    assert done.stderr == ""


# ---- a Space


def test_a_space_is_published_beside_the_model(logged_in, run, capsys):
    assert main(["publish", str(run), "ada/digits", "--space", "--private"]) == 0
    assert capsys.readouterr().out.count("published: ") == 2
    made = logged_in.repos["space", "ada/digits"]
    assert (made.sdk, made.private) == ("gradio", True)
    assert logged_in.files("ada/digits", "space") == space_files("ada/digits")
    assert "the Space [ada/digits]" in logged_in.files("ada/digits")["README.md"].decode()
    assert main(["publish", str(run), "ada/digits", "--space", "--private"]) == 0
    assert len(made.commits) == 2


def test_somebodys_space_is_not_overwritten_and_nothing_is_published_by_halves(logged_in, run, tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "app.py").write_text("something else")
    logged_in.add_folder("ada/digits", tmp_path / "app", "space")
    with pytest.raises(UsageError, match=r"'ada/digits' holds a different Space already \(app\.py\)"):
        push_to_hub(run, "ada/digits", space=True)
    assert writes(logged_in) == []


def test_a_space_that_fails_says_what_was_published(logged_in, run):
    logged_in.always("POST .*spaces.*commit", 403)
    with pytest.raises(UsageError, match=r"published is http\S+/commit/\w+, and not its space: the token may not"):
        push_to_hub(run, "ada/digits", space=True)


def test_a_dry_run_shows_the_space_too(hub, run):
    done = push_to_hub(run, "ada/digits", space=True, dry_run=True)
    assert set(described(done.parcels[1])) == {"app.py", "requirements.txt", "README.md"}
    assert hub.requests == []


@pytest.mark.parametrize("discriminator", [True, False], ids=["with D", "without"])
def test_the_page_of_a_demo_shows_what_was_published(logged_in, run, discriminator):
    push_to_hub(run, "ada/digits", discriminator=discriminator)
    here, there = Model.load(run), Model.load("ada/digits")
    assert torch.equal(there.sample(3, 8, IN_TURN, 0.0), here.sample(3, 8, IN_TURN, 0.0))
    assert (there.discriminator is not None) == discriminator
    with pytest.raises(UsageError, match="no revision 'v2'"):
        Model.load("ada/digits", "v2")
