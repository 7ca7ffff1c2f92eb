"""GAC around what strangers have: several heads, conditions, latents of any kind, wrapped and part-frozen networks."""

import copy

import pytest
import timm.optim
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

from gac_plugin import BETAS, GAC, LOSSES, METRICS, PENALTIES, SCORES, ConjugateGradient, UsageError, refine

BATCH, SIZE, LATENT = 8, 4, 3
both_schedules = pytest.mark.parametrize("schedule", ["fresh", "fused"])


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def perceptron(size_in, size_out):
    return nn.Sequential(nn.Linear(size_in, 6), nn.Tanh(), nn.Linear(6, size_out)).double()


def sgd(network, lr=0.1):
    return torch.optim.SGD(network.parameters(), lr)


def gac_of(generator, discriminator, **options):
    return GAC(generator, discriminator, sgd(generator), sgd(discriminator), **options)


def values(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def close(actual, expected, rtol=1e-9):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=1e-12)


@pytest.fixture
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# Several discriminators


class Several(nn.ModuleList):
    """Discriminators as one."""

    def forward(self, samples, **conditions):
        return [discriminator(samples, **conditions) for discriminator in self]


SHAPES = [(), (1,), (1, 2, 3)]
"""What each head gives for a sample: a number, a vector of one, a map."""


def several():
    """Heads that weigh about the same number of logits very differently: 1, 1 and 6 of them."""
    number = nn.Sequential(perceptron(SIZE, 1), nn.Flatten(0))
    return Several([number, perceptron(SIZE, 1), nn.Sequential(perceptron(SIZE, 6), nn.Unflatten(1, (1, 2, 3)))])


def by_hand(generator, discriminator, real, z, loss, score, penalty):
    """Gradients of both losses, with each sample and head by itself: mean over heads of the mean over their logits."""
    loss, phi, theta = LOSSES[loss], values(discriminator), values(generator)

    def heads(phi, x):
        return [head.reshape(-1) for head in functional_call(discriminator, phi, (x[None],))]

    def mean(objective, phi, xs, ys):
        pairs = [zip(heads(phi, x), heads(phi, y), strict=True) for x, y in zip(xs, ys, strict=True)]
        return sum(sum(objective(r, f)) / len(r) for pair in pairs for r, f in pair) / (len(SHAPES) * len(xs))

    def slope(phi, xs):
        slopes = vmap(grad(lambda x: torch.cat(heads(phi, x)).sum()))(xs)
        return slopes.square().sum() / len(xs)

    def loss_d(phi, fake):
        value = mean(loss.discriminator, phi, real, fake)
        if penalty is not None:
            value = value + penalty.interval / 2 * (penalty.r1 * slope(phi, real) + penalty.r2 * slope(phi, fake))
        return value

    def loss_g(theta, phi):
        objective = loss.generator if score is None else lambda real, fake: -SCORES[score].value(fake)
        return mean(objective, phi, real, functional_call(generator, theta, (z,)))

    to_d = grad(loss_d)(phi, functional_call(generator, theta, (z,)))
    updated = {name: phi[name] - 0.1 * to_d[name] for name in phi}
    return to_d, grad(loss_g)(theta, updated)


@pytest.mark.parametrize("penalty", [None, *PENALTIES])
@pytest.mark.parametrize(
    ("loss", "score"), [*((loss, None) for loss in LOSSES), *(("relativistic", score) for score in SCORES)]
)
def test_several_heads_count_the_same_whatever_their_number_of_logits(loss, score, penalty):
    generator, discriminator, real, z = perceptron(LATENT, SIZE), several(), randn(BATCH, SIZE), randn(BATCH, LATENT)
    assert [head.shape[1:] for head in discriminator(real)] == SHAPES
    expected = by_hand(generator, discriminator, real, z, loss, score, PENALTIES.get(penalty))
    gac_of(generator, discriminator, loss=loss, score=score, penalty=penalty).step(real, z)
    for network, gradient in zip((discriminator, generator), expected, strict=True):
        close({name: parameter.grad for name, parameter in network.named_parameters()}, gradient)


def test_the_statistics_of_several_heads_are_means_over_heads():
    generator, discriminator, real, z = perceptron(LATENT, SIZE), several(), randn(BATCH, SIZE), randn(BATCH, LATENT)
    r, f = ([head.detach() for head in discriminator(x)] for x in (real, generator(z)))
    stats = gac_of(generator, discriminator).step(real, z)
    expected = {
        "loss_d": sum(float((softplus(-a) + softplus(b)).mean()) for a, b in zip(r, f, strict=True)) / 3,
        "d_real": sum(float(a.sigmoid().mean()) for a in r) / 3,
        "d_fake": sum(float(b.sigmoid().mean()) for b in f) / 3,
    }
    assert {name: float(stats[name]) for name in expected} == pytest.approx(expected, rel=1e-12)


