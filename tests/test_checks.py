"""What would go wrong silently is refused, with the value and the mend."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gac_plugin import GAC, ConjugateGradient
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
    require_range(dtype)


def test_half_precision_logits_are_refused():
    with pytest.raises(UsageError, match=r"the logits are float16; use mixed precision bf16, or schedule='fresh'"):
        require_range(torch.float16)


@pytest.fixture
def gac(tiny_generator, tiny_discriminator):
    """GAC around tiny networks, wrapped as a test likes."""

    def build(wrap_g=lambda network: network, wrap_d=lambda network: network, **settings) -> GAC:
        generator, discriminator = tiny_generator(), tiny_discriminator()
        optimizers = (
            ConjugateGradient(generator.parameters(), 1e-3),
            torch.optim.Adam(discriminator.parameters(), 1e-3),
        )
        return GAC(wrap_g(generator), wrap_d(discriminator), *optimizers, **settings)

    return build


@pytest.mark.parametrize("engine", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_engines_that_own_the_network_are_refused(gac, engine):
    accelerator = SimpleNamespace(distributed_type=engine, backward=None)
    with pytest.raises(UsageError, match=f"GAC does not run under {engine.value}.* launch with DDP"):
        gac(accelerator=accelerator)
    gac(accelerator=SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, backward=None))


@pytest.mark.parametrize("role", ["generator", "discriminator"])
def test_a_static_graph_is_refused(gac, alone, role):
    def static(network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network, static_graph=True)

    with pytest.raises(UsageError, match=f"the {role} is wrapped with static_graph=True.* leave it out of"):
        gac(**{"wrap_" + role[0]: static})
    gac(DistributedDataParallel, DistributedDataParallel)


@pytest.mark.parametrize("role", ["generator", "discriminator"])
def test_networks_that_processes_do_not_share_are_refused(gac, alone, role):
    wraps = {"wrap_g": DistributedDataParallel, "wrap_d": DistributedDataParallel}
    accelerator = SimpleNamespace(num_processes=2, backward=None)
    gac(**wraps, accelerator=accelerator)
    del wraps["wrap_" + role[0]]
    with pytest.raises(UsageError, match=f"the {role} is not shared between the processes.*accelerator.prepare"):
        gac(**wraps, accelerator=accelerator)


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="aot_eager")


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="aot_eager")
    return network


def compiled_in_part(network: nn.Module) -> nn.Module:
    network[1] = torch.compile(network[1], backend="aot_eager")
    return network


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, compiled_in_part])
def test_a_compiled_discriminator_with_a_penalty_is_refused(gac, wrap):
    with pytest.raises(UsageError, match="needs second derivatives, which a compiled discriminator does not have"):
        gac(wrap_d=wrap, penalty="r1")


def test_a_compiled_discriminator_without_a_penalty_gives_the_same_covectors(gac):
    torch.manual_seed(3)
    plain = gac()
    torch.manual_seed(3)
    fast = gac(wrap_d=compiled)
    samples = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(fast.cotangent(samples), plain.cotangent(samples), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("share", "refused"), [(0.0, False), (0.001, True), (1.0, True)])
def test_a_discriminator_that_mixes_even_a_little_is_refused(share, refused):
    discriminator = nn.Sequential(nn.Linear(8, 16), MeanOverBatch(share), nn.Tanh(), nn.Linear(16, 1))
    batches = torch.randn(4, 8), torch.randn(4, 8) + 1
    if not refused:
        require_independent_samples(Logits(discriminator), *batches, {})
        return
    with pytest.raises(UsageError, match=r"logits change with the rest of the batch.*schedule='fresh'"):
        require_independent_samples(Logits(discriminator), *batches, {})
