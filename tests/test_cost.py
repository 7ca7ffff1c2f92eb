"""What benchmarks/cost.py compares is what it says: equal arithmetic where it claims so, and floating-point operations
as counted on paper."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import conv2d, softplus

from benchmarks import cost_page
from benchmarks.cells import HERE
from benchmarks.cost import count_operations, peak_memory
from benchmarks.cost_steps import CONTENDERS, Game

BATCH, LATENT, SHAPE = 6, 5, (1, 3, 4)


def make_game(dtype=torch.float64, optimizer=torch.optim.Adam, rate=1e-2):
    generator = nn.Sequential(
        nn.Linear(LATENT, 7), nn.LeakyReLU(0.2), nn.Linear(7, 12), nn.Tanh(), nn.Unflatten(1, SHAPE)
    )
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.LeakyReLU(0.2), nn.Linear(9, 1))
    networks = generator.to(dtype), discriminator.to(dtype)
    return Game(*networks, *(optimizer(network.parameters(), rate) for network in networks), LATENT)


def twin(game):
    """The same networks once more, with optimizers that have not stepped."""
    networks = copy.deepcopy((game.generator, game.discriminator))
    optimizers = [
        type(old)(network.parameters(), old.param_groups[0]["lr"])
        for old, network in zip((game.optimizer_g, game.optimizer_d), networks, strict=True)
    ]
    return Game(*networks, *optimizers, LATENT)


def parameters(game):
    return [*game.generator.parameters(), *game.discriminator.parameters()]


def run(contender, game, steps=3):
    torch.manual_seed(1)
    step = CONTENDERS[contender](game)
    for _ in range(steps):
        step(torch.randn(BATCH, *SHAPE, dtype=torch.float64))
    return [parameter.detach() for parameter in parameters(game)]


@pytest.mark.parametrize(
    ("flat", "named"),
    [("flat fresh", "fresh"), ("flat fused", "fused"), ("one-stage", "fused"), ("flat fused", "one-stage")],
)
def test_equal_arithmetic_gives_equal_parameters(flat, named):
    game = make_game()
    start = [parameter.detach().clone() for parameter in parameters(game)]
    expected = run(flat, twin(game))
    for actual, wanted, before in zip(run(named, game), expected, start, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
        assert float((actual - before).abs().max()) > 1e-3


def test_fresh_and_fused_are_not_the_same():
    game = make_game()
    fresh, fused = run("fresh", twin(game)), run("fused", twin(game))
    assert max(float((a - b).abs().max()) for a, b in zip(fresh, fused, strict=True)) > 1e-6


@pytest.mark.parametrize(("contender", "draws"), [("textbook", 2), ("dcgan example", 1), ("r3gan", 2)])
def test_the_loops_that_people_use_do_what_their_equations_say(contender, draws):
    """One step of plain gradient descent against functional autograd."""
    game = make_game(optimizer=torch.optim.SGD, rate=0.3)
    theta, phi = (
        {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        for network in (game.generator, game.discriminator)
    )
    torch.manual_seed(2)
    real = torch.randn(BATCH, *SHAPE, dtype=torch.float64)
    state = torch.get_rng_state()
    latents = [torch.randn(BATCH, LATENT, dtype=torch.float64) for _ in range(draws)]
    torch.set_rng_state(state)
    CONTENDERS[contender](game)(real)

    def logits(phi, x):
        return functional_call(game.discriminator, phi, (x,)).flatten()

    def squared_slope(phi, x):
        return grad(lambda x: logits(phi, x).sum())(x).square().sum() / BATCH

    fake = functional_call(game.generator, theta, (latents[0],))

    def loss_d(phi):
        if contender == "r3gan":
            penalty = 0.5 * (squared_slope(phi, real) + squared_slope(phi, fake))
            return softplus(logits(phi, fake) - logits(phi, real)).mean() + penalty
        return softplus(-logits(phi, real)).mean() + softplus(logits(phi, fake)).mean()

    slopes = grad(loss_d)(phi)
    phi = {name: phi[name] - 0.3 * slopes[name] for name in phi}

    def loss_g(theta):
        made = logits(phi, functional_call(game.generator, theta, (latents[-1],)))
        return softplus(logits(phi, real) - made if contender == "r3gan" else -made).mean()

    slopes = grad(loss_g)(theta)
    for name, parameter in game.discriminator.named_parameters():
        torch.testing.assert_close(parameter.detach(), phi[name], rtol=0, atol=1e-12)
    for name, parameter in game.generator.named_parameters():
        torch.testing.assert_close(parameter.detach(), theta[name] - 0.3 * slopes[name], rtol=0, atol=1e-12)


# Floating-point operations


D_SIZES, G_SIZES = (40, 30, 20, 1), (5, 30, 20, 40)
"""Units of each layer's input and output, of the networks of `perceptrons`."""


