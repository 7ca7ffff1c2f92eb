"""What would go wrong silently, looked for once, before or at the first step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from gac_plugin.cotangent import evaluating, sharded_parts
from gac_plugin.errors import UsageError
from gac_plugin.penalties import GradientPenalty
from gac_plugin.protocols import Backward, Heads, Logits


def require_tensor(samples: Any, where: str) -> None:
    """Refuse samples that come in a tuple, list or dictionary with something else.

    Args:
        samples: what should be a tensor.
        where: whose samples they are, for the message, with the verb ("the generator returned").

    Raises:
        UsageError: they are no tensor.
    """
    if not isinstance(samples, Tensor):
        raise UsageError(
            f"{where} a {type(samples).__name__}, not a tensor of samples; pick the samples out of it, for example [0]"
        )


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


def require_range(precision: torch.dtype | str | None) -> None:
    """Refuse float16 for the fused schedule: the small weights of `keep_visible` would round to zero.

    Args:
        precision: type of the discriminator's logits, or accelerate's name of its mixed precision, under which logits
            come out as float32 whatever they were computed in.

    Raises:
        UsageError: the logits are computed in float16.
    """
    if precision in (torch.float16, "fp16"):
        raise UsageError(
            "the fused schedule needs the range of float32 or bfloat16, and the logits are float16; "
            "use mixed precision bf16, or schedule='fresh'"
        )


def require_right_gradients(
    generator: nn.Module, discriminator: nn.Module, accelerator: Backward | None, penalty: GradientPenalty | None
) -> None:
    """Refuse what would give gradients that are wrong without a word, or fail in the middle of the first step.

    Raises:
        UsageError: DeepSpeed, Megatron-LM or FSDP1; networks that several processes do not share; DDP with a static
            graph; a compiled discriminator with a gradient penalty.
    """
    engine = str(getattr(accelerator, "distributed_type", ""))
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if name in engine:
            raise UsageError(
                f"GAC does not run under {name}: its engine owns one network and one optimizer, and a GAN has two of "
                "each; launch with DDP (accelerate launch --multi_gpu)"
            )
    for role, network in (("generator", generator), ("discriminator", discriminator)):
        parts = list(network.modules())
        if any(isinstance(part, DistributedDataParallel) and part.static_graph for part in parts):
            raise UsageError(
                f"the {role} is wrapped with static_graph=True, under which a GAN step's gradients are silently wrong; "
                "leave it out of DistributedDataParallelKwargs"
            )
        if any(type(part).__name__ == "FullyShardedDataParallel" for part in parts):
            raise UsageError(
                f"the {role} is wrapped in FullyShardedDataParallel (FSDP1), under which inner products miss the other "
                "processes' shards and D cannot be frozen; use fully_shard (accelerate: fsdp_version=2)"
            )
        shared = any(isinstance(part, DistributedDataParallel) for part in parts) or sharded_parts(network)
        if getattr(accelerator, "num_processes", 1) > 1 and not shared:
            raise UsageError(
                f"the {role} is not shared between the processes, and each would train its own; pass both networks and "
                "both optimizers through accelerator.prepare, and give GAC what it returns"
            )
    if penalty is not None and (penalty.r1 > 0 or penalty.r2 > 0) and any(map(_is_compiled, discriminator.modules())):
        raise UsageError(
            "a gradient penalty needs second derivatives, which a compiled discriminator does not have; pass the "
            "discriminator before torch.compile, or penalty=None"
        )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


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


def require_one_logit_each(heads: Heads, batch: int) -> None:
    """Refuse several logits for a sample in the fused schedule: one backward pass cannot be re-weighted for each.

    Args:
        heads: the discriminator's logits.
        batch: number of samples, B.

    Raises:
        UsageError: there are several heads, or several logits in one; the message gives their shapes.
    """
    if [head.numel() for head in heads] != [batch]:
        shapes = ", ".join(str(tuple(head.shape)) for head in heads)
        raise UsageError(
            f"the fused schedule needs one logit for each sample, got {shapes} for {batch} samples; "
            "use schedule='fresh'"
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
