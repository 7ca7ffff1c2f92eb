"""Each rule's beta against its textbook formula, stated for the cost that is descended.

d = -u + beta d-,   u = M^-1 g,   y = g - g-,   g the gradient of the cost
"""

import math

import numpy as np
import pytest
import torch

from gac_plugin import ConjugateGradient, Diagonal, Metric
from gac_plugin.betas import BETAS, BetaRule, InnerProducts, conjugate_beta
from gac_plugin.tensors import per_sample_inner

SIZE, RULES = 6, [name for name in BETAS if name != "none"]
DIAGONAL = np.linspace(0.5, 3.0, SIZE)


def clip(value, low, high):
    return max(low, min(value, high))


# name -> beta of (g, g-, d-) and the map M^-1
TEXTBOOK = {
    "none": lambda g, g0, d0, sharp: 0.0,
    "fr": lambda g, g0, d0, sharp: g @ sharp(g) / (g0 @ sharp(g0)),
    "pr+": lambda g, g0, d0, sharp: max(0.0, g @ sharp(g - g0) / (g0 @ sharp(g0))),
    "hs": lambda g, g0, d0, sharp: g @ sharp(g - g0) / (d0 @ (g - g0)),
    "dy": lambda g, g0, d0, sharp: g @ sharp(g) / (d0 @ (g - g0)),
    "hz": lambda g, g0, d0, sharp: (
        (sharp(g - g0) - 2 * d0 * ((g - g0) @ sharp(g - g0)) / (d0 @ (g - g0))) @ g / (d0 @ (g - g0))
    ),
    "hs-dy": lambda g, g0, d0, sharp: max(0.0, min(TEXTBOOK["hs"](g, g0, d0, sharp), TEXTBOOK["dy"](g, g0, d0, sharp))),
    "fr-pr": lambda g, g0, d0, sharp: clip(
        g @ sharp(g - g0) / (g0 @ sharp(g0)), -TEXTBOOK["fr"](g, g0, d0, sharp), TEXTBOOK["fr"](g, g0, d0, sharp)
    ),
}


def test_every_rule_has_a_textbook_formula_here_and_stands_under_its_name():
    assert TEXTBOOK.keys() == BETAS.keys()
    assert all(rule.name == name and rule.description for name, rule in BETAS.items())


def tensor(array):
    return torch.from_numpy(np.array(array, dtype=np.float64))


def products(g, g0, d0, sharp, u0=None):
    """The products of one step for the gradient of a *score*; arrays (SIZE,) make one direction."""
    inner = torch.dot if g.ndim == 1 else per_sample_inner
    g, g0, d0 = tensor(g), tensor(g0), tensor(d0)
    return InnerProducts(inner, sharp, g, sharp(g), g - g0, d0, inner(g0, sharp(g0) if u0 is None else u0))


def draws(count=40):
    """Gradients and directions in general position: nothing is orthogonal to anything."""
    rng = np.random.default_rng(3)
    for _ in range(count):
        yield rng.normal(size=SIZE), rng.normal(size=SIZE), rng.normal(size=SIZE)


@pytest.mark.parametrize("name", RULES)
def test_formulas_are_the_textbooks_with_the_signs_of_ascent(name):
    expected = [TEXTBOOK[name](g, g0, d0, lambda a: a / DIAGONAL) for g, g0, d0 in draws()]
    # the score is minus the cost: its gradients change sign, the direction does not
    found = [float(BETAS[name].formula(products(-g, -g0, d0, lambda a: a / tensor(DIAGONAL)))) for g, g0, d0 in draws()]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert sum(abs(beta) > 0.01 for beta in found) > 10


