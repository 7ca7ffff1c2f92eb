"""What GAC asks of foreign objects: networks, latents, and the packages that adapters wrap."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gac_plugin.errors import UsageError

LatentSource = int | tuple[int, ...] | Callable[[int], Any]
"""A latent size, a latent shape, or a callable from batch size to latents; the first two mean standard normal draws."""

OUTPUTS = ("logit", "probability")


class Backward(Protocol):
    """The part of `accelerate.Accelerator` that GAC cannot do without; gradient scaling and accumulation are behind it.

    Where they are there, GAC also uses `sync_gradients`, `no_sync`, `scaler`, `unscale_gradients`, `mixed_precision`,
    `distributed_type` and `num_processes`.
    """

    def backward(self, loss: Tensor) -> None: ...


class Scaler(Protocol):
    """The part of `torch.amp.GradScaler` that a covector needs."""

    def scale(self, outputs: Tensor) -> Tensor: ...


class Logits:
    """D's answer as logits, whatever D returns.

    Args:
        discriminator: called with samples and the conditions.
        output: "logit" if D returns logits, "probability" if it ends in a sigmoid.
        select: picks the logits (or probabilities) out of D's answer, when that is a tuple, a dictionary or the like.

    Raises:
        UsageError: `output` is neither; at a call, D's answer is not a tensor whose first size is the batch.
    """

    def __init__(
        self, discriminator: nn.Module, output: str = "logit", select: Callable[[Any], Tensor] | None = None
    ) -> None:
        if output not in OUTPUTS:
            raise UsageError(f"unknown output {output!r}; choose one of: {', '.join(OUTPUTS)}")
        self.discriminator = discriminator
        self.probability = output == "probability"
        self.select = select

    def __call__(self, samples: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        answer = self.discriminator(samples, **conditions)
        if self.select is not None:
            answer = self.select(answer)
        if not isinstance(answer, Tensor):
            raise UsageError(
                f"the discriminator returned a {type(answer).__name__}, not a tensor of logits; say which part of it "
                "the logits are, for example logits=lambda out: out[0]"
            )
        if answer.dim() == 0 or answer.shape[0] != samples.shape[0]:
            raise UsageError(
                f"the discriminator's logits have shape {tuple(answer.shape)} for {samples.shape[0]} samples; "
                "the first size must be the batch"
            )
        if not self.probability:
            return answer
        # l = log p - log(1 - p). p stays off 1 by what its type can tell apart, and off 0 by as much as keeps 1/p^2, in
        # a penalty's double backward pass, finite: a rounded sigmoid gives a finite logit and no gradient
        p = answer.float() if answer.dtype in (torch.float16, torch.bfloat16) else answer
        limits = torch.finfo(p.dtype)
        p = p.clamp(limits.tiny**0.5, 1 - limits.eps / 2)
        return p.log() - torch.log1p(-p)


def latent_sampler(latent: LatentSource | None, generator: nn.Module) -> Callable[[Tensor], Any] | None:
    """How latents are drawn for a real batch: real -> z for as many samples, of the batch's type, on its device.

    Args:
        latent: see `LatentSource`; None uses the generator's `nz` (torch-mimicry's name), if it has one.
        generator: the network that the latents are for.

    Returns:
        A callable, or None if `latent` is None and the generator does not tell its latent size.
    """
    if latent is None:
        latent = getattr(generator, "nz", None)
    if latent is None:
        return None
    if callable(latent):
        draw = latent
        return lambda real: draw(real.shape[0])
    shape = (latent,) if isinstance(latent, int) else tuple(latent)
    return lambda real: torch.randn(real.shape[0], *shape, device=real.device, dtype=real.dtype)


@dataclass(frozen=True)
class Adapter:
    """Networks of one ecosystem, found by the entry point group `gac_plugin.adapters`.

    Both builders take the same keyword arguments, all of them JSON values, and return a network with fresh weights:
    `sample_shape` (C, H, W), `latent_size`, `width`, `depth`, and `output`, "tanh" or "sigmoid", the range of samples.

    Attributes:
        name: its entry point.
        generator: builds a network from latents (B, latent_size) to samples (B, *sample_shape).
        discriminator: builds a network from samples (B, *sample_shape) to logits (B, 1).
        description: one line.
    """

    name: str
    generator: Callable[..., nn.Module]
    discriminator: Callable[..., nn.Module]
    description: str
