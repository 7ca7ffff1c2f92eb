"""Foreign discriminators and latents brought to one interface."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gac_plugin import GAC, UsageError
from gac_plugin.protocols import Logits, latent_sampler


class Answers(nn.Module):
    """A discriminator that gives a fixed answer."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, samples, **conditions):
        self.conditions = conditions
        return self.answer


SAMPLES = torch.zeros(3, 2)
VALUES = torch.tensor([[-2.0], [0.5], [3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("answer", "select"),
    [
        (VALUES, None),
        ((None, VALUES), lambda out: out[1]),
        ({"logits": VALUES, "features": None}, lambda out: out["logits"]),
    ],
    ids=["alone", "tuple", "dict"],
)
def test_logits_are_found_in_whatever_the_discriminator_returns(answer, select):
    assert Logits(Answers(answer), select=select)(SAMPLES, {}) is VALUES


def test_conditions_reach_the_discriminator_by_keyword():
    discriminator = Answers(VALUES)
    Logits(discriminator)(SAMPLES, {"label": 7})
    assert discriminator.conditions == {"label": 7}


def test_probabilities_become_the_logits_that_they_came_from():
    back = Logits(Answers(torch.sigmoid(VALUES)), output="probability")(SAMPLES, {})
    torch.testing.assert_close(back, VALUES, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probabilities_that_rounded_to_0_or_1_give_finite_logits(dtype):
    back = Logits(Answers(torch.tensor([0.0, 0.5, 1.0], dtype=dtype)), output="probability")(SAMPLES, {})
    assert back.isfinite().all()
    assert back[0] < -10
    assert back[2] > 10


def test_an_unknown_output_is_refused_with_the_choices():
    with pytest.raises(UsageError, match="unknown output 'probabilities'; choose one of: logit, probability"):
        Logits(Answers(VALUES), output="probabilities")


MAP = torch.arange(12.0, dtype=torch.float64).reshape(3, 1, 2, 2)
NUMBERS = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("answer", "select"),
    [
        ([VALUES, MAP, NUMBERS], None),
        ((VALUES, MAP, NUMBERS), list),
        ((VALUES, MAP, NUMBERS, None), lambda out: out[:3]),
        ([[VALUES], [None, MAP], [NUMBERS]], lambda out: [scale[-1] for scale in out]),
        ({"b": MAP, "a": VALUES, "c": NUMBERS}, lambda out: [out["a"], out["b"], out["c"]]),
    ],
    ids=["list", "tuple", "part of a tuple", "lists of features", "dict"],
)
def test_several_heads_are_found_and_their_mean_is_a_samples_logit(answer, select):
    judge = Logits(Answers(answer), select=select)
    heads = judge.heads(SAMPLES, {})
    assert all(head is part for head, part in zip(heads, (VALUES, MAP, NUMBERS), strict=True))
    expected = [(-2.0 + 1.5 + 4.0) / 3, (0.5 + 5.5 + 5.0) / 3, (3.0 + 9.5 + 6.0) / 3]
    torch.testing.assert_close(judge(SAMPLES, {}), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_probabilities_of_several_heads_become_logits():
    heads = Logits(Answers([VALUES.sigmoid(), MAP.sigmoid()]), output="probability").heads(SAMPLES, {})
    for head, expected in zip(heads, (VALUES, MAP), strict=True):
        torch.testing.assert_close(head, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "answer",
    [
        (VALUES, None),
        (VALUES, VALUES),
        [VALUES, torch.zeros(3, 8, 2, 2)],
        [VALUES, torch.zeros(3, 1, dtype=torch.int64)],
        [[VALUES], [MAP]],
        [VALUES, torch.zeros(())],
        [],
        {"logits": VALUES},
        None,
    ],
    ids=["parts", "tuple", "features", "integers", "lists", "scalar", "empty", "dict", "none"],
)
def test_an_answer_that_may_be_more_than_logits_asks_for_a_selector(answer):
    with pytest.raises(UsageError, match=rf"returned a {type(answer).__name__}.*logits=lambda.*logits=list"):
        Logits(Answers(answer))(SAMPLES, {})


@pytest.mark.parametrize(
    ("select", "kinds"),
    [(lambda out: out, "dict"), (lambda out: [out["a"], "a"], "Tensor, str"), (lambda out: (), "nothing")],
    ids=["dict", "mixed", "nothing"],
)
def test_a_selector_must_pick_tensors(select, kinds):
    with pytest.raises(UsageError, match=f"logits= picked {kinds} out of .*one tensor for each head"):
        Logits(Answers({"a": VALUES}), select=select)(SAMPLES, {})


@pytest.mark.parametrize(
    "answer",
    [torch.zeros(()), torch.zeros(2, 1), [torch.zeros(3, 1), torch.zeros(6, 1)]],
    ids=["scalar", "other batch", "other batch in a head"],
)
def test_an_answer_without_the_batch_is_refused_with_its_shape(answer):
    with pytest.raises(UsageError, match=r"have shape \(.*\) for 3 samples"):
        Logits(Answers(answer))(SAMPLES, {})


@pytest.mark.parametrize(("latent", "shape"), [(5, (3, 5)), ((2, 4, 4), (3, 2, 4, 4)), ((), (3,))])
def test_a_size_or_shape_means_standard_normal_latents_for_each_real_sample(latent, shape):
    draw = latent_sampler(latent, nn.Identity())
    torch.manual_seed(5)
    z = draw(SAMPLES)
    torch.manual_seed(5)
    assert torch.equal(z, torch.randn(shape))


def test_a_callable_is_asked_for_the_batch_size():
    assert latent_sampler(lambda batch: ["z"] * batch, nn.Identity())(SAMPLES) == ["z"] * 3


def test_what_a_callable_draws_comes_to_the_batch():
    """Floating-point tensors take its type and device, wherever they stand; whole numbers keep their type."""
    ids, noise, real = torch.arange(3), torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, device="meta")
    z = latent_sampler(lambda batch: {"noise": (noise, [noise.half()]), "ids": ids, "text": "a"}, nn.Identity())(real)
    assert z["text"] == "a"
    kinds = [(each.device.type, each.dtype) for each in (z["noise"][0], z["noise"][1][0], z["ids"])]
    assert kinds == [("meta", torch.float32), ("meta", torch.float32), ("meta", torch.int64)]
    assert latent_sampler(lambda batch: noise, nn.Identity())(VALUES) is noise


def test_the_generators_own_nz_is_used_where_no_latent_is_given():
    generator = nn.Identity()
    assert latent_sampler(None, generator) is None
    generator.nz = 6
    assert latent_sampler(None, generator)(SAMPLES).shape == (3, 6)
    assert latent_sampler(2, generator)(SAMPLES).shape == (3, 2)
    wrapper = nn.Module()
    wrapper.module = generator  # as DistributedDataParallel calls it
    assert latent_sampler(None, wrapper)(SAMPLES).shape == (3, 6)


@pytest.mark.parametrize("bias", [-80.0, -20.0, 0.0, 20.0, 80.0])
@pytest.mark.parametrize("penalty", [None, "r1+r2"])
def test_a_saturated_probability_never_spoils_a_weight(bias, penalty):
    generator, discriminator = nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    discriminator[0].bias.data.fill_(bias)
    optimizers = [torch.optim.SGD(network.parameters(), 0.0) for network in (generator, discriminator)]
    gac = GAC(generator, discriminator, *optimizers, latent=4, output="probability", penalty=penalty)
    gac.step(torch.randn(8, 3))
    assert all(torch.isfinite(p.grad).all() for p in (*generator.parameters(), *discriminator.parameters()))
    if -80 < bias < 0:  # D is sure and its sigmoid has not rounded: -log D still pulls with weight 1
        expected = -discriminator[0].weight.detach()[0]
        torch.testing.assert_close(generator.bias.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_half_precision_accelerator_is_refused_for_the_fused_schedule():
    networks = nn.Linear(4, 3), nn.Linear(3, 1)
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in networks]
    accelerator = SimpleNamespace(mixed_precision="fp16", backward=lambda loss: loss.backward())
    with pytest.raises(UsageError, match="use mixed precision bf16"):
        GAC(*networks, *optimizers, schedule="fused", accelerator=accelerator)
    GAC(*networks, *optimizers, accelerator=accelerator)


def test_a_paired_loss_refuses_real_samples_of_another_batch_size():
    networks = nn.Linear(4, 3), nn.Linear(3, 1)
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in networks]
    gac = GAC(*networks, *optimizers, loss="relativistic")
    with pytest.raises(UsageError, match=r"differ in shape: \(1, 3\) and \(8, 3\)"):
        gac.generator_step(networks[0](torch.randn(8, 4)), real=torch.randn(1, 3))
