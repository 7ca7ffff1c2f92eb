"""Cotangent maps: the covectors and where they arrive, against formulas; the sanity check; the pictures' colours."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from scipy.stats import spearmanr
from torch import nn

from gac_plugin.adapters.speech import SpeechCodec
from gac_plugin.adapters.text import TextCodec
from gac_plugin.cli import main
from gac_plugin.errors import UsageError
from gac_plugin.training.data.images import ImageCodec
from gac_plugin.training.hub import load_discriminator, load_generator, read_recipe, save_network
from gac_plugin.training.judging.maps import (
    coordinates_heard,
    draw_tiles,
    explain,
    layer_norms,
    letter_wishes,
    pixel_changes,
    randomisation_check,
    rank_correlation,
    wishes,
    write_stage,
)
from gac_plugin.training.judging.sheets import LESS, MORE, letters, overlay, write_bars, write_sheet
from gac_plugin.training.networks import Recipe

BATCH, SHAPE = 5, (1, 2, 3)


@pytest.fixture
def networks(tiny_generator, tiny_discriminator):
    return tiny_generator(SHAPE), tiny_discriminator(SHAPE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "run"
    flags = ["--steps", "300", "--width", "64", "--evaluation-samples", "0", "--checkpoint-every", "100", "--cpu"]
    assert main(["train", *flags, "--output-dir", str(folder)]) == 0
    return folder


# The numbers


def test_covectors_are_the_slopes_of_the_logit_at_samples_and_latents(networks, latents):
    generator, discriminator = networks
    z, step = latents(BATCH), 1e-6
    wish = wishes(generator, discriminator, z)
    assert torch.equal(wish.samples, generator(z))
    assert torch.equal(wish.logits, discriminator(wish.samples)[:, 0])
    for found, points, logit in (
        (wish.covectors, wish.samples, discriminator),
        (wish.latents, z, lambda latent: discriminator(generator(latent))),
    ):
        expected = torch.zeros_like(points)
        for index in np.ndindex(points.shape):
            ends = []
            for sign in (1, -1):
                moved = points.detach().clone()
                moved[index] += sign * step
                ends.append(float(logit(moved).detach()[index[0], 0]))
            expected[index] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_looking_leaves_networks_as_they_are(networks, latents):
    generator, discriminator = networks
    discriminator.insert(1, nn.BatchNorm1d(6).double())
    before = [tensor.clone() for network in networks for tensor in network.state_dict().values()]
    z = latents(BATCH)
    wishes(generator, discriminator, z)
    layer_norms(generator, discriminator, z)
    randomisation_check(generator, discriminator, z)
    after = [tensor for network in networks for tensor in network.state_dict().values()]
    assert all(map(torch.equal, before, after))
    assert all(part.training for network in networks for part in network.modules())
    assert all(p.requires_grad and p.grad is None for network in networks for p in network.parameters())


def test_layers_hear_the_pulled_back_covectors(networks, latents):
    generator, discriminator = networks
    z = latents(BATCH)
    covectors = wishes(generator, discriminator, z).covectors
    found = layer_norms(generator, discriminator, z)
    assert list(found) == ["0", "2"]
    generator(z).backward(covectors / BATCH)  # g = (1/B) sum_i J_i^T c_i
    for name, layer in (("0", generator[0]), ("2", generator[2])):
        g = math.hypot(float(layer.weight.grad.norm()), float(layer.bias.grad.norm()))
        theta = math.hypot(float(layer.weight.detach().norm()), float(layer.bias.detach().norm()))
        assert found[name] == pytest.approx((g, theta), rel=1e-9)


def test_coordinates_heard_are_counted_by_their_evenness():
    even = torch.ones(4, 10)
    assert coordinates_heard(even) == pytest.approx(10)
    assert coordinates_heard(even * (torch.arange(10) < 3)) == pytest.approx(3)
    # v = (9, 1): 10^2 / 82
    assert coordinates_heard(torch.tensor([[3.0, -1.0], [-3.0, 1.0]])) == pytest.approx(100 / 82)


def test_rank_correlation_is_spearmans():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 4, 30))
    a[0], b[1] = a[0].round(), b[1].round()  # with ties
    b[2] = np.exp(a[2])
    found = rank_correlation(torch.from_numpy(a).reshape(4, 5, 6), torch.from_numpy(b).reshape(4, 5, 6))
    np.testing.assert_allclose(found, [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)], atol=1e-12)
    assert float(found[2]) == pytest.approx(1)
    assert float(rank_correlation(torch.ones(1, 5), torch.arange(5.0)[None])) == 0


# The sanity check


def test_maps_of_a_trained_discriminator_change_with_its_weights(run):
    z = torch.randn(16, 64)
    cascade = randomisation_check(load_generator(run), load_discriminator(run), z)
    assert [name for name, _, _ in cascade] == ["layers.4", "layers.2", "layers.0"]
    assert abs(cascade[-1][1]) < 0.25
    assert abs(cascade[-1][2]) < 0.35


def test_maps_that_do_not_depend_on_the_weights_are_found_out(networks, latents):
    class Edge(nn.Module):
        """Its covector is the sample itself, whatever the weight, as with an edge detector."""

        def __init__(self):
            super().__init__()
            self.shift = nn.Linear(1, 1).double()

        def forward(self, x):
            return x.flatten(1).square().sum(dim=1, keepdim=True) + self.shift.bias

    ((name, signed, absolute),) = randomisation_check(networks[0], Edge(), latents(BATCH))
    assert name == "shift"
    assert (signed, absolute) == (pytest.approx(1), pytest.approx(1))


def test_the_cascade_keeps_what_it_has_shuffled(networks, latents):
    generator, discriminator = networks
    z = latents(BATCH)
    cascade = randomisation_check(generator, discriminator, z, seed=3)
    assert cascade == randomisation_check(generator, discriminator, z, seed=3)
    assert [name for name, _, _ in cascade] == ["3", "1"]
    by_hand, draw = nn.Sequential(*discriminator), torch.Generator().manual_seed(3)
    original = wishes(generator, discriminator, z).covectors
    for (_, signed, _), layer in zip(cascade, (by_hand[3], by_hand[1]), strict=True):
        for parameter in (layer.weight, layer.bias):
            order = torch.randperm(parameter.numel(), generator=draw)
            parameter.data = parameter.data.flatten()[order].reshape(parameter.shape)
        now = wishes(generator, by_hand, z).covectors
        assert signed == pytest.approx(float(rank_correlation(original, now).mean()), abs=1e-12)


# From covectors to pictures


def test_an_images_map_is_its_covector_on_its_own_scale():
    codec = ImageCodec((3, 10, 10), "tanh")
    covectors = torch.randn(2, 3, 10, 10)
    covectors[1] *= 1000
    changes = pixel_changes(codec, torch.zeros(2, 3, 10, 10), covectors)
    for change, covector in zip(changes, covectors, strict=True):
        whole = covector.sum(dim=0)
        full = np.quantile(whole.abs().numpy(), 0.99)
        torch.testing.assert_close(change, (whole / full).clamp(-1, 1), rtol=1e-4, atol=1e-6)
    assert torch.equal(pixel_changes(codec, covectors, torch.zeros_like(covectors)), torch.zeros(2, 10, 10))


def test_a_sounds_map_shows_the_tone_that_is_wanted_louder_and_the_one_that_is_not():
    codec = SpeechCodec(8000, 4096)
    time = torch.arange(4096) / 8000
    low, high = torch.sin(2 * math.pi * 500 * time), torch.sin(2 * math.pi * 3000 * time)
    samples, covectors = (0.3 * (low + high))[None, None], (high - low)[None, None]
    change = pixel_changes(codec, samples, covectors)[0]
    assert change.shape == (64, 64)
    row = {hertz: round(63.5 - hertz / 4000 * 64) for hertz in (500, 3000)}  # low frequencies are at the bottom
    middle = change[:, 8:56].mean(dim=1)
    assert float(middle[row[3000] - 2 : row[3000] + 3].max()) > 0.5
    assert float(middle[row[500] - 2 : row[500] + 3].min()) < -0.5


def test_silence_is_not_painted():
    codec = SpeechCodec(8000, 4096)
    samples = torch.zeros(1, 1, 4096)
    samples[..., :2048] = torch.randn(2048) * 0.2
    change = pixel_changes(codec, samples, torch.randn(1, 1, 4096))[0]
    assert float(change[:, 36:].abs().mean()) < 0.2 * float(change[:, :28].abs().mean())


def test_the_letter_wanted_is_the_one_with_the_largest_gain():
    samples = nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 4).float()
    covectors = torch.tensor([[[0.0, 1.0, 3.0, 2.5], [0.0, -1.0, 5.0, 4.0], [-2.0, -3.0, -1.0, -4.0]]])
    best, gain = letter_wishes(samples, covectors)
    assert best.tolist() == [[2, 2, 2]]
    assert gain.tolist() == [[2.0, 0.0, 1.0]]


def test_overlay_blends_grey_into_orange_and_blue():
    base = torch.tensor([0, 255], dtype=torch.uint8).repeat(2, 1).reshape(1, 1, 2, 2)
    drawn = overlay(base, torch.tensor([[[1.0, -1.0], [0.0, 0.5]]]))[0].permute(1, 2, 0)
    assert drawn[0, 0].tolist() == list(MORE)
    assert drawn[0, 1].tolist() == list(LESS)
    assert drawn[1, 0].tolist() == [30, 30, 30]
    assert drawn[1, 1].tolist() == [round((140 + c) / 2) for c in MORE]


@pytest.mark.parametrize("weights", [(0.2126, 0.7152, 0.0722), (0.567, 0.433, 0.0), (0.0, 0.433, 0.567)])
def test_the_two_colours_differ_and_outshine_what_lies_below(weights):
    """In luminance for those who see no colour; and in the mixtures that are left without red or blue receptors."""
    less, more = (np.array(colour) for colour in (LESS, MORE))
    assert min(less @ np.array(weights), more @ np.array(weights)) > 75
    assert np.abs(less.astype(int) - more).max() > 150


def test_letters_are_drawn_stronger_where_more_is_gained():
    drawn = np.asarray(letters([["a", "b"], ["c", "b"]], [1.0, 0.0]))
    assert (drawn[-3, 2] == MORE).all()
    assert not (drawn == MORE).all(axis=-1)[:, 16:].any()


def test_a_text_is_drawn_as_two_rows_of_letters():
    codec = TextCodec("\0 ab", 3)
    draw, legend = draw_tiles(codec)
    samples = codec.to_samples(torch.tensor([[2, 1, 0]]))
    (tile,) = draw(samples, torch.randn(1, 3, 4))
    assert legend is None
    assert tile.size == (3 * 15, 2 * 19)


def test_sheets_and_bars_hold_what_they_are_given(tmp_path):
    tile = Picture.new("RGB", (50, 40), "white")
    write_sheet(tmp_path / "sheet.png", [(tile, "one"), (tile, "two"), (tile, "three")], 2, "a title", ("less", "more"))
    with Picture.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture)
    assert (pixels == 255).all(axis=-1).sum() >= 3 * 50 * 40
    write_bars(tmp_path / "bars.png", [("group", [("first", 1.0), ("second", 0.5)]), ("none", [("zero", 0.0)])])
    with Picture.open(tmp_path / "bars.png") as picture:
        bars = (np.asarray(picture) == MORE).all(axis=-1).sum(axis=1)
    assert bars.max() == 361
    assert 181 in bars


# The command


def test_explain_writes_pictures_and_tells_what_they_show(run, tmp_path, capsys):
    capsys.readouterr()
    assert main(["explain", str(run), "--out", str(tmp_path / "out"), "--n", "4"]) == 0
    out = capsys.readouterr().out
    assert "D's logit of the 4 samples is " in out
    assert "from step 100 to step 300 the norm of D's covectors went from " in out
    assert "10 steps of refine take the logit of 4 samples from " in out
    assert "so they tell what D has learned" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"maps.png", "refine.png", "training.png", "layers.png", "layers.json"}
    for name in names - {"layers.json"}:
        with Picture.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 100
            assert len(picture.getcolors(2**20)) > 20
    facts = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert [layer["name"] for layer in facts["layers"]] == ["layers.0", "layers.2", "layers.4"]
    assert len(facts["latents"]) == 64
    assert 1 <= facts["coordinates_heard"] <= 64


def test_explain_repeats_for_a_seed(run, tmp_path):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        explain(str(run), tmp_path / name, count=2, seed=seed)
        pictures.append((tmp_path / name / "maps.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_film_of_refinement_takes_the_calibrated_discriminator(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    explain(str(folder), tmp_path / "before", 2)
    recipe = read_recipe(folder / "discriminator")
    save_network(folder / "calibrated" / "discriminator", recipe.discriminator(), recipe)
    explain(str(folder), tmp_path / "after", 2)
    same = {
        name: (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
        for name in ("maps.png", "training.png", "refine.png")
    }
    assert same == {"maps.png": True, "training.png": True, "refine.png": False}


def test_explain_takes_a_model_from_the_hub_that_was_published_with_its_discriminator(run, tmp_path, hub):
    repository = tmp_path / "repository"
    shutil.copytree(run / "generator", repository)
    hub.add_folder("ada/model", repository, "model")
    with pytest.raises(UsageError, match="'ada/model' has no discriminator/"):
        explain("ada/model", tmp_path / "out", 3)
    shutil.copytree(run / "discriminator", repository / "discriminator")
    hub.add_folder("ada/model", repository, "model")
    told = explain("ada/model", tmp_path / "out", 3)
    [mine] = [sentence for sentence in explain(str(run), tmp_path / "mine", 3) if sentence.startswith("D's logit")]
    assert told[0] == mine
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "maps.png",
        "refine.png",
        "layers.png",
        "layers.json",
    }
    assert (tmp_path / "out" / "maps.png").read_bytes() == (tmp_path / "mine" / "maps.png").read_bytes()


def test_a_stage_of_training_is_drawn_narrow_enough_for_a_phone(tmp_path):
    codec = TextCodec("\0 abenortv", 15)
    arguments = {"sample_shape": list(codec.sample_shape), "latent_size": 8, "width": 8, "depth": 2, "output": "tanh"}
    recipe = Recipe("text", arguments, codec.to_json())
    networks = recipe.generator(), recipe.discriminator()
    write_stage(tmp_path / "stage.png", *networks, codec, torch.randn(4, 8), {})
    with Picture.open(tmp_path / "stage.png") as picture:
        assert picture.width < 520
    for parameter in networks[1].parameters():
        parameter.data.fill_(math.nan)
    write_stage(tmp_path / "none.png", *networks, codec, torch.randn(4, 8), {})
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("adapter", ["text", "speech"])
def test_explain_serves_other_kinds_of_samples(adapter, tmp_path):
    codec = {"text": TextCodec("\0 abenortv", 7), "speech": SpeechCodec(8000, 1024)}[adapter]
    arguments = {"sample_shape": list(codec.sample_shape), "latent_size": 8, "width": 8, "depth": 2, "output": "tanh"}
    recipe = Recipe(adapter, {**arguments, "classes": 3}, codec.to_json())
    save_network(tmp_path / "generator", recipe.generator(), recipe)
    save_network(tmp_path / "discriminator", recipe.discriminator(), recipe)
    assert main(["explain", str(tmp_path), "--out", str(tmp_path / "out"), "--n", "3"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"maps.png", "refine.png", "layers.png", "layers.json"} | (
        {"letters.txt"} if adapter == "text" else set()
    )
    if adapter == "text":
        table = (tmp_path / "out" / "letters.txt").read_text().splitlines()
        assert len(table) == 1 + 3 * (1 + 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "0"], "--n must be between 1 and 64, got 0"),
        (["--seed", "-1"], "--seed must be between 0 and"),
        (["--revision", "main"], "a revision is for a name on the Hub"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, capsys, flags, message):
    capsys.readouterr()
    assert main(["explain", str(run), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_discriminator_is_told(run, tmp_path):
    with pytest.raises(UsageError, match="holds a generator alone"):
        explain(str(run / "generator"), tmp_path / "out")
