"""Adversarial autoencoders and VAE-GANs: equal to loops written out by hand, and what one step may change."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits

from gac_plugin import GAC, ConjugateGradient, GradientPenalty, UsageError
from gac_plugin.adapters.autoencoder import (
    VAEGAN,
    AdversarialAutoencoder,
    error_in,
    half_squared_error,
    kl_to_standard_normal,
)
from gac_plugin.training.processes import leave

BATCH, SIZE, CODE = 6, (2, 3), 2
RATE, BETA2 = 0.01, 0.99


class TwoHeaded(nn.Module):
    """x -> (mean, log variance)."""

    def __init__(self, code=CODE):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2 * code)).double()

    def forward(self, x):
        return self.layers(x).chunk(2, dim=1)


def one_headed(code=CODE):
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, code)).double()


def decoder_to(shape=SIZE):
    last = nn.Linear(7, shape[0] * shape[1])
    return nn.Sequential(nn.Linear(CODE, 7), nn.Tanh(), last, nn.Unflatten(1, shape)).double()


def judge(size):
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def sgd(*networks, lr=RATE):
    return torch.optim.SGD([p for network in networks for p in network.parameters()], lr)


def adam(*networks):
    return torch.optim.Adam([p for network in networks for p in network.parameters()], RATE, betas=(0.0, BETA2))


def conjugate(network):
    return ConjugateGradient(network.parameters(), RATE, rule="none", metric="adam", beta2=BETA2, eps=1e-8)


def aae_of(encoder, decoder, discriminator, prior=CODE, rate=RATE, gac_rate=RATE, **options):
    gac = GAC(encoder, discriminator, sgd(encoder, lr=gac_rate), sgd(discriminator, lr=gac_rate), **options)
    return AdversarialAutoencoder(gac, decoder, sgd(encoder, decoder, lr=rate), prior)


def vae_gan_of(encoder, decoder, discriminator, latent=CODE, rate=RATE, gac_rate=RATE, error=half_squared_error):
    gac = GAC(decoder, discriminator, sgd(decoder, lr=gac_rate), sgd(discriminator, lr=gac_rate))
    return VAEGAN(gac, encoder, sgd(encoder, decoder, lr=rate), latent, error)


def aae_networks():
    return one_headed(), decoder_to(), judge(CODE)


def vae_gan_networks():
    return TwoHeaded(), decoder_to(), judge(6)


def batches(count):
    return [torch.randn(BATCH, *SIZE, dtype=torch.float64) for _ in range(count)]


def close(networks, expected):
    for network, other in zip(networks, expected, strict=True):
        for a, b in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def agree(stats, **expected):
    for name, value in expected.items():
        torch.testing.assert_close(stats[name], value.detach(), rtol=1e-10, atol=1e-12)


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def cross_entropy(logits, label):
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


# Against loops written by hand


def test_the_adversarial_autoencoder_is_the_loop_of_makhzani_et_al_written_by_hand():
    ours = encoder, decoder, discriminator = aae_networks()
    theirs = e, d, c = copy.deepcopy(ours)
    data, prior = batches(8), [torch.randn(BATCH, CODE, dtype=torch.float64) for _ in range(8)]
    supply = iter(prior)
    gac = GAC(encoder, discriminator, conjugate(encoder), adam(discriminator))
    aae = AdversarialAutoencoder(gac, decoder, adam(encoder, decoder), prior=lambda n: next(supply))
    optimizer, optimizer_e, optimizer_c = adam(e, d), adam(e), adam(c)
    for x, draws in zip(data, prior, strict=True):
        stats = aae.step(x)

        error = (d(e(x)) - x).square().mean()
        descend(optimizer, error)
        codes = e(x)
        loss_d = cross_entropy(c(draws), 1.0) + cross_entropy(c(codes.detach()), 0.0)
        descend(optimizer_c, loss_d)
        loss_g = cross_entropy(c(codes), 1.0)
        descend(optimizer_e, loss_g)

        agree(stats, reconstruction=error, loss_d=loss_d, loss_g=loss_g)
    close(ours, theirs)


@pytest.mark.parametrize("in_features", [False, True], ids=["pixels", "features"])
def test_the_vae_gan_is_a_variational_step_and_a_gan_step_written_by_hand(in_features):
    ours = encoder, decoder, discriminator = vae_gan_networks()
    theirs = e, d, c = copy.deepcopy(ours)
    measure = error_in(discriminator[:3]) if in_features else half_squared_error
    gac = GAC(decoder, discriminator, conjugate(decoder), adam(discriminator))
    vae_gan = VAEGAN(gac, encoder, adam(encoder, decoder), CODE, measure, kl_weight=0.3)
    optimizer, optimizer_d, optimizer_c = adam(e, d), adam(d), adam(c)
    for seed, x in enumerate(batches(8)):
        torch.manual_seed(seed)
        stats = vae_gan.step(x)

        torch.manual_seed(seed)
        draws, noise = torch.randn(BATCH, CODE, dtype=torch.float64), torch.randn(BATCH, CODE, dtype=torch.float64)
        mean, log_variance = e(x)
        posterior = Normal(mean, log_variance.exp().sqrt())
        codes = posterior.mean + posterior.stddev * noise
        kl = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum() / BATCH
        seen = c[:3] if in_features else nn.Flatten()
        likelihood = Normal(seen(d(codes)), 1.0)
        surprise = likelihood.log_prob(likelihood.mean) - likelihood.log_prob(seen(x).detach())
        error = surprise.sum() / BATCH
        descend(optimizer, error + 0.3 * kl)
        fake = d(torch.cat([codes[:3], draws[3:]]).detach())
        descend(optimizer_c, cross_entropy(c(x), 1.0) + cross_entropy(c(fake.detach()), 0.0))
        descend(optimizer_d, cross_entropy(c(fake), 1.0))

        agree(stats, reconstruction=error, kl=kl)
    close(ours, theirs)


def test_small_steps_of_the_vae_gan_follow_the_gradients_of_larsen_et_al():
    # encoder: KL + L, decoder: gamma L - score, with L in a layer of D and gamma the ratio of the learning rates
    encoder, decoder, discriminator = networks = vae_gan_networks()
    rate, gamma = 1e-7, 4.0
    model = vae_gan_of(*networks, rate=gamma * rate, gac_rate=rate, error=error_in(discriminator[:3]))
    before = copy.deepcopy(networks)
    (x,) = batches(1)
    torch.manual_seed(5)
    model.step(x)

    e, d, c = before
    torch.manual_seed(5)
    draws, noise = torch.randn(BATCH, CODE, dtype=torch.float64), torch.randn(BATCH, CODE, dtype=torch.float64)
    mean, log_variance = e(x)
    codes = mean + log_variance.exp().sqrt() * noise
    kl = kl_divergence(Normal(mean, log_variance.exp().sqrt()), Normal(0.0, 1.0)).sum() / BATCH
    error = (c[:3](d(codes)) - c[:3](x)).square().sum() / (2 * BATCH)
    score = -cross_entropy(c(d(torch.cat([codes[:3], draws[3:]]).detach())), 1.0)
    wanted = [
        *torch.autograd.grad(kl + error, list(e.parameters()), retain_graph=True),
        *torch.autograd.grad(gamma * error - score, list(d.parameters())),
    ]
    moved = zip([*encoder.parameters(), *decoder.parameters()], [*e.parameters(), *d.parameters()], strict=True)
    rates = [gamma * rate] * len(list(e.parameters())) + [rate] * len(list(d.parameters()))
    for (after, start), gradient, lr in zip(moved, wanted, rates, strict=True):
        torch.testing.assert_close((start - after) / lr, gradient, rtol=1e-5, atol=1e-6)


def test_kl_is_that_of_torch_distributions():
    mean, log_variance = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, log_variance.exp().sqrt()), Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected, rtol=1e-12, atol=1e-12)


# What one step changes


@pytest.mark.parametrize(
    ("build", "networks", "rates", "changed"),
    [
        (aae_of, aae_networks, {"rate": RATE, "gac_rate": 0.0}, (True, True, False)),
        (aae_of, aae_networks, {"rate": 0.0, "gac_rate": RATE}, (True, False, True)),
        (vae_gan_of, vae_gan_networks, {"rate": RATE, "gac_rate": 0.0}, (True, True, False)),
        (vae_gan_of, vae_gan_networks, {"rate": 0.0, "gac_rate": RATE}, (False, True, True)),
    ],
    ids=["aae-reconstruction", "aae-regularisation", "vae-gan-variational", "vae-gan-adversarial"],
)
def test_each_half_of_a_step_moves_its_own_networks(build, networks, rates, changed):
    trio = networks()  # encoder, decoder, discriminator
    before = copy.deepcopy(trio)
    build(*trio, **rates).step(batches(1)[0])
    for network, old, moves in zip(trio, before, changed, strict=True):
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, old.get_parameter(name)) != moves, name


def test_the_error_in_features_of_d_leaves_no_gradient_and_no_frozen_flag_in_d():
    encoder, decoder, discriminator = vae_gan_networks()
    seen = []

    def error(reconstruction, x):
        seen.extend(parameter.requires_grad for parameter in discriminator.parameters())
        return error_in(discriminator[:3])(reconstruction, x)

    vae_gan_of(encoder, decoder, discriminator, error=error).step(batches(1)[0])
    assert seen == [False] * 4
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


@pytest.mark.parametrize(
    ("build", "networks"), [(aae_of, aae_networks), (vae_gan_of, vae_gan_networks)], ids=["aae", "vae-gan"]
)
def test_statistics_are_detached_and_nothing_is_read_on_the_host(build, networks, host_reads):
    model = build(*networks())
    first, second = batches(2)
    model.step(first)  # GAC checks its first step on the host
    with host_reads() as reads:
        stats = model.step(second)
    assert reads.seen == []
    assert {"reconstruction", "loss_d", "loss_g", "d_real", "d_fake"} <= stats.keys()
    assert all(value.dim() == 0 and not value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    ("build", "networks"), [(aae_of, aae_networks), (vae_gan_of, vae_gan_networks)], ids=["aae", "vae-gan"]
)
def test_an_accelerator_changes_nothing_in_one_process(build, networks):
    plain = networks()
    prepared = copy.deepcopy(plain)
    model, other = build(*plain), build(*prepared)
    accelerator = Accelerator(cpu=True)
    passes = []
    backward = accelerator.backward
    accelerator.backward = lambda loss: (passes.append(loss), backward(loss))
    gac = GAC(
        other.gac.generator,
        other.gac.discriminator,
        accelerator.prepare(other.gac.generator_optimizer),
        accelerator.prepare(other.gac.discriminator_optimizer),
        accelerator=accelerator,
    )
    (x,) = batches(1)
    last = other.decoder if build is aae_of else other.encoder
    other = type(other)(gac, last, accelerator.prepare(other.optimizer), CODE)
    for each in (model, other):
        torch.manual_seed(3)
        each.step(x)
    close(plain, prepared)
    assert len(passes) == 3  # reconstruction, D, pullback


@pytest.mark.parametrize("kind", [AdversarialAutoencoder, VAEGAN], ids=["aae", "vae-gan"])
def test_networks_optimizers_and_the_state_of_gac_are_all_there_is_to_save(kind):
    def build():
        encoder, decoder, discriminator = aae_networks() if kind is AdversarialAutoencoder else vae_gan_networks()
        generator, last = (encoder, decoder) if kind is AdversarialAutoencoder else (decoder, encoder)
        penalty = GradientPenalty(interval=3)
        gac = GAC(generator, discriminator, conjugate(generator), adam(discriminator), penalty=penalty)
        model = kind(gac, last, adam(encoder, decoder), CODE)
        return model, (
            *(encoder, decoder, discriminator),
            *(gac.generator_optimizer, gac.discriminator_optimizer, model.optimizer, gac),
        )

    data = batches(6)
    torch.manual_seed(1)
    (model, parts), (resumed, fresh) = build(), build()
    for x in data[:2]:
        model.step(x)
    for part, new in zip(parts, fresh, strict=True):
        new.load_state_dict(copy.deepcopy(part.state_dict()))
    for each in (model, resumed):
        torch.manual_seed(2)
        for x in data[2:]:
            each.step(x)
    for network, new in zip(parts[:3], fresh[:3], strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, new.state_dict()[name]), name


# Several processes


class Certain(nn.Module):
    """x -> (mean, a log variance so low that the code is the mean), so that nothing is drawn at random."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, x):
        mean = self.mean(x)
        return mean, torch.full_like(mean, -200.0)


