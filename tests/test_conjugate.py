"""`ConjugateGradient` as an optimizer: Adam without momentum as a special case, groups, state, the ecosystem."""

import copy
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy

from gac_plugin import BETAS, METRICS, ConjugateGradient, UsageError, conjugate

DTYPES = [torch.float32, torch.float64]
LR = {"identity": 0.02, "adam": 3e-3, "spectral": 0.02, "kronecker": 3e-3}
every_rule = pytest.mark.parametrize("rule", BETAS)
every_metric = pytest.mark.parametrize("metric", METRICS)


def net(dtype=torch.float32, device="cpu"):
    torch.manual_seed(7)
    layers = nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)
    return nn.Sequential(*layers).to(device, dtype)


def data(model, batch=16):
    like = next(model.parameters())
    return torch.randn(batch, 2, 4, 4, dtype=like.dtype).to(like.device)


def backward(model, x):
    model.zero_grad()
    model(x).square().sum().backward()


def train(model, optimizer, batches):
    for x in batches:
        backward(model, x)
        optimizer.step()


def same(model, other):
    return all(map(torch.equal, model.parameters(), other.parameters()))


def halves(model):
    return [{"params": model[:4].parameters()}, {"params": model[4:].parameters()}]


# Adam


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rule_none_and_metric_adam_are_adam_without_momentum_bit_for_bit(dtype, beta2, maximize):
    ours, theirs = net(dtype), net(dtype)
    optimizer = ConjugateGradient(ours.parameters(), 1e-3, "none", "adam", beta2=beta2, maximize=maximize)
    adam = torch.optim.Adam(theirs.parameters(), 1e-3, betas=(0.0, beta2), maximize=maximize)
    for _ in range(100):
        x = data(ours)
        train(ours, optimizer, [x])
        train(theirs, adam, [x])
        assert same(ours, theirs)
    assert not same(ours, net(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rule_none_and_metric_identity_are_gradient_descent_bit_for_bit(dtype):
    ours, theirs, batches = net(dtype), net(dtype), [data(net(dtype)) for _ in range(20)]
    train(ours, ConjugateGradient(ours.parameters(), 1e-3, "none", "identity"), batches)
    train(theirs, torch.optim.SGD(theirs.parameters(), 1e-3), batches)
    assert same(ours, theirs)


# Groups


@every_metric
@every_rule
def test_groups_with_equal_settings_walk_as_one(rule, metric):
    one, two = net(torch.float64), net(torch.float64)
    together = ConjugateGradient(one.parameters(), LR[metric], rule, metric)
    apart = ConjugateGradient(halves(two), LR[metric], rule, metric)
    batches = [data(one) for _ in range(20)]
    train(one, together, batches)
    train(two, apart, batches)
    assert same(one, two)
    assert (together.beta is None) == (rule == "none")


def test_each_group_keeps_its_own_rate_metric_and_sign():
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    points = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3)]
    own = {"lr": 0.1}, {"metric": "spectral"}, {"maximize": True}
    groups = [{"params": [point], **settings} for point, settings in zip(points, own, strict=True)]
    optimizer = ConjugateGradient(groups, 1.0, "none", "identity")
    for point in points:
        point.grad = gradient.clone()
    optimizer.step()
    for point, expected in zip(points, ([-0.3, -0.4], [-0.6, -0.8], [3.0, 4.0]), strict=True):
        np.testing.assert_allclose(point.detach(), expected, rtol=1e-9)


def test_beta_is_one_number_for_all_groups():
    small, large = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [small]}, {"params": [large], "lr": 1.0}]
    optimizer = ConjugateGradient(groups, 1.0, "fr", "identity", beta_max=math.inf)
    for g_small, g_large in ((1.0, 2.0), (3.0, 1.0)):
        small.grad, large.grad = torch.full_like(small, g_small), torch.full_like(large, g_large)
        optimizer.step()
    beta = (3.0**2 + 1.0**2) / (1.0**2 + 2.0**2)
    assert float(optimizer.beta) == pytest.approx(beta, rel=1e-15)
    assert small.item() == pytest.approx(-1.0 - (3.0 + beta * 1.0), rel=1e-15)
    assert large.item() == pytest.approx(-2.0 - (1.0 + beta * 2.0), rel=1e-15)


