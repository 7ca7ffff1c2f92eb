"""Named features: maps from pictures to vectors in which distances mean something."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from gac_plugin.errors import UsageError, resolve
from gac_plugin.training.data.source import Decoded, first_line
from gac_plugin.training.files import write_whole
from gac_plugin.training.judging.measures import CHUNK

FORMAT = 1
"""To be raised with any change of the classifier or of its training."""
AT_ONCE = 32
"""Pictures that a large network sees together."""


@dataclass(frozen=True)
class Features:
    """A map from images to vectors in which distances mean something.

    Attributes:
        name: what to call it in a result, with what is needed to judge it.
        extract: uint8 pixels (N, C, H, W) -> float32 vectors (N, F).
        classify: vectors (N, F) -> int64 classes (N,), where the features are those of a classifier.
        accuracy: share of real test images whose class it finds.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    accuracy: float | None = None

    def of(self, pixels: Tensor) -> Tensor:
        """The same as `extract`, in parts."""
        return torch.cat([self.extract(part) for part in pixels.split(CHUNK)])


@dataclass(frozen=True)
class FeatureKind:
    """An entry of `FEATURES`.

    Attributes:
        description: one line.
        make: (the part of the name after ":", training pictures, test pictures, seed, device) -> the features.
        learned: whether labels of the training samples went into them, so that these lie elsewhere than fresh ones.
        model: what is to stand after ":", if anything.
    """

    description: str
    make: Callable[[str, Decoded, Decoded, int, torch.device], Features]
    learned: bool = False
    model: str = ""


def make_features(
    train: Decoded,
    test: Decoded,
    seed: int,
    device: torch.device,
    name: str | None = None,
    samples: str = "images",
) -> Features:
    """Features by their name.

    Args:
        train: pictures that the classifier learns, or the principal components are taken from.
        test: pictures that the classifier's accuracy is measured on.
        seed: fixes the classifier.
        device: where to compute.
        name: in `FEATURES`, with ":MODEL" where that takes one; by default "classifier" where there are labels to
            learn and "pixels" where not.
        samples: what the pictures are of, to be told if they are not the samples themselves.

    Raises:
        UsageError: the name is unknown, its package is not installed, or its weights cannot be fetched.
    """
    kind, model = find_kind(name or ("classifier" if _has_classes(train, test) else "pixels"))
    features = kind.make(model, train, test, seed, device)
    return features if samples == "images" else replace(features, name=f"{features.name}, on pictures of {samples}")


def find_kind(name: str) -> tuple[FeatureKind, str]:
    """The entry of `FEATURES` that a name is of, and its model.

    Raises:
        UsageError: there is none, or a model is missing or not wanted.
    """
    first, colon, model = name.partition(":")
    kind = resolve(first, FEATURES, "features")
    assert not isinstance(kind, str)
    if bool(model) != bool(kind.model) or (colon and not model):
        wanted = f"{first}:{kind.model}" if kind.model else first
        raise UsageError(f"features {name!r} are not of the form {wanted}")
    return kind, model


def _has_classes(train: Decoded, test: Decoded) -> bool:
    return train.labels is not None and test.labels is not None and bool(0 <= train.labels.min() < train.labels.max())


def _classifier(model: str, train: Decoded, test: Decoded, seed: int, device: torch.device, size: int = 64) -> Features:
    if not _has_classes(train, test):
        raise UsageError("features 'classifier' need class labels, and the data set has none; pass --features pixels")
    path = Path(datasets.config.HF_DATASETS_CACHE) / "gac-plugin" / f"{fingerprint(train, seed)}.safetensors"
    return _features_of(_trained(train, seed, device, size, path), test, device)


def kept_features(file: Path, test: Decoded, device: torch.device) -> Features:
    """The features of a classifier out of the cache of this machine or of another.

    The same training ends elsewhere on another processor, and distances in two classifiers' features do not compare.

    Args:
        file: its weights, safetensors.
        test: pictures with labels, that its accuracy is measured on.
        device: where to compute.
    """
    weights = load_file(file)
    (_, inputs), (classes, size) = weights["1.weight"].shape, weights["5.weight"].shape
    network = _new_classifier(inputs, size, classes)
    network.load_state_dict(weights)
    return _features_of(network.to(device), test, device)


def _features_of(network: nn.Sequential, test: Decoded, device: torch.device) -> Features:
    assert test.labels is not None
    body, head = network.requires_grad_(False)[:-1], network[-1]
    guesses = torch.cat([network(_unit(part.to(device))).argmax(1).cpu() for part in test.values.split(CHUNK)])
    accuracy = float((guesses == test.labels).float().mean())
    size, split = head.in_features, test.split
    name = f"{size} features of a classifier trained on this data set (accuracy {accuracy:.1%} on {split!r})"
    return Features(name, lambda pixels: body(_unit(pixels)), lambda vectors: head(vectors).argmax(1), accuracy)


