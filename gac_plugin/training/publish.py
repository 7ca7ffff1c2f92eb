"""A trained generator to the Hub: what is sent is fixed and checked before the first request, and nothing else is."""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from gac_plugin import __version__
from gac_plugin.errors import UsageError
from gac_plugin.training.card import (
    CARD,
    EVALUATION,
    METRICS,
    PICTURE,
    PLACEHOLDER,
    TRAINING,
    data_set_name,
    draw_samples,
    hub_data_set,
    model_card,
    without_path,
)
from gac_plugin.training.config import EMBEDDED, read_config
from gac_plugin.training.hub import PICKLES, RECIPE, WEIGHTS, load_discriminator, load_generator, read_recipe
from gac_plugin.training.remote import asking, persistently, require_repo_id
from gac_plugin.training.space import SPACE_SDK, space_files

MODEL_FILES = (RECIPE, ".safetensors", ".h5", ".onnx", ".msgpack", ".gguf", *PICKLES)
"""Ends of the names of files that make a model what it is."""
SPACE_FILES, DISCRIMINATOR = ("app.py",), "discriminator/"
MESSAGE = f"A generator trained with gac-plugin {__version__}"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class Parcel:
    """What goes to one repository.

    Attributes:
        repo_id: "user/name".
        files: path in the repository -> content.
        kind: "model" or "space".
        guarded: ends of the names of files that are not overwritten with something else unasked.
        create: further arguments to create the repository.
    """

    repo_id: str
    files: dict[str, bytes]
    kind: str = "model"
    guarded: tuple[str, ...] = MODEL_FILES
    create: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Attributes:
        parcels: the model and, where it was asked for, the Space.
        urls: of the commits or the pull request; empty for a dry run. Where a repository held all of it already, of the
            commit that did.
    """

    parcels: tuple[Parcel, ...]
    urls: tuple[str, ...] = ()


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    pull_request: bool = False,
    force: bool = False,
    discriminator: bool = False,
    recipe: bool = True,
    license: str | None = None,
    revision: str | None = None,
    space: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Publication:
    """Publish the generator of a run on the Hub; the run folder stays as it is.

    Args:
        run: the run folder.
        repo_id: "user/name"; the repository is created if there is none.
        private: who may see a repository that is created; None leaves that to the account's settings.
        pull_request: propose it to an existing repository instead of changing it.
        force: replace a different model that the repository holds.
        discriminator: with the discriminator.
        recipe: with the settings of the run, for `gac train --config`.
        license: identifier of the licence of the weights, such as "cc-by-4.0".
        revision: branch to publish on, created if there is none; None for main.
        space: with a demo, a Space of the same name.
        dry_run: ask nothing of the Hub.
        token: by default the one that `hf auth login` or HF_TOKEN gave.

    Raises:
        UsageError: the run folder is damaged or not finished, the name is none, the repository holds a different model,
            or the Hub does not take it.
    """
    require_repo_id(repo_id)
    if pull_request and (space or revision):
        raise UsageError("--pull-request goes to the main branch of a model alone; leave out --space and --revision")
    parcels = [pack(run, repo_id, discriminator, recipe, license, space)]
    if space:
        parcels.append(_pack_space(repo_id))
    if dry_run:
        return Publication(tuple(parcels))
    api, urls = HfApi(token=token), list[str]()
    with asking(repo_id, token, revision):
        found = [persistently(partial(_look, api, parcel, revision)) for parcel in parcels]
        for parcel, here in zip(parcels, found, strict=True):
            _require_place(parcel, here, private, pull_request, force)
    for parcel, here in zip(parcels, found, strict=True):
        try:
            with asking(repo_id, token, revision):
                urls.append(
                    _propose(api, parcel, here) if pull_request else _send(api, parcel, here, revision, private)
                )
        except UsageError as error:
            before = f"published is {urls[0]}, and not its {parcel.kind}: " if urls else ""
            raise UsageError(f"{before}{error}") from error
    return Publication(tuple(parcels), tuple(urls))


def pack(
    run: str | Path,
    repo_id: str,
    discriminator: bool = False,
    recipe: bool = True,
    license: str | None = None,
    space: bool = False,
) -> Parcel:
    """The files of a model, read and checked, without the Hub; see `push_to_hub`.

    Raises:
        UsageError: the run folder holds no finished generator, or its weights are damaged; or the licence is no
            identifier.
    """
    folder = Path(run)
    if not (folder / RECIPE).is_file() or not (folder / "generator" / WEIGHTS).is_file():
        raise UsageError(f"{str(run)!r} is no run folder with a finished generator; give the --output-dir of gac train")
    if license is not None and not LICENSE.fullmatch(license := license.lower()):
        raise UsageError(f"--license must be an identifier such as mit, apache-2.0 or cc-by-4.0, got {license!r}")
    for told in filter(Path.exists, (folder / RECIPE, folder / EVALUATION, folder / METRICS)):  # in card and settings
        _read(folder, told.name)
    generator = load_generator(folder / "generator")
    files = {name: _read(folder, f"generator/{name}") for name in (WEIGHTS, RECIPE)}
    files[CARD] = _card(folder, repo_id, license, discriminator, recipe, space).encode()
    if (folder / "generator" / PICTURE).exists():
        files[PICTURE] = _read(folder, f"generator/{PICTURE}")
    else:
        with tempfile.TemporaryDirectory() as elsewhere:
            draw_samples(Path(elsewhere) / PICTURE, generator, read_recipe(folder / "generator"))
            files[PICTURE] = (Path(elsewhere) / PICTURE).read_bytes()
    if discriminator:
        load_discriminator(folder)
        files |= {name: _read(folder, name) for name in (f"discriminator/{WEIGHTS}", f"discriminator/{RECIPE}")}
    if recipe:
        files[TRAINING] = (json.dumps(shared_settings(folder), indent=2) + "\n").encode()
    return Parcel(repo_id, files)


def shared_settings(run: Path) -> dict[str, Any]:
    """The settings of a run as others may see and use them: without the paths of this machine.

    A data set in a folder becomes "./NAME", so that nothing else is taken for it: it is wanted beside the settings.
    """
    settings = {"dataset": EMBEDDED, **read_config(run / RECIPE)}
    dataset = settings["dataset"]
    everywhere = dataset == EMBEDDED or hub_data_set(run, dataset)
    shared = dataset if everywhere else f"./{data_set_name(run, dataset)}"
    return {name: without_path(value) for name, value in settings.items()} | {"dataset": shared}


def _pack_space(repo_id: str) -> Parcel:
    return Parcel(repo_id, space_files(repo_id), "space", SPACE_FILES, {"space_sdk": SPACE_SDK})


def _read(run: Path, name: str) -> bytes:
    """A file of the run.

    Raises:
        UsageError: it is a link to somewhere else, or cannot be read.
    """
    path = run / name
    try:
        if not path.resolve(strict=True).is_relative_to(run.resolve()):
            raise UsageError(
                f"{path} is a link to a file outside of the run, which is not sent; put a copy in its place"
            )
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _card(run: Path, repo_id: str, license: str | None, discriminator: bool, recipe: bool, space: bool) -> str:
    """A card for this publication; or the run's, with name and licence filled in, if somebody has written on it."""
    made = model_card(run, repo_id, license, discriminator, recipe, space)
    path = run / "generator" / CARD
    if not path.exists():
        return made
    kept = _read(run, f"generator/{CARD}").decode("utf-8", "replace")
    if kept == model_card(run):
        return made
    kept = kept.replace(PLACEHOLDER, repo_id)
    if license is None:
        return kept
    try:
        card = ModelCard(kept, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the metadata at the head of {path} cannot be read: {error}") from error
    card.data["license"] = license
    return str(card)


def _look(api: HfApi, parcel: Parcel, revision: str | None) -> Any:
    """What the repository holds, without a download; None if there is no such repository or branch yet."""
    try:
        return _info(api, parcel, revision)
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _info(api: HfApi, parcel: Parcel, revision: str | None) -> Any:
    return api.repo_info(parcel.repo_id, repo_type=parcel.kind, revision=revision, files_metadata=True)


def _require_place(parcel: Parcel, found: Any, private: bool | None, pull_request: bool, force: bool) -> None:
    """Refuse to publish where that would show or destroy what it should not."""
    name, what = parcel.repo_id, "Space" if parcel.kind == "space" else "model"
    if found is None:
        if pull_request:
            raise UsageError(f"there is no {what} {name!r} to propose anything to; leave out --pull-request")
        return
    if private and not pull_request and found.private is False:
        raise UsageError(
            f"the {what} {name!r} exists and is public; make it private on its page, or choose another name"
        )
    if pull_request or force:
        return
    if different := _different(parcel, found):
        raise UsageError(
            f"{name!r} holds a different {what} already ({', '.join(different)}); pass --force to replace it, "
            "--pull-request to propose yours, or choose another name"
        )


def _different(parcel: Parcel, found: Any) -> list[str]:
    """Files of the repository that would be replaced by something else."""
    return [file.rfilename for file in found.siblings if _is_guarded(parcel, file) and not _is_ours(parcel, file)]


def _is_guarded(parcel: Parcel, file: Any) -> bool:
    # where none is sent, a discriminator stays with its generator, or goes with it
    left = file.rfilename.startswith(DISCRIMINATOR) and file.rfilename not in parcel.files
    return file.rfilename.endswith(parcel.guarded) and not left


def _is_ours(parcel: Parcel, file: Any) -> bool:
    """Whether a file on the Hub is the one to be sent, by the hash that its listing gives."""
    content = parcel.files.get(file.rfilename)
    if content is None:
        return False
    if file.lfs is not None:
        return file.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return file.blob_id == hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _send(api: HfApi, parcel: Parcel, found: Any, revision: str | None, private: bool | None) -> str:
    """Make the files the commit after the one that was found, and return its address."""
    name, kind = parcel.repo_id, parcel.kind
    if found is None:
        persistently(lambda: api.create_repo(name, repo_type=kind, private=private, exist_ok=True, **parcel.create))
        if revision is not None:
            persistently(lambda: api.create_branch(name, branch=revision, repo_type=kind, exist_ok=True))
        found = persistently(lambda: _info(api, parcel, revision))
        # a branch that begins here takes nothing away; a repository that somebody else has just made could
        _require_place(parcel, found, private, pull_request=False, force=revision is not None)

    def commit() -> str:
        # made twice it is one commit: the client leaves out what the branch holds, and makes none of nothing
        made = api.create_commit(
            name,
            _operations(parcel, found),
            repo_type=kind,
            revision=revision,
            parent_commit=found.sha,
            commit_message=MESSAGE,
        )
        return made.commit_url

    return persistently(commit)


def _propose(api: HfApi, parcel: Parcel, found: Any) -> str:
    """Open a pull request, and return its address. It is tried once, since a second try could open a second one."""
    made = api.create_commit(
        parcel.repo_id, _operations(parcel, found), repo_type=parcel.kind, create_pr=True, commit_message=MESSAGE
    )
    return made.pr_url or made.commit_url


def _operations(parcel: Parcel, found: Any) -> Sequence[CommitOperationAdd | CommitOperationDelete]:
    """The files of a parcel; the discriminator of another generator does not stay beside it."""
    added = [CommitOperationAdd(path, content) for path, content in parcel.files.items()]
    if not _different(parcel, found):
        return added
    others = [file.rfilename for file in found.siblings if file.rfilename.startswith(DISCRIMINATOR)]
    return [*added, *(CommitOperationDelete(path) for path in others if path not in parcel.files)]


def described(parcel: Parcel) -> Mapping[str, tuple[int, str]]:
    """Path of each file -> its bytes and their SHA-256."""
    return {path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in parcel.files.items()}
