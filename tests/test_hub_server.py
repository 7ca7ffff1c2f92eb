"""The stand-in for the Hub answers the real clients as the Hub does: files come back, and what is refused is said."""

import io
import tarfile
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from hub_server import Hub, card_errors
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image as Picture

WRITER = HfApi(token="hf_writer")
# huggingface_hub hands the body of a large file to its HTTP client in a way that the client calls outdated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def push(content: bytes, name: str = "weights.safetensors", **more) -> huggingface_hub.CommitInfo:
    operations = [CommitOperationAdd(name, content), CommitOperationAdd("notes.txt", b"of " + content)]
    return WRITER.create_commit("ada/model", operations, commit_message="test", **more)


def read(name: str = "weights.safetensors", **more) -> bytes:
    return Path(hf_hub_download("ada/model", name, **more)).read_bytes()


@pytest.fixture
def model(hub) -> Hub:
    WRITER.create_repo("ada/model")
    push(b"first")
    return hub


def test_an_account_is_known_by_its_token(hub):
    assert WRITER.whoami()["name"] == "ada"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_nobody").whoami()


def test_files_come_back_small_and_large(model):
    assert read() == b"first"
    assert read("notes.txt") == b"of first"
    assert model.files("ada/model") == {"weights.safetensors": b"first", "notes.txt": b"of first"}
    assert [request.method for request in model.requests if "lfs-storage" in request.path] == ["PUT"]