def test_the_cotangent_of_several_heads_is_the_mean_of_each_ones():
    discriminator, fake = several(), randn(BATCH, SIZE)
    each = [gac_of(perceptron(LATENT, SIZE), head).cotangent(fake) for head in discriminator]
    together = gac_of(perceptron(LATENT, SIZE), discriminator).cotangent(fake)
    torch.testing.assert_close(together, sum(each) / 3, rtol=1e-12, atol=1e-15)


def test_refine_ascends_the_mean_over_heads():
    generator, discriminator, z, reports = perceptron(LATENT, SIZE), several(), randn(BATCH, LATENT), []
    expected = sum(head.reshape(BATCH, -1).mean(1) for head in discriminator(generator(z))).detach() / 3
    refine(generator, discriminator, z, steps=3, prior=0.0, report=reports.append)
    torch.testing.assert_close(reports[0].logit_before, expected, rtol=1e-12, atol=0)
    assert (reports[0].logit_after > expected).all()


def test_fused_refuses_several_heads_before_its_first_step():
    generator, discriminator = perceptron(LATENT, SIZE), several()
    before, gac = values(discriminator), gac_of(generator, discriminator, schedule="fused")
    with pytest.raises(UsageError, match=r"one logit for each sample, got \(8,\), \(8, 1\), \(8, 1, 2, 3\) for 8 samp"):
        gac.step(randn(BATCH, SIZE), randn(BATCH, LATENT))
    close(values(discriminator), before, rtol=0)


@pytest.mark.parametrize("logits", [None, list, lambda out: tuple(out)], ids=["list", "logits=list", "tuple"])
@both_schedules
def test_one_head_in_a_list_is_a_discriminator_as_any_other(schedule, logits):
    networks, batch = (perceptron(LATENT, SIZE), perceptron(SIZE, 1)), (randn(BATCH, SIZE), randn(BATCH, LATENT))
    generator, discriminator = copy.deepcopy(networks)
    gac_of(*networks, schedule=schedule).step(*batch)
    gac_of(generator, Several([discriminator]), schedule=schedule, logits=logits).step(*batch)
    for network, other in zip(networks, (generator, discriminator), strict=True):
        assert all(map(torch.equal, network.parameters(), other.parameters()))


def test_steps_with_several_heads_never_wait_for_the_device(host_reads):
    gac = gac_of(perceptron(LATENT, SIZE), several(), penalty="r1+r2", loss="relativistic")
    gac.step(randn(BATCH, SIZE), randn(BATCH, LATENT))
    for _ in range(4):
        with host_reads() as reads:
            gac.step(randn(BATCH, SIZE), randn(BATCH, LATENT))
        assert not reads.seen


# Conditions


class Given(nn.Module):
    """A network of its input and a condition that it has already."""

    def __init__(self, body, condition):
        super().__init__()
        self.body, self.condition = body, condition

    def forward(self, x):
        return self.body(torch.cat([x, self.condition], 1))


class Named(nn.Module):
    """A network of its input and a keyword condition, of the name that it gives to it; nothing else may come."""

    def __init__(self, body, name):
        super().__init__()
        self.body, self.name = body, name

    def forward(self, x, /, **conditions):
        assert list(conditions) == [self.name]
        return self.body(torch.cat([x, conditions[self.name]], 1))


def same_networks(one, other):
    for network, twin in zip(one, other, strict=True):
        close(values(twin), values(network), rtol=1e-12)


@pytest.mark.parametrize(("name_g", "name_d"), [("y", "labels"), ("real", "z"), ("z", "real"), ("z", "fake")])
@both_schedules
def test_each_network_may_have_conditions_of_its_own_under_any_name(schedule, name_g, name_d):
    bodies, (real, z) = (
        (perceptron(LATENT + 2, SIZE), perceptron(SIZE + 3, 1)),
        (randn(BATCH, SIZE), randn(BATCH, LATENT)),
    )
    to_g, to_d = randn(BATCH, 2), randn(BATCH, 3)
    twins = copy.deepcopy(bodies)
    gac_of(Given(bodies[0], to_g), Given(bodies[1], to_d), schedule=schedule).step(real, z)
    gac = gac_of(Named(twins[0], name_g), Named(twins[1], name_d), schedule=schedule)
    gac.step(real, z=z, generator_conditions={name_g: to_g}, discriminator_conditions={name_d: to_d})
    same_networks(bodies, twins)


