"""Networks on disk and on the Hub: safetensors for the weights, JSON for how to build them. Nothing is unpickled."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gac_plugin.errors import UsageError
from gac_plugin.training.config import OUTPUT_RANGES, read_config
from gac_plugin.training.files import CALIBRATED, write_json, write_whole
from gac_plugin.training.networks import Recipe, adapter_names
from gac_plugin.training.remote import asking, is_repo_id

WEIGHTS, RECIPE = "model.safetensors", "config.json"
CHECKSUM = "sha256"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def save_network(folder: Path, network: nn.Module, recipe: Recipe) -> None:
    """Write `model.safetensors`, with a checksum among its metadata, and `config.json`.

    Args:
        folder: made if missing.
        network: built by the recipe, on any device.
        recipe: how to build it again.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    noted = {CHECKSUM: checksum(weights)}  # safetensors writes several entries in a random order
    write_whole(folder / WEIGHTS, lambda temporary: save_file(weights, temporary, metadata=noted))
    codec = {"codec": recipe.codec} if recipe.codec else {}
    write_json(folder / RECIPE, {"library_name": "gac-plugin", "adapter": recipe.adapter, **recipe.arguments, **codec})


def load_generator(path: str | Path, revision: str | None = None, token: str | None = None) -> nn.Module:
    """The generator of a run folder, of a folder with `model.safetensors` and `config.json`, or on the Hub.

    Args:
        path: a folder, or "user/name" on the Hub, of which those two files alone are fetched. A folder comes first.
        revision: branch, tag or commit on the Hub.
        token: for a private repository; by default the one that `hf auth login` or HF_TOKEN gave.

    Returns:
        The generator in evaluation mode.

    Raises:
        UsageError: there is no generator, its adapter is not installed, its weights do not fit, or the Hub does not
            give it.
    """
    folder = network_folder(path, "generator", revision, token)
    return _load(folder, read_recipe(folder).generator())


from_pretrained = load_generator
"""The name that other libraries give to it."""


def load_discriminator(path: str | Path, revision: str | None = None, token: str | None = None) -> nn.Module:
    """The discriminator of a run folder, or of a repository that was published with it; see `load_generator`."""
    folder = network_folder(path, "discriminator", revision, token)
    return _load(folder, read_recipe(folder).discriminator())


def network_folder(path: str | Path, kind: str, revision: str | None = None, token: str | None = None) -> Path:
    """The folder with the weights: `path`/`kind` of a run, `path` itself, or the Hub's files in the cache.

    Args:
        path, revision, token: see `load_generator`.
        kind: "generator" or "discriminator".

    Raises:
        UsageError: none of them holds weights.
    """
    name, folder = str(path), Path(path)
    with suppress(OSError):  # a name that the file system does not take
        if not folder.exists() and isinstance(path, str) and is_repo_id(name):
            try:
                return _fetch(name, kind, revision, token)
            except UsageError as error:
                if not isinstance(error.__cause__, LocalEntryNotFoundError):
                    raise
                # nobody has said whether there is such a name; a folder's may have been misspelt
                raise UsageError(f"there is no folder {name!r}, and {error}") from error
        if revision is not None:
            raise UsageError(f"a revision is for a name on the Hub, and {name!r} is none; leave out --revision")
        for place in (folder / kind, folder):
            if (place / WEIGHTS).is_file():
                return place
    raise UsageError(f"no {kind} in {name!r}: neither it nor its folder {kind!r} holds {WEIGHTS}")