def trained_on_shares(kind, accelerator=None):
    """Parameters of all three networks after 5 steps on batches of 8, of which each of two processes takes its half.

    A process shows D the reconstructions of the first half of its share; one process on the whole batch must have all
    of those in its first half.
    """
    torch.manual_seed(7)
    encoder, decoder = one_headed(), decoder_to()
    discriminator = judge(CODE if kind is AdversarialAutoencoder else 6)
    data = torch.randn(5, 8, *SIZE, dtype=torch.float64)
    prior = torch.randn(5, 8, CODE, dtype=torch.float64)
    rows = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    networks = [encoder if kind is AdversarialAutoencoder else Certain(encoder), decoder, discriminator]
    optimizers = [adam(encoder, decoder), conjugate(networks[kind is VAEGAN]), adam(discriminator)]
    prepared = [*networks, *optimizers]
    if accelerator is not None:
        rows = torch.arange(8).chunk(accelerator.num_processes)[accelerator.process_index]
        prepared = accelerator.prepare(*prepared)
    e, d, c, optimizer, optimizer_g, optimizer_c = prepared
    generator, last = (e, d) if kind is AdversarialAutoencoder else (d, e)
    draws = iter(prior[:, rows])
    gac = GAC(generator, c, optimizer_g, optimizer_c, penalty=GradientPenalty(interval=2), accelerator=accelerator)
    model = kind(gac, last, optimizer, lambda n: next(draws))
    for x in data[:, rows]:
        model.step(x)
    return {
        f"{kind.__name__}.{role}.{name}": parameter.detach()
        for role, network in zip("EDC", networks, strict=True)
        for name, parameter in network.named_parameters()
    }


