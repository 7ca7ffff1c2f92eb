"""Networks of a run, from the adapter that it names."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from gac_plugin.errors import UsageError, resolve
from gac_plugin.protocols import Adapter
from gac_plugin.training.config import OUTPUT_RANGES, Config

GROUP = "gac_plugin.adapters"
SMALL_SAMPLE = 1024
WIDTH_AND_DEPTH = {"mlp": (256, 2), "dcgan": (64, 3)}


@dataclass(frozen=True)
class Recipe:
    """How to build a run's networks again: what stands in the `config.json` beside their weights.

    Attributes:
        adapter: name of the adapter.
        arguments: keyword arguments of its builders, JSON values.
    """

    adapter: str
    arguments: dict[str, Any]

    @property
    def latent_size(self) -> int:
        """Size of a latent."""
        return self.arguments["latent_size"]

    @property
    def value_range(self) -> tuple[float, float]:
        """Lowest and highest value of a sample."""
        return OUTPUT_RANGES[self.arguments["output"]]

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
        UsageError: none is installed under the name, or what its entry point names is not an `Adapter`.
    """
    point = resolve(name, {point.name: point for point in entry_points(group=GROUP)}, "adapter")
    assert not isinstance(point, str)
    adapter = point.load()
    if not isinstance(adapter, Adapter):
        raise UsageError(f"the entry point {point.value!r} of adapter {name!r} is a {type(adapter).__name__}")
    return adapter


def choose_recipe(config: Config, sample_shape: Sequence[int]) -> Recipe:
    """The adapter and its arguments for samples of a shape: what the configuration says, or what suits the size."""
    adapter = config.adapter or ("mlp" if math.prod(sample_shape) <= SMALL_SAMPLE else "dcgan")
    width, depth = WIDTH_AND_DEPTH.get(adapter, (64, 2))
    return Recipe(
        adapter,
        {
            "sample_shape": list(sample_shape),
            "latent_size": config.latent_size,
            "width": config.width or width,
            "depth": config.depth or depth,
            "output": config.output,
        },
    )
