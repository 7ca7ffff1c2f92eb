"""The methods beside GAC, each against its formula computed in another way."""

import math
from functools import partial
from itertools import cycle, repeat

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from benchmarks import ablation_variants
from benchmarks.peers import (
    METHODS,
    OUR_GAME,
    OURS,
    PLAIN_GAME,
    R3_GAME,
    Game,
    OptimisticAdam,
    adam,
    alternating,
    conjugate,
    constant,
    extragradient,
    falling,
    lookahead,
)
from gac_plugin import LOSSES, PENALTIES, ConjugateGradient, GradientPenalty
from gac_plugin.training import Config
from gac_plugin.training.schedules import Schedule

LR, BATCH, STEPS = 0.05, 6, 7


class Point(nn.Module):
    """A generator of one point, theta, whatever the latent."""

    nz = 1

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self, z):
        return self.value.expand(len(z), 1)


class Slope(nn.Module):
    """A discriminator l(x) = phi x."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self, x):
        return x * self.value


def networks(seed=0):
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    generator.nz = 3
    return generator, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def real_batches(count=4):
    random = torch.Generator().manual_seed(5)
    return [torch.randn(BATCH, 4, generator=random) for _ in range(count)]


def trained(make, steps=STEPS, lr_g=LR, lr_d=LR / 2):
    """Both networks after some steps of a method."""
    generator, discriminator = networks()
    step, batches = make(generator, discriminator, lr_g, lr_d), cycle(real_batches())
    torch.manual_seed(9)
    for _ in range(steps):
        step(batches)
    return [p.detach() for p in (*generator.parameters(), *discriminator.parameters())]


def assert_close(found, expected, tolerance=1e-6):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---- on the bilinear game min_theta max_phi of phi theta, where the critic's losses have the slopes theta and -phi

BILINEAR = Game(LOSSES["wasserstein"])


def play(make, steps, rate, theta=1.0, phi=0.5):
    generator, discriminator = Point(theta), Slope(phi)
    step, real = make(generator, discriminator, rate, rate), repeat(torch.zeros(2, 1, dtype=torch.float64))
    for _ in range(steps):
        step(real)
    return generator.value.item(), discriminator.value.item()


def test_extragradient_spirals_in_as_its_closed_form_says():
    """(theta + i phi) is multiplied by 1 - lr^2 - i lr in every step."""
    rate, steps = 0.3, 11
    found = play(extragradient(BILINEAR, torch.optim.SGD), steps, rate)
    expected = complex(1.0, 0.5) * complex(1 - rate**2, -rate) ** steps
    assert found == pytest.approx((expected.real, expected.imag), abs=1e-12)
    assert abs(expected) < abs(complex(1.0, 0.5))


def test_alternating_steps_keep_to_their_ellipse():
    """phi <- phi - lr theta, then theta <- theta + lr phi: theta^2 + phi^2 - lr theta phi stays."""
    rate = 0.3
    theta, phi = play(alternating(BILINEAR, torch.optim.SGD, torch.optim.SGD), 50, rate)
    assert theta**2 + phi**2 - rate * theta * phi == pytest.approx(1.25 - rate * 0.5, abs=1e-12)
    assert (theta, phi) != pytest.approx((1.0, 0.5), abs=0.1)


def test_extragradient_adam_is_its_algorithm():
    """Algorithm 4 by hand, in numbers: moments take in both gradients, and steps start from the point before."""
    rate, beta1, beta2, eps, steps = 0.1, 0.5, 0.9, 1e-8, 5
    theta, phi = 1.0, 0.5
    moments = {"theta": [0.0, 0.0], "phi": [0.0, 0.0]}
    count = 0

    def move(name, gradient):
        first, second = moments[name]
        moments[name] = [beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2]
        m, v = (value / (1 - beta**count) for value, beta in zip(moments[name], (beta1, beta2), strict=True))
        return -rate * m / (math.sqrt(v) + eps)

    for _ in range(steps):
        count += 1
        ahead = theta + move("theta", -phi), phi + move("phi", theta)
        count += 1
        theta, phi = theta + move("theta", -ahead[1]), phi + move("phi", ahead[0])
    found = play(extragradient(BILINEAR, adam(beta1, beta2)), steps, rate)
    assert found == pytest.approx((theta, phi), abs=1e-10)


def test_optimistic_adam_is_its_formula():
    rate, (beta1, beta2), eps = 0.1, (0.5, 0.9), 1e-8
    gradients = [torch.tensor(values, dtype=torch.float64) for values in ([1.0, -2.0], [0.5, 3.0], [-1.0, 0.1])]
    point = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
    expected, m, v, before = point.detach().clone(), 0.0, 0.0, 0.0
    optimizer = OptimisticAdam([point], rate, betas=(beta1, beta2))
    for number, gradient in enumerate(gradients, 1):
        point.grad = gradient.clone()
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        scaled = (m / (1 - beta1**number)) / ((v / (1 - beta2**number)).sqrt() + eps)
        expected = expected - 2 * rate * scaled + rate * before
        before = scaled
        torch.testing.assert_close(point.detach(), expected, rtol=0, atol=1e-12)


def test_lookahead_goes_half_the_way_of_five_steps():
    moves = [torch.tensor([float(2**number)]) for number in range(10)]

    def inner(generator, discriminator, lr_g, lr_d):
        to_come = iter(moves)

        def step(batches):
            move = next(to_come)
            with torch.no_grad():
                generator.value += lr_g * move
                discriminator.value -= lr_d * move

        return step

    generator, discriminator = Point(1.0), Slope(2.0)
    step = lookahead(inner)(generator, discriminator, 1.0, 0.5)
    seen = []
    for _ in range(10):
        step(iter(()))
        seen.append(generator.value.item())
    first = 1.0 + 31 / 2  # 1 + 2 + 4 + 8 + 16 = 31
    assert seen == [2, 4, 8, 16, first, first + 32, first + 96, first + 224, first + 480, first + 992 / 2]
    assert discriminator.value.item() == 2.0 - 0.5 * (31 + 992) / 2


# ---- games written out by hand


def by_hand(discriminator_loss, generator_loss, optimizers, steps=STEPS):
    generator, discriminator = networks()
    of_g, of_d = optimizers(generator.parameters(), LR), optimizers(discriminator.parameters(), LR / 2)
    batches = cycle(real_batches())
    torch.manual_seed(9)
    for number in range(steps):
        real = next(batches)
        fake = generator(torch.randn(BATCH, 3)).detach()
        of_d.zero_grad()
        discriminator_loss(discriminator, real, fake, number).backward()
        of_d.step()
        fake = generator(torch.randn(BATCH, 3))
        of_g.zero_grad()
        generator_loss(discriminator, real, fake).backward()
        of_g.step()
    return [p.detach() for p in (*generator.parameters(), *discriminator.parameters())]


def cross_entropy(discriminator, real, fake, number):
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    ones, zeros = torch.ones_like(real_logits), torch.zeros_like(fake_logits)
    return binary_cross_entropy_with_logits(real_logits, ones) + binary_cross_entropy_with_logits(fake_logits, zeros)


def log_d(discriminator, real, fake):
    return -torch.log(torch.sigmoid(discriminator(fake))).mean()


def penalty(discriminator, samples):
    """1/2 E |dl/dx|^2, sample by sample."""
    total = 0.0
    for x in samples:
        x = x[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
        total = total + gradient.square().sum() / 2
    return total / len(samples)


def test_the_textbook_loop():
    found = trained(alternating(PLAIN_GAME, adam(0.5, 0.999), adam(0.5, 0.999)))
    expected = by_hand(cross_entropy, log_d, lambda p, lr: torch.optim.Adam(p, lr, betas=(0.5, 0.999)))
    assert_close(found, expected, 1e-5)
    assert_close(found, trained(METHODS["textbook"].make))


def test_our_recipe_pays_its_penalty_every_fourth_step_and_four_times():
    def loss(discriminator, real, fake, number):
        due = number % 4 == 0
        extra = 4 * (penalty(discriminator, real) + penalty(discriminator, fake)) if due else 0.0
        return cross_entropy(discriminator, real, fake, number) + extra

    expected = by_hand(loss, log_d, lambda p, lr: torch.optim.Adam(p, lr, betas=(0.0, 0.99)))
    assert_close(trained(METHODS["recipe"].make), expected, 1e-5)


def test_r3gan_pairs_samples_and_pays_in_every_step():
    def loss(discriminator, real, fake, number):
        apart = softplus(discriminator(fake) - discriminator(real)).mean()
        return apart + penalty(discriminator, real) + penalty(discriminator, fake)

    def of_generator(discriminator, real, fake):
        return softplus(discriminator(real) - discriminator(fake)).mean()

    expected = by_hand(loss, of_generator, lambda p, lr: torch.optim.Adam(p, lr, betas=(0.0, 0.99)))
    assert_close(trained(METHODS["r3gan"].make), expected, 1e-5)


def test_r3gan_s_preset_lets_gamma_and_the_rates_fall_by_a_cosine_while_beta2_rises():
    def left(number):
        return 0.5 * (1 + math.cos(math.pi * number / (STEPS - 1)))

    def loss(discriminator, real, fake, number):
        apart = softplus(discriminator(fake) - discriminator(real)).mean()
        gamma = 0.005 + 0.045 * left(number)
        return apart + gamma * (penalty(discriminator, real) + penalty(discriminator, fake))

    def of_generator(discriminator, real, fake):
        return softplus(discriminator(real) - discriminator(fake)).mean()

    class Preset(torch.optim.Adam):
        def __init__(self, params, lr):
            super().__init__(params, lr, betas=(0.0, 0.9))
            self.first, self.number = lr, 0

        def step(self, closure=None):
            f = left(self.number)
            self.param_groups[0].update(
                lr=self.first / 4 + self.first * 3 / 4 * f, betas=(0.0, 0.9 * f + 0.99 * (1 - f))
            )
            self.number += 1
            return super().step(closure)

    found = trained(METHODS["r3gan-falling"].make_over(STEPS))
    assert_close(found, by_hand(loss, of_generator, Preset), 1e-5)


def test_a_frozen_discriminator_gets_no_gradients_in_the_generator_s_step():
    """And has those of its own step again in the next."""
    optimizers = adam(0.5, 0.999), adam(0.5, 0.999)
    as_usual, frozen = (alternating(PLAIN_GAME, *optimizers, freeze=one) for one in (False, True))
    assert_close(trained(frozen), trained(as_usual), 0)

    generator, discriminator = networks()
    norms = []
    for make in (as_usual, frozen):
        torch.manual_seed(9)
        make(generator, discriminator, 0.0, 0.0)(cycle(real_batches()))
        norms.append(discriminator[0].weight.grad.norm())
        assert all(p.requires_grad for p in discriminator.parameters())
    assert norms[0] != norms[1]


def test_conjugate_gradient_as_published():
    """d = g + min(1/2, |g|^2 / |g-|^2) d-, started again where it would not descend."""

    class FletcherReeves(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})
            self.before = None

        @torch.no_grad()
        def step(self):
            parameters = self.param_groups[0]["params"]
            g = torch.cat([p.grad.flatten() for p in parameters]).double()
            d = g.clone()
            if self.before is not None:
                g_before, d_before = self.before
                d += min(0.5, float(g @ g / (g_before @ g_before))) * d_before
                d = d if g @ d > 0 else g.clone()
            self.before = g, d
            for p, part in zip(parameters, d.split([p.numel() for p in parameters]), strict=True):
                p -= self.param_groups[0]["lr"] * part.reshape(p.shape)

    assert_close(trained(METHODS["published"].make), by_hand(cross_entropy, log_d, FletcherReeves), 1e-5)


def moved(optimizers, gradients):
    """Points that start at 0, one for each optimizer."""
    points = [nn.Parameter(torch.zeros(len(gradients[0]))) for _ in optimizers]
    made = [make([point], 0.1) for make, point in zip(optimizers, points, strict=True)]
    for gradient in gradients:
        for point, optimizer in zip(points, made, strict=True):
            point.grad = torch.tensor(gradient)
            optimizer.step()
    return [point.tolist() for point in points]


def test_constant_beta_under_the_identity_is_the_heavy_ball_until_it_would_not_ascend():
    ours = conjugate(constant(0.9), metric="identity", beta_max=1.0)
    one, other = moved([ours, partial(torch.optim.SGD, momentum=0.9)], [[1.0, 2.0], [0.5, 1.5], [0.4, 1.0]])
    assert one == pytest.approx(other)
    # the gradient turns: -.5 + .9 goes against it, so the direction starts again
    one, other = moved([ours, partial(torch.optim.SGD, momentum=0.9)], [[1.0], [-0.5], [1.0]])
    assert one == pytest.approx([-0.1 * (1.0 - 0.5 + (1.0 - 0.9 * 0.5))])
    assert other == pytest.approx([-0.1 * (1.0 + 0.4 + 1.36)])


def test_gac_is_trained_here_as_gac_train_does():
    config = Config()
    assert PENALTIES["r1+r2"] == GradientPenalty(config.r1, config.r2, config.penalty_interval) == OUR_GAME.penalty
    assert (config.optimizer, config.rule, config.metric, config.schedule) == (
        "conjugate",
        "none",
        "kronecker",
        "fresh",
    )
    assert R3_GAME.penalty.interval == 1
    as_trained = ablation_variants.recipe(config, 4)
    assert_close(trained(METHODS[OURS].make_over(4), steps=4), trained(as_trained, steps=4), 0)


def test_one_pullback_is_gac_s_own_step():
    config = Config(metric="adam", lr_schedule="constant")
    one, two = (trained(ablation_variants.pullbacks(times)(config, 1)) for times in (1, 2))
    usual = trained(ablation_variants.recipe(config, 1))
    assert_close(one, usual, 1e-5)
    assert (two[0] - usual[0]).abs().max() > 1e-2


def test_on_a_common_batch_beta_is_free_of_the_noise_between_draws(monkeypatch):
    """Where no network moves, y is nothing but noise, and so is PR+'s beta = <y, u> / <g-, u->."""
    step = ConjugateGradient.step

    def largest(make):
        betas = []

        def told(self, *arguments):
            step(self, *arguments)
            betas.append(abs(float(self.beta)))

        monkeypatch.setattr(ConjugateGradient, "step", told)
        trained(make(Config(rule="pr+"), 1), lr_g=0.0, lr_d=0.0)
        assert len(betas) == STEPS
        return max(betas)

    assert largest(ablation_variants.recipe) > 0.1
    assert largest(ablation_variants.common_batch) < 1e-4


