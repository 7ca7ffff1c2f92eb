"""Covectors and pullbacks against explicit Jacobians of every single sample.

c_i = w_i dl/dx (x_i)        g = (1/B) sum_i J_i^T c_i
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from gac_plugin import GAC, LOSSES, SCORES, UsageError
from gac_plugin.cotangent import cotangent, evaluating, frozen, keep_visible, pullback

BATCH = 6
SHAPES = [(4,), (2, 3), (1, 2, 3), (2, 1, 2, 2)]

# w = ds/dl of the score that the generator ascends, for real logits r and generated logits f; sigmoid(l) = D
LOSS_WEIGHTS = {
    "bce": lambda r, f: 1 - f.sigmoid(),
    "minimax": lambda r, f: f.sigmoid(),
    "mse": lambda r, f: 1 - f,
    "hinge": lambda r, f: torch.ones_like(f),
    "wasserstein": lambda r, f: torch.ones_like(f),
    "relativistic": lambda r, f: (r - f).sigmoid(),
}
SCORE_WEIGHTS = {
    "log_d": lambda r, f: 1 - f.sigmoid(),
    "logit": lambda r, f: torch.ones_like(f),
    "probability": lambda r, f: f.sigmoid() * (1 - f.sigmoid()),
}
CHOICES = [(loss, None) for loss in LOSSES] + [(loss, score) for loss in ("mse", "relativistic") for score in SCORES]
every_choice = pytest.mark.parametrize(("loss", "score"), CHOICES)


def test_every_loss_and_score_has_a_closed_weight_here():
    assert (LOSS_WEIGHTS.keys(), SCORE_WEIGHTS.keys()) == (LOSSES.keys(), SCORES.keys())


def weigh(loss, score, real_logits, fake_logits):
    weight = LOSS_WEIGHTS[loss] if score is None else SCORE_WEIGHTS[score]
    return weight(real_logits.detach(), fake_logits.detach())


def samples(shape, batch=BATCH):
    return torch.randn(batch, *shape, dtype=torch.float64)


def still(network):
    """An optimizer that leaves the gradients to be read; nn.Identity has no parameters, so it gets one."""
    return torch.optim.SGD([*network.parameters()] or [torch.zeros(1)], lr=0.0)


def gac_of(generator, discriminator, **options):
    return GAC(generator, discriminator, still(generator), still(discriminator), **options)


def jacobian(network, x, *conditions):
    """dl/dx of every sample and every logit, one sample at a time: shape (B, logits, *sample)."""
    return vmap(jacrev(lambda one, *c: network(one[None], *(y[None] for y in c))[0]))(x, *conditions)


def close(actual, expected, rtol=1e-6):
    torch.testing.assert_close(actual, expected.detach(), rtol=rtol, atol=1e-12)


# Cotangent


@pytest.mark.parametrize("shape", SHAPES)
@every_choice
def test_the_cotangent_is_the_weighted_logit_gradient(loss, score, shape, tiny_discriminator):
    discriminator, real, fake = tiny_discriminator(shape), samples(shape), samples(shape)
    w = weigh(loss, score, discriminator(real), discriminator(fake))
    c = gac_of(nn.Identity(), discriminator, loss=loss, score=score).cotangent(fake, real)
    assert c.shape == fake.shape
    assert not c.requires_grad
    close(c.flatten(1), w * jacobian(discriminator, fake).flatten(1))


@every_choice
def test_a_discriminator_that_ends_in_a_sigmoid_gives_the_same_cotangent(loss, score, tiny_discriminator):
    discriminator, real, fake = tiny_discriminator(spread=1.0), samples((4,)), samples((4,))
    judge = nn.Sequential(discriminator, nn.Sigmoid())
    w = weigh(loss, score, discriminator(real), discriminator(fake))
    c = gac_of(nn.Identity(), judge, loss=loss, score=score, output="probability").cotangent(fake, real)
    close(c, w * jacobian(discriminator, fake).flatten(1))


@every_choice
def test_the_score_of_a_patch_map_is_the_mean_over_its_patches(loss, score, tiny_discriminator):
    discriminator = nn.Sequential(tiny_discriminator(logits=6), nn.Unflatten(1, (1, 2, 3)))
    real, fake = samples((4,)), samples((4,))
    w = weigh(loss, score, discriminator(real), discriminator(fake)).flatten(1)
    patches = jacobian(discriminator, fake).reshape(BATCH, 6, 4)
    c = gac_of(nn.Identity(), discriminator, loss=loss, score=score).cotangent(fake, real)
    close(c, (w[:, :, None] * patches).mean(1))


class Conditional(nn.Module):
    """Samples and a keyword condition -> logits (B, 1), wrapped as asked."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.body, self.wrap = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double(), wrap

    def forward(self, samples, condition):
        return self.wrap(self.body(torch.cat([samples, condition], 1)))


