"""Networks of a run, from the adapter that it names."""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from gac_plugin.errors import UsageError, resolve
from gac_plugin.protocols import Adapter, Codec
from gac_plugin.training.config import Config

GROUP = "gac_plugin.adapters"
SMALL_SAMPLE = 1024
CONTRACT = ("sample_shape", "latent_size", "width", "depth", "output", "classes")
"""Arguments that every builder gets; what else it takes are options of its adapter."""


@dataclass(frozen=True)
class Recipe:
    """How to build a run's networks again: what stands in the `config.json` beside their weights.

    Attributes:
        adapter: name of the adapter.
        arguments: keyword arguments of its builders, JSON values.
        codec: what the codec's `to_json` gives, where the samples are not images.
    """

    adapter: str
    arguments: dict[str, Any]
    codec: dict[str, Any] = field(default_factory=dict)

    @property
    def latent_size(self) -> int:
        """Size of a latent."""
        return self.arguments["latent_size"]

    @property
    def classes(self) -> int:
        """The number of classes that the networks are told apart, 0 if they are not told."""
        return self.arguments.get("classes", 0)

    def generator(self) -> nn.Module:
        """A generator with fresh weights; see `_build`."""
        return self._build(find_adapter(self.adapter).generator)

    def discriminator(self) -> nn.Module:
        """A discriminator with fresh weights; see `_build`."""
        return self._build(find_adapter(self.adapter).discriminator)

    def _build(self, builder: Callable[..., nn.Module]) -> nn.Module:
        """Call a builder of the adapter.

        Raises:
            UsageError: the builder does not take the arguments.
        """
        try:
            return builder(**self.arguments)
        except UsageError:
            raise
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"cannot build the network of adapter {self.adapter!r}: {reason}") from error


def adapter_names() -> list[str]:
    """Names of the installed adapters, ours and other packages'."""
    return sorted(point.name for point in entry_points(group=GROUP))


def find_adapter(name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        UsageError: none is installed under the name, it cannot be imported, or its entry point names no `Adapter`.
    """
    point = resolve(name, {point.name: point for point in entry_points(group=GROUP)}, "adapter")
    assert not isinstance(point, str)
    try:
        adapter = point.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the adapter {name!r} cannot be imported from {point.value!r}: {error}") from error
    if not isinstance(adapter, Adapter):
        raise UsageError(f"the entry point {point.value!r} of adapter {name!r} is a {type(adapter).__name__}")
    return adapter


def adapter_options(adapter: Adapter) -> list[str]:
    """What `--options` may set for an adapter: "name", or "name=default"."""
    found: dict[str, str] = {}
    for builder in (adapter.generator, adapter.discriminator):
        for name, parameter in inspect.signature(builder).parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and name not in CONTRACT:
                needed = parameter.default is parameter.empty
                found[name] = name if needed else f"{name}={json.dumps(parameter.default, default=str)}"
    codec = adapter.medium.options if adapter.medium else ()
    return [*found.values(), *(name for name in codec if name not in found)]


def choose_recipe(config: Config, codec: Codec, adapter: str | None, classes: int) -> Recipe:
    """The adapter and the arguments of its builders: what the configuration says, or what suits the samples.

    Args:
        config: of the run.
        codec: of the data.
        adapter: the one that reads the data; None for images, whose size then decides.
        classes: in the data; used where training is conditional.
    """
    small = math.prod(codec.sample_shape) <= SMALL_SAMPLE
    name = config.adapter or adapter or ("mlp" if small else "dcgan")
    found = find_adapter(name)
    codec_options = found.medium.options if found.medium else ()
    arguments = {
        "sample_shape": list(codec.sample_shape),
        "latent_size": config.latent_size,
        "width": config.width or found.width,
        "depth": config.depth or found.depth,
        "output": config.output,
        **{name: value for name, value in config.adapter_options.items() if name not in codec_options},
        **({"classes": classes} if config.conditional else {}),
    }
    return Recipe(name, arguments, codec.to_json())
