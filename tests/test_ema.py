"""The running average, against the recursion written out."""

import torch
from torch import nn

from gac_plugin.training.ema import RunningAverage


def trained(values: list[float], decay: float) -> tuple[RunningAverage, nn.Module]:
    network = nn.BatchNorm1d(2)
    average = RunningAverage(network)
    for value in values:
        nn.init.constant_(network.weight, value)
        network.running_mean.fill_(value)
        average.update(network, decay)
    return average, network


def test_the_average_is_the_recursion_started_by_a_copy():
    average, network = trained([3.0, 5.0, -1.0], 0.75)
    expected = 0.75 * (0.75 * 3.0 + 0.25 * 5.0) + 0.25 * -1.0
    torch.testing.assert_close(average.network.weight, torch.full((2,), expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(average.network.running_mean, torch.full((2,), -1.0), rtol=0, atol=0)
    assert not average.network.weight.requires_grad
    assert network.weight.requires_grad


def test_decay_zero_is_the_network_itself():
    average, network = trained([3.0, 0.1], 0.0)
    assert torch.equal(average.network.weight, network.weight)


def test_nothing_is_read_on_the_host(host_reads):
    average, network = trained([1.0], 0.9)
    with host_reads() as reads:
        average.update(network, 0.9)
    assert reads.seen == []


def test_it_goes_on_from_its_state():
    average, network = trained([3.0, 5.0], 0.9)
    other = RunningAverage(nn.BatchNorm1d(2))
    other.load_state_dict(average.state_dict())
    nn.init.constant_(network.weight, 7.0)
    for one in (average, other):
        one.update(network, 0.9)
    assert torch.equal(average.network.weight, other.network.weight)