def perceptrons():
    def layers(sizes):
        return [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2))]

    generator, discriminator = nn.Sequential(*layers(G_SIZES)[:-1]), nn.Sequential(*layers(D_SIZES)[:-1])
    return Game(
        generator, discriminator, *(torch.optim.Adam(n.parameters()) for n in (generator, discriminator)), latent=5
    )


def on_paper(sizes, forward, weights, inputs, first_inputs, without_last=0):
    """2 B m n operations for each product of a layer m x n: forward, for its weights, for its inputs.

    Args:
        sizes: of the layers.
        forward, weights, inputs: numbers of passes.
        first_inputs: how many of the passes to inputs reach below the first layer.
        without_last: how many of them do not begin at the last layer.
    """
    products = [2 * BATCH * m * n for m, n in pairwise(sizes)]
    to_inputs = sum(products[1:]) * inputs + products[0] * first_inputs - products[-1] * without_last
    return sum(products) * (forward + weights) + to_inputs


PASSES = {  # (D's forward, weights, inputs, and inputs of its first layer), (the same of G)
    "textbook": ((3, 3, 3, 1), (2, 1, 1, 0)),
    "dcgan example": ((3, 3, 3, 1), (1, 1, 1, 0)),
    "fresh": ((3, 2, 3, 1), (1, 1, 1, 0)),
    "flat fresh": ((3, 2, 3, 1), (1, 1, 1, 0)),
    "fused": ((2, 2, 2, 1), (1, 1, 1, 0)),
    "flat fused": ((2, 2, 2, 1), (1, 1, 1, 0)),
    "one-stage": ((2, 2, 2, 1), (1, 1, 1, 0)),
    # a penalty adds for each batch: dl/dx, and its way back to weights and, but for the constant dl/dl, to inputs
    "r3gan": ((4, 2 + 2, 3 + 2 + 2, 7, 2), (2, 1, 1, 0)),
    "fresh, penalty every step": ((3, 2 + 2, 3 + 2 + 2, 7, 2), (1, 1, 1, 0)),
}


def test_the_passes_on_paper_are_those_of_the_method():
    totals = {name: tuple(sum(passes[:3]) for passes in both) for name, both in PASSES.items()}
    assert totals["textbook"] == (9, 4)
    assert totals["fresh"] == (8, 3)
    assert totals["fused"] == (6, 3)


@pytest.mark.parametrize("contender", PASSES)
def test_counted_operations_are_those_on_paper(contender):
    step = CONTENDERS[contender](perceptrons())
    real = torch.randn(BATCH, D_SIZES[0])
    step(real)  # the first step of GAC also checks that the schedule fits
    d, g = PASSES[contender]
    assert count_operations(step, [real]) == on_paper(D_SIZES, *d) + on_paper(G_SIZES, *g)


def test_operations_of_convolutions_are_counted_through_a_double_backward_pass():
    weight, x = torch.randn(5, 3, 3, 3, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)

    def step(_):
        (slope,) = torch.autograd.grad(conv2d(x, weight).square().sum(), x, create_graph=True)
        slope.square().sum().backward(inputs=[weight])

    one_pass = 2 * (2 * 6 * 6) * 5 * (3 * 3 * 3)
    # forward and slope; back from the slope to the weight and to what came in; from there to the weight
    assert count_operations(step, [x]) == 5 * one_pass


def test_peak_memory_is_that_of_the_worst_moment():
    def make_step():
        kept = torch.empty(1000)

        def step(size):
            for doubles in (int(size) * 2, int(size)):
                torch.empty(doubles, dtype=torch.float64)
            kept.zero_()

        return step

    assert peak_memory(make_step, [torch.tensor(5000), torch.tensor(3000)]) == 4 * 1000 + 8 * 10_000


def test_the_page_says_what_the_figures_say():
    files = [HERE / "results" / name for name in ("cost.json", "scale.json")]
    if not files[0].exists():
        pytest.skip("cost.json has not been measured yet")
    reports = (json.loads(file.read_text()) if file.exists() else {} for file in files)
    assert (HERE / "COST.md").read_text() == cost_page.page(*reports)
