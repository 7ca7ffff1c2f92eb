"""Refinement: per sample, never downhill, and without a trace in the networks."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from gac_plugin import BETAS, REFINEMENTS, SCORES, UsageError, refine

BATCH, LATENT = 5, 3
every_rule = pytest.mark.parametrize("rule", BETAS)
every_method = pytest.mark.parametrize("method", REFINEMENTS)
climbs = [name for name, method in REFINEMENTS.items() if method.noise == 0]
flows = [name for name, method in REFINEMENTS.items() if method.noise > 0]


@pytest.fixture
def networks(tiny_generator, tiny_discriminator):
    """A generator with running statistics, one submodule in evaluation mode, and a wavy discriminator."""
    generator = nn.Sequential(nn.BatchNorm1d(LATENT), nn.Dropout(0.5).eval(), tiny_generator((2, 2))).double()
    generator[0].running_var.fill_(0.3)
    return generator, tiny_discriminator((2, 2), spread=20.0)


@pytest.fixture
def z(latents):
    return latents(BATCH)


def height(generator, discriminator, z, prior):
    """h(z) = l(D(G(z))) - prior/2 ||z||^2 of every sample, in evaluation mode."""
    generator, discriminator = copy.deepcopy(generator).eval(), copy.deepcopy(discriminator).eval()
    with torch.no_grad():
        return discriminator(generator(z)).flatten() - prior / 2 * z.square().sum(1)


class Bowl(nn.Module):
    """l_i = -1/2 (x - m_i)^T A (x - m_i): a quadratic of its own for every sample, all with the curvatures A."""

    def __init__(self, minima, curvatures):
        super().__init__()
        self.minima, self.curvatures = minima, curvatures

    def forward(self, x):
        return -0.5 * ((x - self.minima) ** 2 * self.curvatures).sum(1, keepdim=True)


@pytest.fixture
def bowl():
    return Bowl(torch.randn(BATCH, 6, dtype=torch.float64), torch.logspace(-1, 0.5, 6, dtype=torch.float64))


# What it leaves alone


@pytest.mark.parametrize(
    "options", [*({"rule": rule} for rule in BETAS), *({"method": method} for method in REFINEMENTS)], ids=str
)
def test_parameters_buffers_modes_flags_and_latents_stay_as_they_are(options, networks, z):
    generator, discriminator = networks
    discriminator[1].bias.requires_grad_(False)
    parts = [part for network in networks for part in network.modules()]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    state, start = [copy.deepcopy(network.state_dict()) for network in networks], z.clone()
    modes, flags = [part.training for part in parts], [parameter.requires_grad for parameter in parameters]
    refined = refine(generator, discriminator, z, steps=5, **options)
    for network, saved in zip(networks, state, strict=True):
        assert all(torch.equal(network.state_dict()[name], value) for name, value in saved.items())
    assert [part.training for part in parts] == modes
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert all(parameter.grad is None for parameter in parameters)
    assert torch.equal(z, start)
    assert not z.requires_grad
    assert not refined.requires_grad
    assert not torch.equal(refined, z)


def test_modes_and_flags_come_back_after_an_exception(networks, z):
    generator, discriminator = networks
    modes = [part.training for part in generator.modules()]
    discriminator.register_forward_hook(lambda *_: [].pop())
    with pytest.raises(IndexError):
        refine(generator, discriminator, z)
    assert [part.training for part in generator.modules()] == modes
    assert all(parameter.requires_grad for network in networks for parameter in network.parameters())


def test_it_works_where_gradients_are_disabled_and_on_latents_that_require_them(networks, z):
    expected = refine(*networks, z)
    with torch.no_grad():
        assert torch.equal(refine(*networks, z), expected)
    assert torch.equal(refine(*networks, z.clone().requires_grad_()), expected)


@pytest.mark.parametrize("method", climbs)
def test_a_climb_draws_nothing(method, networks, z):
    state = torch.get_rng_state()
    first = refine(*networks, z, method=method)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(refine(*networks, z, method=method, random=torch.Generator().manual_seed(3)), first)


@pytest.mark.parametrize("method", flows)
def test_a_flow_repeats_for_the_seed_of_its_generator_and_leaves_torchs_own_alone(method, networks, z):
    state, found = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        found.append(refine(*networks, z, method=method, random=torch.Generator().manual_seed(seed)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], rtol=1e-3)
    torch.manual_seed(3)
    assert torch.equal(refine(*networks, z, method=method), found[0])


# The ascent


@pytest.mark.parametrize("rate", [0.01, 1.0, 30.0])
@every_rule
def test_the_height_of_no_sample_ever_falls(rule, rate, networks, z):
    options = {"rate": rate, "rule": rule, "prior": 1.0, "proximity": 0.0}
    heights = [height(*networks, refine(*networks, z, steps=steps, **options), prior=1.0) for steps in range(12)]
    assert torch.equal(heights[0], height(*networks, z, prior=1.0))
    for before, after in pairwise(heights):
        assert (after >= before - 1e-12).all()
    assert (heights[-1] > heights[0]).all()


@pytest.mark.parametrize("prior", [None, 0.0, 0.5, 2.0])
def test_the_first_step_goes_along_the_gradient_of_logit_and_prior(prior, networks, z):
    generator, discriminator = copy.deepcopy(networks)
    leaf = z.clone().requires_grad_()
    objective = discriminator(generator.eval()(leaf)).sum() - (prior or 0.0) / 2 * leaf.square().sum()
    (slope,) = torch.autograd.grad(objective, leaf)
    moved = refine(*networks, z, steps=1, rate=1e-3, prior=prior)
    torch.testing.assert_close(moved, z + 1e-3 * slope, rtol=1e-12, atol=1e-14)


@every_rule
def test_every_sample_is_refined_as_if_it_were_alone(rule, networks, z):
    together = refine(*networks, z, steps=8, rate=0.5, rule=rule)
    alone = torch.cat([refine(*networks, one[None], steps=8, rate=0.5, rule=rule) for one in z])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2), (1, 2, 2, 1)])
def test_samples_of_any_rank_move_directly_where_there_is_no_generator(shape, tiny_discriminator):
    discriminator, x = tiny_discriminator(shape), torch.randn(BATCH, *shape, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(leaf).sum(), leaf)  # no prior
    torch.testing.assert_close(refine(None, discriminator, x, steps=1, rate=1e-3), x + 1e-3 * slope)
    assert (discriminator(refine(None, discriminator, x)) > discriminator(x)).all()


def remaining(bowl, **options):
    """Height that is left to climb after refining, relative to the start, of the sample that is worst off."""
    start = torch.zeros_like(bowl.minima)
    return float((bowl(refine(None, bowl, start, steps=40, rate=0.3, **options)) / bowl(start)).max())


@pytest.mark.parametrize("rule", ["fr", "dy", "hz"])  # the others need line searches: y is small at a fixed step
def test_conjugate_directions_climb_a_quadratic_faster_than_the_gradient(rule, bowl):
    assert remaining(bowl, rule=rule) < 0.01 * remaining(bowl, rule="none")


def test_by_default_it_climbs_a_quadratic_near_the_start():
    # the documented defaults: proximity 30, rate 0.7/30, no prior
    curvatures, start = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.randn(BATCH, 2).double()
    hill = Bowl(torch.randn(BATCH, 2, dtype=torch.float64), curvatures)
    expected = (curvatures * hill.minima + 30 * start) / (curvatures + 30)
    torch.testing.assert_close(refine(nn.Identity(), hill, start, steps=30), expected, rtol=0, atol=1e-6)
    first = start + (curvatures * (hill.minima - start)) * 0.7 / 30
    torch.testing.assert_close(refine(nn.Identity(), hill, start, steps=1), first, rtol=1e-12, atol=1e-14)


def test_the_plain_gradient_climbs_a_quadratic_at_the_rate_of_theory(bowl):
    x = refine(None, bowl, torch.zeros_like(bowl.minima), steps=7, rate=0.3, rule="none")
    torch.testing.assert_close(x, bowl.minima * (1 - (1 - 0.3 * bowl.curvatures) ** 7), rtol=1e-12, atol=1e-14)


def test_a_step_too_long_is_halved_until_it_climbs():
    # l = -x^2 / 2 from 1 with rate 12: 12, 6, 3 overshoot (|1 - rate| > 1), 1.5 arrives at -1/2
    hill = Bowl(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    start = torch.ones(1, 1, dtype=torch.float64)
    found = [refine(None, hill, start, steps=steps, rate=12.0, rule="none").item() for steps in range(6)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 1.0, -0.5, 0.25], rel=1e-15)


# Flows


DERIVATIVES = {  # w = ds/dl of the method's score, and its prior
    "langevin": (lambda d: 1.0, 1.0),
    "dgflow-kl": (lambda d: 1.0, 0.0),
    "dgflow-js": (lambda d: d, 0.0),
    "dgflow-logd": (lambda d: 1 - d, 0.0),
}


@pytest.mark.parametrize("method", flows)
def test_a_flow_follows_the_weighted_gradient(method, networks, z):
    generator, discriminator = (network.eval() for network in copy.deepcopy(networks))
    weight, prior = DERIVATIVES[method]
    leaf = z.clone().requires_grad_()
    logit = discriminator(generator(leaf))
    (gradient,) = torch.autograd.grad(logit.sum(), leaf)
    drift = weight(torch.sigmoid(logit.detach())) * gradient - prior * z
    moved = refine(*networks, z, steps=1, method=method, rate=0.02, noise=0.0)
    torch.testing.assert_close(moved, z + 0.02 * drift, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", flows)
def test_the_noise_of_a_flow_has_the_variance_of_its_equation(method, networks, z):
    many = z[:1].expand(4000, -1)
    still, moved = (refine(*networks, many, steps=1, method=method, rate=0.3, noise=noise) for noise in (0.0, 0.7))
    difference = moved - still
    assert difference.mean().item() == pytest.approx(0.0, abs=0.03)  # 4 standard errors of 12,000 draws: 0.024
    assert difference.var().item() == pytest.approx(2 * 0.3 * 0.7, rel=0.06)


def test_langevin_samples_the_density_of_prior_and_logit():
    # l = -a/2 (x - m)^2 with G the identity: p(z) exp(l) is normal, of variance 1 / (1 + a) and mean a m / (1 + a)
    a, m = 3.0, 2.0
    hill = Bowl(torch.full((4000, 1), m, dtype=torch.float64), torch.tensor([a], dtype=torch.float64))
    z = refine(nn.Identity(), hill, torch.randn(4000, 1, dtype=torch.float64), steps=400, method="langevin", rate=0.01)
    assert z.mean().item() == pytest.approx(a * m / (1 + a), abs=0.04)
    assert z.var().item() == pytest.approx(1 / (1 + a), rel=0.1)


@pytest.mark.parametrize("method", flows)
def test_fewer_steps_are_the_beginning_of_more(method, networks, z):
    def walk(start, steps, random):
        return refine(*networks, start, steps=steps, method=method, rate=0.05, random=random)

    once, twice = (torch.Generator().manual_seed(5) for _ in range(2))
    torch.testing.assert_close(walk(z, 5, once), walk(walk(z, 2, twice), 3, twice), rtol=1e-12, atol=1e-14)


# What is climbed


@pytest.mark.parametrize("score", SCORES)
def test_any_score_of_the_logit_can_be_climbed(score, networks, z):
    generator, discriminator = (network.eval() for network in copy.deepcopy(networks))
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(SCORES[score].value(discriminator(generator(leaf))).sum(), leaf)
    moved = refine(*networks, z, steps=1, rate=1e-3, prior=0.0, score=score)
    torch.testing.assert_close(moved, z + 1e-3 * slope, rtol=1e-10, atol=1e-14)


def test_proximity_ends_at_the_maximum_near_the_start():
    # l = -A/2 (x - m)^2 - p/2 (x - x0)^2 has its maximum at (A m + p x0) / (A + p)
    curvatures, p = torch.tensor([0.5, 2.0], dtype=torch.float64), 4.0
    hill, start = Bowl(torch.randn(BATCH, 2, dtype=torch.float64), curvatures), torch.randn(BATCH, 2).double()
    found = refine(None, hill, start, steps=60, rate=0.15, proximity=p)
    expected = (curvatures * hill.minima + p * start) / (curvatures + p)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_plain_ascent_is_conjugate_ascent_with_the_rule_none(networks, z):
    plain = refine(*networks, z, method="gradient", rate=0.1)
    assert torch.equal(plain, refine(*networks, z, rule="none", rate=0.1))
    assert not torch.allclose(plain, refine(*networks, z, rule="fr", rate=0.1), rtol=1e-3)


@pytest.mark.parametrize("method", [name for name, method in REFINEMENTS.items() if method.samples])
def test_samples_move_by_every_method_that_is_defined_there(method, tiny_discriminator):
    discriminator, x = tiny_discriminator(), torch.randn(BATCH, 4, dtype=torch.float64)
    moved = refine(None, discriminator, x, method=method, rate=0.01)
    assert moved.isfinite().all()
    assert not torch.equal(moved, x)


# Report, conditions, outputs


@every_method
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_the_report_says_how_far_each_sample_moved_and_at_what_cost(steps, method, networks, z):
    generator, discriminator = networks
    calls, reports = [], []
    generator.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    refined = refine(*networks, z, steps=steps, method=method, report=reports.append)
    (report,) = reports
    assert report.evaluations == sum(calls) == max(steps, 1)
    assert len(calls) == steps + 1  # the last point needs a value, not a gradient
    torch.testing.assert_close(report.moved, (refined - z).norm(dim=1), rtol=1e-12, atol=0)
    for logit, point in ((report.logit_before, z), (report.logit_after, refined)):
        torch.testing.assert_close(logit, height(generator, discriminator, point, prior=0.0), rtol=1e-12, atol=0)


@every_method
def test_no_steps_return_a_copy(method, networks, z):
    refined = refine(*networks, z, steps=0, method=method)
    assert torch.equal(refined, z)
    assert refined.data_ptr() != z.data_ptr()


def test_conditions_reach_both_networks(networks, z):
    class Shifted(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, by):
            return self.network(x + by.reshape(-1, *[1] * (x.dim() - 1)))

    generator, discriminator = (Shifted(network) for network in networks)
    by = torch.linspace(-1, 1, BATCH, dtype=torch.float64)
    refined = refine(generator, discriminator, z, by=by)
    alone = [refine(generator, discriminator, one[None], by=shift[None]) for one, shift in zip(z, by, strict=True)]
    torch.testing.assert_close(refined, torch.cat(alone), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(refined, refine(generator, discriminator, z, by=-by), rtol=1e-3)


@pytest.mark.parametrize("form", ["probability", "tuple", "patches"])
def test_the_logits_are_found_in_whatever_the_discriminator_returns(form, tiny_discriminator):
    discriminator, x = tiny_discriminator(spread=1.0), torch.randn(BATCH, 4, dtype=torch.float64)
    wrapped, options = {
        "probability": (nn.Sequential(discriminator, nn.Sigmoid()), {"output": "probability"}),
        "tuple": (discriminator, {"logits": lambda out: (out, None)[0]}),
        "patches": (discriminator, {"logits": lambda out: torch.stack([out - 1, out + 1], 2)}),
    }[form]
    torch.testing.assert_close(refine(None, wrapped, x, **options), refine(None, discriminator, x), rtol=1e-9, atol=0)


# Mistakes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": -1}, "got steps=-1"),
        ({"rate": 0.0}, r"got .*rate=0\.0"),
        ({"rate": -0.5}, r"got .*rate=-0\.5"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"beta_max": -1.0}, r"beta_max.*-1\.0"),
        ({"prior": float("nan")}, "prior.*nan"),
        ({"rule": "pr"}, "unknown rule 'pr'"),
        ({"method": "newton"}, "unknown method 'newton'; choose one of: conjugate, .*dgflow-logd"),
        ({"score": "logits"}, r"unknown score 'logits' \(did you mean 'logit'\?\)"),
        ({"proximity": -1.0}, r"proximity=-1\.0"),
        ({"proximity": float("inf")}, "proximity=inf"),
        ({"method": "langevin", "noise": -0.1}, r"noise=-0\.1"),
        ({"method": "langevin", "rule": "fr"}, "'langevin' has no conjugate directions: leave out rule, got 'fr'"),
        ({"noise": 0.1}, "'conjugate' draws nothing at random: leave out noise, got 0.1"),
        ({"output": "probs"}, "unknown output 'probs'"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_with_their_value(wrong, message, networks, z):
    with pytest.raises(UsageError, match=message):
        refine(*networks, z, **wrong)


def test_langevin_is_for_latents(tiny_discriminator):
    with pytest.raises(UsageError, match="'langevin' moves latents, not samples: pass a generator, or another method"):
        refine(None, tiny_discriminator(), torch.zeros(2, 4).double(), method="langevin")


@pytest.mark.parametrize("bad", [torch.zeros(4, 3, dtype=torch.int64), torch.tensor(0.5)], ids=["integers", "scalar"])
def test_latents_must_be_a_floating_point_batch(bad, networks):
    with pytest.raises(UsageError, match=r"floating-point batch of shape \(B, ...\), got torch\."):
        refine(*networks, bad)
