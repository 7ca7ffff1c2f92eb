"""Latents and the samples that are made of them: seeds, truncation, the way between two latents."""

import math

import adapter_samples
import numpy as np
import pytest
import torch
from scipy.stats import norm, truncnorm

from gac_plugin.cli import main
from gac_plugin.errors import UsageError
from gac_plugin.training.data import codec_of
from gac_plugin.training.generate import class_labels, draw_latents, generate, slerp, truncate
from gac_plugin.training.hub import save_network

RECIPE = adapter_samples.recipe("mlp")


@pytest.mark.parametrize("bound", [0.04, 0.5, 2.0, 6.0])
def test_truncation_maps_quantiles_to_quantiles(bound):
    probabilities = np.linspace(0.0001, 0.9999, 999)
    latents = torch.from_numpy(norm.ppf(probabilities)).view(9, 111)
    expected = truncnorm.ppf(probabilities, -bound, bound).reshape(9, 111)
    assert truncate(latents, bound).numpy() == pytest.approx(expected, abs=1e-9)


def test_truncation_keeps_far_latents_inside_and_a_wide_bound_changes_nothing():
    latents = torch.tensor([[-40.0, -9.0, 0.0, 9.0, 40.0]])
    assert truncate(latents, 0.75).tolist() == [[-0.75, -0.75, 0.0, 0.75, 0.75]]
    drawn = torch.randn(100, 7)
    assert torch.allclose(truncate(drawn, 50.0), drawn, rtol=1e-6, atol=0)
    assert truncate(drawn, 1.0).dtype == torch.float32


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_bounds_nothing_is_an_error(bound):
    with pytest.raises(UsageError, match=rf"the truncation must be a positive number, got {bound}"):
        truncate(torch.zeros(1, 1), bound)


def test_samples_are_those_of_the_seeds_truncated_latents():
    generator = RECIPE.generator().eval()
    latents = torch.randn(6, RECIPE.latent_size, generator=torch.Generator().manual_seed(3))
    for bound, z in ((None, latents), (0.5, truncate(latents, 0.5))):
        with torch.no_grad():
            expected = codec_of(RECIPE).to_stored(generator(z))
        assert torch.equal(generate(generator, RECIPE, 6, seed=3, truncation=bound), expected)
        assert torch.equal(draw_latents(RECIPE, 6, 3, bound), z)


def test_labels_are_one_class_or_all_in_turn():
    conditional = adapter_samples.recipe("mlp", classes=3)
    assert class_labels(conditional, 5).tolist() == [0, 1, 2, 0, 1]
    assert class_labels(conditional, 2, 2).tolist() == [2, 2]
    assert class_labels(RECIPE, 5) is None


def test_slerp_turns_at_a_constant_speed_from_exactly_one_latent_to_the_other():
    start, end = torch.randn(4, 6), 3 * torch.randn(4, 6)
    way = slerp(start, end, 5)
    assert way.shape == (5, 4, 6)
    assert torch.equal(way[0], start)
    assert torch.equal(way[-1], end)
    for row in range(4):
        a, b = start[row].numpy().astype(float), end[row].numpy().astype(float)
        whole = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for frame in range(5):
            z = way[frame, row].numpy().astype(float)
            length = np.linalg.norm(z)
            assert length == pytest.approx(
                np.linalg.norm(a) + (np.linalg.norm(b) - np.linalg.norm(a)) * frame / 4, rel=1e-5
            )
            turned = [math.acos(min(1.0, other @ z / np.linalg.norm(other) / length)) for other in (a, b)]
            assert turned == pytest.approx([whole * frame / 4, whole * (4 - frame) / 4], abs=1e-3)


def test_slerp_on_a_line_through_the_origin_is_that_line():
    start, end = torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([[2.0], [-1.0], [2.0]])
    expected = [[1.0, 1.0, 2.0], [1.5, 0.0, 2.0], [2.0, -1.0, 2.0]]
    assert slerp(start, end, 3).squeeze(-1).numpy() == pytest.approx(np.array(expected), abs=1e-6)


def test_gac_sample_truncates(tmp_path, capsys):
    save_network(tmp_path / "generator", RECIPE.generator(), RECIPE)
    pictures = []
    for name, flags in (("a", []), ("b", ["--truncation", "0.5"]), ("c", ["--truncation", "0.5"])):
        assert main(["sample", str(tmp_path), "--n", "4", "--out", str(tmp_path / f"{name}.png"), *flags]) == 0
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] != pictures[1] == pictures[2]
    capsys.readouterr()
    assert main(["sample", str(tmp_path), "--out", str(tmp_path / "d.png"), "--truncation", "0"]) == 2
    assert capsys.readouterr().err == "gac: error: the truncation must be a positive number, got 0.0\n"
    assert not (tmp_path / "d.png").exists()