def test_two_processes_with_half_the_batch_each_equal_one_with_all_of_it(tmp_path):
    file = tmp_path / "parameters.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = [*launch, Path(__file__), file]
    finished = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = load_file(file)
    expected = trained_on_shares(AdversarialAutoencoder) | trained_on_shares(VAEGAN)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


# What it is for


def test_codes_move_to_the_prior_and_only_by_the_adversary():
    data = torch.randn(512, 2) @ torch.tensor([[0.5, 0.2], [0.0, 0.3]])

    def codes_after_training(gac_rate):
        torch.manual_seed(0)
        encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 2)
        nn.init.constant_(encoder.bias, 3.0)
        discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        gac = GAC(
            encoder,
            discriminator,
            torch.optim.Adam(encoder.parameters(), gac_rate, betas=(0.0, 0.99)),
            torch.optim.Adam(discriminator.parameters(), gac_rate, betas=(0.0, 0.99)),
            penalty="r1+r2",
        )
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-2)
        aae = AdversarialAutoencoder(gac, decoder, optimizer, prior=2)
        for _ in range(600):
            stats = aae.step(data[torch.randint(512, (64,))])
        return encoder(data).detach(), float(stats["reconstruction"])

    codes, error = codes_after_training(1e-2)
    assert codes.mean(0).abs().max() < 0.4
    assert codes.T.cov().diagonal().min() > 0.6
    assert codes.T.cov().diagonal().max() < 1.5
    assert error < 0.02  # of a variance of about 0.19
    alone, _ = codes_after_training(0.0)
    assert alone.mean(0).abs().max() > 1.0


