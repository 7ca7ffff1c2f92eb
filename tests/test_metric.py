"""Each metric's map from covectors to directions against numpy."""

import numpy as np
import pytest
import torch

from gac_plugin.metric import METRICS, Diagonal, Identity, Spectral, kronecker, orthogonalise

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


def closed_kronecker(history, interval=10, sides=(True, True)):
    """The bases turn at each of the first `interval` steps and then after as many; `sides` says which of them do."""
    if history[0].ndim == 1:
        return closed_adam(history)
    decay, moment = SETTINGS["beta2"], 0.0
    matrices = [g.reshape(len(g), -1) for g in history]
    averages, (left, right) = [0.0, 0.0], map(np.eye, matrices[0].shape)
    for step, g in enumerate(matrices, start=1):
        if step <= interval or step % interval == 0:
            kept = decay if step <= interval else decay**interval
            averages = [kept * a + (1 - kept) * gram for a, gram in zip(averages, (g @ g.T, g.T @ g), strict=True)]
            shifted = [a + 1e-4 * np.trace(a) / len(a) * np.eye(len(a)) for a in averages]
            left = np.linalg.qr(shifted[0] @ left)[0] if sides[0] else left
            right = np.linalg.qr(shifted[1] @ right)[0] if sides[1] else right
        turned = left.T @ g @ right
        moment = decay * moment + (1 - decay) * turned**2
    direction = turned / (np.sqrt(moment / (1 - decay ** len(history))) + SETTINGS["eps"])
    return (left @ direction @ right.T).reshape(history[0].shape)


CLOSED = {
    "identity": lambda history: history[-1],
    "adam": closed_adam,
    "spectral": lambda history: polar(history[-1]),
    "kronecker": closed_kronecker,
}


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


@pytest.mark.parametrize(
    ("largest_side", "sides"),
    [(5, (True, True)), (4, (True, False)), (3, (False, False)), (2, (False, False))],
)
def test_kronecker_turns_at_intervals_and_only_sides_that_are_cheap_enough(largest_side, sides):
    batches = [draw([(3, 5)]) for _ in range(9)]
    for step, sharp in enumerate(run(kronecker(largest_side, interval=3), batches), start=1):
        expected = closed_kronecker([batch[0].numpy() for batch in batches[:step]], 3, sides)
        np.testing.assert_allclose(sharp(batches[step - 1])[0], expected, rtol=1e-9, atol=1e-12)


def test_kronecker_without_a_side_that_is_cheap_enough_is_adam_bit_for_bit():
    batches = [draw() for _ in range(5)]
    both = zip(run(kronecker(largest_side=1), batches), run(METRICS["adam"], batches), batches, strict=True)
    assert all(torch.equal(a, b) for ours, theirs, g in both for a, b in zip(ours(g), theirs(g), strict=True))


def test_kronecker_bases_become_eigenvectors_of_the_mean_products():
    draws = np.random.default_rng(0)
    (left, right), spread = (np.linalg.qr(draws.normal(size=(n, n)))[0] for n in (4, 6)), np.geomspace(1, 30, 4)
    noise = draws.normal(size=(600, 4, 6)) * spread[:, None] * np.geomspace(20, 1, 6)
    batches = [[torch.from_numpy(left @ g @ right.T)] for g in noise]
    metric, state = kronecker(interval=1), {"step": 0, **kronecker().init(batches[0][0])}
    for covectors in batches:
        state["step"] += 1
        metric.at(covectors, [state], {"beta2": 0.99, "eps": 1e-8})
    for basis, true, order in ((state["left_basis"], left, [3, 2, 1, 0]), (state["right_basis"], right, range(6))):
        alignment = np.abs(basis.numpy().T @ true[:, list(order)])
        np.testing.assert_allclose(alignment, np.eye(len(true)), atol=0.2)
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(true)), atol=1e-12)


def test_kronecker_is_a_metric_for_any_vectors():
    batches = [draw() for _ in range(3)]
    sharp = list(run(METRICS["kronecker"], batches))[-1]
    a, b = draw(), draw()
    for x, y, up_x, up_y in zip(a, b, sharp(a), sharp(b), strict=True):
        assert float((x * up_y).sum()) == pytest.approx(float((up_x * y).sum()), rel=1e-12)
        assert float((x * up_x).sum()) > 0


def test_kronecker_turns_parameters_of_16_bits_in_32():
    half = [torch.randn(3, 5).bfloat16()]
    exact = [half[0].float()]
    state = METRICS["kronecker"].init(half[0])
    assert {name: value.dtype for name, value in state.items()} == {
        "second_moment": torch.bfloat16,
        **dict.fromkeys(("left", "left_basis", "right", "right_basis"), torch.float32),
    }
    (ours,), (theirs,) = (next(run(METRICS["kronecker"], [g]))(g) for g in (half, exact))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=0.05)
