"""The benchmarks of quality, coverage and ablation: what their figures mean, and that the defaults are what won."""

import inspect
import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import ablation, ablation_variants, cells, coverage, coverage_runs, quality, quality_runs, smoke, worlds
from benchmarks.peers import METHODS, Game
from gac_plugin import GAC, LOSSES, ConjugateGradient, GradientPenalty, kronecker
from gac_plugin.training import Config

RESULTS = cells.HERE / "results"


def results(name):
    file = RESULTS / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{file.name} has not been measured yet")
    return json.loads(file.read_text())


# ---- cells


def test_a_cell_is_computed_once(tmp_path, capfd):
    with ThreadPoolExecutor(1) as pool:
        tasks = {"a/one": (math.sqrt, 4.0), "a/two": (math.sqrt, 9.0)}
        assert cells.Cells(tmp_path, pool).of(tasks) == [2.0, 3.0]
        (tmp_path / "a" / "one.json").write_text("7.0")
        assert cells.Cells(tmp_path, pool).of(tasks) == [7.0, 3.0]
    assert capfd.readouterr().out.split() == ["a/one", "a/two"]


# ---- quality


def curve(*points):
    return {"curve": [{"step": step, "frechet": frechet, "gradients": 3 * step} for step, frechet in points]}


def test_the_step_at_which_a_target_is_reached():
    run = curve((100, 80.0), (200, 20.0), (300, 30.0))
    assert quality.reached_at(run, 40.0) == pytest.approx(150)  # half the way from 80 to 20 in logarithms
    assert quality.reached_at(run, 20.0) == pytest.approx(200)
    assert quality.reached_at(run, 90.0) == 100
    assert quality.reached_at(run, 19.0) == math.inf
    assert quality.reached_at(curve(), 19.0) == math.inf


def report(**methods):
    """Grids and ends of methods by name, all at a pace of 0.5 s."""
    made = {
        name: {
            "steps": 200,
            "best": (1e-3, 1e-3),
            "grid": [{"lr_g": 1.0, "lr_d": 1.0, "frechet": frechet} for frechet in grid],
            "runs": [curve((100, 100.0), (200, end)) for end in ends],
        }
        for name, (grid, ends) in methods.items()
    }
    return {"methods": made, "pace": dict.fromkeys(methods, 0.5)}


def test_target_time_and_robustness_by_hand():
    found = report(
        textbook=([10.0, 14.0, None, 40.0], [30.0, 25.0, 50.0]), gac=([9.0, 12.0, 13.0, 14.0], [9.0, 30.0, 10.0])
    )
    assert quality.target_of(found) == 30.0
    steps = [100 + 100 * math.log(100 / 30) / math.log(100 / end) for end in (9.0, 30.0, 10.0)]
    assert quality.seconds_to(found, "gac", 30.0) == pytest.approx([step / 2 for step in steps])
    assert quality.seconds_to(found, "textbook", 30.0)[2] == math.inf
    assert quality.share_near(found, "gac") == 0.75  # 9, 12 and 13 are within 13.5
    assert quality.share_near(found, "textbook") == 0.25
    assert quality.share_near(found, "textbook", own=True) == 0.5  # 10 and 14 are within 15
    assert quality.grid_ends(found["methods"]["textbook"]) == [10.0, 14.0, 40.0, math.inf]
    assert quality.gradients_per_step(found["methods"]["gac"]) == 3.0


def test_a_run_that_ended_early_has_failed():
    method = {"steps": 200, "runs": [curve((100, 5.0)), curve()]}
    assert quality.finals(method) == [math.inf, math.inf]


def test_methods_measured_before_stay_under_the_same_conditions_alone():
    methods = {"gac": {"tuning steps": 2, "steps": 4}, "recipe": {"tuning steps": 2, "steps": 5}}
    before = {"features": "a", "floor": 0.5, "samples": 10, "seeds": [0, 1], "methods": methods}
    assert quality.methods_of(before, {**before, "methods": {}}, 2, 4) == {"gac": methods["gac"]}
    for what, value in (("features", "b"), ("floor", 0.6), ("samples", 11), ("seeds", [0])):
        assert quality.methods_of(before, {**before, what: value}, 2, 4) == {}, what