@pytest.mark.parametrize("name", RULES)
def test_formulas_work_per_sample(name):
    g, g0, d0 = (np.stack(rows) for rows in zip(*draws(8), strict=True))
    found = BETAS[name].formula(products(-g, -g0, d0, lambda a: a))
    expected = [TEXTBOOK[name](*rows, lambda a: a) for rows in zip(g, g0, d0, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def fixed(diagonal):
    """A metric that stays the same along training."""
    return Metric("fixed", lambda p: {}, lambda *_: Diagonal([tensor(diagonal)]), "u = g / m for a fixed m")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_the_optimizer_walks_along_the_textbook_directions_either_way(name, maximize):
    rng, sign = np.random.default_rng(11), -1 if maximize else 1
    gradient = rng.normal(size=SIZE)
    theta = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = ConjugateGradient([theta], 1.0, name, fixed(DIAGONAL), beta_max=math.inf, maximize=maximize)
    g0 = d0 = None
    betas = []
    for _ in range(12):
        gradient = 0.9 * gradient + 0.5 * rng.normal(size=SIZE)
        g = sign * gradient  # of the cost
        beta = 0.0 if g0 is None else TEXTBOOK[name](g, g0, d0, lambda a: a / DIAGONAL)
        d = -g / DIAGONAL + (0.0 if d0 is None else beta * d0)
        if g @ d >= 0:
            beta, d = 0.0, -g / DIAGONAL
        theta.data.zero_()
        theta.grad = tensor(gradient)
        optimizer.step()
        assert float(optimizer.beta) == pytest.approx(beta, rel=1e-12, abs=1e-12)
        np.testing.assert_allclose(theta.detach(), d, rtol=1e-11, atol=1e-12)
        g0, d0 = g, d
        betas.append(beta)
    assert sum(beta != 0 for beta in betas) >= 3


def minimise(name, metric, size, maximize):
    """Exact line searches along the optimizer's directions: the relative error after `size` steps."""
    rng = np.random.default_rng(size)
    axes = np.linalg.qr(rng.normal(size=(size, size)))[0]
    curvature = tensor(axes * np.linspace(1.0, 20.0, size) @ axes.T)
    minimum, point = (tensor(rng.normal(size=size)) for _ in range(2))
    start = (point - minimum).norm()
    theta = torch.nn.Parameter(torch.zeros_like(point))
    optimizer = ConjugateGradient([theta], 1.0, name, metric, beta_max=math.inf, maximize=maximize)
    for _ in range(size):
        gradient = curvature @ (point - minimum)
        theta.data.zero_()  # so that the displacement is d, to full precision
        theta.grad = -gradient if maximize else gradient
        optimizer.step()
        d = theta.detach()
        point = point - (gradient @ d) / (d @ curvature @ d) * d
    return float((point - minimum).norm() / start)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("size", [2, 5, 12])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_solves_a_quadratic_of_n_dimensions_in_n_exact_line_searches(name, size, preconditioned, maximize):
    metric = fixed(np.linspace(0.5, 3.0, size)) if preconditioned else "identity"
    assert minimise(name, metric, size, maximize) < 1e-8


@pytest.mark.parametrize("size", [2, 5, 12])
def test_steepest_ascent_does_not(size):
    assert minimise("none", "identity", size, maximize=False) > 1e-3


def ascending():
    """g = (1, 0), g- = (0, 1) and d- = (3, 1): beta = 1 for FR."""
    return products(np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([3.0, 1.0]), lambda a: a)


@pytest.mark.parametrize(("cap", "beta"), [(math.inf, 1.0), (0.25, 0.25), (0.0, 0.0)])
def test_beta_is_capped(cap, beta):
    assert float(conjugate_beta(BETAS["fr"], ascending(), cap)) == beta


def test_the_cap_bounds_negative_betas_too():
    rule = BetaRule("negative", lambda p: torch.full_like(p.gu, -7.0), "-7")
    backwards = products(np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([-3.0, 1.0]), lambda a: a)
    assert float(conjugate_beta(rule, backwards, 0.5)) == -0.5


@pytest.mark.parametrize(("along", "beta"), [(-0.5, 1.0), (-1.0, 0.0), (-2.0, 0.0)])
def test_a_direction_that_does_not_ascend_restarts(along, beta):
    # <g, u> = 1 and FR = 1: <g, d> = 1 + <d-, g> must be positive
    step = products(np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([along, 5.0]), lambda a: a)
    assert float(conjugate_beta(BETAS["fr"], step, math.inf)) == beta


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_beta_that_is_not_finite_restarts(value):
    rule = BetaRule("broken", lambda p: torch.full_like(p.gu, value), "not finite")
    assert float(conjugate_beta(rule, ascending(), math.inf)) == 0.0


@pytest.mark.parametrize("cap", [0.5, math.inf])
@pytest.mark.parametrize("gradient", [0.0, 1.0])
@pytest.mark.parametrize("name", RULES)
def test_the_first_step_goes_along_u(name, gradient, cap):
    theta = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = ConjugateGradient([theta], 1.0, name, fixed(DIAGONAL), beta_max=cap)
    theta.grad = torch.full_like(theta, gradient)
    optimizer.step()
    assert float(optimizer.beta) == 0.0
    np.testing.assert_allclose(theta.detach(), -gradient / DIAGONAL, rtol=1e-15)


@pytest.mark.parametrize("name", RULES)
def test_a_gradient_that_vanishes_for_a_step_does_no_harm(name):
    theta = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = ConjugateGradient([theta], 1.0, name, "identity", beta_max=math.inf)
    for gradient in (1.0, 0.0, 2.0):
        theta.data.zero_()
        theta.grad = torch.full_like(theta, gradient)
        optimizer.step()
        assert theta.isfinite().all()
    torch.testing.assert_close(theta.data, torch.full_like(theta, -2.0), rtol=1e-15, atol=0)
