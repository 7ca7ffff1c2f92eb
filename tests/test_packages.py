"""Published GAN packages with GAC swapped in, by the scripts of benchmarks/packages.py; each needs its own extra."""

import importlib
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy, softplus

from benchmarks import packages
from gac_plugin import GAC, ConjugateGradient, UsageError
from gac_plugin.update import Update

STEPS = 3
SWAPS = [(package, depth) for package, scripts in packages.SCRIPTS.items() for depth in scripts if depth != "before"]


def needs(package: str) -> None:
    if find_spec(package.replace("-", "_")) is None:
        pytest.skip(f'needs the extra: pip install "gac-plugin[{package}]"')


@pytest.fixture
def gac_updates(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the updates that GAC and its optimizer make, in their order."""
    made: list[str] = []

    def noted(owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        def wrapper(self, *args, **kwargs):
            made.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, wrapper)

    noted(Update, "finish", "update")  # once for D and once for G in each step
    noted(ConjugateGradient, "step", "conjugate")
    return made


@pytest.mark.parametrize(("package", "depth"), SWAPS, ids=[f"{package}-{depth}" for package, depth in SWAPS])
def test_a_swapped_package_trains_by_gac(package, depth, gac_updates):
    needs(package)
    run = packages.run(packages.SCRIPTS[package][depth], STEPS, seed=0)
    assert len(run.losses) == STEPS
    assert all(math.isfinite(loss) for pair in run.losses for loss in pair)
    expected = ["conjugate"] if depth == "optimizer" else ["update", "update"]
    if package == "ctgan":
        expected.append("conjugate")
    assert gac_updates == STEPS * expected


@pytest.mark.parametrize("package", packages.SCRIPTS)
def test_the_package_itself_trains_without_gac(package, gac_updates):
    needs(package)
    run = packages.run(packages.SCRIPTS[package]["before"], STEPS, seed=0)
    assert len(run.losses) == STEPS
    assert gac_updates == []


@pytest.mark.parametrize(("package", "depth"), SWAPS)
def test_a_swap_changes_five_lines_at_most(package, depth):
    scripts = packages.SCRIPTS[package]
    lines = packages.changed_lines(scripts["before"], scripts[depth])
    assert any(line.startswith("+") and "gac_plugin" in line for line in lines), lines
    for sign in "+-":
        assert sum(line.startswith(sign) for line in lines) <= 5, lines


def test_the_stored_figures_belong_to_these_scripts():
    report = json.loads((Path(packages.__file__).parent / "results" / "packages.json").read_text())
    for package, depth in SWAPS:
        scripts, figures = packages.SCRIPTS[package], report[package][depth]
        assert figures["changed lines"] == packages.changed_lines(scripts["before"], scripts[depth])
        assert figures["all losses finite"]
        assert report[package]["steps"] == packages.STEPS


def test_changed_lines_leave_out_what_is_equal():
    def before():
        a = 1
        b = 2
        return a + b

    def after():
        a = 1

        b = 3
        return a + b

    assert packages.changed_lines(before, after) == ["-        b = 2", "+        b = 3"]


@pytest.mark.parametrize(("shift", "expected"), [(0, 0.0), (20, 0.5), (1000, 0.9)])
def test_total_variation_of_a_column_of_numbers(shift, expected):
    # ten bins of four rows each; shifted by 20 of 40 rows, five bins are empty and the last one holds 24
    real = pd.DataFrame({"x": range(40)})
    assert packages.total_variation(real, real + shift, []) == pytest.approx(expected, abs=1e-9)


def test_the_correlation_gap_is_the_mean_over_pairs():
    real = pd.DataFrame({"x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 2.0], "z": [1.0, 0.0, 1.0]})
    other = real.assign(y=[2.0, 1.0, 0.0])  # r(x, y) from 1 to -1; r(x, z) and r(y, z) stay 0
    assert packages.correlation_gap(real, other) == pytest.approx(2 / 3, abs=1e-9)


def test_total_variation_of_categories():
    real, other = pd.DataFrame({"x": list("aabb")}), pd.DataFrame({"x": list("abcc")})
    assert packages.total_variation(real, other, ["x"]) == pytest.approx((0.25 + 0.25 + 0.5) / 2)


# The table adapter


@pytest.fixture
def tables():
    needs("ctgan")
    return importlib.import_module("gac_plugin.adapters.tables")


@pytest.fixture
def table():
    size = torch.linspace(0, 1, 30).tolist()
    return pd.DataFrame({"size": size, "kind": ["a", "b", "c"] * 10, "place": ["n", "s"] * 15})


def test_the_extra_is_named_where_ctgan_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctgan", None)
    monkeypatch.delitem(sys.modules, "gac_plugin.adapters.tables", raising=False)
    with pytest.raises(ImportError, match=r"gac-plugin\[ctgan\]"):
        importlib.import_module("gac_plugin.adapters.tables")


SMALL = {
    "batch_size": 20,
    "epochs": 2,
    "embedding_dim": 4,
    "generator_dim": (8,),
    "discriminator_dim": (8,),
    "enable_gpu": False,
}


def test_rows_come_back_in_the_tables_form(tables, table):
    model = tables.GACCTGAN(**SMALL)
    model.fit(table, ["kind", "place"])
    rows = model.sample(50)
    assert list(rows.columns) == ["size", "kind", "place"]
    assert len(rows) == 50
    assert set(rows["kind"]) <= {"a", "b", "c"}
    assert list(model.loss_values.columns) == ["Epoch", "Generator Loss", "Discriminator Loss"]
    assert len(model.loss_values) == 2


def test_numbers_alone_need_no_condition(tables, table):
    model = tables.GACCTGAN(**SMALL)
    model.fit(table[["size"]].to_numpy())
    assert model.sample(5).shape == (5, 1)


def test_the_seed_decides(tables, table):
    def rows(seed):
        model = tables.GACCTGAN(**SMALL)
        model.set_random_state(seed)
        model.fit(table, ["kind", "place"])
        return model.sample(20)

    assert rows(1).equals(rows(1))
    assert not rows(1).equals(rows(2))


def seed():
    torch.manual_seed(1)
    np.random.seed(1)


def fitted(tables, table):
    """A model with its generator, the table as the networks see it, and a critic that drops nothing."""
    model = tables.GACCTGAN(**SMALL | {"epochs": 0})
    model.fit(table, ["kind", "place"])
    rows = model._transformer.transform(table).astype("float32")
    width = rows.shape[1] + model._data_sampler.dim_cond_vec()
    critic = tables.PackCritic(tables.Discriminator(width, (8,), pac=model.pac)).eval()
    return model, rows, critic


def test_real_rows_meet_their_condition(tables, table):
    model, rows, _ = fitted(tables, table)
    real, condition, mask = model._draw(rows)
    kinds, places = real[:, -5:-2], real[:, -2:]
    asked = torch.where(mask[:, :1] == 1, torch.cat([kinds, 0 * places], 1), torch.cat([0 * kinds, places], 1))
    assert torch.equal(condition, asked)


def test_the_generators_gradient_is_that_of_score_and_cross_entropy(tables, table):
    model, rows, critic = fitted(tables, table)
    still = [torch.optim.SGD(network.parameters(), 0.0) for network in (model._generator, critic)]
    gac = GAC(model._generator, critic, *still, loss="bce")

    seed()
    stats = model._step(gac, rows)
    written = [parameter.grad.clone() for parameter in model._generator.parameters()]

    seed()
    _, condition, mask = model._draw(rows)
    raw = model._generator(torch.cat([torch.randn(20, 4), condition], 1))
    fake = model._apply_activate(raw)
    logits = critic.critic(torch.cat([fake, condition], 1))
    asked = torch.where(
        mask[:, 0] == 1,
        cross_entropy(raw[:, -5:-2], condition[:, :3].argmax(1), reduction="none"),
        cross_entropy(raw[:, -2:], condition[:, 3:].argmax(1), reduction="none"),
    )
    loss = softplus(-logits).mean() + asked.mean()
    expected = torch.autograd.grad(loss, list(model._generator.parameters()))
    torch.testing.assert_close(written, list(expected), rtol=1e-5, atol=1e-7)
    assert float(stats["loss_g"]) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("spoil", "discrete", "words"),
    [
        (lambda table: table[:1], ["kind", "place"], "1 rows and 3 columns"),
        (lambda table: table[:0], ["kind", "place"], "0 rows and 3 columns"),
        (lambda table: table[[]], [], "30 rows and 0 columns"),
        (lambda table: table, ["place"], r"columns \['kind'\] do not hold numbers"),
        (lambda table: table.assign(fast=True), ["kind", "place"], r"columns \['fast'\] do not hold numbers"),
        (lambda table: table, ["kind", "place", "hue"], r"discrete columns \['hue'\] are not in the table"),
        (lambda table: table.assign(size=math.inf), ["kind", "place"], r"columns \['size'\] have missing or infinite"),
        (lambda table: table.assign(size=None).astype({"size": float}), ["kind", "place"], "missing or infinite"),
        (lambda table: [1, 2], [], "got list"),
    ],
)
def test_a_table_that_cannot_be_learned_is_refused_in_one_line(spoil, discrete, words, tables, table):
    with pytest.raises(UsageError, match=words) as error:
        tables.GACCTGAN(**SMALL).fit(spoil(table), discrete)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch_size": 22}, "batch_size=22 is not a multiple of pac=10"), ({"generator_decay": 0.1}, "no weight decay")],
)
def test_settings_that_cannot_be_kept_are_refused(options, words, tables):
    with pytest.raises(UsageError, match=words):
        tables.GACCTGAN(**SMALL | options)


def test_a_refused_table_leaves_the_model_usable(tables, table):
    model = tables.GACCTGAN(**SMALL)
    with pytest.raises(UsageError):
        model.fit(table[:1], ["kind", "place"])
    model.fit(table, ["kind", "place"])
    assert len(model.loss_values) == 2
