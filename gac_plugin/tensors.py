"""Inner products and norms: over lists of tensors (parameter space) and per sample (sample or latent space)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def inner_parts(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """<a_i, b_i> of each pair of tensors: 0-dimensional, on the device of a_i, at least float32.

    Args:
        a, b: tensors of equal shapes, pairwise.
    """
    return [torch.dot(_flat(x), _flat(y)) for x, y in zip(a, b, strict=True)]


def total(parts: Sequence[Tensor]) -> Tensor:
    """Sum of 0-dimensional tensors, on the device of the first, without a host synchronisation."""
    device = parts[0].device
    return torch.stack([part.to(device, non_blocking=True) for part in parts]).sum()


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a, b> = sum_i <a_i, b_i> over two lists of tensors of equal shapes: 0-dimensional."""
    return total(inner_parts(a, b))


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


def _flat(x: Tensor) -> Tensor:
    x = x.reshape(-1)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
