"""Calibration: the discriminator learns how far refinement has to go, and nothing else changes."""

import copy
import math
from itertools import repeat

import pytest
import torch
from torch import nn

from gac_plugin import GradientPenalty, UsageError, calibrate, refine

BATCH, LATENT = 6, 3
FREE = GradientPenalty(r1=0.0, r2=0.0)


@pytest.fixture
def networks(tiny_generator, tiny_discriminator):
    """A generator with running statistics, one submodule in evaluation mode; a discriminator with statistics too."""
    generator = nn.Sequential(nn.BatchNorm1d(LATENT), nn.Dropout(0.5).eval(), tiny_generator((2, 2))).double()
    discriminator = tiny_discriminator((2, 2))
    return generator, nn.Sequential(discriminator[0], nn.BatchNorm1d(4).double(), *discriminator[1:])


@pytest.fixture
def batches(latents):
    return [(torch.randn(BATCH, 2, 2, dtype=torch.float64) + 1, latents(BATCH), {}) for _ in range(4)]


@pytest.fixture
def plane():
    """A linear discriminator, real samples x, latents z, and how far their means are apart."""
    x, z = torch.randn(50, 2, dtype=torch.float64) + torch.tensor([1.0, -2.0]), torch.randn(50, 2, dtype=torch.float64)
    return nn.Linear(2, 1).double(), x, z, x.mean(0) - z.mean(0)


@pytest.mark.parametrize("proximity", [2.0, 8.0])
def test_samples_are_refined_to_where_the_real_ones_are(proximity, plane):
    # l = <w, x> + b moves every z by w / p; the means agree for w = p (mean x - mean z)
    discriminator, x, z, apart = plane
    # and the first step of that rate is the whole way
    options = {"proximity": proximity, "rate": 1 / proximity, "steps": 1}
    judge = calibrate(
        nn.Identity(),
        discriminator,
        repeat((x, z, {})),
        learning_rate=0.05 * proximity,
        decay=0.9,
        penalty=FREE,
        **options,
    )
    torch.testing.assert_close(judge.weight[0], proximity * apart, rtol=0.01, atol=0.01)
    refined = refine(nn.Identity(), judge, z, **options)
    torch.testing.assert_close(refined, z + apart, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(("r1", "r2"), [(0.5, 0.0), (0.0, 0.5), (0.25, 0.25)])
def test_the_penalty_shortens_the_way(r1, r2, plane):
    # <w, mean z> + |w|^2 / (2p) - <w, mean x> + (r1 + r2) |w|^2 / 2 is least at w = (mean x - mean z) / (1/p + r1 + r2)
    discriminator, x, z, apart = plane
    judge = calibrate(
        nn.Identity(),
        discriminator,
        repeat((x, z, {})),
        steps=1,
        learning_rate=0.02,
        decay=0.9,
        penalty=GradientPenalty(r1, r2, interval=1),
        proximity=4.0,
        rate=0.25,
    )
    torch.testing.assert_close(judge.weight[0], apart / (1 / 4 + 0.5), rtol=0.01, atol=0.01)


def test_the_penalty_comes_at_its_interval(networks, batches):
    def weights(steps, r1, interval):
        penalty = GradientPenalty(r1, 0.0, interval)
        return [parameter.detach() for parameter in calibrate(*networks, batches, steps, penalty=penalty).parameters()]

    def same(a, b):
        return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))

    assert same(weights(1, 8.0, 1), weights(1, 2.0, 4))  # times the interval
    assert not same(weights(1, 8.0, 1), weights(1, 0.0, 1))
    assert same(weights(4, 2.0, 4), weights(4, 1.0, 8))
    assert not same(weights(4, 2.0, 4), weights(4, 4.0, 2))