def test_a_listing_tells_what_is_there_without_a_download(model):
    info = WRITER.model_info("ada/model", files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert set(files) == {".gitattributes", "weights.safetensors", "notes.txt"}
    # printf 'first' | sha256sum; printf 'of first' | git hash-object --stdin
    assert files["weights.safetensors"].lfs.sha256 == "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"
    assert files["notes.txt"].blob_id == "2965c4be8e73b147f6b405f86d2dcd50d2e75ef6"
    assert files["notes.txt"].size == 8
    assert set(WRITER.list_repo_files("ada/model")) == set(files)
    assert WRITER.get_paths_info("ada/model", ["notes.txt"])[0].size == 8


def test_older_revisions_stay(model):
    first = WRITER.model_info("ada/model").sha
    WRITER.create_tag("ada/model", tag="v1")
    push(b"second")
    assert (read(), read(revision=first), read(revision="v1")) == (b"second", b"first", b"first")
    with pytest.raises(RevisionNotFoundError):
        read(revision="v2")
    with pytest.raises(RemoteEntryNotFoundError):
        read("none.txt")


def test_what_has_not_changed_is_not_sent_again(model):
    before = WRITER.model_info("ada/model").sha
    assert push(b"first").oid == before
    assert [request.method for request in model.requests if "/commit/" in request.path] == ["POST"]


def test_a_pull_request_leaves_the_main_branch_alone(model):
    assert push(b"second", create_pr=True).pr_url == f"{model.endpoint}/ada/model/discussions/1"
    assert (read(), read(revision="refs/pr/1")) == (b"first", b"second")
    assert push(b"third", create_pr=True).pr_revision == "refs/pr/2"
    assert len(WRITER.list_repo_refs("ada/model", include_pull_requests=True).pull_requests) == 2


def test_a_commit_on_a_parent_that_is_no_longer_the_newest_is_refused(model):
    before = WRITER.model_info("ada/model").sha
    push(b"second", parent_commit=before)
    with pytest.raises(HfHubHTTPError, match="412"):
        push(b"third", parent_commit=before)


def test_an_existing_repository_is_not_created_again(model):
    with pytest.raises(HfHubHTTPError, match="409"):
        WRITER.create_repo("ada/model")
    assert WRITER.create_repo("ada/model", exist_ok=True).repo_id == "ada/model"
    WRITER.delete_repo("ada/model")
    with pytest.raises(RepositoryNotFoundError):
        WRITER.model_info("ada/model")


def test_others_may_not_write(model):
    reader = HfApi(token="hf_reader")
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_repo("ada/other")
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ada/model")
    proposed = reader.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ada/model", create_pr=True)
    assert proposed.pr_num == 1


@pytest.mark.parametrize(
    ("token", "error"),
    [(None, RepositoryNotFoundError), ("hf_reader", RepositoryNotFoundError), ("hf_x", HfHubHTTPError)],
)
def test_a_private_repository_is_hidden_from_others(hub, token, error):
    WRITER.create_repo("ada/model", private=True)
    push(b"secret")
    assert read(token="hf_writer") == b"secret"
    hub_again = HfApi(token=token)
    with pytest.raises(error):
        hub_again.model_info("ada/model")


def test_a_gated_repository_is_seen_and_not_read(hub, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    hub.add_folder("ada/model", tmp_path, "model", gated=True)
    assert WRITER.model_info("ada/model").gated == "manual"
    with pytest.raises(GatedRepoError):
        read("a.txt", token="hf_reader")
    assert read("a.txt", token="hf_writer") == b"a"


def test_a_space_has_a_kind_of_its_own(hub):
    WRITER.create_repo("ada/model", repo_type="space", space_sdk="gradio")
    WRITER.upload_file(path_or_fileobj=b"x", path_in_repo="app.py", repo_id="ada/model", repo_type="space")
    assert WRITER.space_info("ada/model").sdk == "gradio"
    assert hub.files("ada/model", "space") == {"app.py": b"x"}


@pytest.mark.parametrize("faults", [(503,), (500, 502), ("drop",), (429,)], ids=str)
def test_the_client_tries_again_where_it_does(model, faults):
    model.fail("HEAD .*weights", 500)
    model.fail("POST .*preupload", *faults)
    push(b"second")
    assert read() == b"second"
    assert sum("preupload" in request.path for request in model.requests) == 2 + len(faults)


def test_half_of_a_file_is_never_taken_for_the_whole(model):
    push(b"second" * 1000)
    model.fail("GET .*weights", "half")
    assert read() == b"second" * 1000
    assert sum(request.method == "GET" and "weights" in request.path for request in model.requests) == 2


def test_a_hub_that_stays_down_is_an_error(model):
    model.always("HEAD .*weights", 503)
    with pytest.raises(LocalEntryNotFoundError):
        read()
    model.clear()
    assert read() == b"first"


def test_half_of_an_answer_means_that_the_commit_was_made(model):
    model.fail("POST .*commit", "half")
    with pytest.raises(Exception, match="peer closed"):
        push(b"second")
    assert model.files("ada/model")["weights.safetensors"] == b"second"


GOOD = """---
license: mit
pipeline_tag: unconditional-image-generation
model-index:
- name: x
  results:
  - task: {type: unconditional-image-generation}
    dataset: {name: d, type: d}
    metrics: [{type: frechet, value: 1.5}]
---
# x
"""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("mit", "mine", "license"),
        ("pipeline_tag: unc", "pipeline_tag: Unc", "pipeline_tag"),
        ("value: 1.5", "value: high", "model-index"),
        ("- name: x\n", "- name: ''\n", "model-index"),
        ("license: mit", "datasets: [/home/ada/data]", "datasets"),
        ("license: mit", "license: [", "cannot be read"),
        ("---\nlicense", "license", "no metadata"),
    ],
)
def test_the_metadata_of_a_card_is_checked(hub, before, after, message):
    assert card_errors(GOOD, "model") == []
    assert message in card_errors(GOOD.replace(before, after, 1), "model")[0]
    WRITER.create_repo("ada/model")
    push(GOOD.encode(), "README.md")
    with pytest.raises(ValueError, match=message):
        push(GOOD.replace(before, after, 1).encode(), "README.md")


# ---- data sets