@pytest.mark.parametrize("role", ["generator", "discriminator"])
@both_schedules
def test_a_condition_may_be_for_one_network_alone(schedule, role):
    y, batch = randn(BATCH, 2), (randn(BATCH, SIZE), randn(BATCH, LATENT))
    sizes = {"generator": (LATENT, SIZE), "discriminator": (SIZE, 1)}
    bodies = {name: perceptron(a + 2 * (name == role), b) for name, (a, b) in sizes.items()}
    twins = copy.deepcopy(bodies)
    gac_of(**bodies | {role: Given(bodies[role], y)}, schedule=schedule).step(*batch)
    gac = gac_of(**twins | {role: Named(twins[role], "y")}, schedule=schedule)
    gac.step(*batch, **{f"{role}_conditions": {"y": y}})
    same_networks(bodies.values(), twins.values())


def test_a_networks_own_condition_comes_before_the_common_one_of_the_same_name():
    bodies, batch = (perceptron(LATENT + 2, SIZE), perceptron(SIZE + 2, 1)), (randn(BATCH, SIZE), randn(BATCH, LATENT))
    y, own, twins = randn(BATCH, 2), randn(BATCH, 2), copy.deepcopy(bodies)
    gac_of(Given(bodies[0], y), Given(bodies[1], own)).step(*batch)
    gac_of(Named(twins[0], "y"), Named(twins[1], "y")).step(*batch, y=y, discriminator_conditions={"y": own})
    same_networks(bodies, twins)