def judge_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder with the discriminator to refine latents with: the calibrated one where a run holds one; see
    `network_folder`."""
    if revision is None:
        with suppress(OSError):
            calibrated = Path(path) / CALIBRATED / "discriminator"
            if (calibrated / WEIGHTS).is_file():
                return calibrated
    return network_folder(path, "discriminator", revision)


def read_recipe(path: str | Path, revision: str | None = None, token: str | None = None) -> Recipe:
    """How to build the network whose weights stand in a folder or, under "user/name", on the Hub.

    Args:
        path: the folder itself, or a name on the Hub.
        revision, token: see `load_generator`.

    Raises:
        UsageError: `config.json` cannot be read, does not name an adapter and its arguments, or names an adapter that
            is not installed.
    """
    folder = Path(path)
    if not folder.exists() and isinstance(path, str) and is_repo_id(path):
        folder = network_folder(path, "generator", revision, token)
    values = read_config(folder / RECIPE)
    arguments = {name: value for name, value in values.items() if name not in ("library_name", "adapter", "codec")}
    if arguments.get("pretrained"):  # the weights stand beside it; nothing is to be downloaded
        arguments["pretrained"] = False
    shape, codec = values.get("sample_shape"), values.get("codec", {})
    well_formed = {
        "adapter": isinstance(values.get("adapter"), str),
        "output": values.get("output") in list(OUTPUT_RANGES),
        "codec": isinstance(codec, dict),
        "sample_shape": isinstance(shape, list)
        and all(map(_is_size, shape))
        and (bool(codec) or (len(shape) == 3 and shape[0] in (1, 3))),
        **{name: _is_size(values.get(name)) for name in ("latent_size", "width", "depth")},
    }
    wrong = [name for name, right in well_formed.items() if not right]
    if wrong:
        raise UsageError(f"{folder / RECIPE} does not describe a network: {', '.join(wrong)} missing or wrong")
    if values["adapter"] not in adapter_names():
        raise UsageError(
            f"unknown adapter {values['adapter']!r}, whose networks these are: install the package that provides it "
            f"(the page of the model tells which); installed are: {', '.join(adapter_names())}"
        )
    return Recipe(values["adapter"], arguments, codec)


def checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the weights' names, types, shapes and bytes, as hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _fetch(repo_id: str, kind: str, revision: str | None, token: str | None) -> Path:
    """The folder in the cache with a network's two files from the Hub, both of one commit."""
    under = "" if kind == "generator" else f"{kind}/"
    with asking(repo_id, token, revision):
        try:
            recipe = hf_hub_download(repo_id, under + RECIPE, revision=revision, token=token)
            snapshot = Path(recipe).parents[under.count("/")]  # named by its commit
            hf_hub_download(repo_id, under + WEIGHTS, revision=snapshot.name, token=token)
        except (GatedRepoError, LocalEntryNotFoundError):
            raise  # the latter: not a file that is not there, but a Hub that is not there
        except RepositoryNotFoundError as error:
            raise UsageError(
                f"there is no folder {repo_id!r}, and no such repository on the Hub, or it is private; check the name, "
                "and log in with `hf auth login` or set HF_TOKEN to a token that may see it"
            ) from error
        except EntryNotFoundError as error:
            files = HfApi().list_repo_files(repo_id, revision=revision, token=token)
            raise UsageError(_absence(repo_id, kind, under, files)) from error
    return Path(recipe).parent


def _absence(repo_id: str, kind: str, under: str, files: Sequence[str]) -> str:
    missing = [name for name in (RECIPE, WEIGHTS) if under + name not in files]
    pickles = [file for file in files if file.endswith(PICKLES)]
    if WEIGHTS in missing and pickles:
        return (
            f"{repo_id!r} has no {under}{WEIGHTS}, and {', '.join(pickles)} is never opened, since a pickle can run "
            "code; ask its author to publish safetensors"
        )
    what = "a generator of gac-plugin" if kind == "generator" else f"its {kind}; it was published without"
    return f"{repo_id!r} has no {' and no '.join(under + name for name in missing)}: it does not hold {what}"


def _load(folder: Path, network: nn.Module) -> nn.Module:
    try:
        weights = load_file(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            noted = (file.metadata() or {}).get(CHECKSUM)
        if noted not in (None, checksum(weights)):  # files of other programs have none
            raise UsageError(f"the weights in {folder / WEIGHTS} are damaged: they are not those that were written")
        network.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UsageError(f"the weights in {folder / WEIGHTS} do not fit or are damaged: {reason}") from error
    spoiled = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if spoiled:
        raise UsageError(f"the weights {', '.join(spoiled)} in {folder / WEIGHTS} are not finite: the run diverged")
    return network.eval()
