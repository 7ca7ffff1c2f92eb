"""Diagnostics of a step: what they are, at which steps they come, and that they change and wait for nothing."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from gac_plugin import GAC, ConjugateGradient, UsageError
from gac_plugin.diagnostics import accuracies, step_figures

BATCH, SHAPE = 6, (2, 3)
DIAGNOSTICS = {"accuracy_real", "accuracy_fake", "norm_c", "norm_g", "update", "cosine"}
both_schedules = pytest.mark.parametrize("schedule", ["fresh", "fused"])


@pytest.fixture
def networks(tiny_generator, tiny_discriminator):
    return tiny_generator(SHAPE), tiny_discriminator(SHAPE)


@pytest.fixture
def batches(latents):
    return [(torch.randn(BATCH, *SHAPE, dtype=torch.float64), latents(BATCH)) for _ in range(8)]


def gac_of(networks, make=lambda p: torch.optim.Adam(p, 0.05, (0.5, 0.9)), **options):
    return GAC(*networks, *(make(network.parameters()) for network in networks), **options)


def flat(network) -> np.ndarray:
    return np.concatenate([parameter.detach().numpy().ravel().copy() for parameter in network.parameters()])


def test_accuracies_are_shares_on_either_side_of_the_mean_logits_middle():
    # head 1: means 2 and -1, border 0.5; head 2: means 0 and 1, border 0.5
    real = [torch.tensor([[4.0], [0.6], [0.4], [3.0]]), torch.tensor([0.0, 1.0, -1.0, 0.0])]
    fake = [torch.tensor([[-4.0], [0.7], [0.3], [-1.0]]), torch.tensor([1.0, 0.4, 2.0, 0.6])]
    found = accuracies(real, fake)
    assert float(found["accuracy_real"]) == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert float(found["accuracy_fake"]) == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_the_cosine_is_that_of_all_tensors_as_one_vector():
    d = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    back = [torch.tensor([0.0, 7.0]), torch.tensor([[-2.0]])]
    theta = [torch.tensor([6.0, 0.0]), torch.tensor([[8.0]])]
    figures = {name: float(value) for name, value in step_figures(d, back, theta).items()}
    assert figures == pytest.approx({"update": 5 / 10, "cosine": -8 / (5 * math.sqrt(53))})
    assert step_figures(d, [], theta).keys() == {"update"}
    still = [torch.zeros(2), torch.zeros(1, 1)]
    assert {name: float(value) for name, value in step_figures(still, d, still).items()} == {"update": 0, "cosine": 0}


@both_schedules
@pytest.mark.parametrize("make", [None, lambda p: ConjugateGradient(p, 0.05, "pr+")], ids=["adam", "conjugate"])
def test_a_step_reports_what_numpy_finds(make, schedule, networks, batches):
    gac = gac_of(networks, **({"make": make} if make else {}), schedule=schedule, diagnose_every=1)
    generator, walked = networks[0], []
    for real, z in batches:
        start, (_, judge) = flat(generator), copy.deepcopy(networks)
        stats = gac.step(real, z)
        if schedule == "fresh":
            judge = networks[1]
        before = copy.deepcopy(generator)
        torch.nn.utils.vector_to_parameters(torch.from_numpy(start), before.parameters())
        x = before(z).detach().requires_grad_(True)
        weight = 1 - torch.sigmoid(judge(x).detach())  # the score log D
        (slope,) = torch.autograd.grad((weight * judge(x)).sum(), x)
        norms = np.linalg.norm(slope.numpy().reshape(BATCH, -1), axis=1)
        assert float(stats["norm_c"]) == pytest.approx(norms.mean(), rel=1e-9)
        gradient = np.concatenate([parameter.grad.numpy().ravel() for parameter in generator.parameters()])
        assert float(stats["norm_g"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-9)
        walked.append(flat(generator) - start)
        assert float(stats["update"]) == pytest.approx(np.linalg.norm(walked[-1]) / np.linalg.norm(start), rel=1e-9)
        if len(walked) > 1:
            a, b = walked[-2:]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert float(stats["cosine"]) == pytest.approx(cosine, rel=1e-6, abs=1e-9)
        else:
            assert "cosine" not in stats


@both_schedules
def test_they_come_at_the_first_step_and_every_kth(schedule, networks, batches):
    gac = gac_of(networks, schedule=schedule, diagnose_every=3)
    seen = [gac.step(*batch).keys() & DIAGNOSTICS for batch in batches]
    without = DIAGNOSTICS - {"cosine"}
    assert seen == [without, set(), DIAGNOSTICS, set(), set(), DIAGNOSTICS, set(), set()]
    assert gac_of(networks).step(*batches[0]).keys() & DIAGNOSTICS == set()


@both_schedules
def test_looking_changes_nothing(schedule, networks, batches):
    others = copy.deepcopy(networks)
    looked_at, left_alone = gac_of(networks, schedule=schedule, diagnose_every=1), gac_of(others, schedule=schedule)
    for batch in batches:
        looked_at.step(*batch)
        left_alone.step(*batch)
    for one, other in zip(networks, others, strict=True):
        assert np.array_equal(flat(one), flat(other))


@both_schedules
def test_looking_never_waits_for_the_device(schedule, networks, batches, host_reads):
    gac = gac_of(
        networks, lambda p: ConjugateGradient(p, 0.05, "pr+"), schedule=schedule, penalty="r1", diagnose_every=2
    )
    gac.step(*batches[0])
    for batch in batches[1:]:
        with host_reads() as reads:
            gac.step(*batch)
        assert not reads.seen


@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_strategy_compares_with_the_step_before_the_interruption(every, networks, batches):
    gac = gac_of(networks, diagnose_every=every)
    for batch in batches[:3]:
        gac.step(*batch)
    others = copy.deepcopy(networks)
    resumed = gac_of(others, diagnose_every=every)
    for ours, theirs in (
        (gac.generator_optimizer, resumed.generator_optimizer),
        (gac.discriminator_optimizer, resumed.discriminator_optimizer),
        (gac, resumed),
    ):
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for batch in batches[3:]:
        one, other = gac.step(*batch), resumed.step(*batch)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_left_out_has_no_direction(networks, batches):
    gac = gac_of(networks, skip_nonfinite=True, diagnose_every=1)
    spoiled = batches[2][0] * math.nan
    for real, z in (batches[0], batches[1]):
        gac.step(real, z)
    assert gac.step(spoiled, batches[2][1]).keys().isdisjoint({"cosine", "update", "norm_g"})
    after = gac.step(*batches[3])
    assert "update" in after
    assert "cosine" not in after
    assert "cosine" in gac.step(*batches[4])


def test_a_generator_that_may_not_move_has_length_and_cosine_zero(networks, batches):
    gac = GAC(*networks, torch.optim.SGD(networks[0].parameters(), 0.0), torch.optim.SGD(networks[1].parameters(), 0.1))
    gac.diagnose_every = 1
    for batch in batches[:2]:
        stats = gac.step(*batch)
    assert (float(stats["update"]), float(stats["cosine"])) == (0, 0)


def test_an_optimizer_may_drop_the_gradients_that_it_has_used(networks, batches):
    class Tidy(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    gac = gac_of(networks, lambda p: Tidy(p, 0.1), diagnose_every=1)
    gac.step(*batches[0])
    assert DIAGNOSTICS - gac.step(*batches[1]).keys() == {"norm_g"}


def test_heads_and_patch_maps_have_accuracies(networks, batches):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.map = nn.Linear(6, 1).double(), nn.Linear(6, 4).double()

        def forward(self, x):
            return [self.one(x.flatten(1)), self.map(x.flatten(1)).reshape(-1, 1, 2, 2)]

    stats = gac_of((networks[0], Two()), diagnose_every=1).step(*batches[0])
    assert 0 <= float(stats["accuracy_real"]) <= 1
    assert float(stats["norm_c"]) > 0


def test_a_negative_interval_is_refused(networks):
    with pytest.raises(UsageError, match="diagnose_every must be at least 0, got -1"):
        gac_of(networks, diagnose_every=-1)