class Comparison(nn.Module):
    """pix2pix's D: the samples beside the picture that they are made from."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1)).double()

    def forward(self, samples, source):
        return self.body(torch.cat([samples, source], 1))


def test_a_picture_may_be_what_the_generator_starts_from_and_what_the_discriminator_compares_with():
    generator = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1)).double()
    discriminator, (source, target) = Comparison(), randn(2, BATCH, 1, 5, 5)
    maker, judge = copy.deepcopy(generator), copy.deepcopy(discriminator)
    gac_of(generator, discriminator).step(target, source, discriminator_conditions={"source": source})
    fake = maker(source)
    optimizers = sgd(judge), sgd(maker)
    (softplus(-judge(target, source)).mean() + softplus(judge(fake.detach(), source)).mean()).backward()
    optimizers[0].step()
    softplus(-judge(fake, source)).mean().backward()
    optimizers[1].step()
    same_networks((generator, discriminator), (maker, judge))


class Reader(nn.Module):
    """A network of its input and a text: embeddings (B, T, E), and which of them count, bool (B, T)."""

    def __init__(self, size_in, size_out):
        super().__init__()
        self.body = perceptron(size_in + 5, size_out)

    def forward(self, x, text, mask):
        return self.body(torch.cat([x, (text * mask[..., None]).sum(1)], 1))


@both_schedules
def test_text_embeddings_and_their_mask_go_to_both_networks(schedule):
    networks, batch = (Reader(LATENT, SIZE), Reader(SIZE, 1)), (randn(BATCH, SIZE), randn(BATCH, LATENT))
    text, mask, bodies = randn(BATCH, 7, 5), torch.rand(BATCH, 7) > 0.3, copy.deepcopy(networks)
    gac_of(*networks, schedule=schedule).step(*batch, text=text, mask=mask)
    summed = torch.einsum("bte,bt->be", text, mask.double())
    gac_of(*(Given(each.body, summed) for each in bodies), schedule=schedule).step(*batch)
    same_networks(networks, bodies)


# Latents


class TwoLatents(nn.Module):
    """A generator of two latents, taken out of what it is given."""

    def __init__(self, take):
        super().__init__()
        self.body, self.take = perceptron(LATENT + 2, SIZE), take

    def forward(self, z):
        return self.body(torch.cat(self.take(z), 1))


KINDS = {
    "tuple": (lambda a, b: (a, b), lambda z: z),
    "list": (lambda a, b: [a, b], lambda z: z),
    "dictionary": (lambda a, b: {"noise": a, "style": b}, lambda z: (z["noise"], z["style"])),
    "nested": (lambda a, b: {"styles": [a, (b, "text")]}, lambda z: (z["styles"][0], z["styles"][1][0])),
}


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@both_schedules
def test_latents_of_any_kind_are_the_generators_one_argument(schedule, kind, drawn):
    pack, take = KINDS[kind]
    generator, discriminator, real = TwoLatents(take), perceptron(SIZE, 1), randn(BATCH, SIZE)
    twins = copy.deepcopy(generator), copy.deepcopy(discriminator)
    a, b = randn(BATCH, LATENT), randn(BATCH, 2)
    if drawn:
        gac_of(generator, discriminator, schedule=schedule, latent=lambda batch: pack(a[:batch], b[:batch])).step(real)
    else:
        gac_of(generator, discriminator, schedule=schedule).step(real, pack(a, b))
    gac_of(twins[0].body, twins[1], schedule=schedule).step(real, torch.cat([a, b], 1))
    same_networks((generator, discriminator), twins)


def test_a_second_latent_may_be_an_argument_of_its_own():
    body, discriminator, (real, z, y) = (
        perceptron(LATENT + 2, SIZE),
        perceptron(SIZE, 1),
        (randn(BATCH, n) for n in (4, 3, 2)),
    )
    twins = copy.deepcopy((body, discriminator))
    gac_of(Given(body, y), discriminator).step(real, z)
    gac_of(Named(twins[0], "style"), twins[1]).step(real, z, generator_conditions={"style": y})
    same_networks((body, discriminator), twins)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("loss", ["bce", "relativistic"])
def test_a_window_of_batches_keeps_latents_conditions_and_heads_of_any_kind(loss):
    """Two windows of four batches are two steps on all samples at once."""

    def start(accelerator=None):
        torch.manual_seed(1)
        generator = TwoLatents(lambda z: (z["noise"], z["style"]))
        discriminator = Several([Named(perceptron(SIZE + 2, 1), "real"), Named(perceptron(SIZE + 2, 3), "real")])
        parts = (generator, discriminator, sgd(generator), sgd(discriminator))
        prepared = parts if accelerator is None else accelerator.prepare(*parts)
        return GAC(*prepared, loss=loss, penalty="r1+r2", accelerator=accelerator)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    whole, parts = start(), start(accelerator)
    before = values(whole.generator)
    for _ in range(2):
        real, a, b, y = (randn(16, size) for size in (SIZE, LATENT, 2, 2))
        whole.step(real, {"noise": a, "style": b}, discriminator_conditions={"real": y})
        for some_real, some_a, some_b, some_y in zip(*(tensor.chunk(4) for tensor in (real, a, b, y)), strict=True):
            with accelerator.accumulate(parts.generator, parts.discriminator):
                parts.step(some_real, {"noise": some_a, "style": some_b}, discriminator_conditions={"real": some_y})
    same_networks((whole.generator, whole.discriminator), (parts.generator, parts.discriminator))
    assert all(not torch.equal(parameter, before[name]) for name, parameter in whole.generator.named_parameters())


# Parts that stay as they are


class Trunk(nn.Module):
    """A network with a part that is trained and one that is not, batch norm in the latter if asked."""

    def __init__(self, size_in, size_out, norm):
        super().__init__()
        self.fixed = nn.Sequential(nn.Linear(size_in, 6), nn.BatchNorm1d(6) if norm else nn.Tanh()).double()
        self.trained = nn.Sequential(nn.Tanh(), nn.Linear(6, size_out)).double()

    def forward(self, x):
        return self.trained(self.fixed(x))


@pytest.mark.parametrize("how", ["frozen", "left out of the optimizer"])
@pytest.mark.parametrize(("schedule", "norm"), [("fresh", False), ("fresh", True), ("fused", False)])
@pytest.mark.parametrize("penalty", [None, "r1+r2"])
def test_what_is_frozen_or_not_optimized_stays_to_the_last_bit(schedule, norm, penalty, how):
    networks = Trunk(LATENT, SIZE, norm), Trunk(SIZE, 1, norm)
    for network in networks:
        network.fixed.eval()
        network.fixed.requires_grad_(how != "frozen")
    start = copy.deepcopy(networks)
    adams = [
        torch.optim.AdamW((network if how == "frozen" else network.trained).parameters(), 0.01) for network in networks
    ]
    gac = GAC(*networks, *adams, schedule=schedule, penalty=penalty, latent=LATENT)
    for _ in range(3):
        gac.step(randn(BATCH, SIZE))
    for network, old in zip(networks, start, strict=True):
        for (name, now), before in zip(network.state_dict().items(), old.state_dict().values(), strict=True):
            assert torch.equal(now, before) == name.startswith("fixed"), name
        for now, before in zip(network.parameters(), old.parameters(), strict=True):
            assert now.requires_grad == before.requires_grad
        assert [part.training for part in network.modules()] == [part.training for part in old.modules()]


# Wrapped networks


@both_schedules
def test_compiled_networks_take_the_same_steps(schedule):
    networks, heads = (perceptron(LATENT, SIZE), perceptron(SIZE, 1)), schedule == "fresh"
    networks = (networks[0], several()) if heads else networks
    twins = copy.deepcopy(networks)
    compiled = [torch.compile(network, backend="aot_eager") for network in twins]
    plain, fast = gac_of(*networks, schedule=schedule), gac_of(*compiled, schedule=schedule)
    for _ in range(3):
        batch = randn(BATCH, SIZE), randn(BATCH, LATENT)
        close(fast.step(*batch), plain.step(*batch))
    same_networks(networks, twins)


@both_schedules
@pytest.mark.usefixtures("alone")
def test_networks_in_ddp_take_the_same_steps_frozen_parts_and_all(schedule):
    networks = Trunk(LATENT, SIZE, norm=False), Trunk(SIZE, 1, norm=False)
    networks[0].nz = LATENT
    for network in networks:
        network.fixed.requires_grad_(False)
    twins = copy.deepcopy(networks)
    wrapped = gac_of(*map(DistributedDataParallel, twins), schedule=schedule, penalty="r1+r2")
    plain = gac_of(*networks, schedule=schedule, penalty="r1+r2")
    for seed in range(5):
        real = randn(BATCH, SIZE)
        for gac in (plain, wrapped):
            torch.manual_seed(seed)  # latents are drawn by the generator's own nz, which DDP hides
            gac.step(real)
    same_networks(networks, twins)


@pytest.mark.usefixtures("alone")
def test_several_heads_and_conditions_pass_through_ddp():
    discriminator = Several([Named(perceptron(SIZE + 2, 1), "y"), Named(perceptron(SIZE + 2, 3), "y")])
    networks, y = (perceptron(LATENT, SIZE), discriminator), randn(BATCH, 2)
    twins = copy.deepcopy(networks)
    plain, wrapped = gac_of(*networks, penalty="r1"), gac_of(*map(DistributedDataParallel, twins), penalty="r1")
    for _ in range(5):
        batch = randn(BATCH, SIZE), randn(BATCH, LATENT)
        for gac in (plain, wrapped):
            gac.step(*batch, discriminator_conditions={"y": y})
    same_networks(networks, twins)


# Optimizers


class Lion(torch.optim.Optimizer):
    """A stranger's optimizer, sign of an average, that clears gradients by filling them with zeros."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def zero_grad(self):
        super().zero_grad(set_to_none=False)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                parameter.sub_(group["lr"] * (0.9 * average + 0.1 * parameter.grad).sign())
                average.lerp_(parameter.grad, 0.01)


