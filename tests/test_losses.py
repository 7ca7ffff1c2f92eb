"""Every loss and score against its closed form in numpy."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit

from gac_plugin.losses import LOSSES, SCORES, generator_objective

# name -> (what D minimises, what G minimises) of real logits r and generated logits f; log_expit = log sigmoid
VALUES = {
    "bce": (lambda r, f: -log_expit(r) - log_expit(-f), lambda r, f: -log_expit(f)),
    "minimax": (lambda r, f: -log_expit(r) - log_expit(-f), lambda r, f: log_expit(-f)),
    "mse": (lambda r, f: ((r - 1) ** 2 + f**2) / 2, lambda r, f: (f - 1) ** 2 / 2),
    "hinge": (lambda r, f: np.maximum(0, 1 - r) + np.maximum(0, 1 + f), lambda r, f: -f),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
    "relativistic": (lambda r, f: -log_expit(r - f), lambda r, f: -log_expit(f - r)),
}
ASCENDED = {"log_d": log_expit, "logit": lambda f: f, "probability": expit}
SHAPES = [(7,), (7, 1), (7, 1, 2, 3)]


def logits(shape, spread=4.0):
    return [spread * torch.randn(shape, dtype=torch.float64) for _ in range(2)]


def test_every_entry_has_a_closed_form_here_and_stands_under_its_name():
    assert (VALUES.keys(), ASCENDED.keys()) == (LOSSES.keys(), SCORES.keys())
    for table in (LOSSES, SCORES):
        assert all(entry.name == name and entry.description for name, entry in table.items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_their_closed_form_per_sample(name, shape):
    real, fake = logits(shape)
    for objective, expected in zip((LOSSES[name].discriminator, LOSSES[name].generator), VALUES[name], strict=True):
        values = objective(real, fake)
        assert values.shape == shape
        np.testing.assert_allclose(values, expected(real.numpy(), fake.numpy()), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCORES)
def test_scores_have_their_closed_form_per_sample(name, shape):
    real, fake = logits(shape)
    np.testing.assert_allclose(SCORES[name].value(fake), ASCENDED[name](fake.numpy()), rtol=1e-7, atol=1e-12)
    minimised = generator_objective(LOSSES["relativistic"], SCORES[name])(real, fake)
    np.testing.assert_allclose(minimised, -ASCENDED[name](fake.numpy()), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_score_the_generator_minimises_its_own_loss(name):
    assert generator_objective(LOSSES[name], None) is LOSSES[name].generator


@pytest.mark.parametrize("name", LOSSES)
def test_paired_says_whether_the_generator_looks_at_real_logits(name):
    real, fake = logits((7,))
    moved = LOSSES[name].generator(real + 1, fake) - LOSSES[name].generator(real, fake)
    assert bool(moved.any()) == LOSSES[name].paired


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_give_finite_values_and_derivatives(name, dtype):
    real = torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4], dtype=dtype, requires_grad=True)
    fake = real.detach().flip(0).requires_grad_()
    for objective in (LOSSES[name].discriminator, LOSSES[name].generator):
        values = objective(real, fake)
        assert values.isfinite().all()
        gradients = torch.autograd.grad(values.sum(), (real, fake), allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_entries_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LOSSES["bce"].name = "other"
