"""Each metric's map from covectors to directions against numpy."""

import numpy as np
import pytest
import torch

from gac_plugin.metric import METRICS, Diagonal, Identity, Spectral, orthogonalise

SETTINGS = {"beta2": 0.9, "eps": 1e-3}
SHAPES = [(3, 5), (4,), (2, 3, 2, 2)]
KERNELS = {"wide": (3, 7), "tall": (7, 3), "square": (5, 5), "conv": (4, 3, 2, 2), "row": (1, 6), "column": (6, 1)}


def draw(shapes=SHAPES):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def matrix(rows, columns, values):
    """A float64 matrix with the given singular values."""
    u, v = (np.linalg.qr(np.random.default_rng(s).normal(size=(n, n)))[0] for s, n in enumerate((rows, columns)))
    return (u[:, : len(values)] * values) @ v[:, : len(values)].T


def polar(g):
    """U V^T over the singular values that are not zero."""
    u, s, vt = np.linalg.svd(g.reshape(len(g), -1), full_matrices=False)
    return (u[:, s > 1e-12] @ vt[s > 1e-12]).reshape(g.shape)


def closed_adam(history):
    decay, moment = SETTINGS["beta2"], 0.0
    for g in history:
        moment = decay * moment + (1 - decay) * g**2
    return history[-1] / (np.sqrt(moment / (1 - decay ** len(history))) + SETTINGS["eps"])


CLOSED = {"identity": lambda history: history[-1], "adam": closed_adam, "spectral": lambda history: polar(history[-1])}


def test_every_metric_has_a_closed_form_here_and_stands_under_its_name():
    assert CLOSED.keys() == METRICS.keys()
    assert all(metric.name == name and metric.description for name, metric in METRICS.items())


def run(metric, batches):
    """The map after each batch of covectors has been shown, with the state that a fresh start has."""
    states = [{"step": 0, **metric.init(covector)} for covector in batches[0]]
    for covectors in batches:
        for state in states:
            state["step"] += 1
        yield metric.at(covectors, states, SETTINGS)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_have_their_closed_form_at_every_step(name):
    batches = [draw() for _ in range(4)]
    for step, sharp in enumerate(run(METRICS[name], batches), start=1):
        for i, direction in enumerate(sharp(batches[step - 1])):
            expected = CLOSED[name]([batch[i].numpy() for batch in batches[:step]])
            np.testing.assert_allclose(direction, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_ascending_in_place_adds_the_rate_times_the_direction(name):
    covectors, points = draw(), draw()
    (sharp,) = run(METRICS[name], [covectors])
    expected = [point + 0.3 * direction for point, direction in zip(points, sharp(covectors), strict=True)]
    sharp.ascend_(points, covectors, 0.3)
    torch.testing.assert_close(points, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", METRICS)
def test_directions_are_new_tensors_that_ascend(name):
    covectors = draw()
    before = [covector.clone() for covector in covectors]
    (sharp,) = run(METRICS[name], [covectors])
    for covector, direction in zip(covectors, sharp(covectors), strict=True):
        assert float((covector * direction).sum()) > 0
        direction.zero_()
    assert all(map(torch.equal, covectors, before))


@pytest.mark.parametrize("name", METRICS)
def test_a_zero_gradient_gives_a_zero_direction(name):
    zeros = [torch.zeros(shape) for shape in [*SHAPES, ()]]
    (sharp,) = run(METRICS[name], [zeros])
    assert all(map(torch.equal, sharp(zeros), zeros))


def test_the_same_map_serves_any_vector():
    diagonal, vector = [torch.tensor([2.0, 4.0])], [torch.tensor([3.0, 3.0])]
    assert torch.equal(Diagonal(diagonal)(vector)[0], torch.tensor([1.5, 0.75]))
    assert torch.equal(Identity()(vector)[0], vector[0])


@pytest.mark.parametrize("kind", KERNELS)
def test_spectral_is_the_polar_factor_of_any_kernel(kind):
    shape = KERNELS[kind]
    rows, columns = shape[0], int(np.prod(shape[1:]))
    g = 7.0 * matrix(rows, columns, np.geomspace(1.0, 0.01, min(rows, columns))).reshape(shape)
    direction = orthogonalise(torch.from_numpy(g))
    assert direction.shape == shape
    np.testing.assert_allclose(direction, polar(g), atol=1e-6, rtol=0)


def test_spectral_of_a_vector_is_its_unit_vector_and_of_a_scalar_its_sign():
    v = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    np.testing.assert_allclose(orthogonalise(v), [0.6, 0.0, -0.8], atol=1e-9)
    for scalar, sign in ((1e-3, 1.0), (-250.0, -1.0)):
        unit = orthogonalise(torch.tensor(scalar, dtype=torch.float64))
        assert unit.shape == ()
        assert float(unit) == pytest.approx(sign, abs=1e-9)


@pytest.mark.parametrize("kind", KERNELS)
def test_the_gradient_along_the_spectral_direction_is_its_nuclear_norm(kind):
    g = torch.randn(KERNELS[kind], dtype=torch.float64)
    (u,) = Spectral(eps=1e-8)([g])
    values = np.linalg.svd(g.reshape(len(g), -1).numpy(), compute_uv=False)
    assert float((g * u).sum()) == pytest.approx(values.sum(), rel=1e-6)


def test_directions_that_a_rank_deficient_gradient_lacks_stay_absent():
    g = matrix(6, 5, np.array([2.0, 1.0, 0.5]))
    u = orthogonalise(torch.from_numpy(g)).numpy()
    np.testing.assert_allclose(u, polar(g), atol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(u, compute_uv=False), [1, 1, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e15])
def test_spectral_knows_no_scale_in_float32(scale):
    g = matrix(4, 6, np.array([1.0, 0.7, 0.2, 0.05]))
    u = orthogonalise(torch.from_numpy(scale * g).float())
    np.testing.assert_allclose(u, polar(g), atol=2e-5)


def test_a_gradient_far_below_eps_is_not_blown_up_to_full_length():
    g = matrix(4, 6, np.array([1.0, 0.7, 0.2, 0.05]))
    faint = orthogonalise(torch.from_numpy(1e-19 * g), eps=1e-8)
    assert 0 < faint.abs().max() < 1e-6