def test_samples_of_the_vae_gan_move_to_the_data():
    def wasserstein(samples):  # of sorted projections, on both axes
        return (samples.sort(0).values - data.sort(0).values).abs().mean()

    angle = 6.3 * torch.rand(512, 1)
    data = torch.cat([angle.cos(), angle.sin()], 1) + torch.tensor([2.0, 0.0])
    body = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 4))
    encoder = nn.Sequential(body, Halves())
    decoder = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    betas = {"betas": (0.0, 0.99)}
    gac = GAC(
        decoder,
        discriminator,
        torch.optim.Adam(decoder.parameters(), 5e-3, **betas),
        torch.optim.Adam(discriminator.parameters(), 5e-3, **betas),
        penalty="r1+r2",
    )
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 5e-3)
    model = VAEGAN(gac, encoder, optimizer, 2, kl_weight=0.05)
    before = wasserstein(model.sample(512))
    for _ in range(400):
        model.step(data[torch.randint(512, (64,))])
    assert before > 0.8
    assert wasserstein(model.sample(512)) < 0.2
    assert (model.reconstruct(data) - data).square().mean() < 0.1


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2, dim=1)


@pytest.mark.parametrize(
    ("build", "networks"), [(aae_of, aae_networks), (vae_gan_of, vae_gan_networks)], ids=["aae", "vae-gan"]
)
def test_reconstruct_and_sample_draw_no_graph_and_leave_the_modes_alone(build, networks):
    encoder, decoder, discriminator = networks()
    decoder.append(nn.Dropout(0.5))
    decoder[1].eval()
    model = build(encoder, decoder, discriminator)
    (x,) = batches(1)
    code = encoder(x) if build is aae_of else encoder(x)[0]
    torch.testing.assert_close(model.reconstruct(x), decoder[:4](code).detach(), rtol=0, atol=0)
    torch.manual_seed(4)
    samples = model.sample(3)
    torch.manual_seed(4)
    expected = decoder[:4](torch.randn(3, CODE, dtype=torch.float64)).detach()
    torch.testing.assert_close(samples, expected, rtol=0, atol=0)
    assert not samples.requires_grad
    assert decoder.training
    assert decoder[4].training
    assert not decoder[1].training