@pytest.mark.parametrize(
    ("wrap", "select"),
    [
        (lambda logits: logits, None),
        (lambda logits: (None, logits), lambda out: out[1]),
        (lambda logits: {"logits": logits}, lambda out: out["logits"]),
    ],
    ids=["alone", "tuple", "dict"],
)
@every_choice
def test_conditions_and_selected_outputs_are_honoured(loss, score, wrap, select):
    discriminator, real, fake, y = Conditional(wrap), samples((4,)), samples((4,)), samples((2,))

    def logits(x, condition):
        return discriminator.body(torch.cat([x, condition], 1))

    w = weigh(loss, score, logits(real, y), logits(fake, y))
    gac = gac_of(nn.Identity(), discriminator, loss=loss, score=score, logits=select)
    close(gac.cotangent(fake, real, condition=y), w * jacobian(logits, fake, y).flatten(1))


def test_the_cotangent_of_a_mean_is_that_of_a_sum_over_the_batch_size():
    x, slope = samples((4,)), samples((4,), 1)
    of_sum, value = cotangent(lambda s: (s @ slope[0]).sum(), x)
    of_mean, _ = cotangent(lambda s: (s @ slope[0]).mean(), x)
    close(of_sum, slope.expand(BATCH, 4))
    close(of_mean, slope.expand(BATCH, 4) / BATCH)
    assert float(value) == pytest.approx(float((x @ slope[0]).sum()), rel=1e-12)
    assert not x.requires_grad


# Pullback


def explicit_pullback(generator, z, covectors):
    """(1/B) sum_i J_i^T c_i for every parameter, from the Jacobian of each sample."""
    parameters = {name: parameter.detach() for name, parameter in generator.named_parameters()}

    def one_sample(theta, latent):
        return functional_call(generator, theta, (latent[None],))[0].flatten()

    jacobians = vmap(jacrev(one_sample), in_dims=(None, 0))(parameters, z)
    return {name: torch.einsum("bi,bi...->...", covectors.flatten(1), j) / len(z) for name, j in jacobians.items()}


@pytest.mark.parametrize("shape", SHAPES)
@every_choice
def test_the_generators_gradient_is_the_mean_pullback_of_the_cotangents(
    loss, score, shape, tiny_generator, tiny_discriminator, latents
):
    generator, discriminator, z, real = tiny_generator(shape), tiny_discriminator(shape), latents(BATCH), samples(shape)
    fake = generator(z)
    w = weigh(loss, score, discriminator(real), discriminator(fake))
    c = (w * jacobian(discriminator, fake.detach()).flatten(1)).detach()
    gac_of(generator, discriminator, loss=loss, score=score).generator_step(fake, real)
    for name, expected in explicit_pullback(generator, z, c).items():
        close(generator.get_parameter(name).grad, -expected)  # gradients of what is minimised: minus the score


def test_a_pullback_adds_to_the_gradients_and_goes_through_the_accelerator(tiny_generator, latents):
    generator, z, covector = tiny_generator(), latents(BATCH), samples((4,))
    expected = explicit_pullback(generator, z, BATCH * covector)
    pullback(generator(z), covector)
    pullback(generator(z), covector)

    class Doubling:
        def backward(self, loss):
            (2 * loss).backward()

    pullback(generator(z), covector, Doubling())
    for name, once in expected.items():
        close(generator.get_parameter(name).grad, 4 * once)


def test_samples_without_a_graph_are_refused(tiny_generator, tiny_discriminator, latents):
    generator = tiny_generator()
    with torch.no_grad():
        fake = generator(latents(BATCH))
    with pytest.raises(UsageError, match=r"no graph back to the generator.*torch\.no_grad"):
        gac_of(generator, tiny_discriminator()).generator_step(fake)


# The discriminator stays out of it


