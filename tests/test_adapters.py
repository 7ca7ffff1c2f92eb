"""What every adapter must do, ours and other packages': the tests run over all that are installed."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from adapter_samples import recipe, samples, two_steps

from gac_plugin import GAC, ConjugateGradient
from gac_plugin.errors import UsageError
from gac_plugin.protocols import Adapter
from gac_plugin.training import load_discriminator, load_generator
from gac_plugin.training.data import codec_of
from gac_plugin.training.hub import save_network
from gac_plugin.training.networks import Recipe, adapter_names, find_adapter

ADAPTERS, CLASSES = adapter_names(), 3
conditional = pytest.mark.parametrize("classes", [0, CLASSES], ids=["alone", "conditional"])
every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def labels(classes: int, count: int = 4) -> dict[str, torch.Tensor]:
    return {"labels": torch.arange(count) % classes} if classes else {}


@every_adapter
@conditional
def test_shapes_are_those_of_the_contract(name, classes):
    made = recipe(name, classes)
    generated = made.generator()(torch.randn(4, made.latent_size), **labels(classes))
    assert generated.shape == (4, *made.arguments["sample_shape"])
    assert made.discriminator()(generated, **labels(classes)).shape[0] == 4
    assert made.generator().nz == made.latent_size


@every_adapter
@conditional
def test_the_covectors_are_of_the_samples_shape_and_of_each_sample_alone(name, classes):
    made = recipe(name, classes)
    generator, discriminator = made.generator(), made.discriminator().eval()
    optimizers = ConjugateGradient(generator.parameters(), 1e-3), torch.optim.Adam(discriminator.parameters(), 1e-3)
    gac = GAC(generator, discriminator, *optimizers)
    points = samples(made, 4)
    whole = gac.cotangent(points, **labels(classes))
    assert whole.shape == points.shape
    assert torch.isfinite(whole).all()
    assert (whole.flatten(1).norm(dim=1) > 0).all()
    first = gac.cotangent(points[:2], **labels(classes, 2))
    torch.testing.assert_close(whole[:2], first, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


@every_adapter
@conditional
def test_a_step_moves_what_it_should_and_nothing_else(name, classes):
    made = recipe(name, classes)
    generator, discriminator = made.generator(), made.discriminator()
    optimizers = ConjugateGradient(generator.parameters(), 1e-3), torch.optim.Adam(discriminator.parameters(), 1e-3)
    gac = GAC(generator, discriminator, *optimizers, penalty="r1+r2")
    frozen = [p for net in (generator, discriminator) for p in net.parameters() if not p.requires_grad]
    before = [p.clone() for p in frozen]

    def state(network: torch.nn.Module) -> list[torch.Tensor]:
        return [p.detach().clone() for p in network.parameters() if p.requires_grad]

    start_g, start_d = state(generator), state(discriminator)
    fake = generator(torch.randn(4, made.latent_size), **labels(classes))
    gac.discriminator_step(samples(made, 4), fake, **labels(classes))
    assert all(torch.equal(a, b) for a, b in zip(state(generator), start_g, strict=True)), "D's step leaves G alone"
    assert any(not torch.equal(a, b) for a, b in zip(state(discriminator), start_d, strict=True))
    after_d = state(discriminator)
    stats = gac.generator_step(fake, **labels(classes))
    assert all(torch.equal(a, b) for a, b in zip(state(discriminator), after_d, strict=True)), "G's step leaves D alone"
    assert any(not torch.equal(a, b) for a, b in zip(state(generator), start_g, strict=True))
    assert torch.isfinite(stats["loss_g"])
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))


@every_adapter
@pytest.mark.parametrize("schedule", ["fresh", "fused"])
def test_either_schedule_moves_every_parameter_that_is_free_to_move(name, schedule):
    made = recipe(name)
    generator, discriminator = made.generator(), made.discriminator()
    free = [p for net in (generator, discriminator) for p in net.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in free]
    optimizers = ConjugateGradient(generator.parameters(), 1e-3), torch.optim.Adam(discriminator.parameters(), 1e-3)
    gac = GAC(generator, discriminator, *optimizers, penalty="r1+r2", schedule=schedule)
    stats = gac.step(samples(made, 6))
    assert all(not torch.equal(a, b) for a, b in zip(before, free, strict=True))
    assert all(torch.isfinite(value) for value in stats.values())


@every_adapter
@conditional
def test_networks_load_back_exactly(name, classes, tmp_path):
    made = recipe(name, classes)
    generator, discriminator = made.generator().eval(), made.discriminator().eval()
    save_network(tmp_path / "generator", generator, made)
    save_network(tmp_path / "discriminator", discriminator, made)
    z = torch.randn(4, made.latent_size)
    with torch.no_grad():
        generated = generator(z, **labels(classes))
        assert torch.equal(load_generator(tmp_path)(z, **labels(classes)), generated)
        judged = load_discriminator(tmp_path)(generated, **labels(classes))
        assert torch.equal(judged, discriminator(generated, **labels(classes)))


@every_adapter
def test_the_codec_takes_samples_both_ways_and_writes_every_kind_of_file(name, tmp_path):
    made = recipe(name)
    codec = codec_of(made)
    assert codec.sample_shape == tuple(made.arguments["sample_shape"])
    stored = codec.to_stored(samples(made, 4))
    again = codec.to_samples(stored)
    assert again.shape == (4, *codec.sample_shape)
    assert again.dtype == torch.float32
    assert torch.equal(codec.to_stored(again), stored)
    pictures = codec.pictures(stored)
    assert (pictures.dtype, pictures.dim(), len(pictures)) == (torch.uint8, 4, 4)
    assert ".png" in codec.suffixes
    for suffix in codec.suffixes:
        codec.write(tmp_path / f"samples{suffix}", stored, columns=2)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted(codec.suffixes)
    assert all(path.stat().st_size for path in tmp_path.iterdir())
    assert codec_of(Recipe(made.adapter, made.arguments, json.loads(json.dumps(codec.to_json())))) == codec


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory) -> dict[str, float]:
    """How far each adapter's networks moved in two steps by two gloo processes, whose parameters were the same."""
    file = tmp_path_factory.mktemp("adapters") / "moved.json"
    program = Path(__file__).with_name("adapter_samples.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*launch, program, file], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(file.read_text())


@every_adapter
def test_two_processes_keep_the_same_networks(in_two_processes, name):
    assert in_two_processes[name] > 1e-4, "nothing has moved, so that nothing is compared"
    assert in_two_processes[name] == pytest.approx(two_steps(name), rel=0.9), "steps are of the size of one process's"


def test_an_adapter_describes_itself_in_one_line():
    for name in ADAPTERS:
        found = find_adapter(name)
        assert found.name == name
        assert found.description
        assert "\n" not in found.description


# ---- an adapter of somebody else's


MODULE = """
from torch import nn
from gac_plugin.protocols import Adapter


class Generator(nn.Linear):
    def __init__(self, sample_shape, latent_size, width, depth, output):
        super().__init__(latent_size, sample_shape[1] * sample_shape[2])
        self.nz, self.shape = latent_size, sample_shape

    def forward(self, z):
        return super().forward(z).tanh().reshape(-1, *self.shape)


def discriminator(sample_shape, latent_size, width, depth, output):
    return nn.Sequential(nn.Flatten(), nn.Linear(sample_shape[1] * sample_shape[2], 1))


adapter = Adapter("somebody", Generator, discriminator, "straight lines by somebody else")
not_one = "text"
"""
METADATA = "Metadata-Version: 2.1\nName: somebodys-gan\nVersion: 1.0\n"
ENTRY_POINTS = "[gac_plugin.adapters]\nsomebody = somebodys_gan:adapter\nbroken = somebodys_gan:not_one\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """An environment in which another project's package with an adapter is installed, by pip, out of a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = folder / "somebodys_gan-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("somebodys_gan.py", MODULE)
        for name, text in (("METADATA", METADATA), ("entry_points.txt", ENTRY_POINTS), ("WHEEL", WHEEL)):
            file.writestr(f"somebodys_gan-1.0.dist-info/{name}", text)
        file.writestr("somebodys_gan-1.0.dist-info/RECORD", "")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder / "site"]
    subprocess.run([*pip, wheel], check=True, timeout=120, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}


