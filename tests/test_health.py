"""Alarms: collapse and an overpowering discriminator, said once, and not said of a game that is well."""

import pytest
import torch

from gac_plugin.losses import LOSSES
from gac_plugin.training.health import IN_A_ROW, Health, diversity, nearest_distance

WELL = {"loss_d": 1.3, "diversity": 0.9}


def test_the_nearest_distance_is_the_median_over_the_samples():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0], [20.0, 0.0], [20.0, 2.5]])
    # nearest others: 5, 1, 1, 2.5, 2.5
    assert float(nearest_distance(points)) == pytest.approx(2.5)


def test_diversity_is_one_for_the_data_and_small_for_a_few_modes():
    numbers = torch.Generator().manual_seed(0)
    real, other = torch.randn(2, 64, 3, 4, 4, generator=numbers).unbind()
    scale = nearest_distance(real)
    assert float(diversity(other, scale)) == pytest.approx(1, abs=0.1)
    modes = other[:4].repeat(16, 1, 1, 1) + 0.01 * torch.randn(64, 3, 4, 4, generator=numbers)
    assert float(diversity(modes, scale)) < 0.05
    assert float(diversity(torch.ones(64, 3, 4, 4), scale)) == 0


@pytest.mark.parametrize(
    ("name", "sick", "message"),
    [
        ("collapsed", {"loss_d": 1.3, "diversity": 0.02}, "step 2: the generator has collapsed: its samples are 2% as"),
        (
            "overpowering",
            {"loss_d": 0.004, "diversity": 0.9},
            "the discriminator overpowers the generator: its loss is 0.004",
        ),
    ],
)
def test_an_alarm_is_said_once_for_as_long_as_it_lasts(name, sick, message):
    said = []
    health = Health(LOSSES["bce"], said.append)
    in_force = [health.observe(step, figures) for step, figures in enumerate([sick] * 5 + [WELL] + [sick] * 3)]
    assert in_force == [[], [], [name], [name], [name], [], [], [], [name]]
    assert len(said) == 2
    assert message in said[0]


def test_two_signs_in_a_row_are_no_alarm():
    said = []
    health = Health(LOSSES["bce"], said.append)
    for figures in ({"loss_d": 0.0, "diversity": 0.0}, {"loss_d": 0.0, "diversity": 0.0}, WELL) * 3:
        assert health.observe(1, figures) == []
    assert said == []


@pytest.mark.parametrize("loss", LOSSES)
def test_a_discriminator_that_is_sure_and_right_overpowers(loss):
    """Real logits far above generated ones; wasserstein has no floor to come near to."""
    health = Health(LOSSES[loss], lambda text: None)
    sure = LOSSES[loss].discriminator(
        torch.full((4, 1), 1.0 if loss == "mse" else 9.0), torch.full((4, 1), 0.0 if loss == "mse" else -9.0)
    )
    for _ in range(IN_A_ROW):
        alarms = health.observe(1, {"loss_d": float(sure.mean())})
    assert alarms == ([] if loss == "wasserstein" else ["overpowering"])
    undecided = LOSSES[loss].discriminator(torch.zeros(4, 1), torch.zeros(4, 1))
    assert health.observe(2, {"loss_d": float(undecided.mean())}) == []


def test_the_count_goes_on_from_its_state():
    first, said = Health(LOSSES["bce"], print), []
    for _ in range(IN_A_ROW - 1):
        first.observe(1, {"loss_d": 0.0})
    second = Health(LOSSES["bce"], said.append)
    second.load_state_dict(first.state_dict())
    assert second.observe(2, {"loss_d": 0.0}) == ["overpowering"]
    assert len(said) == 1
