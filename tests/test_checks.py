"""What would go wrong silently is refused, with the value and the mend."""

import pytest
import torch
from torch import nn

from gac_plugin.checks import require_alike, require_independent_samples, require_range
from gac_plugin.errors import UsageError
from gac_plugin.protocols import Logits


class MeanOverBatch(nn.Module):
    """A layer that lets every sample see a little of the others."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x):
        return x + self.share * x.mean(0, keepdim=True)


def test_samples_of_another_shape_are_refused():
    with pytest.raises(UsageError, match=r"differ in shape: \(4, 1, 8, 8\) and \(4, 64\); resize the data"):
        require_alike(torch.zeros(4, 1, 8, 8), torch.zeros(4, 64))


def test_integer_samples_are_refused():
    with pytest.raises(UsageError, match=r"must be floating point, got torch\.uint8; convert them"):
        require_alike(torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_with_range_enough_are_accepted(dtype):
    require_range(torch.zeros(4, 1, dtype=dtype))


def test_half_precision_logits_are_refused():
    with pytest.raises(UsageError, match=r"the logits are float16; use mixed precision bf16, or schedule='fresh'"):
        require_range(torch.zeros(4, 1, dtype=torch.float16))


@pytest.mark.parametrize(("share", "refused"), [(0.0, False), (0.001, True), (1.0, True)])
def test_a_discriminator_that_mixes_even_a_little_is_refused(share, refused):
    discriminator = nn.Sequential(nn.Linear(8, 16), MeanOverBatch(share), nn.Tanh(), nn.Linear(16, 1))
    batches = torch.randn(4, 8), torch.randn(4, 8) + 1
    if not refused:
        require_independent_samples(Logits(discriminator), *batches, {})
        return
    with pytest.raises(UsageError, match=r"logits change with the rest of the batch.*schedule='fresh'"):
        require_independent_samples(Logits(discriminator), *batches, {})
