"""R1 and R2 against closed forms and finite differences."""

import math

import pytest
import torch

from gac_plugin import UsageError
from gac_plugin.penalties import PENALTIES, GradientPenalty, logit_gradient

BATCH = 5
SHAPES = [(4,), (2, 3), (1, 2, 3), (2, 2, 2, 2)]


def samples(shape):
    return torch.randn(BATCH, *shape, dtype=torch.float64, requires_grad=True)


def test_the_table_leaves_out_what_its_names_leave_out():
    weights = {name: (penalty.r1, penalty.r2) for name, penalty in PENALTIES.items()}
    assert weights == {"r1": (1.0, 0.0), "r2": (0.0, 1.0), "r1+r2": (1.0, 1.0)}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_logit_costs_half_gamma_times_its_squared_slope(shape):
    slope, real, fake = torch.randn(math.prod(shape), dtype=torch.float64), samples(shape), samples(shape)
    at_real, at_fake = (logit_gradient(x.flatten(1) @ slope, x) for x in (real, fake))
    value = GradientPenalty(r1=3.0, r2=0.5, interval=1).of(at_real, at_fake)
    assert at_real.shape == (BATCH, *shape)
    assert value.shape == ()
    assert float(value) == pytest.approx((3.0 + 0.5) / 2 * float(slope.square().sum()), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_quadratic_logit_costs_the_mean_square_of_its_gradient_at_each_kind_of_sample(shape):
    size = math.prod(shape)
    form = torch.randn(size, size, dtype=torch.float64)

    def slope(x):  # d/dx (x^T A x / 2) = (A + A^T) x / 2
        return x.detach().flatten(1) @ (form + form.T) / 2

    real, fake = samples(shape), samples(shape)
    logits = ((x.flatten(1) @ form * x.flatten(1)).sum(1) / 2 for x in (real, fake))
    at_real, at_fake = map(logit_gradient, logits, (real, fake))
    torch.testing.assert_close(at_real.detach().flatten(1), slope(real), rtol=1e-10, atol=1e-12)
    r1, r2 = (float(slope(x).square().sum()) / BATCH / 2 for x in (real, fake))
    weighted = GradientPenalty(r1=3.0, r2=0.5, interval=1)
    assert float(weighted.of(at_real, at_fake).detach()) == pytest.approx(3.0 * r1 + 0.5 * r2, rel=1e-12)
    assert float(weighted.of(at_real, None).detach()) == pytest.approx(3.0 * r1, rel=1e-12)
    assert float(weighted.of(None, at_fake).detach()) == pytest.approx(0.5 * r2, rel=1e-12)


def test_a_map_of_logits_is_measured_by_its_sum():
    maps, x = torch.randn(4, 3, dtype=torch.float64), samples((4,))
    expected = maps.sum(1).expand(BATCH, 4)
    torch.testing.assert_close(logit_gradient(x @ maps, x).detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("interval", [1, 4, 16])
def test_a_lazy_penalty_falls_on_every_kth_step_and_is_k_times_as_strong(interval):
    penalty, gradient = GradientPenalty(r1=2.0, interval=interval), torch.ones(BATCH, 3)
    assert [step for step in range(40) if penalty.is_due(step)] == list(range(0, 40, interval))
    assert float(penalty.of(gradient, None)) == pytest.approx(3.0 * interval)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_parameter_gradient_agrees_with_finite_differences(name, tiny_discriminator):
    discriminator, penalty = tiny_discriminator((2, 2)), PENALTIES[name]
    real, fake = samples((2, 2)), samples((2, 2))

    def value():
        at_real = logit_gradient(discriminator(real), real) if penalty.r1 else None
        return penalty.of(at_real, logit_gradient(discriminator(fake), fake) if penalty.r2 else None)

    value().backward()
    step = 1e-5
    for parameter in discriminator.parameters():
        flat = parameter.data.view(-1)
        for i in range(flat.numel()):
            middle, ends = float(flat[i]), []
            for end in (middle + step, middle - step):
                flat[i] = end
                ends.append(float(value().detach()))
            flat[i] = middle
            analytic = 0.0 if parameter.grad is None else float(parameter.grad.view(-1)[i])
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(analytic, rel=1e-6, abs=1e-7)
    assert sum(float(p.grad.abs().sum()) for p in discriminator.parameters() if p.grad is not None) > 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r1": -1.0}, r"at least 0, got r1=-1\.0, r2=1\.0"),
        ({"r2": -0.5}, r"at least 0, got r1=1\.0, r2=-0\.5"),
        ({"r1": math.nan}, "r1=nan"),
        ({"interval": 0}, "at least 1 step, got 0"),
    ],
    ids=str,
)
def test_weights_and_intervals_out_of_range_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        GradientPenalty(**wrong)