def _trained(train: Decoded, seed: int, device: torch.device, size: int, path: Path) -> nn.Sequential:
    """The classifier out of the cache, or trained and put there."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        assert train.labels is not None
        inputs, classes = train.values[0].numel(), int(train.labels.max()) + 1
        network = _new_classifier(inputs, size, classes)
        cached = _weights(path)
        if {name: tensor.shape for name, tensor in cached.items()} == {
            name: tensor.shape for name, tensor in network.state_dict().items()
        }:
            network.load_state_dict(cached)
            return network.to(device)
        _learn(network.to(device), train, device)
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    with suppress(UsageError):  # a cache that cannot be written is none
        write_whole(path, lambda temporary: save_file(weights, temporary))
    return network


def _new_classifier(inputs: int, size: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, size), nn.ReLU(), nn.Linear(size, classes)
    )


def _weights(path: Path) -> dict[str, Tensor]:
    """What a file holds; nothing if it is not there, or not whole."""
    with suppress(SafetensorError, OSError):
        return load_file(path)
    return {}


def _learn(
    network: nn.Module, train: Decoded, device: torch.device, steps: int = 1500, batch: int = 128, rate: float = 2e-3
) -> None:
    assert train.labels is not None
    x, y = train.values.to(device), train.labels.to(device)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,)).to(device)
        optimizer.zero_grad()
        cross_entropy(network(_unit(x[rows])), y[rows]).backward()
        optimizer.step()
        schedule.step()


def fingerprint(train: Decoded, seed: int) -> str:
    """What tells the classifier of these samples and this seed from any other."""
    found = hashlib.sha256(f"classifier {FORMAT} {seed} {tuple(train.values.shape)}".encode())
    for part in train.values.split(CHUNK):
        found.update(part.cpu().contiguous().numpy().data)
    if train.labels is not None:
        found.update(train.labels.cpu().contiguous().numpy().data)
    return found.hexdigest()[:32]


def _pixels(model: str, train: Decoded, test: Decoded, seed: int, device: torch.device, size: int = 64) -> Features:
    x = _unit(train.values[:10_000].to(device)).flatten(1)
    size = min(size, *x.shape)
    mean = x.mean(0)
    components = torch.linalg.svd(x - mean, full_matrices=False).Vh[:size].T
    return Features(
        f"{size} principal components of the pixels in [0, 1]",
        lambda pixels: (_unit(pixels).flatten(1) - mean) @ components,
    )


def _timm(model: str, train: Decoded, test: Decoded, seed: int, device: torch.device) -> Features:
    if not timm.is_model(model):
        near = get_close_matches(model, timm.list_models(pretrained=True), n=3, cutoff=0.5) or ["resnet18"]
        raise UsageError(f"timm has no backbone {model!r}; near names: {', '.join(near)} (timm.list_models() has all)")
    if not timm.is_model_pretrained(model):
        raise UsageError(f"timm has no weights for {model!r}; timm.list_models(pretrained=True) tells what it has")
    try:
        network: Any = timm.create_model(model, pretrained=True, num_classes=0)
    except OSError as error:  # every failure of the Hub's client is one
        raise _cannot_fetch(f"timm:{model}", error) from error
    except RuntimeError as error:
        raise UsageError(f"timm cannot make {model!r} with its weights: {first_line(error)}; take another") from error
    network = network.eval().requires_grad_(False).to(device)
    config = resolve_model_data_config(network)
    _, *size = config["input_size"]
    mean, std = (torch.tensor(config[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))

    def extract(pixels: Tensor) -> Tensor:
        x = interpolate(_unit(_in_colour(pixels)), size, mode="bicubic", antialias=True).clamp(0, 1)
        return network((x - mean) / std).float()

    tag = network.pretrained_cfg.get("tag")
    full = model if "." in model or not tag else f"{model}.{tag}"
    name = f"{network.num_features} features of timm's {full}, at {size[0]}x{size[1]} pixels"
    return Features(name, partial(_in_parts, extract))


def _inception(model: str, train: Decoded, test: Decoded, seed: int, device: torch.device) -> Features:
    """The network of the FID of the literature, as torch-fidelity provides it."""
    try:
        library: Any = import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise UsageError(
            "features 'inception' need torch-fidelity: pip install 'gac-plugin[evaluate]', or pass another --features"
        ) from error
    try:
        # torch-fidelity unpickles this file; a file that this line reads holds tensors alone, and no code to run
        torch.hub.load_state_dict_from_url(
            library.URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise _cannot_fetch("inception", error) from error
    network = network.eval().to(device)

    def extract(pixels: Tensor) -> Tensor:
        return network(_in_colour(pixels))[0]

    return Features("2048 features of torch-fidelity's Inception v3", partial(_in_parts, extract))


def _cannot_fetch(name: str, error: Exception) -> UsageError:
    return UsageError(
        f"the weights of the features {name!r} are not in the cache and cannot be fetched: {first_line(error)}; run "
        "once with a network, or pass --features classifier or pixels, which need none"
    )


@torch.no_grad()
def _in_parts(extract: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    return torch.cat([extract(part) for part in pixels.split(AT_ONCE)])


def _in_colour(pixels: Tensor) -> Tensor:
    return pixels.expand(-1, 3, -1, -1)


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


FEATURES = {
    "classifier": FeatureKind(
        "a small classifier trained on the data set itself and kept in the cache; offline", _classifier, learned=True
    ),
    "pixels": FeatureKind("principal components of the pixels; offline", _pixels),
    "timm": FeatureKind("a pretrained backbone of timm, such as timm:resnet18; downloaded", _timm, model="NAME"),
    "inception": FeatureKind("the Inception v3 of the FID; downloaded, needs the extra 'evaluate'", _inception),
}
