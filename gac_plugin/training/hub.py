"""Networks on disk: safetensors for the weights, JSON for how to build them. Nothing is unpickled."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gac_plugin.errors import UsageError
from gac_plugin.training.config import OUTPUT_RANGES, read_config
from gac_plugin.training.files import write_json, write_whole
from gac_plugin.training.networks import Recipe

WEIGHTS, RECIPE = "model.safetensors", "config.json"
CHECKSUM = "sha256"


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


def load_generator(path: str | Path) -> nn.Module:
    """The generator of a run folder, or of a folder with `model.safetensors` and `config.json`; in evaluation mode.

    Raises:
        UsageError: there is no generator, its adapter is not installed, or its weights do not fit.
    """
    folder = network_folder(path, "generator")
    return _load(folder, read_recipe(folder).generator())


def load_discriminator(path: str | Path) -> nn.Module:
    """The discriminator of a run folder; see `load_generator`."""
    folder = network_folder(path, "discriminator")
    return _load(folder, read_recipe(folder).discriminator())


def network_folder(path: str | Path, kind: str) -> Path:
    """The folder with the weights: `path`/`kind` of a run, or `path` itself.

    Raises:
        UsageError: neither holds weights.
    """
    for folder in (Path(path) / kind, Path(path)):
        with suppress(OSError):  # a name that the file system does not take
            if (folder / WEIGHTS).is_file():
                return folder
    raise UsageError(f"no {kind} in {str(path)!r}: neither it nor its folder {kind!r} holds {WEIGHTS}")


def read_recipe(folder: Path) -> Recipe:
    """How to build the network whose weights stand in the folder.

    Raises:
        UsageError: `config.json` cannot be read or does not name an adapter and its arguments.
    """
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
