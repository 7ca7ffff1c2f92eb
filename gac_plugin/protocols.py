"""What GAC asks of foreign objects: networks, latents, and the packages that adapters wrap."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gac_plugin.errors import UsageError

Heads = list[Tensor]
"""The logits of each of a discriminator's heads, shapes (B, ...); most discriminators have one head."""

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

    A discriminator may have several heads, one for each scale say, whose logits differ in shape. A list of tensors is
    taken for the logits of heads, but for feature maps, of more than one channel; a tuple is not, since it is as often
    logits and something else, unless a selector has picked it.

    Args:
        discriminator: called with samples and the conditions.
        output: "logit" if D returns logits, "probability" if it ends in a sigmoid.
        select: picks the logits (or probabilities) out of D's answer, when that is a tuple, a dictionary or the like;
            `list` if every part of it is a head.

    Raises:
        UsageError: `output` is neither; at a call, D's answer is not tensors whose first size is the batch.
    """

    def __init__(
        self, discriminator: nn.Module, output: str = "logit", select: Callable[[Any], Any] | None = None
    ) -> None:
        if output not in OUTPUTS:
            raise UsageError(f"unknown output {output!r}; choose one of: {', '.join(OUTPUTS)}")
        self.discriminator = discriminator
        self.probability = output == "probability"
        self.select = select

    def __call__(self, samples: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """One tensor: a single head's logits, shape (B, ...), or the mean over heads of each one's mean, shape (B,)."""
        heads = self.heads(samples, conditions)
        if len(heads) == 1:
            return heads[0]
        return torch.stack([head.reshape(head.shape[0], -1).mean(dim=1) for head in heads]).mean(dim=0)

    def heads(self, samples: Tensor, conditions: Mapping[str, Any]) -> Heads:
        """The logits of each head, shapes (B, ...)."""
        answer = self.discriminator(samples, **conditions)
        parts = _parts(answer) if self.select is None else _picked_parts(self.select(answer))
        return [self._as_logits(part, samples.shape[0]) for part in parts]

    def _as_logits(self, answer: Tensor, batch: int) -> Tensor:
        if answer.dim() == 0 or answer.shape[0] != batch:
            raise UsageError(
                f"the discriminator's logits have shape {tuple(answer.shape)} for {batch} samples; "
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


def _parts(answer: Any) -> Sequence[Tensor]:
    """The heads' tensors in an answer of which nobody has said what it is."""
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, list) and answer and all(map(_may_be_logits, answer)):
        return answer
    raise UsageError(
        f"the discriminator returned a {type(answer).__name__}, not a tensor of logits; say which part of it "
        "the logits are, for example logits=lambda out: out[0], or logits=list if each part is the logits of one head"
    )


def _picked_parts(picked: Any) -> Sequence[Tensor]:
    """The heads' tensors in what a selector picked."""
    parts = picked if isinstance(picked, (list, tuple)) else [picked]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise UsageError(
            f"logits= picked {kinds} out of the discriminator's answer; it must pick a tensor of logits, or a list "
            "with one tensor for each head"
        )
    return parts


def _may_be_logits(part: Any) -> bool:
    """Whether it is a number or a vector for each sample, or a map of one channel."""
    return isinstance(part, Tensor) and part.is_floating_point() and (0 < part.dim() < 3 or part.shape[1:2] == (1,))


def latent_sampler(latent: LatentSource | None, generator: nn.Module) -> Callable[[Tensor], Any] | None:
    """How latents are drawn for a real batch: real -> z for as many samples, of the batch's type, on its device.

    What a callable returns may be any object that the generator takes; floating-point tensors in it, also within
    tuples, lists and dictionaries, are brought to the batch's type and device, other tensors to its device.

    Args:
        latent: see `LatentSource`; None uses the generator's `nz` (torch-mimicry's name), if it has one.
        generator: the network that the latents are for, maybe wrapped in `DistributedDataParallel`.

    Returns:
        A callable, or None if `latent` is None and the generator does not tell its latent size.
    """
    if latent is None:
        unwrapped = getattr(generator, "module", None)
        latent = getattr(generator, "nz", getattr(unwrapped, "nz", None))
    if latent is None:
        return None
    if callable(latent):
        draw = latent
        return lambda real: tree_map_only(Tensor, lambda z: _beside(z, real), draw(real.shape[0]))
    shape = (latent,) if isinstance(latent, int) else tuple(latent)
    return lambda real: torch.randn(real.shape[0], *shape, device=real.device, dtype=real.dtype)


