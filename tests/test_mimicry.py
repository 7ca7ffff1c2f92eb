"""GAC's generator step inside torch-mimicry's interface, its checkpoints, and our networks with that interface.

The real package is met in a process of its own, by `mimicry_interop.py`; everything else does without it.
"""

import json
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import mimicry_interop
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gac_plugin import GAC, ConjugateGradient
from gac_plugin.adapters.mimicry import (
    GACGenerator,
    PlainResidualGenerator,
    ResidualDiscriminator,
    ResidualGenerator,
    convert_checkpoint,
    read_checkpoint,
)
from gac_plugin.errors import UsageError
from gac_plugin.training import Config, load_generator, train

ARGUMENTS = {"sample_shape": (2, 8, 4), "latent_size": 3, "width": 6, "depth": 2, "output": "tanh"}
BATCH = 5


class Log(dict):
    """The package's MetricLog, as far as a train_step uses it."""

    def add_metric(self, name, value, group=None, precision=4):
        self[name] = value


def pair(generator=ResidualGenerator, **options):
    torch.manual_seed(0)
    networks = generator(**ARGUMENTS, **options), ResidualDiscriminator(**ARGUMENTS, **options)
    return [network.double() for network in networks]


def batch(classes=0):
    return torch.rand(BATCH, 2, 8, 4, dtype=torch.float64) * 2 - 1, torch.arange(BATCH) % max(classes, 1)


def sgd(network, lr=0.0):
    return torch.optim.SGD(network.parameters(), lr)


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def trainer_step(netG, netD, optG, optD, real_batch, n_dis=1, log=None):  # noqa: N803
    """What the package's Trainer calls in one of its steps, by keyword as it does."""
    log = Log() if log is None else log
    rest = {"global_step": 0, "device": torch.device("cpu"), "scaler": None}
    for _ in range(n_dis):
        log = netD.train_step(real_batch=real_batch, netG=netG, optD=optD, log_data=log, **rest)
    return netG.train_step(real_batch=real_batch, netD=netD, optG=optG, log_data=log, **rest)


def after_d_step(n_dis=1, kind=ResidualGenerator, **options):
    """A generator, its discriminator after `n_dis` steps, and the real batch; the last latents are seed 7's."""
    generator, discriminator = pair(kind, **options)
    real = batch(options.get("classes", 0))
    for seed in reversed(range(7, 7 + n_dis)):
        torch.manual_seed(seed)
        discriminator.train_step(real, netG=generator, optD=sgd(discriminator, 0.05), log_data=Log())
    return generator, discriminator, real