# Mistakes


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: aae_of(one_headed(code=3), nn.Linear(3, 6).double(), judge(3)),
            r"codes and the prior's draws differ in shape: \(6, 3\) and \(6, 2\); change the encoder's last layer",
        ),
        (
            lambda: aae_of(TwoHeaded(), decoder_to(), judge(CODE)),
            "the encoder returned a tuple where a tensor of codes",
        ),
        (
            lambda: aae_of(one_headed(), decoder_to((3, 2)), judge(CODE)),
            r"reconstructions and samples differ in shape: \(6, 3, 2\) and \(6, 2, 3\)",
        ),
        (
            lambda: vae_gan_of(TwoHeaded(code=3), decoder_to(), judge(6)),
            r"codes and the prior's draws differ in shape: \(6, 3\) and \(6, 2\)",
        ),
        (lambda: vae_gan_of(one_headed(), decoder_to(), judge(6)), r"returned a Tensor; VAEGAN needs a tuple \(mean"),
        (
            lambda: vae_gan_of(TwoHeaded(), decoder_to((3, 2)), judge(6)),
            r"reconstructions and samples differ in shape: \(6, 3, 2\) and \(6, 2, 3\)",
        ),
    ],
    ids=["aae-code", "aae-tuple", "aae-decoder", "vae-gan-code", "vae-gan-tensor", "vae-gan-decoder"],
)
def test_networks_that_do_not_fit_are_told_in_one_line_before_anything_moves(model, message):
    model = model()
    networks = (model.encoder, model.decoder, model.gac.discriminator)
    before = copy.deepcopy(networks)
    with pytest.raises(UsageError, match=message) as told:
        model.step(batches(1)[0])
    assert "\n" not in str(told.value)
    close(networks, before)


def test_integers_for_samples_are_told():
    with pytest.raises(UsageError, match=r"samples must be floating point, got torch\.uint8"):
        aae_of(*aae_networks()).step(torch.zeros(BATCH, *SIZE, dtype=torch.uint8))


def test_an_unknown_size_of_code_is_told_and_the_decoders_nz_is_taken():
    encoder, decoder, discriminator = aae_networks()
    with pytest.raises(UsageError, match="the shape of a code is not known"):
        aae_of(encoder, decoder, discriminator, prior=None)
    decoder.nz = CODE
    assert aae_of(encoder, decoder, discriminator, prior=None).sample(3).shape == (3, *SIZE)


def test_one_optimizer_for_both_steps_is_told():
    encoder, decoder, discriminator = aae_networks()
    optimizer = sgd(encoder, decoder)
    gac = GAC(encoder, discriminator, optimizer, sgd(discriminator))
    with pytest.raises(UsageError, match="one optimizer serves both"):
        AdversarialAutoencoder(gac, decoder, optimizer, CODE)


if __name__ == "__main__":  # one of the two processes
    process = Accelerator(cpu=True)
    assert process.num_processes == 2, process.num_processes
    parameters = trained_on_shares(AdversarialAutoencoder, process) | trained_on_shares(VAEGAN, process)
    if process.is_main_process:
        save_file(parameters, sys.argv[1])
    process.end_training()
    leave(0)