def test_d_moves_under_the_metric_of_g(monkeypatch):
    base, turned = (
        trained(make(Config(), 1), 1) for make in (ablation_variants.recipe, ablation_variants.turned_for_both)
    )
    assert_close(turned[:2], base[:2], 0.2)  # G is near: its step follows D's
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(turned[4:], base[4:], strict=True))


def test_a_rate_follows_its_schedule():
    point = nn.Parameter(torch.zeros(1))
    optimizer, rates = falling(torch.optim.SGD, Schedule("linear", 0.0), 5)([point], 0.1), []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        point.grad = torch.ones(1)
        optimizer.step()
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])


@pytest.mark.parametrize("name", ["textbook", "gac", "recipe", "lookahead"])
def test_falling_rates_fall_to_nothing_over_the_run(name):
    """The first step is at the full rate, and the last of all moves nothing."""
    method, usual = METHODS[f"{name}-falling"], METHODS[name]
    assert_close(trained(method.make_over(10), steps=1), trained(usual.make, steps=1), 0)
    assert_close(trained(method.make_over(2), steps=2), trained(usual.make, steps=1), 0)
    assert usual.make_over(2) is usual.make


def test_optimistic_adam_takes_back_half_of_its_first_move_at_a_rate_of_nothing():
    """2 u_1 in the first step, 0 - u_1 in the second."""
    method, usual = METHODS["optimistic-falling"], METHODS["optimistic"]
    start, after = (trained(usual.make, steps=steps) for steps in (0, 1))
    assert_close(trained(method.make_over(10), steps=1), after, 0)
    middle = [(a + b) / 2 for a, b in zip(start, after, strict=True)]
    assert_close(trained(method.make_over(2), steps=2), middle)


def test_half_way_the_rate_is_half():
    def optimizer(parameters, lr):
        adam = torch.optim.Adam(parameters, lr, betas=(0.0, 0.99))
        falls = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 1 - t / 4)
        adam.register_step_post_hook(lambda *_: falls.step())
        return adam

    expected = trained(alternating(OUR_GAME, optimizer, optimizer), steps=3)
    assert_close(trained(METHODS["recipe-falling"].make_over(5), steps=3), expected, 1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_both_networks_and_has_as_many_cells(name):
    before = [p.detach() for network in networks() for p in network.parameters()]
    method = METHODS[name]
    after = trained(method.make, steps=3, lr_g=method.rates[2], lr_d=method.rates[2])
    assert all(b.isfinite().all() for b in after)
    weights = [(a, b) for a, b in zip(before, after, strict=True) if a.dim() > 1]  # a shift of l moves no paired loss
    assert all(not torch.equal(a, b) for a, b in weights)
    assert len(method.rates) == len(method.rates_d) == 5
    assert method.about