@pytest.mark.parametrize(("name", "value"), [("rule", "hs"), ("beta_max", 0.1)])
def test_groups_that_disagree_on_the_common_direction_are_refused(name, value):
    model = net()
    first, second = halves(model)
    with pytest.raises(UsageError, match=rf"{name} must be the same in all parameter groups.*{value!r}"):
        ConjugateGradient([first, second | {name: value}], 0.1)
    optimizer = ConjugateGradient([first := halves(model)[0]], 0.1)
    with pytest.raises(UsageError, match=f"{name} must be the same"):
        optimizer.add_param_group(halves(model)[1] | {name: value})
    assert len(optimizer.param_groups) == 1


@every_rule
def test_maximising_a_score_is_minimising_its_negative(rule):
    up, down = net(torch.float64), net(torch.float64)
    ascent = ConjugateGradient(up.parameters(), 1e-3, rule, maximize=True)
    descent = ConjugateGradient(down.parameters(), 1e-3, rule)
    for _ in range(10):
        x = data(up)
        backward(up, x)
        backward(down, x)
        for parameter in down.parameters():
            parameter.grad.neg_()
        ascent.step()
        descent.step()
        assert same(up, down)
    assert not same(up, net(torch.float64))


# What a step touches


@every_metric
@every_rule
def test_parameters_without_a_gradient_stay_and_cost_no_memory(rule, metric):
    model = net()
    optimizer = ConjugateGradient(model.parameters(), LR[metric], rule, metric)
    optimizer.step()  # no gradient anywhere
    assert not optimizer.state
    model[0].requires_grad_(False)
    train(model, optimizer, [data(model)])
    assert torch.equal(model[0].weight, net()[0].weight)
    assert model[0].weight not in optimizer.state
    model[0].requires_grad_(True)
    train(model, optimizer, [data(model)])
    assert not torch.equal(model[0].weight, net()[0].weight)


@every_metric
@every_rule
def test_a_step_leaves_the_gradients_as_they_are(rule, metric):
    model = net()
    optimizer = ConjugateGradient(model.parameters(), LR[metric], rule, metric)
    for _ in range(3):
        backward(model, data(model))
        before = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        assert all(map(torch.equal, before, (parameter.grad for parameter in model.parameters())))


@every_metric
@every_rule
def test_gradients_written_into_the_same_memory_make_no_difference(rule, metric):
    kept, renewed = net(torch.float64), net(torch.float64)  # a remembered g- that is p.grad itself would make y = 0
    pairs = [(model, ConjugateGradient(model.parameters(), LR[metric], rule, metric)) for model in (kept, renewed)]
    for _ in range(5):
        x = data(kept)
        for model, optimizer in pairs:
            optimizer.zero_grad(set_to_none=model is renewed)
            model(x).square().sum().backward()
            optimizer.step()
    assert same(kept, renewed)


def test_a_closure_is_evaluated_once_with_gradients_and_its_value_returned():
    model, calls = net(), []
    optimizer = ConjugateGradient(model.parameters(), 0.1)

    def closure():
        calls.append(torch.is_grad_enabled())
        backward(model, data(model))
        return "loss"

    assert optimizer.step(closure) == "loss"
    assert calls == [True]


def test_the_counter_of_host_reads_counts(host_reads):
    with host_reads() as reads:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert len(reads.seen) == 2


@every_metric
@every_rule
def test_no_step_waits_for_the_device(rule, metric, host_reads):
    model = net()
    optimizer = ConjugateGradient(halves(model), LR[metric], rule, metric)
    for _ in range(3):
        backward(model, data(model))
        with host_reads() as reads:
            optimizer.step()
        assert not reads.seen


@every_metric
@every_rule
def test_steps_need_no_values_at_all(rule, metric):
    model = net(device="meta")  # tensors without data: reading a value raises
    optimizer = ConjugateGradient(halves(model), LR[metric], rule, metric)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    assert optimizer.beta is None or optimizer.beta.device.type == "meta"


# Refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -0.1}, "lr must be a number of at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be a number of at least 0, got nan"),
        ({"lr": math.inf}, "lr must be .*got inf"),
        ({"lr": "fast"}, "lr must be .*got 'fast'"),
        ({"beta_max": -1.0}, "beta_max must be a number of at least 0, got -1.0"),
        ({"beta2": 1.0}, "beta2 must be a number of at least 0 and below 1, got 1.0"),
        ({"beta2": -0.1}, "beta2 must be .*got -0.1"),
        ({"eps": -1e-8}, "eps must be .*got -1e-08"),
        ({"rule": "pr"}, r"unknown rule 'pr' \(did you mean.*" + ", ".join(BETAS).replace("+", r"\+")),
        ({"metric": "adm"}, r"unknown metric 'adm' \(did you mean 'adam'\?\).*" + ", ".join(METRICS)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_refused_with_their_value(wrong, message):
    with pytest.raises(UsageError, match=message):
        ConjugateGradient(net().parameters(), **{"lr": 0.1} | wrong)
    with pytest.raises(UsageError, match=message):  # in a group of its own, too
        ConjugateGradient([{"params": net().parameters()} | wrong], 0.1)


def test_sparse_gradients_and_complex_parameters_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"dense gradients.*sparse_coo.*\(4, 2\).*sparse=False"):
        ConjugateGradient(embedding.parameters(), 0.1).step()
    with pytest.raises(UsageError, match=r"real parameters, got torch\.complex64 of shape \(3,\)"):
        ConjugateGradient([nn.Parameter(torch.zeros(3, dtype=torch.complex64))], 0.1)


# State


def continues_identically(model, optimizer, other, restored):
    batches = [data(model) for _ in range(5)]
    train(model, optimizer, batches)
    train(other, restored, batches)
    return same(model, other)


@every_metric
@every_rule
def test_a_deep_copy_in_the_middle_of_training_continues_identically(rule, metric):
    model = net()
    optimizer = ConjugateGradient(model.parameters(), LR[metric], rule, metric)
    train(model, optimizer, [data(model) for _ in range(3)])
    assert continues_identically(model, optimizer, *copy.deepcopy((model, optimizer)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
@every_metric
@every_rule
def test_a_saved_state_continues_identically(rule, metric, steps, dtype):
    model = net(dtype)
    optimizer = ConjugateGradient(halves(model), LR[metric], rule, metric)
    train(model, optimizer, [data(model) for _ in range(steps)])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    restored = ConjugateGradient(halves(other), lr=1.0, rule="dy", metric="identity", beta_max=9.0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert continues_identically(model, optimizer, other, restored)


@pytest.mark.parametrize("as_object", [False, True])
@every_metric
@every_rule
def test_group_settings_survive_json(rule, metric, as_object):
    model = net()
    kinds = (BETAS[rule], METRICS[metric]) if as_object else (rule, metric)
    optimizer = ConjugateGradient(halves(model), 0.1, *kinds)
    for group in optimizer.state_dict()["param_groups"]:
        settings = {key: value for key, value in group.items() if key != "params"}
        assert json.loads(json.dumps(settings)) == settings
        assert (settings["rule"], settings["metric"]) == (rule, metric)


@every_rule
def test_the_state_holds_only_what_the_rule_reads(rule):
    model = net()
    optimizer = ConjugateGradient(model.parameters(), 0.1, rule, "adam")
    train(model, optimizer, [data(model)])
    kept = {"step", "second_moment"}
    kept |= set() if rule == "none" else {"direction", "inner"} if rule == "fr" else {"direction", "inner", "covector"}
    assert all(state.keys() == kept for state in optimizer.state.values())


# The ecosystem


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=20, cycle_momentum=False),
    ],
    ids=["StepLR", "CosineAnnealingLR", "LambdaLR", "OneCycleLR"],
)
def test_learning_rate_schedulers_drive_it_as_they_drive_adam(schedule):
    ours, theirs = net(), net()
    pairs = [
        (ours, ConjugateGradient(ours.parameters(), 1e-3, "none", "adam", beta2=0.9)),
        (theirs, torch.optim.Adam(theirs.parameters(), 1e-3, betas=(0.0, 0.9))),
    ]
    schedulers, rates = [schedule(optimizer) for _, optimizer in pairs], []
    for _ in range(12):
        x = data(ours)
        for (model, optimizer), scheduler in zip(pairs, schedulers, strict=True):
            train(model, optimizer, [x])
            scheduler.step()
        assert same(ours, theirs)
        rates.append(pairs[0][1].param_groups[0]["lr"])
    assert len(set(rates)) > 2