def test_what_a_run_took_is_not_kept():
    method = {"best": (1, 2), "runs": [{"curve": [{"step": 2, "seconds": 0.5, "frechet": 3.0}], "recall": 0.5}]}
    assert quality.without_seconds(method) == {
        "best": (1, 2),
        "runs": [{"curve": [{"step": 2, "frechet": 3.0}], "recall": 0.5}],
    }


def test_what_was_trained_on_another_device_is_told():
    found = {
        "methods": {"textbook": {}, "gac": {"device": "One"}, "recipe": {"device": "Two"}, "r3gan": {"device": "One"}}
    }
    first, second, _ = quality.trained_elsewhere(found)
    assert first.startswith("Trained with `--device cuda` on one One, ")
    assert first.endswith(": GAC, constant rates; R3GAN's recipe.")
    assert second.startswith("Trained with `--device cuda` on one Two, ")
    assert quality.trained_elsewhere({"methods": {"textbook": {}}}) == []


GRADIENTS = {
    "textbook": 3,  # real, generated, and the generated ones of G's step
    "gac": 3 + 2 / 4,  # R1 and R2 in every fourth step
    "recipe": 3 + 2 / 4,
    "r3gan": 3 + 2,
    "extragradient": 6,
    "lookahead": 3,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_the_discriminator_are_counted(name):
    run = quality_runs.new_run(quality_runs.yardstick("mnist", "digits"), METHODS[name].make, 1e-3, 1e-3, 0)
    for _ in range(8):
        run.advance()
    assert run.gradients == 8 * GRADIENTS[name]


def test_learning_is_the_same_for_the_same_seed_and_tells_where_it_diverged():
    known = ("mnist", "digits", METHODS["gac"].make)
    first, again, other = (quality_runs.learn(*known, (1e-3, 1e-3), seed, [3, 6], 50) for seed in (0, 0, 1))
    assert [point["frechet"] for point in first["curve"]] == [point["frechet"] for point in again["curve"]]
    assert first["curve"][1]["frechet"] != other["curve"][1]["frechet"]
    assert [point["step"] for point in first["curve"]] == [3, 6]
    broken = quality_runs.learn("mnist", "digits", METHODS["published"].make, (1e30, 1e30), 0, [3, 6], 50)
    assert broken == {"curve": []}


def test_cells_and_long_runs_let_the_rates_fall_over_their_own_steps():
    rates = (1e-3, 1e-3)
    falling = quality_runs.try_cell("mnist", "digits", "gac-falling", rates, 2, 50)
    assert falling != quality_runs.try_cell("mnist", "digits", "gac", rates, 2, 50)
    size = quality_runs.Size({}, {}, evaluations=2, samples=50)
    usual, fallen = (
        quality_runs.long_run("mnist", "digits", name, rates, 0, 4, size)["curve"] for name in ("gac", "gac-falling")
    )
    assert usual[1]["frechet"] != fallen[1]["frechet"]


def test_all_methods_see_the_same_batches():
    known = quality_runs.yardstick("mnist", "digits")
    one, two = quality_runs.batches(known, 4), quality_runs.batches(known, 4)
    torch.rand(1)
    assert torch.equal(next(one), next(two))
    assert torch.equal(next(one), next(two))


# ---- coverage


def test_modes_and_their_shares_by_hand():
    world = worlds.ring(Path(), "")
    right, left = world.centres[0], world.centres[4]
    samples = torch.stack([right, right + torch.tensor([0.0, 0.029]), left, left + torch.tensor([0.031, 0.0])])
    figures = coverage_runs.judge(world, samples)
    assert figures["modes"] == 2
    assert figures["good"] == 0.75
    assert figures["spread"] == pytest.approx(2.9 / 3**0.5, rel=1e-4)
    assert figures["kl"] == pytest.approx(2 / 3 * math.log(8 * 2 / 3) + 1 / 3 * math.log(8 / 3))
    assert coverage_runs.judge(world, samples + 100) == {"modes": 0, "good": 0.0}


@pytest.mark.parametrize(("world", "modes", "deviation"), [(worlds.ring, 8, 0.01), (worlds.grid, 25, 0.05)])
def test_mixtures_are_what_was_published(world, modes, deviation):
    mixture = world(Path(), "")
    samples = mixture.draw(20_000, torch.Generator().manual_seed(0))
    nearest = torch.cdist(samples, mixture.centres).argmin(1)
    assert nearest.unique().numel() == modes
    apart = samples - mixture.centres[nearest]
    assert apart.std().item() == pytest.approx(deviation, rel=0.02)
    figures = coverage_runs.judge(mixture, samples)
    assert figures["good"] == pytest.approx(1 - math.exp(-4.5), abs=0.003)  # of a plane normal within 3 deviations
    assert figures["kl"] < 0.003
    reach = mixture.centres.abs().max().item()
    assert reach == pytest.approx(1.0 if modes == 8 else 4.0)


def test_stacked_digits_are_read_colour_by_colour():
    digits = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1).expand(10, 4, 4)

    class Reader(nn.Module):
        def forward(self, x):
            return -((x.mean(dim=(1, 2, 3)) + 1) * 127.5 - torch.arange(10.0)[:, None]).T.abs()

    world = worlds.Stacked(digits, Reader())
    samples = torch.tensor([[3, 1, 4], [0, 0, 7]])[:, :, None, None].expand(2, 3, 4, 4) / 127.5 - 1
    assert world.mode_of(samples).tolist() == [314, 7]
    drawn = world.draw(3000, torch.Generator().manual_seed(0))
    assert drawn.shape == (3000, 3, 4, 4)
    assert coverage_runs.judge(world, drawn)["modes"] > 900


