"""Cotangents: the discriminator's covectors at the samples, fresh or fused, and their pullback through the generator.

With a score s of the logit l (log D, D, l, ...), the covector of sample x_i and the generator's gradient are

    c_i = w_i dl/dx (x_i),  w = ds/dl            g = (1/B) sum_i J_i^T c_i,  J_i = d G(z_i) / d theta
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Backward, Scaler


def sharded_parts(*modules: nn.Module) -> list[Any]:
    """The parts of the modules that `torch.distributed.fsdp.fully_shard` has taken, known by their class's name."""
    parts = (part for module in modules for part in module.modules())
    return [part for part in parts if any(base.__name__ == "FSDPModule" for base in type(part).__mro__)]


def reshard(parts: Sequence[Any]) -> None:
    """Drop the gathered copies of sharded parameters: neither an optimizer's step nor a changed flag reaches them."""
    for part in parts:
        part.reshard()


@contextmanager
def frozen(*modules: nn.Module, sharded: Sequence[Any] | None = None) -> Iterator[None]:
    """Within the block no parameter of the modules takes part in autograd; their own flags come back afterwards.

    Args:
        modules: whose parameters.
        sharded: their `sharded_parts`, where those are known already.
    """
    parts = sharded_parts(*modules) if sharded is None else sharded
    reshard(parts)
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        reshard(parts)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within the block the modules are in evaluation mode; each submodule's own mode comes back afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def cotangent(
    objective: Callable[[Tensor], Tensor], samples: Tensor, scaler: Scaler | None = None
) -> tuple[Tensor, Tensor]:
    """The covector of a scalar objective at the samples: one backward pass to the inputs alone.

    Args:
        objective: samples -> a 0-dimensional tensor. A sum over samples gives the covectors c_i; a mean, c_i / B.
        samples: shape (B, ...), floating point. The graph behind them is not entered.
        scaler: multiplies the objective before the backward pass, so that a float16 network's small derivatives do not
            round to zero; the covector is divided by the same factor.

    Returns:
        The covector, of the shape of `samples`, and the objective's value, 0-dimensional, detached.
    """
    leaf = samples.detach().requires_grad_(True)
    with torch.enable_grad():
        value = objective(leaf)
    if scaler is None:
        return torch.autograd.grad(value, leaf)[0], value.detach()
    covector = torch.autograd.grad(scaler.scale(value), leaf)[0]
    return covector / scaler.scale(torch.ones_like(value.detach())), value.detach()


def pullback(samples: Tensor, covector: Tensor, accelerator: Backward | None = None) -> None:
    """Add J^T covector to the gradients of all parameters behind the samples: one vector-Jacobian product through G.

    Args:
        samples: G(z) with its graph, shape (B, ...).
        covector: of the shape of `samples`.
        accelerator: takes the backward pass, so that its gradient scaling, synchronisation and accumulation apply.

    Raises:
        UsageError: the samples have no graph.
    """
    if not samples.requires_grad:
        raise UsageError(
            "the generated samples carry no graph back to the generator; call the generator outside torch.no_grad(), "
            "with parameters that require gradients, and do not detach what it returns"
        )
    if accelerator is None:
        samples.backward(covector)
    else:
        accelerator.backward((samples * covector).sum())


def keep_visible(loss: Tensor, logits: Tensor) -> Tensor:
    """loss + floor sum_i l_i, with the square root of the smallest normal number for floor: no dL/dl_i is 0 any more.

    In the fused schedule one backward pass serves both networks: the gradient v_i dl/dx that D's loss leaves at sample
    i, v_i = dL/dl_i, is divided by v_i again. A sample that D's loss ignores (hinge beyond its margin, a saturated
    sigmoid) would be lost. With a weight of 1e-19, in float32, it comes through to full precision, and what that adds
    to the loss and to D's gradient is far below rounding. Only where D's loss ignores the whole batch is there nothing
    else in that gradient: an optimizer that steps by its sign alone would then move D; the eps of Adam and of
    `spectral` keeps it still.

    Args:
        loss: D's loss, 0-dimensional.
        logits: of the generated samples, with their graph.
    """
    return torch.add(loss, logits.sum(), alpha=torch.finfo(logits.dtype).tiny ** 0.5)