def gac(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from gac_plugin.cli import main; sys.exit(main(sys.argv[1:]))"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=180, env=environment, check=False
    )


def test_another_package_adds_an_adapter_without_touching_ours(installed, tmp_path):
    listed = gac(installed, "info")
    assert "somebody         straight lines by somebody else" in listed.stdout
    settings = ["--cpu", "--steps", "3", "--evaluation-samples", "0", "--output-dir", str(tmp_path / "run")]
    trained = gac(installed, "train", "--adapter", "somebody", *settings)
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "generator" / "config.json").read_text())["adapter"] == "somebody"
    sampled = gac(installed, "sample", str(tmp_path / "run"), "--out", str(tmp_path / "grid.png"))
    assert sampled.returncode == 0, sampled.stderr[-2000:]


def test_what_is_made_with_an_adapter_that_is_gone_is_told_in_one_line(tmp_path):
    config = {"adapter": "somebody", "sample_shape": [1, 8, 8], "latent_size": 4, "width": 1, "depth": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "output": "tanh"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="unknown adapter 'somebody'"):
        load_generator(tmp_path)


def test_an_entry_point_that_is_no_adapter_is_told_and_spoils_nothing(installed):
    listed = gac(installed, "info")
    assert listed.returncode == 0
    assert "broken           (cannot be used: the entry point 'somebodys_gan:not_one'" in listed.stdout


def test_an_adapter_is_a_frozen_record():
    with pytest.raises(AttributeError):
        find_adapter("mlp").name = "other"
    assert isinstance(find_adapter("mlp"), Adapter)