def test_sixteen_images_lie_in_rows_of_four():
    images = torch.linspace(-1, 1, 16)[:, None, None, None].expand(16, 3, 2, 3)
    methods = {"gac": {"runs": [{"as made": {"modes": 0}}]}}
    figure = coverage.draw("stacked", {"real": {"samples": images.tolist()}, "methods": methods})
    real, empty = figure.axes
    sheet = real.images[0].get_array()
    assert sheet.shape == (8, 12, 3)
    assert sheet[::2, ::3, 0].flatten().tolist() == pytest.approx([number / 15 for number in range(16)])
    assert not empty.images


def test_the_page_tells_the_device_and_values_at_the_edge():
    tried = [{"cell": {"lr_g": rate, "lr_d": 4.0, "gamma": gamma}} for rate in (1.0, 2.0) for gamma in (1.0, 3.0)]
    assert coverage.edge({"cell": tried[1]["cell"], "tried": tried}) == " (gamma the largest tried)"
    assert coverage.edge({"cell": tried[0]["cell"], "tried": tried}) == ""
    assert coverage.elsewhere("ring", {}) == ""
    assert coverage.elsewhere("ring", {"device": "One"}).startswith(" Trained on one One (`--only ring --device cuda`)")


def test_published_sizes_of_networks():
    generator, discriminator = worlds.StackedGenerator(256, 8, 28), worlds.stacked_discriminator(2, 28, True)
    widths = [layer.out_channels for layer in generator.layers if isinstance(layer, nn.ConvTranspose2d)]
    assert widths == [32, 16, 8]
    assert [layer.out_channels for layer in discriminator if isinstance(layer, nn.Conv2d)] == [2, 4, 8]
    assert generator(torch.zeros(2, 256)).shape == (2, 3, 28, 28)
    assert discriminator(torch.zeros(2, 3, 28, 28)).shape == (2, 1)
    planar = worlds.planar_discriminator()
    x = torch.randn(3, 2)
    pieces = planar[0].linear(x)
    expected = torch.stack([pieces[:, start : start + 200] for start in range(0, 1000, 200)]).max(dim=0).values
    torch.testing.assert_close(planar[0](x), expected)