@pytest.mark.parametrize("n_dis", [1, 3])
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("loss_type", ["hinge", "bce", "wasserstein"])
def test_the_gradient_is_the_textbook_s_at_the_samples_of_d_s_last_step(classes, n_dis, loss_type):
    generator, discriminator, real = after_d_step(n_dis, classes=classes, loss_type=loss_type)
    plain, _ = pair(PlainResidualGenerator, classes=classes, loss_type=loss_type)
    textbook = deepcopy(discriminator)
    log = generator.train_step(real, netD=discriminator, optG=sgd(generator), log_data=Log())
    torch.manual_seed(7)
    expected = plain.train_step(real, netD=textbook, optG=sgd(plain), log_data=Log())
    torch.testing.assert_close(log["errG"], expected["errG"], rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(generator.parameters(), plain.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_the_generator_s_step_leaves_the_discriminator_as_it_is():
    generator, discriminator, real = after_d_step()
    before = {name: (p.clone(), p.grad.clone()) for name, p in discriminator.named_parameters()}
    generator.train_step(real, netD=discriminator, optG=sgd(generator, 0.1), log_data=Log())
    for name, parameter in discriminator.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert torch.equal(parameter.grad, before[name][1])
        assert parameter.requires_grad


def test_a_step_of_both_takes_one_forward_pass_of_g_where_the_textbook_takes_two():
    counts = []
    for kind in (ResidualGenerator, PlainResidualGenerator):
        generator, discriminator = pair(kind)
        calls = []
        generator.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer_step(generator, discriminator, sgd(generator), sgd(discriminator), batch())
        counts.append(len(calls))
    assert counts == [1, 2]


def test_further_steps_of_g_alone_draw_samples_of_their_own():
    generator, discriminator, real = after_d_step()
    generator.train_step(real, netD=discriminator, optG=sgd(generator, 0.1), log_data=Log())
    plain, _ = pair(PlainResidualGenerator)
    plain.load_state_dict(generator.state_dict())
    textbook = deepcopy(discriminator)
    for network, judge in ((generator, discriminator), (plain, textbook)):
        torch.manual_seed(9)
        for _ in range(2):
            network.train_step(real, netD=judge, optG=sgd(network, 0.1), log_data=Log())
    for ours, theirs in zip(generator.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_pictures_drawn_without_a_graph_do_not_take_the_place_of_d_s_batch():
    expected, discriminator, real = after_d_step()
    expected.train_step(real, netD=discriminator, optG=sgd(expected), log_data=Log())
    generator, discriminator, real = after_d_step()
    with torch.no_grad():
        assert generator.generate_images(2).shape == (2, 2, 8, 4)
    generator.train_step(real, netD=discriminator, optG=sgd(generator), log_data=Log())
    for ours, theirs in zip(generator.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_discriminator_judges_the_samples_with_the_labels_they_were_made_for():
    generator, discriminator, real = after_d_step(classes=3)
    torch.manual_seed(7)
    labels = torch.randint(3, (BATCH,))
    seen = []
    discriminator.register_forward_hook(lambda _, args, __: seen.append(args))
    samples = generator._drawn[0]
    generator.train_step(real, netD=discriminator, optG=sgd(generator), log_data=Log())
    assert torch.equal(seen[0][0], samples)
    assert torch.equal(seen[0][1], labels)


def test_the_network_s_step_may_clear_gradients_through_its_optimizer():
    class Clearing(PlainResidualGenerator):
        def train_step(self, real_batch, netD, optG, log_data, **options):  # noqa: N803
            loss = self.compute_gan_loss(netD(self.generate_images(real_batch[0].shape[0])))
            optG.zero_grad()
            loss.backward()
            optG.step()
            return log_data

    class WithGAC(GACGenerator, Clearing):
        pass

    expected, discriminator, real = after_d_step()
    expected.train_step(real, netD=discriminator, optG=sgd(expected), log_data=Log())
    generator, discriminator, real = after_d_step(kind=WithGAC)
    for parameter in generator.parameters():
        parameter.grad = torch.ones_like(parameter)
    generator.train_step(real, netD=discriminator, optG=sgd(generator), log_data=Log())
    for ours, theirs in zip(generator.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_copy_has_no_batch_at_hand_and_the_network_keeps_its_own():
    generator, discriminator, real = after_d_step()
    copy = deepcopy(generator)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), generator.parameters(), strict=True))
    calls = []
    generator.register_forward_hook(lambda *_: calls.append(1))
    copy.register_forward_hook(lambda *_: calls.append(2))
    for network in (generator, copy):
        network.train_step(real, netD=discriminator, optG=sgd(network), log_data=Log())
    assert calls == [2]


def test_a_step_that_does_not_draw_its_samples_there_is_refused():
    class Stranger(PlainResidualGenerator):
        def train_step(self, real_batch, netD, optG, log_data, **options):  # noqa: N803
            self.compute_gan_loss(netD(self(torch.randn(BATCH, self.nz)))).backward()
            optG.step()

    class WithGAC(GACGenerator, Stranger):
        pass

    generator, discriminator = pair(WithGAC)
    with pytest.raises(UsageError, match="does not use the samples of its own generate_images"):
        trainer_step(generator, discriminator, sgd(generator), sgd(discriminator), batch())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_a_gradient_scaler_is_refused():
    generator, discriminator, real = after_d_step()
    with pytest.raises(UsageError, match="pass amp=False to Trainer"):
        generator.train_step(real, netD=discriminator, optG=sgd(generator), log_data=Log(), scaler=object())


def test_the_discriminator_s_step_is_that_of_its_loss():
    generator, discriminator = pair(classes=3)
    real, labels = batch(3)
    textbook = deepcopy(discriminator)
    torch.manual_seed(3)
    log = discriminator.train_step((real, labels), netG=generator, optD=sgd(discriminator), log_data=Log())
    torch.manual_seed(3)
    fake, fake_labels = generator.generate_images_with_labels(BATCH)
    l_real, l_fake = textbook(real, labels), textbook(fake.detach(), fake_labels)
    loss = (1 - l_real).clamp(min=0).mean() + (1 + l_fake).clamp(min=0).mean()
    loss.backward()
    torch.testing.assert_close(log["errD"], loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(log["D(x)"], (1 / (1 + torch.exp(-l_real.detach()))).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(log["D(G(z))"], (1 / (1 + torch.exp(-l_fake.detach()))).mean(), rtol=1e-12, atol=0)
    for ours, theirs in zip(discriminator.parameters(), textbook.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, suffix):
    def start():
        generator, discriminator = pair(classes=3)
        return generator, discriminator, ConjugateGradient(generator.parameters(), 1e-2), sgd(discriminator, 0.01)

    real = batch(3)
    one = start()
    trainer_step(*one, real)
    trainer_step(*one, real)
    for network, optimizer, folder in ((one[0], one[2], "netG"), (one[1], one[3], "netD")):
        network.save_checkpoint(directory=str(tmp_path / folder), global_step=2, optimizer=optimizer)
    assert [path.name for path in sorted(tmp_path.glob("*/*"))] == [
        "netD_2_steps.safetensors",
        "netG_2_steps.safetensors",
    ]
    other = start()
    for network, optimizer, folder in ((other[0], other[2], "netG"), (other[1], other[3], "netD")):
        file = tmp_path / folder / f"{folder}_2_steps.safetensors"
        if suffix:  # the same, as the package itself writes it
            torch.save(read_checkpoint(file), file.with_suffix(suffix))
            file = file.with_suffix(suffix)
        assert network.restore_checkpoint(ckpt_file=str(file), optimizer=optimizer) == 2
    for run in (one, other):
        torch.manual_seed(11)
        trainer_step(*run, real)
    for network, again in zip(one[:2], other[:2], strict=True):
        state = again.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def package_checkpoint(path, optimizer=True):
    """A file as the package's save_checkpoint makes it, and what is in it."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.0, 0.9))
    network(torch.randn(2, 2, 5, 5)).sum().backward()
    adam.step()
    state = {
        "model_state_dict": network.state_dict(),
        "optimizer_state_dict": adam.state_dict() if optimizer else None,
        "global_step": 100000,
    }
    state["model_state_dict"]["tied"] = state["model_state_dict"]["1.weight"]
    torch.save(state, path)
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_checkpoint_of_the_package_converts_without_loss(tmp_path, optimizer):
    state = package_checkpoint(tmp_path / "netG_100000_steps.pth", optimizer)
    file = convert_checkpoint(tmp_path / "netG_100000_steps.pth", tmp_path / "converted")
    assert file == tmp_path / "converted" / "netG_100000_steps.safetensors"
    assert same(read_checkpoint(file), state)
    assert same(read_checkpoint(tmp_path / "netG_100000_steps.pth"), state)


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "it ran"
    path = tmp_path / "netG_1_steps.pth"
    torch.save({"model_state_dict": {}, "optimizer_state_dict": Planted(mark), "global_step": 1}, path)
    generator, _ = pair()
    for read in (read_checkpoint, generator.restore_checkpoint, lambda p: convert_checkpoint(p, tmp_path / "out")):
        with pytest.raises(UsageError, match="holds more than tensors, numbers and text") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot read the checkpoint|is damaged"),
    ],
    ids=["cut off", "empty", "missing", "folder"],
)
def test_a_file_that_is_no_checkpoint_is_told_in_one_line(tmp_path, suffix, spoil, message):
    package_checkpoint(tmp_path / "a.pth")
    path = convert_checkpoint(tmp_path / "a.pth", tmp_path).with_suffix(suffix)
    spoil(path)
    with pytest.raises(UsageError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_alone_and_weights_of_another_network_are_refused(tmp_path):
    weights = nn.Linear(2, 3).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        with pytest.raises(UsageError, match="lacks model_state_dict, optimizer_state_dict, global_step"):
            read_checkpoint(tmp_path / name)
    package_checkpoint(tmp_path / "other.pth")
    generator, _ = pair()
    with pytest.raises(UsageError, match=r"other\.pth does not fit") as caught:
        generator.restore_checkpoint(tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_an_optimizer_s_state_does_not_fit_an_optimizer(tmp_path):
    generator, _ = pair()
    generator.save_checkpoint(tmp_path / "netG", 3)
    assert generator.restore_checkpoint(tmp_path / "netG" / "netG_3_steps.safetensors") == 3
    with pytest.raises(UsageError, match="holds no state of an optimizer"):
        generator.restore_checkpoint(tmp_path / "netG" / "netG_3_steps.safetensors", sgd(generator))


@pytest.mark.parametrize(
    ("shape", "depth", "classes"),
    [((1, 28, 28), 2, 0), ((1, 28, 28), 2, 10), ((3, 32, 32), 3, 0), ((3, 32, 32), 3, 10)],
)
@pytest.mark.parametrize("schedule", ["fresh", "fused"])
def test_one_step_on_the_shapes_of_mnist_and_cifar(shape, depth, classes, schedule):
    torch.set_default_dtype(torch.float32)
    arguments = {**ARGUMENTS, "sample_shape": shape, "depth": depth, "classes": classes}
    generator, discriminator = ResidualGenerator(**arguments), ResidualDiscriminator(**arguments)
    optimizers = ConjugateGradient(generator.parameters(), 1e-3), torch.optim.Adam(discriminator.parameters(), 1e-3)
    gac = GAC(generator, discriminator, *optimizers, penalty="r1+r2", schedule=schedule)
    before = deepcopy([*generator.parameters(), *discriminator.parameters()])
    conditions = {"labels": torch.arange(8) % classes} if classes else {}
    stats = gac.step(torch.rand(8, *shape) * 2 - 1, **conditions)
    after = [*generator.parameters(), *discriminator.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(value) for value in stats.values())
    assert not any(isinstance(module, _BatchNorm) for module in discriminator.modules())


def test_a_label_changes_the_sample_and_the_logit_and_the_rest_of_the_batch_does_not():
    generator, discriminator = pair(classes=3)
    for module in generator.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    z, zeros, ones = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    discriminator.eval()
    samples = generator(z, zeros)
    assert not torch.allclose(samples, generator(z, ones))
    assert not torch.allclose(discriminator(samples, labels=zeros), discriminator(samples, labels=ones))
    torch.testing.assert_close(generator(z[:1], labels=zeros[:1]), samples[:1])


def test_the_logit_is_linear_in_the_features_plus_their_product_with_the_class_s_embedding():
    _, discriminator = pair(classes=3)
    features = []
    discriminator.logit.register_forward_pre_hook(lambda _, args: features.extend(args))
    discriminator.eval()
    real, labels = batch(3)
    logits = discriminator(real, labels=labels)
    (phi,) = features
    weight, bias, embedding = discriminator.logit.weight, discriminator.logit.bias, discriminator.projection.weight
    expected = torch.stack([weight[0] @ phi[i] + bias[0] + embedding[labels[i]] @ phi[i] for i in range(BATCH)])
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-12, atol=1e-12)


def test_every_weight_of_the_discriminator_has_spectral_norm_one():
    _, discriminator = pair(classes=3)
    for _ in range(50):
        discriminator(*batch(3))
    weights = [module.weight for module in discriminator.modules() if hasattr(module, "parametrizations")]
    assert len(weights) == 1 + 3 * 2 + 2
    norms = torch.stack([torch.linalg.matrix_norm(weight.flatten(1), 2) for weight in weights])
    torch.testing.assert_close(norms, torch.ones(len(weights)), rtol=0, atol=0.02)


def test_a_class_can_be_asked_for_and_is_drawn_otherwise():
    generator, _ = pair(classes=3)
    assert generator.generate_images_with_labels(6, c=2)[1].tolist() == [2] * 6
    assert set(generator.generate_images_with_labels(200)[1].tolist()) == {0, 1, 2}
    assert generator(torch.randn(4, 3)).shape == (4, 2, 8, 4)


def test_parameters_are_counted():
    generator, discriminator = pair()
    block = 2 * (2 * 6) + 2 * (6 * 6 * 9 + 6)
    expected = 3 * 12 + 12 + 2 * block + 2 * 6 + 6 * 2 * 9 + 2
    generator.coarse.requires_grad_(False)
    assert generator.count_params() == (expected, expected - 3 * 12 - 12)
    assert discriminator.count_params()[0] == 2 * 6 * 9 + 6 + 3 * 2 * (6 * 6 * 9 + 6) + 6 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "halve the image 3 times, which 8x4 does not allow"),
        ({"loss_type": "relativistic"}, "pairs real with generated samples"),
        ({"loss_type": "hing"}, "did you mean 'hinge'"),
    ],
)
@pytest.mark.parametrize("network", [ResidualGenerator, ResidualDiscriminator])
def test_what_the_networks_cannot_be_is_refused(network, options, message):
    with pytest.raises(UsageError, match=message):
        network(**{**ARGUMENTS, **options})


def test_gac_train_takes_the_adapter(tmp_path):
    torch.set_default_dtype(torch.float32)
    config = Config(
        adapter="mimicry",
        width=4,
        depth=2,
        steps=2,
        batch_size=8,
        evaluation_samples=0,
        output_dir=str(tmp_path / "run"),
    )
    train(config)
    generator = load_generator(tmp_path / "run")
    assert isinstance(generator, ResidualGenerator)
    assert generator(torch.randn(2, generator.nz)).shape == (2, 1, 8, 8)


CASES = [f"{test}-{name}" for name in mimicry_interop.SMALL for test in ("gradient", "trainer", "loop")]


@pytest.fixture(scope="module")
def interop(tmp_path_factory):
    """Outcome of each case with the real package: None, or what went wrong; cases after a crash are missing."""
    if find_spec("torch_mimicry") is None:
        pytest.skip("needs torch-mimicry (pip install --no-deps torch-mimicry)")
    program = [sys.executable, mimicry_interop.__file__, str(tmp_path_factory.mktemp("interop"))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line["error"] for line in lines} | {
        "end": f"exit code {done.returncode}: {done.stderr[-500:]}"
    }


@pytest.mark.parametrize("case", [*CASES, "ours-0", "ours-3"])
def test_it_works_with_the_real_package(interop, case):
    assert interop.get(case, interop["end"]) is None
