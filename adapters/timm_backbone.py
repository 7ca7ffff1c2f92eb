"""timm's backbones as discriminators, in the manner of Projected GAN (Sauer et al. 2021), and GAC among its optimizers.

    x -> [0, 1] -> (x - mean) / std -> the backbone's size -> feature maps f_1 ... f_n -> one head each -> logits

Of the paper's projected discriminators this keeps the multi-scale heads with spectral norm and, on demand, the fixed
random mixing of channels. It leaves out their mixing across scales, and its heads have one hidden layer.
"""

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import Format, HardSigmoid, freeze_batch_norm_2d
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from gac_plugin.conjugate import ConjugateGradient
from gac_plugin.errors import UsageError, resolve
from gac_plugin.protocols import Adapter

UNIT_INTERVAL = {"tanh": (0.5, 0.5), "sigmoid": (1.0, 0.0)}
"""Range of the samples -> a and b of the map x -> a x + b that takes it to [0, 1]."""

SMALL_BACKBONES = ("resnet18", "convnext_atto", "vit_tiny_patch16_224")

OPTIMIZER_NAMES = ("gac", "conjugategradient")
"""Names of `ConjugateGradient` in timm's registry, which allows no underscore."""


class BackboneInput(nn.Module):
    """Samples as the backbone wants them: x -> (a x + b - mean) / std, resized, differentiable as often as needed.

    Args:
        config: the backbone's data config: `mean`, `std`, `interpolation`.
        output: range of the samples, "tanh" or "sigmoid".
        size: height and width of the result.

    Raises:
        UsageError: the range is neither.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: dict[str, Any], output: str, size: tuple[int, int]) -> None:
        super().__init__()
        a, b = resolve(output, UNIT_INTERVAL, "output")
        mean, std = (torch.tensor(config[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
        self.register_buffer("scale", a / std, persistent=False)
        self.register_buffer("shift", (b - mean) / std, persistent=False)
        self.size = size
        self.interpolation = config["interpolation"]

    def forward(self, x: Tensor) -> Tensor:
        """Samples (B, 1 or 3, H, W) -> (B, 3, *size); a grey sample stands in all three channels."""
        if x.shape[-2:] != self.size:  # with antialias, since every pixel counts also where the size shrinks
            x = interpolate(x, self.size, mode=self.interpolation, antialias=True)
        # a copy: DDP writes buffers anew in each forward pass, also those that a graph still needs
        return x * self.scale.clone() + self.shift


class Head(nn.Module):
    """feature map -> hidden map of `width` channels -> h, its mean over the map -> logit w h + b, or w h + b + v_y h.

    The last term is the projection of Miyato & Koyama 2018, for the class y. Every layer has spectral norm.

    Args:
        channels: of the feature map.
        width: of the hidden map.
        classes: number of classes, 0 for none.
        mixing: put a fixed random 1x1 convolution in front.
    """

    mixing: Tensor | None

    def __init__(self, channels: int, width: int, classes: int, mixing: bool) -> None:
        super().__init__()
        mixer = torch.randn(channels, channels, 1, 1) / math.sqrt(channels) if mixing else None
        self.register_buffer("mixing", mixer)
        self.hidden = spectral_norm(nn.Conv2d(channels, width, 3, padding=1))
        self.logit = spectral_norm(nn.Linear(width, 1))
        self.classes = spectral_norm(nn.Embedding(classes, width)) if classes else None

    def forward(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """Feature maps (B, channels, h, w) and, with classes, labels (B,) -> logits (B, 1)."""
        mixed = features if self.mixing is None else conv2d(features, self.mixing)
        h = leaky_relu(self.hidden(mixed), 0.2).mean((2, 3))
        logit = self.logit(h)
        return logit if self.classes is None else logit + (self.classes(labels) * h).sum(1, keepdim=True)


class TimmDiscriminator(nn.Module):
    """A timm backbone with one head for each of its feature maps.

    A frozen backbone stays in evaluation mode and without parameter gradients, its batch norms being plain affine maps:
    samples stay independent, as the fused schedule asks. A trained one is used as timm makes it; with batch norm in it
    (resnet, efficientnet, ...) only the fresh schedule is right, and the fused one is refused.

    Args:
        sample_shape: (C, H, W), C 1 or 3.
        latent_size, depth: the generator's; not used.
        width: channels of the hidden layer of each head.
        output: range of the samples, "tanh" for [-1, 1], "sigmoid" for [0, 1].
        backbone: a name in `timm.list_models()`, also with a tag of its weights ("resnet18.a1_in1k").
        pretrained: with timm's weights, from the cache or the network; otherwise with random ones.
        frozen: train the heads alone.
        resolution: side in pixels of the square that samples are resized to. None: the backbone's own input size where
            that matters, that is for pretrained weights and for backbones built for one size (most transformers); else
            the samples' size, rounded up to whole cells of the coarsest feature map.
        mixing: put a fixed random mixing of channels in front of each head, as Projected GAN does for frozen backbones.
        per_head: return the logits of the heads side by side instead of their mean. A loss is then taken for each head,
            as in Projected GAN; the fused schedule wants one logit and refuses it.
        classes: number of classes of a conditional discriminator, 0 for none.

    Attributes:
        backbone: its parts, as timm's `features_only` makes them.

    Raises:
        UsageError: timm has no such backbone, or not its feature maps or weights; the weights cannot be fetched; the
            backbone cannot run at the resolution; or the samples are neither grey nor of three colours.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int = 0,
        width: int = 64,
        depth: int = 0,
        output: str = "tanh",
        backbone: str = "convnext_atto",
        pretrained: bool = False,
        frozen: bool = False,
        resolution: int | None = None,
        mixing: bool = False,
        per_head: bool = False,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if sample_shape[0] not in (1, 3):
            raise UsageError(f"timm's backbones see 1 or 3 channels, and the samples have {sample_shape[0]}")
        self.backbone: Any = create_backbone(backbone, pretrained, resolution)
        self.frozen, self.per_head, self.conditional = frozen, per_head, classes > 0
        if frozen:
            self.backbone = freeze_batch_norm_2d(self.backbone).requires_grad_(False)
        size = _input_size(self.backbone, sample_shape, pretrained, resolution)
        self.to_input = BackboneInput(resolve_data_config(model=self.backbone), output, size)
        channels = self._channels(backbone)
        self.heads = nn.ModuleList(Head(number, width, classes, mixing) for number in channels)
        self.train()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples (B, C, H, W) and, with classes, int64 labels (B,) -> logits (B, 1), or (B, heads) for `per_head`."""
        _require_labels(self.conditional, labels)
        logits = torch.cat([head(f, labels) for head, f in zip(self.heads, self.features(x), strict=True)], dim=1)
        return logits if self.per_head else logits.mean(1, keepdim=True)

    def features(self, x: Tensor) -> list[Tensor]:
        """Samples (B, C, H, W) -> the backbone's feature maps, each (B, channels, h, w), fine to coarse."""
        maps = self.backbone(self.to_input(x))
        if getattr(self.backbone, "output_fmt", Format.NCHW) == Format.NHWC:
            return [features.permute(0, 3, 1, 2) for features in maps]
        return maps

    def train(self, mode: bool = True) -> "TimmDiscriminator":
        """Set the mode of everything but a frozen backbone, which stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @torch.no_grad()
    def _channels(self, name: str) -> list[int]:
        """Channels of each feature map, from one run of the backbone; this also tells whether it can run at all."""
        self.eval()
        height, width = self.to_input.size
        try:
            return [features.shape[1] for features in self.features(torch.zeros(1, 3, height, width))]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UsageError(
                f"timm's backbone {name!r} does not run on {height}x{width} pixels ({_first_line(error)}); "
                "pass another resolution"
            ) from error


def _input_size(
    backbone: Any, sample_shape: Sequence[int], pretrained: bool, resolution: int | None
) -> tuple[int, int]:
    """Height and width that samples are resized to; see `resolution` of `TimmDiscriminator`."""
    if resolution is not None:
        return resolution, resolution
    config, (_, height, width) = backbone.pretrained_cfg, sample_shape
    if pretrained or config.get("fixed_input_size"):
        return config["input_size"][1:]
    cell = max(backbone.feature_info.reduction())
    return math.ceil(height / cell) * cell, math.ceil(width / cell) * cell


def create_backbone(name: str, pretrained: bool = False, resolution: int | None = None) -> nn.Module:
    """A timm model that returns its feature maps, with second derivatives.

    Args:
        name: see `TimmDiscriminator`.
        pretrained: with timm's weights.
        resolution: side in pixels of the square input, which backbones built for one size have to know.

    Raises:
        UsageError: timm has no such model, or not its feature maps or weights; or the weights cannot be fetched.
    """
    if not timm.is_model(name):
        known = timm.list_models()
        near = get_close_matches(name, known, n=3, cutoff=0.5) or SMALL_BACKBONES
        raise UsageError(f"timm has no backbone {name!r}; near names: {', '.join(near)} (timm.list_models() has all)")
    try:
        config = get_pretrained_cfg(name)
        size = resolution if config is not None and config.fixed_input_size else None  # None leaves timm its default
        backbone = timm.create_model(name, pretrained=pretrained, features_only=True, img_size=size)
    except OSError as error:  # every failure of the hub's client is one
        raise UsageError(
            f"the weights of timm's {name!r} are not in the cache and cannot be fetched; run once with a network, set "
            "HF_HOME to a cache that holds them, or pass pretrained=false"
        ) from error
    except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
        raise UsageError(
            f"timm cannot make a backbone of {name!r} with features_only, pretrained={pretrained} "
            f"({_first_line(error)}); take another, for example {', '.join(SMALL_BACKBONES)}"
        ) from error
    _allow_second_derivatives(backbone)
    return backbone


def _allow_second_derivatives(backbone: nn.Module) -> None:
    """Put layers that autograd differentiates twice, as gradient penalties need, in the place of two that it does not.

    They compute the same: attention written out for fused attention, relu6(x + 3) / 6 for torch's hard sigmoid.
    """
    parts: list[Any] = list(backbone.modules())
    for part in parts:
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
        for name, child in part.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(part, name, HardSigmoid())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Doubling(nn.Module):
    """Features (B, C, H, W) -> (B, C', 2H, 2W): nearest-neighbour upsampling and a residual pair of convolutions."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(channels_in, channels_out, 1)
        self.first = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = interpolate(features, scale_factor=2.0, mode="nearest")
        residual = self.second(leaky_relu(self.first(leaky_relu(x, 0.2)), 0.2))
        return (self.skip(x) + residual) / math.sqrt(2)


class SkipGenerator(nn.Module):
    """latent -> coarse map -> `depth` residual doublings -> image, the sum of what every resolution has to say.

    Residual blocks and image skips as in StyleGAN2 (Karras et al. 2020), without styles and without norms.

    Args:
        sample_shape: (C, H, W), H and W divisible by 2^depth.
        latent_size: size of a latent; also `nz`, torch-mimicry's name for it.
        width: channels of the finest map; each coarser one has twice as many.
        depth: number of doublings.
        output: "tanh" for samples in [-1, 1], "sigmoid" for [0, 1].
        classes: number of classes of a conditional generator, 0 for none. A class is a vector
            beside the latent, learned and of its size.
        of_discriminator: the discriminator's options; not used.

    Raises:
        UsageError: H or W is not divisible by 2^depth, or the range is neither.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str,
        classes: int = 0,
        **of_discriminator: Any,
    ) -> None:
        super().__init__()
        colours, height, columns = sample_shape
        if height % 2**depth or columns % 2**depth:
            raise UsageError(
                f"the timm adapter's generator doubles a map {depth} times, which {height}x{columns} does not allow; "
                "pass another --image-size or --depth"
            )
        self.nz = latent_size
        widths = [width << level for level in reversed(range(depth + 1))]
        coarse = widths[0], height >> depth, columns >> depth
        self.classes = nn.Embedding(classes, latent_size) if classes else None
        size_in = 2 * latent_size if classes else latent_size
        self.coarse = nn.Sequential(nn.Linear(size_in, math.prod(coarse)), nn.Unflatten(1, coarse))
        self.doublings = nn.ModuleList(Doubling(a, b) for a, b in pairwise(widths))
        self.to_image = nn.ModuleList(nn.Conv2d(channels, colours, 1) for channels in widths)
        self.output = resolve(output, {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}, "output")()

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, latent_size) and, with classes, int64 labels (B,) -> samples (B, C, H, W)."""
        _require_labels(self.classes is not None, labels)
        features = self.coarse(z if self.classes is None else torch.cat([z, self.classes(labels)], dim=1))
        image = self.to_image[0](features)
        for doubling, to_image in zip(self.doublings, self.to_image[1:], strict=True):
            features = doubling(features)
            image = interpolate(image, scale_factor=2.0, mode="nearest") + to_image(features)
        return self.output(image)


def _require_labels(conditional: bool, labels: Tensor | None) -> None:
    """Refuse labels that a network cannot use, and their absence where it needs them.

    Raises:
        UsageError: either of the two.
    """
    if conditional and labels is None:
        raise UsageError("a network with classes needs labels; pass labels=, int64 of shape (B,)")
    if labels is not None and not conditional:
        raise UsageError("labels were passed to a network without classes; build it with classes=")


class RegisteredConjugateGradient(ConjugateGradient):
    """`ConjugateGradient` as timm's factory calls its optimizers.

    It has no weight decay. The inner products behind beta take for granted that the last step went along d and nowhere
    else, which a decay beside it would spoil; a decay that belongs to the loss is the loss's to add.

    Args:
        params: parameters, or parameter groups as timm makes them; the direction is one vector over all of them.
        lr: step length.
        weight_decay: 0, here and in every group.
        settings: further arguments of `ConjugateGradient`.

    Raises:
        UsageError: a weight decay; betas; or see `ConjugateGradient`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        if "betas" in settings:
            raise UsageError(
                f"ConjugateGradient has no betas, got {settings['betas']}; pass beta2= and, for momentum, rule="
            )
        _require_no_decay(weight_decay)
        super().__init__(params, lr, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters without weight decay."""
        _require_no_decay(param_group.get("weight_decay", 0.0))
        super().add_param_group(param_group)


def _require_no_decay(decay: float) -> None:
    if decay:
        raise UsageError(
            f"ConjugateGradient has no weight decay, got {decay}; pass weight_decay=0, or add a decay to the loss"
        )


def register() -> None:
    """Put `ConjugateGradient` into timm's registry, so that `create_optimizer_v2(model, "gac", lr=...)` makes one.

    Calling it again changes nothing.

    Raises:
        UsageError: the installed timm has no registry.
    """
    try:
        from timm.optim import OptimInfo, list_optimizers
        from timm.optim._optim_factory import default_registry  # timm exports its class, not the instance in use
    except ImportError as error:
        raise UsageError(
            f"timm {timm.__version__} has no registry of optimizers; pip install 'timm>=1.0.12'"
        ) from error
    for name in OPTIMIZER_NAMES:
        if name not in list_optimizers():
            default_registry.register(
                OptimInfo(
                    name=name,
                    opt_class=RegisteredConjugateGradient,
                    description="conjugate gradient steps under a metric, without line search (gac-plugin)",
                    has_betas=True,
                )
            )


adapter = Adapter(
    "timm", SkipGenerator, TimmDiscriminator, "any timm backbone with multi-scale heads, and a residual generator"
)
