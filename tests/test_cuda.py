"""On a CUDA device: a step gives what it gives on the CPU, waits for nothing, and can be captured as a CUDA graph."""

import copy

import pytest
import torch

from gac_plugin import GAC, ConjugateGradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BATCH, SHAPE, RATE = 6, (2, 3), 0.05
both_schedules = pytest.mark.parametrize("schedule", ["fresh", "fused"])


def gac_of(networks, schedule, optimizer=None, **options):
    generator, discriminator = networks
    optimizer_g = (optimizer or ConjugateGradient)(generator.parameters(), lr=RATE)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), RATE, foreach=True, **options)
    return GAC(generator, discriminator, optimizer_g, optimizer_d, schedule=schedule, penalty="r1+r2", latent=3)


@pytest.fixture
def networks(tiny_generator, tiny_discriminator):
    return tiny_generator(SHAPE), tiny_discriminator(SHAPE)


def on_cuda(networks):
    return tuple(copy.deepcopy(network).cuda() for network in networks)


def parameters(networks):
    return [parameter.detach().cpu().clone() for network in networks for parameter in network.parameters()]


def optimizer_with(rule, metric):
    return lambda parameters, lr: ConjugateGradient(parameters, lr, rule=rule, metric=metric)


@both_schedules
@pytest.mark.parametrize(("rule", "metric"), [("none", "kronecker"), ("fr-pr", "adam"), ("hz", "identity")])
def test_a_step_gives_what_it_gives_on_the_cpu(networks, latents, schedule, rule, metric):
    """Twelve steps: penalties every 4th, the bases of `kronecker` turn in the tenth."""
    twins, start = on_cuda(networks), parameters(networks)
    here, there = (gac_of(pair, schedule, optimizer_with(rule, metric)) for pair in (networks, twins))
    for _ in range(12):
        real, z = torch.randn(BATCH, *SHAPE, dtype=torch.float64), latents(BATCH)
        here.step(real, z)
        there.step(real.cuda(), z.cuda())
    for actual, expected, before in zip(parameters(twins), parameters(networks), start, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
        assert float((expected - before).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@both_schedules
@pytest.mark.parametrize(("rule", "metric"), [("none", "kronecker"), ("fr-pr", "adam"), ("hz", "identity")])
def test_a_step_waits_for_nothing(networks, schedule, rule, metric):
    gac = gac_of(on_cuda(networks), schedule, optimizer_with(rule, metric))
    real = torch.randn(BATCH, *SHAPE, dtype=torch.float64, device="cuda")
    gac.step(real)  # looks at values once, to refuse what cannot work
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            real.sum().item()
        for _ in range(12):
            gac.step(real)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_schedules
def test_steps_can_be_captured_as_a_cuda_graph(networks, latents, schedule):
    """Four steps, from one penalty to the next, replayed three times, against the same steps one by one."""

    def adam(parameters, lr):
        return torch.optim.Adam(parameters, lr, foreach=True, capturable=True)

    captured, usual = on_cuda(networks), on_cuda(networks)
    batches = [(torch.randn(BATCH, *SHAPE, dtype=torch.float64).cuda(), latents(BATCH).cuda()) for _ in range(4)]

    def turn_of(pair):
        gac = gac_of(pair, schedule, adam, capturable=True)
        return lambda: [gac.step(*batch) for batch in batches]

    turn, stream, graph = turn_of(captured), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        turn()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        turn()
    for _ in range(3):
        graph.replay()
    expected = turn_of(usual)
    for _ in range(4):
        expected()
    for actual, wanted, before in zip(*map(parameters, (captured, usual, networks)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)
        assert float((wanted - before).abs().max()) > 1e-3