def test_one_step_is_adams_on_the_difference_of_the_mean_logits(networks, batches):
    generator, discriminator = networks
    judge = calibrate(generator, discriminator, batches, 1, learning_rate=0.01, penalty=FREE, proximity=5.0, steps=3)
    (real, z, _), learner = batches[0], copy.deepcopy(discriminator)
    moved = refine(generator, discriminator, z, 3, proximity=5.0)
    with torch.no_grad():
        samples = copy.deepcopy(generator).eval()(moved)
    learner.train()
    l_real, l_moved = learner(real), learner(samples)
    (l_moved.mean() - l_real.mean()).backward()
    for before, after in zip(learner.parameters(), judge.parameters(), strict=True):
        far = before.grad.abs() > 1e-5  # Adam's first step is learning_rate sign(gradient), where eps does not count
        torch.testing.assert_close(after[far], (before - 0.01 * before.grad.sign())[far], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(judge[1].running_mean, learner[1].running_mean)  # of a first update, a copy


def test_the_weights_are_a_running_average(networks, batches):
    first, second = (calibrate(*networks, batches, updates, decay=0.0) for updates in (1, 2))
    average = calibrate(*networks, batches, 2, decay=0.75)
    for value, one, two in zip(average.parameters(), first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(value, 0.75 * one + 0.25 * two, rtol=1e-9, atol=1e-12)


def test_the_learning_rate_falls_linearly(plane):
    # with r2 alone and z where x is, so heavy that its sign is that of w: Adam's steps are 1, 3/4, 1/2 and 1/4 as long
    discriminator, x, _, _ = plane
    discriminator.weight.data.fill_(1.0)
    heavy = GradientPenalty(0.0, 1e6, interval=1)
    options = {"learning_rate": 1e-6, "decay": 0.0, "penalty": heavy}
    judge = calibrate(nn.Identity(), discriminator, repeat((x, x, {})), 4, **options)
    wanted = torch.full((2,), 1 - 1e-6 * (1 + 3 / 4 + 1 / 2 + 1 / 4), dtype=torch.float64)
    torch.testing.assert_close(judge.weight[0].detach(), wanted, rtol=0, atol=1e-9)


def test_both_networks_stay_as_they_are(networks, batches):
    parts = [part for network in networks for part in network.modules()]
    state, modes = [copy.deepcopy(network.state_dict()) for network in networks], [part.training for part in parts]
    networks[1][2].bias.requires_grad_(False)
    flags = [parameter.requires_grad for network in networks for parameter in network.parameters()]
    judge = calibrate(*networks, batches, 4)
    for network, saved in zip(networks, state, strict=True):
        assert all(torch.equal(network.state_dict()[name], value) for name, value in saved.items())
    assert [part.training for part in parts] == modes
    assert [parameter.requires_grad for network in networks for parameter in network.parameters()] == flags
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())
    assert not any(part.training for part in judge.modules())
    assert torch.equal(judge[2].bias, networks[1][2].bias)  # asked to stay
    assert not torch.equal(judge[2].weight, networks[1][2].weight)


def test_it_repeats_and_draws_nothing(networks, batches):
    state = torch.get_rng_state()
    first = calibrate(*networks, batches, 4)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        again = calibrate(*networks, iter(batches), 4)
    other = calibrate(*networks, batches[::-1], 4)
    for one, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)
    assert not torch.equal(first[2].weight, other[2].weight)


def test_conditions_reach_both_networks():
    class Labelled(nn.Module):
        """x -> x + by, and <w_by, x>."""

        def __init__(self, judge):
            super().__init__()
            self.classes = nn.Embedding(2, 2).double() if judge else None

        def forward(self, x, by):
            return x + by[:, None] if self.classes is None else (self.classes(by) * x).sum(1)

    # class 0 is to move by (1, 0), class 1 by (0, 2)
    by = torch.arange(40) % 2
    z = torch.randn(40, 2, dtype=torch.float64)
    real = z + by[:, None] + torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)[by]
    judge = calibrate(
        Labelled(False),
        Labelled(True),
        repeat((real, z, {"by": by})),
        steps=1,
        learning_rate=0.05,
        decay=0.9,
        penalty=FREE,
        proximity=3.0,
        rate=1 / 3,
    )
    wanted = torch.tensor([[3.0, 0.0], [0.0, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(judge.classes.weight.detach(), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("form", ["probability", "tuple"])
def test_the_logits_are_found_in_whatever_the_discriminator_returns(form, networks, batches):
    generator, discriminator = networks
    wrapped, options = {
        "probability": (nn.Sequential(discriminator, nn.Sigmoid()), {"output": "probability"}),
        "tuple": (discriminator, {"logits": lambda out: (out, None)[0]}),
    }[form]
    plain = calibrate(generator, discriminator, batches, 4)
    other = calibrate(generator, wrapped, batches, 4, **options)
    for one, same in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, r"positive learning_rate .*learning_rate=0\.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"updates": 0}, "updates of at least 1, .*updates=0"),
        ({"updates": 5}, "there are 4 batches for 5 updates: pass more, or lower updates"),
        ({"decay": 1.0}, r"decay in \[0, 1\), got .*decay=1\.0"),
        ({"decay": -0.1}, r"decay=-0\.1"),
        ({"rule": "pr"}, "unknown rule 'pr'"),
        ({"steps": -1}, "steps=-1"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_with_their_value(wrong, message, networks, batches):
    with pytest.raises(UsageError, match=message):
        calibrate(*networks, batches, **{"updates": 4, **wrong})


def test_weights_that_are_not_finite_any_more_are_refused(networks, batches):
    (real, z, conditions), *rest = batches
    spoiled = [(real * math.nan, z, conditions), *rest]
    with pytest.raises(UsageError, match=r"not finite any more: lower the learning_rate, which is 0\.01"):
        calibrate(*networks, spoiled, 2, learning_rate=0.01)


def test_a_discriminator_that_may_not_be_trained_is_refused(networks, batches):
    networks[1].requires_grad_(False)
    with pytest.raises(UsageError, match=r"no parameter of the discriminator requires a gradient: call requires_grad_"):
        calibrate(*networks, batches)
