"""`GAC`: the method's three formulas, its two schedules, and that it is the textbook loop where it claims to be."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import relu, softplus
from torch.nn.utils.parametrizations import spectral_norm

from gac_plugin import GAC, LOSSES, PENALTIES, SCORES, ConjugateGradient, GradientPenalty, UsageError

BATCH, SHAPE = 6, (2, 3)
RATE = 0.3
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_score = pytest.mark.parametrize("score", [None, *SCORES])
every_penalty = pytest.mark.parametrize("penalty", [None, *PENALTIES])
both_schedules = pytest.mark.parametrize("schedule", ["fresh", "fused"])


@pytest.fixture
def networks(tiny_generator, tiny_discriminator):
    return tiny_generator(SHAPE), tiny_discriminator(SHAPE)


@pytest.fixture
def batch(latents):
    return torch.randn(BATCH, *SHAPE, dtype=torch.float64), latents(BATCH)


def sgd(network, lr=RATE):
    return torch.optim.SGD(network.parameters(), lr)


def gac_of(generator, discriminator, **options):
    return GAC(generator, discriminator, sgd(generator), sgd(discriminator), **options)


def values(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def gradients(network):
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def close(actual, expected, rtol=1e-6):
    assert actual.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=rtol * 1e-3 * scale)


def textbook(generator, discriminator, real, z, loss="bce", score=None, penalty=None):
    """Gradients of both mean losses by functional autograd, with both networks as they stand."""
    phi, theta, loss = values(discriminator), values(generator), LOSSES[loss]
    fake = functional_call(generator, theta, (z,))

    def logits(phi, x):
        return functional_call(discriminator, phi, (x,)).flatten()

    def squared_slope(phi, x):
        slopes = vmap(grad(lambda one: logits(phi, one[None])[0]))(x)
        return slopes.square().flatten(1).sum(1).mean()

    def loss_d(phi):
        value = loss.discriminator(logits(phi, real), logits(phi, fake)).mean()
        if penalty is not None:
            r1, r2 = squared_slope(phi, real), squared_slope(phi, fake)
            value = value + penalty.interval / 2 * (penalty.r1 * r1 + penalty.r2 * r2)
        return value

    def loss_g(theta):
        fake_logits = logits(phi, functional_call(generator, theta, (z,)))
        if score is not None:
            return -SCORES[score].value(fake_logits).mean()
        return loss.generator(logits(phi, real), fake_logits).mean()

    return grad(loss_d)(phi), grad(loss_g)(theta)


# The three formulas


def test_the_discriminator_ascends_log_d_of_real_and_log_one_minus_d_of_generated_samples(networks, batch):
    # grad_D = E_x[d log D(x)] + E_z[d log(1 - D(G(z)))], with d log D = (1 - D) dl and d log(1 - D) = -D dl
    (generator, discriminator), (real, z) = networks, batch
    fake, phi = generator(z).detach(), values(discriminator)

    def expectation(x, weight):
        slopes = vmap(jacrev(lambda p, one: functional_call(discriminator, p, (one[None],))[0, 0]), (None, 0))(phi, x)
        w = weight(torch.sigmoid(discriminator(x).detach().flatten()))
        return {name: torch.einsum("b,b...->...", w, slope) / BATCH for name, slope in slopes.items()}

    at_real, at_fake = expectation(real, lambda d: 1 - d), expectation(fake, lambda d: -d)
    gac_of(generator, discriminator).discriminator_step(real, fake)
    written = {name: -gradient for name, gradient in gradients(discriminator).items()}
    close(written, {name: at_real[name] + at_fake[name] for name in at_real}, rtol=1e-9)


def test_score_probability_ascends_the_mean_of_d(networks, batch):
    # grad_G = E_z[d D(G(z)) / d theta]
    (generator, discriminator), (_, z) = networks, batch
    phi = values(discriminator)

    def probability(theta, latent):
        sample = functional_call(generator, theta, (latent[None],))
        return torch.sigmoid(functional_call(discriminator, phi, (sample,)))[0, 0]

    slopes = vmap(jacrev(probability), (None, 0))(values(generator), z)
    gac_of(generator, discriminator, score="probability").generator_step(generator(z))
    written = {name: -gradient for name, gradient in gradients(generator).items()}
    close(written, {name: slope.mean(0) for name, slope in slopes.items()}, rtol=1e-9)


def test_loss_bce_descends_minus_log_d_of_generated_samples(networks, batch):
    # L(G) = -E_z[log D(G(z))]
    (generator, discriminator), (_, z) = networks, batch

    def loss():
        return sum(math.log1p(math.exp(-logit)) for logit in discriminator(generator(z)).flatten().tolist()) / BATCH

    gac = GAC(generator, discriminator, sgd(generator, lr=0.0), sgd(discriminator))
    assert float(gac.generator_step(generator(z))["loss_g"]) == pytest.approx(loss(), rel=1e-12)
    step = 1e-5
    for parameter in generator.parameters():
        flat, slope = parameter.data.view(-1), parameter.grad.view(-1)
        for i, middle in enumerate(flat.tolist()):
            ends = []
            for end in (middle + step, middle - step):
                flat[i] = end
                ends.append(loss())
            flat[i] = middle
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slope[i]), rel=1e-6, abs=1e-9)


# The two schedules


@both_schedules
@every_penalty
@every_loss
def test_the_discriminators_gradient_is_the_textbooks(loss, penalty, schedule, networks, batch):
    expected, _ = textbook(*networks, *batch, loss, penalty=PENALTIES.get(penalty))
    gac_of(*networks, loss=loss, penalty=penalty, schedule=schedule).step(*batch)
    close(gradients(networks[1]), expected)


@every_penalty
@every_score
@every_loss
def test_fresh_asks_the_updated_discriminator_at_the_same_samples(loss, score, penalty, networks, batch):
    generator, discriminator = networks
    before, made = copy.deepcopy(generator), []
    generator.register_forward_hook(lambda *call: made.append(call[-1]))
    stale = textbook(before, discriminator, *batch, loss, score)[1]
    gac_of(generator, discriminator, loss=loss, score=score, penalty=penalty).step(*batch)
    expected = textbook(before, discriminator, *batch, loss, score)[1]  # the discriminator has moved
    close(gradients(generator), expected)
    assert len(made) == 1
    name = "2.weight"
    assert not torch.allclose(stale[name], expected[name], rtol=1e-3, atol=0)


@every_penalty
@every_score
@every_loss
def test_fused_moves_both_at_once(loss, score, penalty, networks, batch):
    gac = gac_of(*networks, loss=loss, score=score, penalty=penalty, schedule="fused")
    for step in range(3):  # from the second step on, R2 has not measured the gradient at these samples
        before = [values(network) for network in networks]
        due = PENALTIES.get(penalty) if step == 0 else None
        expected = textbook(*networks, *batch, loss, score, due)
        gac.step(*batch)
        for network, old, gradient in zip(networks, before, reversed(expected), strict=True):
            close(gradients(network), gradient)
            close(values(network), {name: old[name] - RATE * gradient[name] for name in old})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_penalty
@every_score
@pytest.mark.parametrize(("loss", "level"), [("hinge", -1.0), ("hinge", -9.0), ("bce", -60.0), ("bce", 60.0)])
def test_fused_hears_samples_that_the_discriminators_loss_ignores(loss, level, score, penalty, dtype, networks, batch):
    generator, discriminator = networks
    discriminator[-1].bias.data += level - discriminator(generator(batch[1])).mean().detach()
    beyond = discriminator(generator(batch[1])) < -1
    assert beyond.any() == (level < 0)
    assert beyond.all() == (level < -1)
    double = textbook(generator, discriminator, *batch, loss, score, PENALTIES.get(penalty))
    networks, batch = [network.to(dtype) for network in networks], [tensor.to(dtype) for tensor in batch]
    gac_of(*networks, loss=loss, score=score, penalty=penalty, schedule="fused").step(*batch)
    rtol = 1e-6 if dtype == torch.float64 else 1e-3
    for network, expected in zip(networks, reversed(double), strict=True):
        close({name: gradient.double() for name, gradient in gradients(network).items()}, expected, rtol)


@every_loss
def test_fused_agrees_in_float32(loss, networks, batch):
    expected = textbook(*networks, *batch, loss)
    gac_of(*(network.float() for network in networks), loss=loss, schedule="fused").step(*(x.float() for x in batch))
    for network, gradient in zip(networks, reversed(expected), strict=True):
        close({name: written.double() for name, written in gradients(network).items()}, gradient, rtol=1e-4)


@pytest.mark.parametrize("metric", ["identity", "adam", "spectral"])
@both_schedules
def test_a_discriminator_whose_loss_is_flat_stays_where_it_is(schedule, metric):
    # real logits 5, generated logits -5: beyond the hinge's margins D's gradient is 0, whatever the metric's scale
    generator, discriminator = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
    for network, weight, bias in ((generator, 0.0, -1.0), (discriminator, 5.0, 0.0)):
        network.weight.data.fill_(weight)
        network.bias.data.fill_(bias)
    before = values(discriminator)
    optimizer = ConjugateGradient(discriminator.parameters(), 0.1, "none", metric)
    gac = GAC(generator, discriminator, sgd(generator), optimizer, loss="hinge", schedule=schedule)
    gac.step(*torch.ones(2, BATCH, 1, dtype=torch.float64))
    close(values(discriminator), before)


@pytest.mark.parametrize(
    ("schedule", "loss", "calls"), [("fresh", "bce", 3), ("fresh", "relativistic", 4), ("fused", "bce", 2)]
)
def test_a_step_costs_one_draw_and_no_spare_pass_of_the_discriminator(schedule, loss, calls, networks, batch):
    gac, called = gac_of(*networks, loss=loss, schedule=schedule), []
    gac.step(*batch)  # the first step also checks that the schedule fits
    for network in networks:
        network.register_forward_hook(lambda module, *_: called.append(module))
    gac.step(*batch)
    assert [called.count(network) for network in networks] == [1, calls]


class Slope(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self, x):
        return self.value * x


@pytest.mark.parametrize(
    ("schedule", "invariant"),
    [
        ("fused", lambda a, b, lr, step: (a**2 + b**2) / (1 + lr**2) ** step),
        ("fresh", lambda a, b, lr, step: a**2 + b**2 - lr * a * b),
    ],
    ids=["fused", "fresh"],
)
def test_a_bilinear_game_spirals_out_when_fused_and_stays_bounded_when_fresh(schedule, invariant):
    # wasserstein with D(x) = a x, G(z) = b and real samples 0: D descends a b and G ascends it
    lr, a, b = 0.1, Slope(0.6), Slope(-0.8)
    gac = GAC(b, a, sgd(b, lr), sgd(a, lr), loss="wasserstein", schedule=schedule)
    zeros, ones = (torch.full((BATCH, 1), value, dtype=torch.float64) for value in (0.0, 1.0))
    start = invariant(0.6, -0.8, lr, 0)
    for step in range(1, 101):
        gac.step(zeros, ones)
        assert invariant(a.value.item(), b.value.item(), lr, step) == pytest.approx(start, rel=1e-10)


# What the fused schedule refuses


class MinibatchStddev(nn.Module):
    """Appends to every sample the standard deviation over the batch, averaged over features (Karras et al. 2018)."""

    def forward(self, x):
        return torch.cat([x, x.std(0, correction=0).mean().expand(len(x), 1)], 1)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_fused_refuses_batch_norm_at_construction(norm, tiny_generator):
    discriminator = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 4), norm(4)), nn.Linear(4, 1))
    with pytest.raises(UsageError, match=rf"its layer '1\.1' is a {norm.__name__}.*schedule='fresh'"):
        gac_of(tiny_generator(SHAPE), discriminator, schedule="fused")
    gac_of(tiny_generator(SHAPE), discriminator)


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("width", [8, 512])
def test_fused_refuses_minibatch_statistics_at_the_first_step(width, size, tiny_generator, latents):
    layers = nn.Linear(6, width), nn.LeakyReLU(0.2), MinibatchStddev(), nn.Linear(width + 1, 1)
    discriminator = nn.Sequential(nn.Flatten(), *layers).double()
    before, real = values(discriminator), torch.randn(size, *SHAPE, dtype=torch.float64)
    gac = gac_of(tiny_generator(SHAPE), discriminator, schedule="fused")
    with pytest.raises(UsageError, match=r"treats samples independently.*schedule='fresh'"):
        gac.step(real, latents(size))
    close(values(discriminator), before)
    gac_of(tiny_generator(SHAPE), discriminator).step(real, latents(size))


def test_fused_refuses_a_patch_map(networks, batch):
    patches = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Unflatten(1, (1, 2, 2))).double()
    with pytest.raises(UsageError, match=r"one logit for each sample, got \(6, 1, 2, 2\) for 6 samples"):
        gac_of(networks[0], patches, schedule="fused").step(*batch)
    gac_of(networks[0], patches).step(*batch)


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout, lambda: nn.GroupNorm(1, 4), lambda: nn.LayerNorm(4), lambda: spectral_norm(nn.Linear(4, 4))],
    ids=["dropout", "group norm", "layer norm", "spectral norm"],
)
def test_fused_accepts_layers_that_keep_samples_apart(layer, networks, batch):
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), layer(), nn.Linear(4, 1)).double()
    gac_of(networks[0], discriminator, schedule="fused").step(*batch)


# Drop-in: the textbook loop bit for bit, with or without accelerate

HAND_WRITTEN = {  # (real logits, generated logits) -> D's loss, and G's
    "bce": (lambda r, f: softplus(-r).mean() + softplus(f).mean(), lambda r, f: softplus(-f).mean()),
    "minimax": (lambda r, f: softplus(-r).mean() + softplus(f).mean(), lambda r, f: -softplus(f).mean()),
    "mse": (lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2, lambda r, f: ((f - 1) ** 2).mean() / 2),
    "hinge": (lambda r, f: relu(1 - r).mean() + relu(1 + f).mean(), lambda r, f: -f.mean()),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "relativistic": (lambda r, f: softplus(f - r).mean(), lambda r, f: softplus(r - f).mean()),
}


def test_every_loss_has_a_hand_written_loop():
    assert HAND_WRITTEN.keys() == LOSSES.keys()


@pytest.mark.parametrize("size", [64, 50])
@every_loss
def test_a_step_is_the_hand_written_loop_with_adam_bit_for_bit(loss, size, networks):
    ours = [network.float() for network in networks]
    generator, discriminator = theirs = copy.deepcopy(ours)
    gac = GAC(*ours, *(ConjugateGradient(network.parameters(), 2e-3, "none", "adam") for network in ours), loss=loss)
    adam_g, adam_d = (torch.optim.Adam(network.parameters(), 2e-3, betas=(0.0, 0.99)) for network in theirs)
    loss_d, loss_g = HAND_WRITTEN[loss]
    for _ in range(100):
        real, z = torch.randn(size, *SHAPE), torch.randn(size, 3)
        gac.step(real, z)

        fake = generator(z)
        adam_d.zero_grad()
        loss_d(discriminator(real), discriminator(fake.detach())).backward()
        adam_d.step()
        adam_g.zero_grad()
        loss_g(discriminator(real).detach(), discriminator(fake)).backward()
        adam_g.step()
        for one, other in zip(ours, theirs, strict=True):
            assert all(map(torch.equal, one.parameters(), other.parameters()))


def conjugate(networks, rule="pr+"):
    return [ConjugateGradient(network.parameters(), 0.01, rule) for network in networks]


@both_schedules
def test_accelerate_changes_nothing(schedule, networks, batch):
    wrapped, accelerator = copy.deepcopy(networks), Accelerator(cpu=True)
    options = {"penalty": "r1+r2", "schedule": schedule}
    one = GAC(*networks, *conjugate(networks), **options)
    two = GAC(*accelerator.prepare(*wrapped, *conjugate(wrapped)), accelerator=accelerator, **options)
    for _ in range(5):
        close(two.step(*batch), one.step(*batch), rtol=1e-12)
        for network, other in zip(networks, wrapped, strict=True):
            close(values(other), values(network), rtol=1e-12)


@pytest.mark.parametrize("output", ["dict", "probability"])
@both_schedules
def test_a_step_reads_the_logits_out_of_what_the_discriminator_returns(schedule, output, networks, batch):
    generator, discriminator = copy.deepcopy(networks)
    if output == "probability":
        options = {"output": "probability"}
        judge = nn.Sequential(discriminator, nn.Sigmoid())
    else:
        options = {"logits": lambda out: out["logits"]}
        judge = discriminator
        judge.register_forward_hook(lambda module, args, out: {"logits": out})
    gac_of(*networks, schedule=schedule).step(*batch)
    gac_of(generator, judge, schedule=schedule, **options).step(*batch)
    for network, other in zip(networks, (generator, discriminator), strict=True):
        close(values(other), values(network), rtol=1e-9)


@both_schedules
@every_penalty
def test_a_scaled_backward_pass_scales_both_gradients_and_nothing_else(penalty, schedule, networks, batch):
    class Scaler:
        def backward(self, loss):
            (1024 * loss).backward()

    still = [sgd(network, lr=0.0) for network in networks]
    expected = textbook(*networks, *batch, "bce", penalty=PENALTIES.get(penalty))
    GAC(*networks, *still, penalty=penalty, schedule=schedule, accelerator=Scaler()).step(*batch)
    for network, gradient in zip(networks, reversed(expected), strict=True):
        close(gradients(network), {name: 1024 * value for name, value in gradient.items()})


# Lazy penalties and state


@both_schedules
def test_a_penalty_without_weight_is_no_penalty(schedule, networks, batch):
    other = copy.deepcopy(networks)
    gac_of(*networks, schedule=schedule).step(*batch)
    gac_of(*other, penalty=GradientPenalty(r1=0.0, r2=0.0), schedule=schedule).step(*batch)
    for network, twin in zip(networks, other, strict=True):
        close(values(twin), values(network), rtol=1e-12)


@pytest.mark.parametrize("interval", [1, 3])
@both_schedules
def test_the_lazy_penalty_falls_on_every_kth_step_across_restarts(schedule, interval, networks, batch):
    def start():
        return gac_of(*networks, penalty=GradientPenalty(interval=interval), schedule=schedule)

    gac, carried = start(), []
    for step in range(8):
        carried += [step] if "penalty" in gac.step(*batch) else []
        state, gac = gac.state_dict(), start()
        gac.load_state_dict(state)
    assert carried == list(range(0, 8, interval))


# Statistics


@both_schedules
def test_statistics_are_detached_means(schedule, networks, batch):
    (real, z), before = batch, copy.deepcopy(networks)
    r, f = (before[1](x).detach() for x in (real, before[0](z)))
    optimizers = conjugate(networks)
    gac = GAC(*networks, *optimizers, penalty="r1", schedule=schedule)
    stats = gac.step(real, z)
    assert stats.keys() == {"loss_d", "loss_g", "d_real", "d_fake", "penalty", "beta"}
    assert all(stat.shape == () and not stat.requires_grad for stat in stats.values())
    assert stats["beta"] is optimizers[0].beta
    asked = networks[1] if schedule == "fresh" else before[1]  # fresh scores the samples by the updated discriminator
    expected = {
        "loss_d": (softplus(-r) + softplus(f)).mean(),
        "loss_g": softplus(-asked(before[0](z))).mean().detach(),
        "d_real": r.sigmoid().mean(),
        "d_fake": f.sigmoid().mean(),
    }
    close({name: stats[name] for name in expected}, expected, rtol=1e-12)
    assert "penalty" not in gac.step(real, z)


@both_schedules
@every_penalty
def test_steps_after_the_first_never_wait_for_the_device(penalty, schedule, networks, batch, host_reads):
    gac = GAC(*networks, *conjugate(networks), penalty=penalty, schedule=schedule)
    gac.step(*batch)
    for _ in range(4):
        with host_reads() as reads:
            gac.step(*batch)
        assert not reads.seen


# Latents and conditions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_latents_are_drawn_for_the_real_batch_in_its_precision(dtype, networks):
    generator, discriminator = (network.to(dtype) for network in networks)
    seen = []
    generator.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    gac_of(generator, discriminator, latent=3).step(torch.randn(BATCH, *SHAPE, dtype=dtype))
    assert [z.shape for z in seen] == [(BATCH, 3)]


class Labelled(nn.Module):
    """A network of its input and a keyword condition, to the given shape."""

    def __init__(self, size, shape):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(size + 2, math.prod(shape)), nn.Unflatten(1, shape)).double()

    def forward(self, x, label):
        return self.body(torch.cat([x.flatten(1), label], 1)).tanh()


@both_schedules
def test_conditions_reach_both_networks(schedule, batch):
    networks, (real, z) = (Labelled(3, SHAPE), Labelled(6, (1,))), batch
    label = torch.randn(BATCH, 2, dtype=torch.float64)
    maker, judge = copy.deepcopy(networks)
    gac_of(*networks, schedule=schedule).step(real, z, label=label)
    r, f = judge(real, label), judge(maker(z, label).detach(), label)
    (softplus(-r) + softplus(f)).mean().backward()
    close(gradients(networks[1]), gradients(judge))
    asked = networks[1] if schedule == "fresh" else judge
    softplus(-asked(maker(z, label), label)).mean().backward()
    close(gradients(networks[0]), gradients(maker))


# Mistakes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "bec"}, r"unknown loss 'bec' \(did you mean 'bce'\?\)"),
        ({"score": "logits"}, r"unknown score 'logits' \(did you mean 'logit'\?\)"),
        ({"penalty": "r3"}, "unknown penalty 'r3'"),
        ({"schedule": "fussed"}, "unknown schedule 'fussed'.*: fresh, fused"),
        ({"output": "probs"}, "unknown output 'probs'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_names_are_refused_at_construction(wrong, message, networks):
    with pytest.raises(UsageError, match=message):
        gac_of(*networks, **wrong)


def test_names_and_objects_are_the_same(networks):
    named = gac_of(*networks, loss="hinge", score="logit", penalty="r1")
    given = gac_of(*networks, loss=LOSSES["hinge"], score=SCORES["logit"], penalty=PENALTIES["r1"])
    assert (named.loss, named.score, named.penalty) == (given.loss, given.score, given.penalty)


@both_schedules
def test_samples_of_different_shape_are_refused_with_both(schedule, networks, batch):
    with pytest.raises(UsageError, match=r"differ in shape: \(6, 3, 3\) and \(6, 2, 3\)"):
        gac_of(*networks, schedule=schedule).step(torch.zeros(6, 3, 3, dtype=torch.float64), batch[1])


@both_schedules
def test_samples_among_other_things_are_refused(schedule, networks, batch):
    with pytest.raises(UsageError, match=r"step was given a list, not a tensor of samples; pick .* for example \[0\]"):
        gac_of(*networks, schedule=schedule, latent=3).step([batch[0], None])
    networks[0].register_forward_hook(lambda module, args, out: (out, None))
    with pytest.raises(UsageError, match="the generator returned a tuple, not a tensor of samples"):
        gac_of(*networks, schedule=schedule).step(*batch)


@both_schedules
@pytest.mark.parametrize(("where", "bad"), [(0, "2 of 36 values in the real"), (1, "6 of 36 values in the generated")])
def test_values_that_are_not_finite_stop_the_first_step(where, bad, schedule, networks, batch):
    batch[where].view(-1)[:2] = torch.tensor([math.nan, math.inf])
    before = values(networks[1])
    with pytest.raises(UsageError, match=f"{bad} samples are not finite at the first step"):
        gac_of(*networks, schedule=schedule).step(*batch)
    close(values(networks[1]), before)


def test_a_discriminator_that_overflows_stops_the_first_step(networks, batch):
    networks[1][-1].bias.data.fill_(math.inf)
    with pytest.raises(UsageError, match=r"6 of 6 values in the .*logits of .*real samples"):
        gac_of(*networks).step(*batch)


def test_a_missing_latent_size_is_told(networks, batch):
    with pytest.raises(UsageError, match=r"does not know the latent size; pass latent=.*or z to step"):
        gac_of(*networks).step(batch[0])


def test_a_loss_that_pairs_samples_asks_for_the_real_ones(networks, batch):
    generator, _ = networks
    with pytest.raises(UsageError, match="'relativistic' pairs real with generated samples; pass real="):
        gac_of(*networks, loss="relativistic").generator_step(generator(batch[1]))
    gac_of(*networks, loss="relativistic", score="logit").generator_step(generator(batch[1]))