def test_the_penalty_falls_with_the_rates(monkeypatch):
    made = []

    def kept(*arguments, **options):
        made.append(GAC(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(coverage_runs, "GAC", kept)
    generator, discriminator = worlds.planar_generator(), worlds.planar_discriminator()
    step = coverage_runs.our_recipe("kronecker", {"gamma": 0.5}, 5)(generator, discriminator, 1e-3, 2e-3)
    batches, found = coverage_runs.real_batches(worlds.ring(Path(), ""), 4, 0), []
    for _ in range(5):
        rates = [one.param_groups[0]["lr"] for one in (made[0].generator_optimizer, made[0].discriminator_optimizer)]
        step(batches)
        found.append([*rates, made[0].penalty.r1, made[0].penalty.r2])
    expected = [[1e-3 * share, 2e-3 * share, 0.5 * share, 0.5 * share] for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert found == [pytest.approx(one) for one in expected]


def test_the_penalty_of_the_plain_recipe_falls_as_well(monkeypatch):
    monkeypatch.setattr(coverage_runs, "falling_alternating", lambda game, *_: game)
    penalised = coverage_runs.penalised({"gamma": 0.8}, 9)
    torch.manual_seed(0)
    discriminator, number = nn.Linear(2, 1), 4  # D is linear: its slope is its weight everywhere
    real, fake = torch.randn(8, 2), torch.randn(8, 2)
    with_it, without = (
        game.of_discriminator(discriminator, real, fake, number) for game in (penalised, Game(LOSSES["bce"]))
    )
    slope = float(discriminator.weight.detach().square().sum())
    assert float((with_it - without).detach()) == pytest.approx(
        4 * 0.5 * (0.4 + 0.4) * slope, rel=1e-4
    )  # every 4th, half of .8


def test_methods_have_as_many_cells():
    for setting in coverage_runs.SETTINGS.values():
        assert len({len(method.cells) for method in setting.contenders.values()}) == 1


# ---- ablation


def found(first, confirming=None):
    return {"first": first, **({} if confirming is None else {"confirming": confirming})}


def test_who_wins():
    variants = {
        "default": found([10.0, 11.0, 9.0], [5.0, 5.5, 4.5]),
        "rule fr, cap 0.5": found([8.0, 8.8, 7.3], [4.0, 4.4, 3.7]),  # better twice
        "rule pr+, cap 0.5": found([7.0, 7.8, 6.3], [3.0, 3.4, 2.6]),  # better twice, and by more
        "loss mse": found([8.0, 8.8, 7.3], [5.1, 5.4, 4.6]),  # better once
        "loss hinge": found([2.0, 30.0, 9.0]),  # better in the mean, not surely
        "beta2 0.9": found([1.0, None, 1.0]),  # diverged
        "metric spectral": found([20.0, 22.0, 18.0]),
    }
    assert ablation.winners(variants) == {"rule": "rule pr+, cap 0.5"}
    assert ablation.changes(variants) == {"rule": "pr+"}
    variants["rule pr+ on a common batch"] = variants.pop("rule pr+, cap 0.5")
    assert ablation.changes(variants) == {"rule pr+ on a common batch": None}, "no setting of gac train does that"
    mean, error = ablation.advantage(variants, "metric spectral", "first")
    assert (mean, error) == pytest.approx((math.log(2), 0.0), abs=1e-12)


def test_steps_are_cut_by_what_a_step_costs():
    assert [ablation.equal_steps(1000, cost) for cost in (1.0, 1.25, 0.75, 2000.0)] == [1000, 800, 1333, 1]


def test_the_defaults_are_what_won():
    told = results("ablation")
    assert told["winners"] == ablation.winners(told["variants"])
    for name, value in ablation.changes(told["variants"]).items():
        assert getattr(Config(), name, "no such setting") == value, f"the ablation asks for {name} = {value!r}"


def test_rates_fall_by_default_for_that_ended_better():
    """In the runs of full length, on every data set."""
    studies = results("quality")["studies"].values()
    ends = [
        [statistics.median(quality.finals(study["methods"][name])) for name in ("gac-falling", "gac")]
        for study in studies
    ]
    assert len(ends) == 2
    assert (Config().lr_schedule == "linear") == all(falling < constant for falling, constant in ends)


def test_the_library_has_one_set_of_defaults():
    config = Config()
    strategy = inspect.signature(GAC).parameters
    assert [strategy[name].default for name in ("loss", "score", "schedule")] == ["bce", None, "fresh"]
    assert (config.loss, config.score, config.schedule) == ("bce", None, "fresh")
    assert (GradientPenalty().r1, GradientPenalty().r2) == (config.r1, config.r2)
    assert GradientPenalty().interval == config.penalty_interval
    optimizer = inspect.signature(ConjugateGradient).parameters
    for name in ("rule", "metric", "beta_max", "beta2"):
        assert optimizer[name].default == getattr(config, name)


def test_the_length_of_a_gradient_is_the_optimizer_s_own():
    generator = worlds.StackedGenerator(4, 2, 8)
    optimizer = ConjugateGradient(generator.parameters(), 0.01, "pr+", beta2=0.9)
    for _ in range(3):
        generator.zero_grad()
        generator(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    for parameter, state in optimizer.state.items():
        torch.testing.assert_close(ablation_variants.length_squared(parameter.grad, state, 0.9), state["inner"])


def test_variants_change_what_they_name():
    for name, variant in ablation_variants.VARIANTS.items():
        base = Config(**ablation_variants.BASE)
        changed = {key: value for key, value in variant.settings.items() if getattr(base, key) != value}
        assert changed == dict(variant.settings), name
        assert bool(variant.settings or variant.make) == (name != ablation_variants.DEFAULT)


def test_output_sides_alone_are_turned():
    """The first axis of a weight is the output's: M = L N L^T, and what is turned is L^T g."""
    metric = ablation_variants.left_alone(kronecker())
    torch.manual_seed(0)
    gradients = torch.randn(6, 5, 7, dtype=torch.float64)
    state = metric.init(gradients[0])
    assert {name for name in state if "basis" in name} == {"left_basis"}
    for step, gradient in enumerate(gradients, 1):
        state["step"] = step
        direction = metric.at([gradient], [state], {"beta2": 0.9, "eps": 0.0})([gradient])[0]
    left = state["left_basis"]
    assert not torch.allclose(left, torch.eye(5, dtype=left.dtype), atol=0.1)
    diagonal = (state["second_moment"] / (1 - 0.9**6)).sqrt()
    torch.testing.assert_close(direction, left @ ((left.T @ gradients[-1]) / diagonal))


# ---- pages and the smoke run


@pytest.mark.parametrize("name", ["quality", "coverage", "ablation"])
def test_pages_are_what_the_figures_say(name):
    told = results(name)
    page = {
        "quality": lambda: quality.page(told["studies"]),
        "coverage": lambda: coverage.page(told["settings"]),
        "ablation": lambda: ablation.page(told, ablation.SIZES["full"]),
    }[name]()
    assert (cells.HERE / f"{name.upper()}.md").read_text() == page


def test_smoke_tells_what_is_wrong_with_a_file(tmp_path):
    good, bad, empty, page = (tmp_path / name for name in ("a.json", "b.json", "c.json", "d.md"))
    good.write_text('{"a": 1}')
    bad.write_text('{"a": NaN}')
    empty.write_text("")
    page.write_text("no title")
    assert smoke.flaw(good) == ""
    assert "NaN" in smoke.flaw(bad)
    assert "missing" in smoke.flaw(empty)
    assert "missing" in smoke.flaw(tmp_path / "none.json")
    assert "title" in smoke.flaw(page)
