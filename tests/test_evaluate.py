"""Scores against reference implementations and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors

from gac_plugin.training.config import Config
from gac_plugin.training.data import load_data
from gac_plugin.training.evaluate import Features, evaluate, frechet_distance, make_features, precision_recall
from gac_plugin.training.source import Decoded


def normal(n: int, mean: float, scale: float, size: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed)) * scale + mean


def test_the_frechet_distance_agrees_with_the_matrix_square_root():
    a, b = normal(200, 0.0, 1.0), normal(150, 0.3, 1.5, seed=1) @ torch.randn(6, 6)
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_agrees_with_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    a, b = normal(300, 0.0, 1.0).double(), normal(300, 0.5, 2.0, seed=1).double()
    expected = _compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_equal_sets_are_at_distance_zero_even_where_features_are_degenerate():
    a = normal(50, 1.0, 1.0)
    a[:, 2] = 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_agree_with_nearest_neighbours_counted_by_scikit_learn():
    real, generated = normal(1300, 0.0, 1.0, size=3), normal(1100, 0.4, 0.7, size=3, seed=1)

    def inside(points, manifold):
        distances, _ = NearestNeighbors(n_neighbors=4).fit(manifold).kneighbors(manifold)
        return (scipy.spatial.distance.cdist(points, manifold) <= distances[:, 3]).any(axis=1).mean()

    precision, recall = precision_recall(real, generated)
    assert precision == pytest.approx(inside(generated.numpy(), real.numpy()), abs=2e-3)
    assert recall == pytest.approx(inside(real.numpy(), generated.numpy()), abs=2e-3)
    assert recall < precision < 1


def test_a_narrow_generator_is_precise_and_forgets():
    precision, recall = precision_recall(normal(500, 0.0, 1.0, size=2), normal(500, 0.0, 0.05, size=2, seed=1))
    assert precision > 0.95
    assert recall < 0.2


def test_an_evaluation_says_what_it_measured():
    features = Features("first pixel row", lambda pixels: pixels[:, 0, 0].float())
    real = torch.randint(0, 256, (80, 1, 3, 3), dtype=torch.uint8)
    generated = torch.randint(0, 256, (60, 1, 3, 3), dtype=torch.uint8)
    result = evaluate(features, real, generated)
    assert (result.features, result.real_samples, result.generated_samples) == ("first pixel row", 80, 60)
    assert result.frechet == pytest.approx(frechet_distance(real[:, 0, 0].float(), generated[:, 0, 0].float()))
    assert result.floor > 0
    assert set(result.to_json()) == {
        *("features", "frechet", "floor", "precision", "recall", "real_samples", "generated_samples")
    }


def test_labelled_data_give_a_classifier_s_features_the_same_each_time():
    data = load_data(Config())
    train, test = data.train, data.test
    features = [make_features(train, test, seed=3, device=torch.device("cpu")) for _ in range(2)]
    assert features[0].name.startswith("64 features of a classifier trained on this data set (accuracy 9")
    a, b = (f.extract(test.values) for f in features)
    assert a.shape == (360, 64)
    assert torch.equal(a, b)


@pytest.mark.parametrize("label", [None, 0, -1], ids=["no labels", "one class", "labels withheld"])
def test_data_without_labels_to_learn_give_principal_components(label):
    pixels = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    images = Decoded(pixels, None if label is None else torch.full((40,), label), "train")
    features = make_features(images, images, seed=0, device=torch.device("cpu"))
    assert features.name == "16 principal components of the pixels in [0, 1]"
    extracted = features.extract(pixels).double()
    covariance = torch.cov((pixels.double() / 255).flatten(1).T)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(extracted.var(0), eigenvalues, rtol=1e-4, atol=1e-6)