def from_timm(name):
    return lambda network: timm.optim.create_optimizer_v2(network, opt=name, lr=1e-2, weight_decay=0.01)


OPTIMIZERS = {
    "a stranger's": lambda network: Lion(network.parameters(), 1e-2),
    **{name: from_timm(name) for name in ("lion", "lamb", "adan", "adabelief", "nadamw", "lookahead_radam")},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_libraries_optimizers_take_the_steps_of_a_hand_written_loop(name):
    ours, make = (perceptron(LATENT, SIZE), perceptron(SIZE, 1)), OPTIMIZERS[name]
    generator, discriminator = theirs = copy.deepcopy(ours)
    gac, (optimizer_g, optimizer_d) = GAC(*ours, *map(make, ours)), map(make, theirs)
    for _ in range(8):
        real, z = randn(BATCH, SIZE), randn(BATCH, LATENT)
        gac.step(real, z)
        fake = generator(z)
        optimizer_d.zero_grad()
        (softplus(-discriminator(real)).mean() + softplus(discriminator(fake.detach())).mean()).backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        softplus(-discriminator(fake)).mean().backward()
        optimizer_g.step()
    same_networks(ours, theirs)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rule", BETAS)
def test_whole_numbers_are_settings_as_fractions_are(rule, metric):
    """A loop's `betas=(0, 0.9)` and its like: torch's Adam refuses a whole number there, ours does not."""
    settings, start, found = {"lr": 1, "beta2": 0, "eps": 1, "beta_max": 1}, perceptron(LATENT, SIZE), []
    x = randn(BATCH, LATENT)
    for number in (int, float):
        network = copy.deepcopy(start)
        options = {name: number(value) for name, value in settings.items()}
        optimizer = ConjugateGradient(network.parameters(), rule=rule, metric=metric, **options)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        found.append(values(network))
    close(*found, rtol=0)
    assert all(tensor.isfinite().all() for tensor in found[0].values())