@pytest.mark.parametrize("rule", ["none", "pr+"])
def test_it_survives_preparation_by_accelerate(rule):
    plain, model = net(), net()
    reference = ConjugateGradient(plain.parameters(), 1e-3, rule)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, ConjugateGradient(model.parameters(), 1e-3, rule))

    assert isinstance(optimizer, AcceleratedOptimizer)

    def step(x):
        train(plain, reference, [x])
        optimizer.zero_grad()
        accelerator.backward(prepared(x).square().sum())
        optimizer.step()
        return same(plain, model)

    assert all(step(data(plain)) for _ in range(3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(step(data(plain)) for _ in range(3))


@pytest.mark.parametrize("metric", ["adam", "spectral"])
@pytest.mark.parametrize("rule", ["none", "pr+", "hs"])
def test_it_trains_a_classifier(rule, metric):
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.astype(np.float32) / 16, labels, test_size=0.25, random_state=0)
    x, x_test, y, y_test = map(torch.from_numpy, split)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = ConjugateGradient(model.parameters(), LR[metric], rule, metric)
    for _ in range(8):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    assert (model(x_test).argmax(1) == y_test).double().mean() > 0.9


# Games


def game_points(dtype=torch.float64):
    return [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in (0.6, -0.8)]


def player(points, lr, **own):
    return ConjugateGradient(points, lr, "none", "identity", **own)


def radius(x, y):
    return math.hypot(x.item(), y.item())


@pytest.mark.parametrize("lr", [0.01, 0.1, 0.5])
def test_simultaneous_steps_of_a_bilinear_game_spiral_outward_by_their_exact_factor(lr):
    # min_x max_y x y: the step's matrix I + lr [[0, -1], [1, 0]] stretches everything by sqrt(1 + lr^2)
    x, y = game_points()
    both = player([{"params": [x]}, {"params": [y], "maximize": True}], lr)
    for step in range(1, 51):
        both.zero_grad()
        (x * y).backward()
        both.step()
        assert radius(x, y) == pytest.approx((1 + lr**2) ** (step / 2), rel=1e-12)


@pytest.mark.parametrize("lr", [0.01, 0.1, 0.5])
def test_alternating_steps_of_a_bilinear_game_stay_on_an_ellipse(lr):
    # x' = x - lr y, y' = y + lr x' keeps x^2 + y^2 - lr x y
    x, y = game_points()
    down, up = player([x], lr), player([y], lr, maximize=True)

    def invariant():
        return (x**2 + y**2 - lr * x * y).item()

    start = invariant()
    for _ in range(500):
        for optimizer in (down, up):
            x.grad = y.grad = None
            (x * y).backward()
            optimizer.step()
        assert invariant() == pytest.approx(start, rel=1e-10)
        assert 0.5 < radius(x, y) < 1.5


@pytest.mark.parametrize(("bend", "lr"), [(1.0, 0.1), (0.5, 0.3), (2.0, 0.2)])
def test_a_strictly_concave_convex_saddle_is_reached_at_the_rate_of_theory(bend, lr):
    # a/2 x^2 + x y - a/2 y^2: eigenvalues 1 - lr a +- i lr, so each step shrinks by their modulus
    x, y = game_points()
    both = player([{"params": [x]}, {"params": [y], "maximize": True}], lr)
    factor = math.hypot(1 - lr * bend, lr)
    assert factor < 1
    for step in range(1, 51):
        both.zero_grad()
        (bend / 2 * x**2 + x * y - bend / 2 * y**2).backward()
        both.step()
        assert radius(x, y) == pytest.approx(factor**step, rel=1e-10)


def test_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UsageError, match="cannot be captured as a CUDA graph"):
        conjugate._refuse_capture(SimpleNamespace(is_cuda=True))
    conjugate._refuse_capture(torch.zeros(1))
