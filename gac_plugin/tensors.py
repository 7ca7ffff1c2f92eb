"""Inner products and norms: over lists of tensors (parameter space) and per sample (sample or latent space)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def inner_parts(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """<a_i, b_i> of each pair of tensors: 0-dimensional, on the device of a_i, at least float32.

    Args:
        a, b: tensors of equal shapes, pairwise. Of sharded ones the products run over all shards, so every process
            calls this with the same list.
    """
    parts = [_inner(x, y) for x, y in zip(a, b, strict=True)]
    return _over_all_shards(parts) if any(map(is_sharded, parts)) else parts


def total(parts: Sequence[Tensor]) -> Tensor:
    """Sum of 0-dimensional tensors, on the device of the first, without a host synchronisation."""
    device = parts[0].device
    return torch.stack([part.to(device, non_blocking=True) for part in parts]).sum()


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a, b> = sum_i <a_i, b_i> over two lists of tensors of equal shapes: 0-dimensional."""
    return total(inner_parts(a, b))


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, in place."""
    if any(map(is_sharded, targets)):  # torch has no foreach copy of them
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    else:
        torch._foreach_copy_(targets, sources)


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, of which each process holds a part."""
    return hasattr(x, "full_tensor")


def whole(x: Any) -> Tensor:
    """x itself; of a sharded x all parts, gathered."""
    return x.full_tensor() if is_sharded(x) else x


def on_whole(function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """function(x), of the shape of x; a sharded x is gathered for it, and the result sharded as x was."""
    if not is_sharded(x):
        return function(x)
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * x.device_mesh.ndim
    result = DTensor.from_local(function(whole(x)), x.device_mesh, everywhere, run_check=False)
    return result.redistribute(placements=x.placements)


def per_sample_inner(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> for every sample i of two tensors of shape (B, ...): shape (B,)."""
    return (a * b).reshape(a.shape[0], -1).sum(dim=1)


def per_sample_norm(a: Tensor) -> Tensor:
    """Euclidean norm of every sample of a tensor of shape (B, ...): shape (B,)."""
    return torch.linalg.vector_norm(a.reshape(a.shape[0], -1), dim=1)


def per_sample_mean(a: Tensor) -> Tensor:
    """Mean over everything but the batch of a tensor of shape (B, ...), such as a map of patch logits: shape (B,)."""
    return a.reshape(a.shape[0], -1).mean(dim=1)


def scale_samples(scale: Tensor, a: Tensor) -> Tensor:
    """Multiply sample i of `a`, shape (B, ...), by scale[i], shape (B,)."""
    return a * scale.reshape(-1, *[1] * (a.dim() - 1))


def _inner(x: Tensor, y: Tensor) -> Tensor:
    x, y = _wide(x), _wide(y)
    if is_sharded(x):  # uneven shards cannot be flattened
        return (x * y).sum()
    return torch.dot(x.reshape(-1), y.reshape(-1))


def _over_all_shards(parts: list[Any]) -> list[Tensor]:
    """Plain tensors from the sums that each process has of its own shards: one reduction for all of equal layout."""
    layouts: dict[Any, list[int]] = {}
    for index, part in enumerate(parts):
        if is_sharded(part):
            layouts.setdefault((part.device_mesh, part.placements, part.dtype), []).append(index)
    whole = list(parts)
    for (mesh, placements, _), indices in layouts.items():
        own = torch.stack([parts[index].to_local() for index in indices])
        sums = type(parts[indices[0]]).from_local(own, mesh, placements, run_check=False).full_tensor()
        for index, value in zip(indices, sums.unbind(), strict=True):
            whole[index] = value
    return whole


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