@pytest.mark.parametrize("written", [False, True])
def test_the_generator_step_never_writes_a_gradient_into_the_discriminator(
    written, tiny_generator, tiny_discriminator, latents
):
    generator, discriminator, entered = tiny_generator(), tiny_discriminator(), []
    discriminator[1].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in discriminator.parameters()]
    marks = [torch.randn_like(p) if written else None for p in discriminator.parameters()]
    for parameter, mark in zip(discriminator.parameters(), marks, strict=True):
        parameter.grad = mark
    discriminator.register_forward_hook(
        lambda *_: entered.append(any(parameter.requires_grad for parameter in discriminator.parameters()))
    )
    gac_of(generator, discriminator).generator_step(generator(latents(BATCH)))
    assert entered == [False]
    assert all(p.grad is mark for p, mark in zip(discriminator.parameters(), marks, strict=True))
    assert [parameter.requires_grad for parameter in discriminator.parameters()] == flags


def test_flags_come_back_after_an_exception(tiny_generator, tiny_discriminator, latents):
    generator, discriminator = tiny_generator(), tiny_discriminator()
    discriminator[1].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in discriminator.parameters()]

    def explode(*_):
        raise RuntimeError("boom")

    discriminator.register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        gac_of(generator, discriminator).generator_step(generator(latents(BATCH)))
    assert [parameter.requires_grad for parameter in discriminator.parameters()] == flags


def test_frozen_takes_the_parameters_of_all_modules_and_restores_each():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    with frozen(one, two):
        assert not any(parameter.requires_grad for parameter in [*one.parameters(), *two.parameters()])
    assert all(parameter.requires_grad for parameter in one.parameters())
    assert not any(parameter.requires_grad for parameter in two.parameters())


def test_evaluating_restores_the_mode_of_each_submodule_even_after_an_exception():
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval(), nn.Dropout()))
    modes = [part.training for part in network.modules()]
    network.register_forward_hook(lambda *_: [].pop())
    with evaluating(network), pytest.raises(IndexError):
        network(torch.zeros(1))
    assert [part.training for part in network.modules()] == modes
    with pytest.raises(IndexError), evaluating(network):
        network(torch.zeros(1))
    assert [part.training for part in network.modules()] == modes


# The pieces of the fused schedule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_derivatives_that_are_zero_become_just_large_enough_to_divide_by(dtype):
    v = torch.tensor([0.0, -0.0, 1e-3, -1e-3, -1.0, torch.finfo(dtype).tiny], dtype=dtype)
    logits = torch.ones(6, dtype=dtype, requires_grad=True)
    loss = (v * logits).sum()
    visible = keep_visible(loss, logits)
    assert torch.equal(visible, loss)
    visible.backward()
    assert torch.equal(logits.grad[2:5], v[2:5])
    small = logits.grad[[0, 1, 5]].double()
    assert (small > 0).all()
    assert (small < torch.finfo(dtype).eps ** 2).all()
    assert (small**2 >= torch.finfo(dtype).tiny * 0.98).all()


def test_a_scaler_keeps_small_covectors_of_a_float16_network():
    """dl/dx / B is 2e-8 here, below the smallest number of float16, 6e-8; float64 tells what it should be."""
    weight = torch.tensor([[3e-4, -5e-4]], dtype=torch.float16)
    points = torch.randn(4096, 2)

    def objective(x):
        return (x.half() @ weight.T).float().mean() * 1e-1

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    expected = (weight.double() * 1e-1 / 4096).expand(4096, 2)
    lost, value = cotangent(objective, points)
    assert float((lost.double() - expected).abs().max()) > 0.5 * float(expected.abs().max())
    kept, scaled_value = cotangent(objective, points, scaler)
    torch.testing.assert_close(kept.double(), expected, rtol=2e-3, atol=0)
    assert torch.equal(scaled_value, value), "the objective is told unscaled"


@pytest.mark.parametrize("scale", [2.0**3, 2.0**16])
def test_a_power_of_two_changes_no_covector(tiny_discriminator, scale):
    points, discriminator = samples((4,)), tiny_discriminator()
    plain, _ = cotangent(lambda x: discriminator(x).mean(), points)
    scaled, _ = cotangent(
        lambda x: discriminator(x).mean(), points, torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
    )
    assert torch.equal(scaled, plain)
