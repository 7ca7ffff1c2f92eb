"""Networks on disk: what is written loads back exactly, and nothing that could run code is ever read."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gac_plugin.errors import UsageError
from gac_plugin.training import load_discriminator, load_generator
from gac_plugin.training.hub import judge_folder, save_network
from gac_plugin.training.networks import Recipe

RECIPE = Recipe("mlp", {"sample_shape": [1, 4, 4], "latent_size": 3, "width": 5, "depth": 1, "output": "tanh"})


@pytest.fixture
def saved(tmp_path) -> tuple[Path, torch.nn.Module]:
    generator = RECIPE.generator()
    save_network(tmp_path / "generator", generator, RECIPE)
    save_network(tmp_path / "discriminator", RECIPE.discriminator(), RECIPE)
    return tmp_path, generator


@pytest.mark.parametrize("part", ["", "generator"])
def test_a_generator_loads_back_from_its_run_or_its_own_folder(saved, part):
    folder, generator = saved
    loaded = load_generator(folder / part)
    z = torch.randn(7, 3)
    assert not loaded.training
    assert torch.equal(loaded(z), generator(z))


def test_a_discriminator_loads_back(saved):
    assert load_discriminator(saved[0])(torch.randn(2, 1, 4, 4)).shape == (2, 1)


def test_refinement_is_judged_by_the_calibrated_discriminator_where_a_run_holds_one(saved):
    folder, _ = saved
    assert judge_folder(folder) == folder / "discriminator"
    assert judge_folder(folder / "generator") == folder / "generator", "which is no discriminator, and the caller tells"
    save_network(folder / "calibrated" / "discriminator", RECIPE.discriminator(), RECIPE)
    assert judge_folder(folder) == folder / "calibrated" / "discriminator"
    with pytest.raises(UsageError, match="a revision is for a name on the Hub"):
        judge_folder(folder, "main")


def test_only_safetensors_and_json_are_written(saved):
    files = sorted(path.relative_to(saved[0]).as_posix() for path in saved[0].rglob("*") if path.is_file())
    kinds = ("config.json", "model.safetensors")
    assert files == [f"{part}/{kind}" for part in ("discriminator", "generator") for kind in kinds]


def test_a_pickle_is_never_opened(saved, tmp_path_factory):
    folder = saved[0] / "generator"
    (folder / "model.safetensors").unlink()
    trap = tmp_path_factory.mktemp("trap") / "sprung"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    for name in ("pytorch_model.bin", "model.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UsageError, match=r"no generator in .*model\.safetensors"):
        load_generator(saved[0])
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UsageError, match="do not fit or are damaged"):
        load_generator(saved[0])
    assert not trap.exists()


def test_a_flipped_bit_in_the_weights_is_told(saved):
    file = saved[0] / "generator" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4  # still a finite number
    file.write_bytes(data)
    with pytest.raises(UsageError, match="are damaged: they are not those that were written"):
        load_generator(saved[0])


def test_weights_of_other_programs_need_no_checksum(saved):
    folder, generator = saved
    save_file(load_file(folder / "generator" / "model.safetensors"), folder / "generator" / "model.safetensors")
    z = torch.randn(2, 3)
    assert torch.equal(load_generator(folder)(z), generator(z))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_an_error(saved, change):
    file = saved[0] / "generator" / "model.safetensors"
    weights = load_file(file)
    first = sorted(weights)[0]
    if change == "missing":
        del weights[first]
    elif change == "extra":
        weights["other"] = torch.zeros(1)
    else:
        weights[first] = torch.zeros(99)
    save_file(weights, file)
    with pytest.raises(UsageError, match=r"the weights in .*model\.safetensors do not fit or are damaged"):
        load_generator(saved[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "does not describe a network"),
        ({"adapter": "mlp", "output": "relu"}, "does not describe a network"),
        ({"adapter": "mlp", **RECIPE.arguments, "output": ["tanh"]}, "output missing or wrong"),
        ({"adapter": "mlp", **RECIPE.arguments, "sample_shape": [4, 4]}, "sample_shape missing or wrong"),
        ({"adapter": "mlp", **RECIPE.arguments, "sample_shape": [1, -4, -4]}, "sample_shape missing or wrong"),
        ({"adapter": "dcgan", **RECIPE.arguments, "depth": 0}, "depth missing or wrong"),
        ({"adapter": "nowhere", **RECIPE.arguments}, "unknown adapter 'nowhere'"),
        ({"adapter": "mlp", **RECIPE.arguments, "layers": 3}, "cannot build the network"),
    ],
)
def test_a_description_that_does_not_build_a_network_is_an_error(saved, settings, message):
    (saved[0] / "generator" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=message):
        load_generator(saved[0])


def test_a_folder_without_a_generator_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"no generator in '{tmp_path}'"):
        load_generator(tmp_path)