def digits(count: int = 20) -> datasets.Dataset:
    pictures = np.random.default_rng(0).integers(0, 256, (count, 6, 5), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Picture.fromarray(pixels) for pixels in pictures], "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


def parquet(folder: Path) -> None:
    digits().to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def imagefolder(folder: Path) -> None:
    for index, row in enumerate(digits()):
        (folder / "train" / "ab"[row["label"]]).mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / "train" / "ab"[row["label"]] / f"{index:02d}.png")


def webdataset(folder: Path) -> None:
    with tarfile.open(folder / "train-000.tar", "w") as archive:
        for index, row in enumerate(digits()):
            data = io.BytesIO()
            row["image"].save(data, "PNG")
            member = tarfile.TarInfo(f"{index:02d}.png")
            member.size = data.tell()
            data.seek(0)
            archive.addfile(member, data)


def csv(folder: Path) -> None:
    (folder / "train.csv").write_text("name,age\n" + "".join(f"n{index},{index}\n" for index in range(20)))


@pytest.mark.parametrize("write", [parquet, imagefolder, webdataset, csv], ids=lambda write: write.__name__)
@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_a_data_set_loads_by_name_as_from_its_folder(hub, streams, tmp_path, write, streaming):
    folder = tmp_path / "data-set"
    folder.mkdir()
    write(folder)
    hub.add_folder("ada/digits", folder)
    there = list(datasets.load_dataset("ada/digits", split="train", streaming=streaming))
    here = list(datasets.load_dataset(str(folder), split="train"))
    assert len(there) == len(here) == 20
    for a, b in zip(there, here, strict=True):
        names = a.keys() - {"__url__"}
        assert all(
            np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in names if not name.startswith("__")
        )
    assert all("hf_" not in request.path for request in hub.requests)


def test_revisions_and_configurations_of_a_data_set(hub, tmp_path):
    for config in ("small", "big"):
        (tmp_path / config).mkdir()
        (tmp_path / config / "train.csv").write_text(f"name\n{config}\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.csv\n" for name in ("small", "big"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    first = hub.add_folder("ada/words", tmp_path)
    (tmp_path / "big" / "train.csv").write_text("name\nbigger\n")
    hub.add_folder("ada/words", tmp_path)
    assert datasets.get_dataset_config_names("ada/words") == ["small", "big"]
    assert datasets.load_dataset("ada/words", "small", split="train")["name"][:] == ["small"]
    assert datasets.load_dataset("ada/words", "big", split="train")["name"][:] == ["bigger"]
    assert datasets.load_dataset("ada/words", "big", split="train", revision=first)["name"][:] == ["big"]


def test_a_private_data_set_wants_its_owners_token(hub, streams, tmp_path, monkeypatch):
    csv(tmp_path)
    hub.add_folder("ada/words", tmp_path, private=True)
    for token in (None, "hf_reader"):
        with pytest.raises(datasets.exceptions.DatasetNotFoundError):
            datasets.load_dataset("ada/words", token=token)
    assert len(datasets.load_dataset("ada/words", split="train", token="hf_writer")) == 20
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert len(list(datasets.load_dataset("ada/words", split="train", streaming=True))) == 20


def test_a_data_set_is_pushed_and_pulled(hub):
    digits().push_to_hub("ada/digits", token="hf_writer")
    again = datasets.load_dataset("ada/digits", split="train")
    assert again["label"][:] == digits()["label"][:]
    assert set(hub.files("ada/digits", "dataset")) == {"README.md", "data/train-00000-of-00001.parquet"}


def test_parts_of_a_file_are_read_by_range(hub, tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    hub.add_folder("ada/bytes", tmp_path)
    with HfFileSystem().open("datasets/ada/bytes/a.bin", "rb", block_size=16) as file:
        file.seek(100)
        assert file.read(4) == bytes([100, 101, 102, 103])
    assert any(request.status == 206 for request in hub.requests)


def test_without_the_stand_in_nothing_is_found():
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("ada/model")