def _beside(z: Tensor, real: Tensor) -> Tensor:
    # non_blocking: the host does not wait for the device to take over a draw of its own
    return z.to(real.device, real.dtype if z.is_floating_point() else z.dtype, non_blocking=real.is_cuda)


class Codec(Protocol):
    """How the cells of a data set's column become samples, and samples become files that people look at, hear or read.

    Attributes:
        sample_shape: of a sample, as both networks see it.
        suffixes: of the files that it writes, the usual one first, ".png" among them.
    """

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def to_samples(self, stored: Tensor) -> Tensor:
        """What is kept in memory, shape (B, ...) -> float32 samples, shape (B, *sample_shape), on the same device."""
        ...

    def to_stored(self, samples: Tensor) -> Tensor:
        """The way back, for generated samples."""
        ...

    def pictures(self, stored: Tensor) -> Tensor:
        """uint8 pixels, shape (B, C, H, W): what evaluation takes features from."""
        ...

    def write(self, path: Path, stored: Tensor, columns: int | None = None) -> None:
        """Write samples to a file, whole or not at all; its suffix, one of `suffixes`, tells the kind.

        Args:
            path: where the file is to stand.
            stored: shape (B, ...).
            columns: pictures in a row, where there are pictures.
        """
        ...

    def figures(self, train: Tensor, test: Tensor, generated: Tensor) -> dict[str, float]:
        """Figures of merit that are this kind of data's own, by name; all arguments as stored. Empty for none."""
        ...

    def to_json(self) -> dict[str, Any]:
        """JSON values from which `Medium.load` makes the same codec."""
        ...


class Encoder(Codec, Protocol):
    """A codec that reads cells one by one."""

    def encode(self, cell: Any) -> Tensor:
        """A cell as it is in the data set, undecoded -> what is kept in memory, of one shape for all cells.

        Raises:
            UsageError: what is wrong with the cell; the caller says which one it is.
        """
        ...


@dataclass(frozen=True)
class Medium:
    """A kind of data, other than images, that an adapter's networks make.

    Attributes:
        column: type of the data set's column, as `datasets` calls it: "Audio", "string".
        fit: (undecoded cells of the training split, options of the codec) -> codec.
        load: what the codec's `to_json` gave -> the same codec.
        options: names of those of the adapter's options that are the codec's; the others are the builders'.
    """

    column: str
    fit: Callable[[Iterable[Any], Mapping[str, Any]], Encoder]
    load: Callable[[Mapping[str, Any]], Encoder]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """Networks of one ecosystem, found by the entry point group `gac_plugin.adapters`.

    Both builders take the same keyword arguments, all of them JSON values, and return a network with fresh weights:
    `sample_shape`, for images (C, H, W), `latent_size`, `width`, `depth`, and `output`, "tanh" or "sigmoid", the range
    of samples; options of the adapter's own, if it has any; and for conditional training `classes`, the number of
    classes. Both networks are then called with `labels=`, int64, shape (B,).

    Attributes:
        name: its entry point.
        generator: builds a network from latents (B, latent_size) to samples (B, *sample_shape).
        discriminator: builds a network from samples (B, *sample_shape) to logits (B, 1).
        description: one line.
        medium: what the samples are; None for images.
        width, depth: what the builders get where the user gives none.
    """

    name: str
    generator: Callable[..., nn.Module]
    discriminator: Callable[..., nn.Module]
    description: str
    medium: Medium | None = None
    width: int = 64
    depth: int = 2
