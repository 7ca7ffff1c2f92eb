"""A generator that copies is caught, one that does not is not; the null intervals hold on fresh real samples."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from scipy.stats import betabinom
from sklearn.neighbors import NearestNeighbors

from gac_plugin.training import train
from gac_plugin.training.assess import assess
from gac_plugin.training.config import Config
from gac_plugin.training.data import load_data
from gac_plugin.training.judging.evaluate import Features, make_features
from gac_plugin.training.judging.memorisation import PAIRS, _interval_of_fresh, draw_pairs, memorisation, nearest

PIXELS = Features("pixels", lambda pixels: pixels.flatten(1).float())


def noise(n: int, seed: int, spread: float = 40.0, shape: tuple[int, ...] = (1, 3, 3)) -> torch.Tensor:
    """Fresh samples of one distribution, as pictures."""
    draw = torch.Generator().manual_seed(seed)
    return (128 + spread * torch.randn(n, *shape, generator=draw)).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def digits():
    data = load_data(Config())
    return data, make_features(data.train, data.test, 0, torch.device("cpu"), "pixels")


def copies(pixels: torch.Tensor, count: int, spread: float, seed: int = 5) -> torch.Tensor:
    """A memoriser: training samples with small noise."""
    draw = torch.Generator().manual_seed(seed)
    chosen = pixels[torch.randint(len(pixels), (count,), generator=draw)].float()
    return (chosen + spread * torch.randn(chosen.shape, generator=draw)).clamp(0, 255).to(torch.uint8)


def test_a_planted_memoriser_is_caught(digits):
    data, features = digits
    real, held_out = data.train.values, data.test.values
    found, pairs = memorisation(features, real, held_out, copies(real, 1000, spread=6.0))
    assert found.memorises
    assert found.closer > 0.9
    assert found.copied > 0.99
    assert found.authenticity < 0.1 < 0.4 < found.authenticity_real < 0.7
    assert re.fullmatch(
        r"memorises: (9\d|100)% of samples are closer to a training sample than 5% of real ones are "
        r"\(by chance 2% to 8%\); for 100% the nearest real sample is a training one \(by chance 77% to 83%\)",
        found.verdict,
    )
    assert (found.generated_samples, found.training_samples, found.held_out_samples) == (1000, 1437, 360)
    assert len(pairs[0]) == len(pairs[1]) == PAIRS


def test_a_generator_that_copies_one_time_in_five_is_caught(digits):
    data, features = digits
    half = len(data.test) // 2
    fresh, held_out = data.test.values[:half], data.test.values[half:]
    generated = torch.cat([fresh, copies(data.train.values, half // 4, spread=6.0)])
    found, _ = memorisation(features, data.train.values, held_out, generated)
    assert found.memorises
    assert 0.15 < found.closer < 0.35


def test_copies_of_held_out_samples_are_no_memorisation(digits):
    """They are close to real samples, which alone says nothing."""
    data, features = digits
    found, _ = memorisation(features, data.train.values, data.test.values, copies(data.test.values, 1000, spread=6.0))
    assert not found.memorises
    assert found.copied < 0.05


def test_typical_samples_are_no_memorisation():
    """Less varied than the data, and therefore closer to them than real ones, but to all alike."""
    found, _ = memorisation(PIXELS, noise(600, 0), noise(300, 1), noise(500, 2, spread=20.0))
    assert found.closer > found.closer_null[1] > 0.05
    assert found.copied < found.copied_null[1]
    assert not found.memorises
    assert found.verdict.startswith("no sign of memorisation: ")


def test_fresh_real_samples_fall_into_both_intervals_nineteen_times_in_twenty():
    outside = np.zeros(2)
    runs = 100
    for seed in range(runs):
        parts = noise(340, seed).split((120, 100, 120))
        found, _ = memorisation(PIXELS, *parts)
        outside += [
            not found.closer_null[0] <= found.closer <= found.closer_null[1],
            not found.copied_null[0] <= found.copied <= found.copied_null[1],
        ]
    assert (outside / runs <= 0.12).all()
    assert (outside > 0).all()


def test_the_interval_of_fresh_samples_is_that_of_the_beta_binomial():
    low, high = _interval_of_fresh(18, 360, 1000)
    exact = betabinom(1000, 18, 343)
    assert (low, high) == pytest.approx(
        (exact.mean() - 1.96 * exact.std(), exact.mean() + 1.96 * exact.std()) / np.array(1000)
    )
    assert (low, high) == pytest.approx(np.array(exact.interval(0.95)) / 1000, abs=0.006)


def test_the_interval_of_copied_samples_is_that_of_all_choices_of_training_samples():
    t, h, g = noise(60, 0), noise(20, 1), noise(200, 2)
    found, _ = memorisation(PIXELS, t, h, g)
    pool = torch.cat([t, h]).flatten(1).double().numpy()
    index = NearestNeighbors(n_neighbors=1).fit(pool).kneighbors(g.flatten(1).numpy(), return_distance=False)[:, 0]
    assert found.copied == pytest.approx((index < 60).mean())
    draw = np.random.default_rng(0)
    shares = [np.isin(index, draw.permutation(80)[:60]).mean() for _ in range(4000)]
    middle, spread = np.mean(found.copied_null), np.diff(found.copied_null)[0] / (2 * 1.96)
    assert middle == pytest.approx(0.75)
    assert spread == pytest.approx(np.std(shares), rel=0.06)


def test_authenticity_is_alaa_s():
    t, h, g = noise(50, 0), noise(30, 1), copies(noise(50, 0), 200, spread=35.0)
    found, _ = memorisation(PIXELS, t, h, g)
    train = t.flatten(1).double().numpy()
    tree = NearestNeighbors(n_neighbors=2).fit(train)
    between = tree.kneighbors(train)[0][:, 1]
    for samples, told in ((g, found.authenticity), (h, found.authenticity_real)):
        distances, source = tree.kneighbors(samples.flatten(1).double().numpy(), n_neighbors=1)
        expected = (distances[:, 0] > between[source[:, 0]]).mean()
        assert told == pytest.approx(expected)
    assert 0.2 < found.authenticity < 0.8


def test_samples_that_stand_in_both_splits_are_not_taken_for_copies():
    """Short texts repeat: a third of the held-out ones are training samples, and of the generated ones as many."""
    words = noise(300, 0)
    held_out = torch.cat([words[:50], noise(100, 1)])
    found, _ = memorisation(PIXELS, words, held_out, torch.cat([words[50:150], noise(200, 2)]))
    assert found.near == pytest.approx(1 / 3)
    assert found.closer == pytest.approx(1 / 3)
    assert found.closer_null[0] < 1 / 3 < found.closer_null[1]
    assert not found.memorises
    found, _ = memorisation(PIXELS, words, held_out, words[:50])
    assert 0.3 < found.copied < 0.7, "those that stand in both splits are nearest to either"


def test_neighbours_are_found_and_oneself_is_none():
    points = torch.tensor([[0.0], [1.0], [1.0], [4.0]]).double()
    distances, index = nearest(points, points, apart=torch.arange(4))
    assert distances.tolist() == [1, 0, 0, 3]
    assert index[1:3].tolist() == [2, 1]
    assert nearest(points + 1e-9, points)[0].tolist() == pytest.approx([1e-9] * 4, rel=1e-6)


def test_the_closest_pairs_are_drawn_above_each_other(tmp_path):
    train, generated = noise(40, 0, shape=(1, 48, 48)), noise(30, 1, shape=(1, 48, 48))
    generated[7] = train[11]
    _, pairs = memorisation(PIXELS, train, noise(10, 2, shape=(1, 48, 48)), generated)
    assert (int(pairs[0][0]), int(pairs[1][0])) == (7, 11)
    draw_pairs(tmp_path / "pairs.png", generated, train, pairs)
    with Picture.open(tmp_path / "pairs.png") as picture:
        assert picture.size == (PAIRS * 52 + 4, 2 * 52 + 4)
        shown = np.asarray(picture)
    for column in range(PAIRS):
        for row, pixels, numbers in ((0, generated, pairs[0]), (1, train, pairs[1])):
            tile = shown[row * 52 + 4 :, column * 52 + 4 :][:48, :48]
            assert np.array_equal(tile, pixels[numbers[column], 0].numpy())


def test_a_healthy_run_is_not_taken_for_a_memoriser(tmp_path):
    train(Config(steps=300, evaluation_samples=500, output_dir=str(tmp_path / "run"), cpu=True))
    found = assess(tmp_path / "run", resamples=0).memorisation
    assert not found.memorises
    written = json.loads((tmp_path / "run" / "memorisation.json").read_text())
    assert written["verdict"] == found.verdict
    assert written["verdict"].startswith("no sign of memorisation: ")
    assert written["features"] == "64 principal components of the pixels in [0, 1]"
    assert (tmp_path / "run" / "memorisation.png").is_file()
    assert found.verdict in (tmp_path / "run" / "generator" / "README.md").read_text()
    train(Config(steps=301, evaluation_samples=0, output_dir=str(tmp_path / "run"), resume="auto", cpu=True))
    assert not list((tmp_path / "run").glob("memorisation.*")), "the generator is another one now"
    assert "was not examined" in (tmp_path / "run" / "generator" / "README.md").read_text()


def test_without_held_out_samples_nothing_is_said_of_copies(tmp_path):
    settings = {"test_split": "train", "steps": 1, "evaluation_samples": 0, "width": 8}
    train(Config(**settings, output_dir=str(tmp_path / "run"), cpu=True))
    found = assess(tmp_path / "run", resamples=0, samples=50)
    assert found.memorisation is None
    assert "was not examined" in (tmp_path / "run" / "generator" / "README.md").read_text()
