"""What would go wrong silently, looked for once, before or at the first step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gac_plugin.cotangent import evaluating
from gac_plugin.errors import UsageError
from gac_plugin.protocols import Logits


def require_alike(real: Tensor, fake: Tensor) -> None:
    """Refuse real samples that are not of the generated samples' shape, or not floating point.

    Raises:
        UsageError: the message gives both shapes, or the type.
    """
    if real.shape != fake.shape:
        raise UsageError(
            f"real and generated samples differ in shape: {tuple(real.shape)} and {tuple(fake.shape)}; "
            "resize the data or change the generator's output"
        )
    if not real.is_floating_point():
        raise UsageError(
            f"real samples must be floating point, got {real.dtype}; convert them to the generator's range first"
        )


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse values that are not finite. Reads them on the host, so it belongs to the first step alone.

    Args:
        tensors: by the name to use in the message.

    Raises:
        UsageError: a value is infinite or not a number; the message says where and how many.
    """
    for name, values in tensors.items():
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise UsageError(
                f"{bad} of {values.numel()} values in the {name} are not finite at the first step; "
                "look for NaN or infinity in the data and in the initial weights"
            )


def require_range(logits: Tensor) -> None:
    """Refuse float16 logits for the fused schedule: the small weights of `keep_visible` would round to zero.

    Raises:
        UsageError: the logits are float16.
    """
    if logits.dtype == torch.float16:
        raise UsageError(
            "the fused schedule needs the range of float32 or bfloat16, and the logits are float16; "
            "use mixed precision bf16, or schedule='fresh'"
        )


def require_no_batch_norm(discriminator: nn.Module) -> None:
    """Refuse a discriminator with batch norm for the fused schedule.

    Raises:
        UsageError: it has one; the message names the layer.
    """
    for name, module in discriminator.named_modules():
        if isinstance(module, _BatchNorm):
            raise UsageError(
                f"the fused schedule needs a discriminator that treats samples independently, and its layer {name!r} "
                f"is a {type(module).__name__}, which mixes the batch; use schedule='fresh', or a norm per sample"
            )


def require_independent_samples(logits: Logits, real: Tensor, fake: Tensor, conditions: Mapping[str, Any]) -> None:
    """Refuse a discriminator that mixes samples: the first one's logit changes when the rest of its batch is replaced.

    Args:
        logits: the discriminator.
        real, fake: two batches of equal shape (B, ...).
        conditions: keyword arguments of the discriminator.

    Raises:
        UsageError: the logit changes by more than rounding.
    """
    # in evaluation mode, since dropout and power iterations differ between any two calls; both batches are of one
    # size, so that a discriminator that keeps samples apart does the same arithmetic twice
    with torch.no_grad(), evaluating(logits.discriminator):
        among_real = logits(real, conditions)
        among_fake = logits(torch.cat([real[:1], fake[1:]]), conditions)
    if not torch.allclose(among_real[0], among_fake[0], rtol=0, atol=1e-5 * float(among_real.abs().max())):
        raise UsageError(
            "the fused schedule needs a discriminator that treats samples independently, and this one's logits change "
            "with the rest of the batch (minibatch statistics?); use schedule='fresh'"
        )
