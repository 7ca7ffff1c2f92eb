"""How a run chooses its networks, and how it builds them again."""

import json

import pytest
import torch

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Adapter, Medium
from gac_plugin.training.config import Config, make_config
from gac_plugin.training.data.images import ImageCodec
from gac_plugin.training.networks import Recipe, adapter_options, choose_recipe, find_adapter

SHAPE = (3, 16, 8)


@pytest.fixture(params=["mlp", "dcgan"])
def recipe(request) -> Recipe:
    arguments = {"sample_shape": list(SHAPE), "latent_size": 5, "width": 8, "depth": 2, "output": "tanh"}
    return Recipe(request.param, arguments)


def chosen(config: Config, shape: tuple[int, ...], classes: int = 0) -> Recipe:
    """The recipe for images of a shape."""
    return choose_recipe(config, ImageCodec(shape, config.output), None, classes)


@pytest.mark.parametrize(("output", "low"), [("tanh", -1.0), ("sigmoid", 0.0)])
def test_samples_fill_the_declared_range(recipe, output, low):
    generator = Recipe(recipe.adapter, {**recipe.arguments, "output": output}).generator()
    last = list(generator.parameters())[-1]
    with torch.no_grad():
        last.fill_(-100.0)
        assert torch.allclose(generator(torch.randn(4, 5)), torch.tensor(low))
        last.fill_(100.0)
        assert torch.allclose(generator(torch.randn(4, 5)), torch.tensor(1.0))


def test_a_recipe_is_json_and_builds_the_same_network(recipe):
    again = Recipe(**json.loads(json.dumps({"adapter": recipe.adapter, "arguments": recipe.arguments})))
    shapes = [{name: tensor.shape for name, tensor in r.generator().state_dict().items()} for r in (recipe, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("shape", "adapter"), [((1, 28, 28), "mlp"), ((1, 32, 32), "mlp"), ((3, 32, 32), "dcgan")])
def test_small_samples_get_perceptrons_and_larger_ones_convolutions(shape, adapter):
    assert chosen(Config(), shape).adapter == adapter


def test_the_configuration_overrides_the_choice():
    recipe = chosen(Config(adapter="dcgan", width=16, depth=1, latent_size=9, output="sigmoid"), (1, 8, 8))
    assert recipe == Recipe(
        "dcgan", {"sample_shape": [1, 8, 8], "latent_size": 9, "width": 16, "depth": 1, "output": "sigmoid"}
    )


def test_a_conditional_run_tells_the_builders_the_number_of_classes_and_others_nothing():
    assert chosen(Config(conditional=True), (1, 8, 8), 7).arguments["classes"] == 7
    assert "classes" not in chosen(Config(), (1, 8, 8), 7).arguments


def test_options_reach_the_builders():
    recipe = chosen(Config(options="backbone=resnet18, frozen=true,rate=0.5"), (1, 8, 8))
    assert {**recipe.arguments, "backbone": "resnet18", "frozen": True, "rate": 0.5} == recipe.arguments
    with pytest.raises(UsageError, match=r"cannot build the network of adapter 'mlp'.*'(backbone|frozen|rate)'"):
        recipe.generator()


def test_what_an_adapter_s_options_are_is_read_off_its_builders():
    def builder(sample_shape, latent_size, width, depth, output, needed, classes=0, backbone="x", rate=0.5, **rest): ...

    medium = Medium("Audio", fit=builder, load=builder, options=("length", "rate"))
    adapter = Adapter("a", builder, find_adapter("mlp").discriminator, "text", medium)
    assert adapter_options(adapter) == ["needed", 'backbone="x"', "rate=0.5", "length"]
    assert adapter_options(find_adapter("mlp")) == []


def test_the_article_preset_has_the_article_s_networks():
    recipe = chosen(make_config(preset="article"), (1, 28, 28))
    generator = [tuple(p.shape) for p in recipe.generator().parameters()]
    discriminator = [tuple(p.shape) for p in recipe.discriminator().parameters()]
    assert generator == [(128, 100), (128,), (784, 128), (784,)]
    assert discriminator == [(128, 784), (128,), (1, 128), (1,)]


def test_an_unknown_adapter_lists_the_installed_ones():
    with pytest.raises(UsageError, match=r"unknown adapter 'mpl' .*'mlp'.*dcgan"):
        find_adapter("mpl")


def test_a_size_that_the_convolutions_cannot_halve_is_refused():
    with pytest.raises(UsageError, match="halve the image 3 times, which 28x28 does not allow"):
        chosen(Config(adapter="dcgan"), (1, 28, 28)).generator()
