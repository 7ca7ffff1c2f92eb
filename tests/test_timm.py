"""timm's backbones as discriminators, its optimizers and schedulers under GAC, and GAC in its registry."""

import importlib.util
import json
import logging
import math
import sys

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import build_model_with_cfg, register_model
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2
from torch import nn

from gac_plugin import GAC, ConjugateGradient, UsageError
from gac_plugin.adapters import timm_backbone
from gac_plugin.adapters.timm_backbone import (
    OPTIMIZER_NAMES,
    BackboneInput,
    Head,
    SkipGenerator,
    TimmDiscriminator,
    create_backbone,
    register,
)
from gac_plugin.training.hub import load_discriminator, load_generator, save_network
from gac_plugin.training.networks import Recipe

SHAPE = (3, 16, 24)
IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
BACKBONES = {
    "test_resnet": 5,
    "test_efficientnet": 5,
    "mobilenetv3_small_050": 5,
    "test_convnext": 4,
    "test_nfnet": 5,
    "test_mambaout": 4,
    "edgenext_xx_small": 4,
    "test_vit": 3,
}
"""Name -> number of feature maps: residual, inverted residual, the same with hard sigmoids, layer norm, no norm,
channels last, hybrid, transformer."""


def discriminator(backbone="test_convnext", shape=SHAPE, **options) -> TimmDiscriminator:
    return TimmDiscriminator(shape, width=8, backbone=backbone, **options)


def generator(**options) -> SkipGenerator:
    return SkipGenerator(SHAPE, latent_size=5, width=4, depth=2, output="tanh", **options)


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def gac_of(g: nn.Module, d: nn.Module, **options) -> GAC:
    return GAC(g, d, ConjugateGradient(g.parameters(), 1e-3), torch.optim.Adam(d.parameters(), 1e-3), **options)


# The discriminator


@pytest.mark.parametrize(("backbone", "heads"), BACKBONES.items())
def test_any_backbone_trains_with_a_penalty(backbone, heads):
    """Every parameter that wants a gradient gets one, which DDP asks for; the penalty differentiates D twice."""
    d = discriminator(backbone, resolution=64, per_head=True)
    x = torch.randn(3, *SHAPE)
    assert d(x).shape == (3, heads)
    assert discriminator(backbone, resolution=64)(x).shape == (3, 1)
    assert [f.shape[1] for f in d.features(x)] == d.backbone.feature_info.channels()
    stats = gac_of(generator(), d, penalty="r1+r2").step(x)
    assert all(torch.isfinite(value) for value in stats.values())
    assert float(stats["penalty"]) > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in d.parameters())
    assert float(gac_of(generator(), d).cotangent(x).abs().sum()) > 0


def test_one_logit_is_the_mean_of_the_heads():
    one = discriminator().eval()
    several = discriminator(per_head=True).eval()
    several.load_state_dict(one.state_dict())
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(one(x).flatten(), several(x).mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"backbone": "test_resnet"}, (32, 32)),
        ({"backbone": "test_resnet", "shape": (1, 33, 64)}, (64, 64)),
        ({"backbone": "test_resnet", "shape": (1, 96, 64)}, (96, 64)),
        ({"backbone": "test_resnet", "resolution": 40}, (40, 40)),
        ({"backbone": "test_vit"}, (160, 160)),
        ({"backbone": "test_vit", "resolution": 32}, (32, 32)),
    ],
)
def test_the_backbone_sees_its_own_size_or_whole_cells_or_what_the_user_says(options, size):
    d = discriminator(**options).eval()
    assert d.to_input.size == size
    cell = 16 if options["backbone"] == "test_vit" else 32
    coarsest = d.features(torch.zeros(1, *options.get("shape", SHAPE)))[-1]
    assert coarsest.shape[2:] == tuple(math.ceil(side / cell) for side in size)


def test_pretrained_weights_see_the_size_they_were_trained_at(monkeypatch):
    create = timm.create_model
    asked = []

    def without_download(*args, pretrained, **options):
        asked.append(pretrained)
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    assert discriminator("test_resnet", pretrained=True).to_input.size == (160, 160)
    assert discriminator("test_resnet", pretrained=True, resolution=32).to_input.size == (32, 32)
    assert asked == [True, True]


@pytest.mark.parametrize(
    ("output", "unit"), [("tanh", lambda x: (x + 1) / 2), ("sigmoid", lambda x: x)], ids=["tanh", "sigmoid"]
)
@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [("resnet18", *IMAGENET), ("vit_tiny_patch16_224", torch.full((3,), 0.5), torch.full((3,), 0.5))],
)
def test_samples_are_normalised_as_the_weights_expect(output, unit, backbone, mean, std):
    config = timm.data.resolve_data_config(pretrained_cfg=timm.create_model(backbone).pretrained_cfg)
    x = torch.randn(2, 3, 8, 8)
    expected = torch.stack([(unit(x[:, c]) - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(BackboneInput(config, output, (8, 8))(x), expected, rtol=1e-5, atol=1e-5)


CONFIG = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(5, 4), (20, 18), (5, 18)])
def test_resizing_is_pillow_s(interpolation, size):
    """Pillow's resampling, which the backbones' own training used, widens its kernel where an image shrinks."""
    x = torch.rand(1, 3, 11, 9)
    method = Image.Resampling[interpolation.upper()]
    expected = [np.asarray(Image.fromarray(channel.numpy(), mode=None).resize(size[::-1], method)) for channel in x[0]]
    found = BackboneInput({**CONFIG, "interpolation": interpolation}, "sigmoid", size)(x)[0]
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=0, atol=2e-3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(3, 3), (8, 7)])
def test_resizing_has_first_and_second_derivatives(interpolation, size):
    to_input = BackboneInput({**CONFIG, "interpolation": interpolation}, "tanh", size).double()
    x = torch.rand(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)

    def curved(x):
        return to_input(x).square().sum()

    assert torch.autograd.gradcheck(curved, x)
    assert torch.autograd.gradgradcheck(curved, x)
    assert (torch.autograd.grad(curved(x), x)[0] != 0).all(), "a pixel is lost"


def test_a_grey_sample_is_one_of_three_equal_channels():
    grey, colour = discriminator(shape=(1, 16, 24)).eval(), discriminator().eval()
    grey.load_state_dict(colour.state_dict())
    x = torch.randn(2, 1, 16, 24)
    torch.testing.assert_close(grey(x), colour(x.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-6)


# A frozen backbone


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("schedule", ["fresh", "fused"])
def test_a_frozen_backbone_stays_as_it_is(backbone, schedule):
    d, g = discriminator(backbone, frozen=True, mixing=True, resolution=32), generator()
    before, before_g = copies(d), copies(g)
    gac = gac_of(g, d, schedule=schedule, penalty="r1+r2")
    for _ in range(3):
        d.train()
        assert not any(module.training for module in d.backbone.modules())
        assert d.heads.training
        gac.step(torch.randn(4, *SHAPE))
    after = copies(d)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name for name in changed if not name.startswith("heads.")} == set()
    assert {name for name in changed if name.endswith("mixing")} == set()
    assert {name for name, _ in d.heads.named_parameters(prefix="heads")} <= changed
    assert all(not torch.equal(before_g[name], tensor) for name, tensor in g.state_dict().items())
    assert float(gac.cotangent(torch.randn(2, *SHAPE)).abs().min()) > 0
    assert [p for p in d.backbone.parameters() if p.requires_grad or p.grad is not None] == []


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "legacy_xception", "pit_ti_224"])
def test_freezing_changes_nothing_of_what_a_backbone_computes(backbone):
    """Batch norms are replaced by affine maps, also where timm's hooks are on them."""
    trained, frozen = (
        discriminator(backbone, resolution=64).double(),
        discriminator(backbone, resolution=64, frozen=True),
    )
    with torch.no_grad():
        for name, tensor in trained.backbone.state_dict().items():
            if "running" in name:
                tensor.add_(torch.rand_like(tensor))
    frozen.double().load_state_dict(
        {name: tensor for name, tensor in trained.state_dict().items() if not name.endswith("num_batches_tracked")}
    )
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    for ours, expected in zip(frozen.features(x), trained.eval().features(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_batch_norm_at_work_is_refused_by_the_fused_schedule():
    with pytest.raises(UsageError, match=r"treats samples independently, and its layer 'backbone\.\S+' is a BatchNorm"):
        gac_of(generator(), discriminator("test_resnet"), schedule="fused")


def test_mixing_is_a_random_matrix_in_front_of_the_head():
    head, plain = Head(6, 4, 0, mixing=True).eval(), Head(6, 4, 0, mixing=False).eval()
    plain.load_state_dict({name: tensor for name, tensor in head.state_dict().items() if name != "mixing"})
    features = torch.randn(2, 6, 3, 3)
    mixed = torch.einsum("oi,bihw->bohw", head.mixing[:, :, 0, 0], features)
    torch.testing.assert_close(head(features, None), plain(mixed, None), rtol=1e-5, atol=1e-6)
    assert "mixing" not in dict(head.named_parameters())
    assert float(Head(64, 4, 0, mixing=True).mixing.square().mean()) == pytest.approx(1 / 64, rel=0.1)


def test_heads_have_spectral_norm_one():
    head = Head(6, 4, 3, mixing=False)
    with torch.no_grad():
        for _ in range(100):  # a power iteration each
            head(torch.randn(2, 6, 3, 3), torch.tensor([0, 1]))
        for layer in (head.eval().hidden, head.logit, head.classes):
            assert float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2)) == pytest.approx(1, abs=1e-3)


# Classes


def test_the_logit_of_a_class_is_a_projection():
    # l(y) = w h + b + v_y h
    head = Head(6, 4, 3, mixing=False).eval()
    features, labels = torch.randn(5, 6, 3, 3), torch.tensor([0, 2, 1, 1, 0])
    h = nn.functional.leaky_relu(head.hidden(features), 0.2).flatten(2).sum(2).detach() / 9
    v = head.classes.weight[labels].detach()
    w, b = head.logit.weight[0].detach(), float(head.logit.bias.detach())
    expected = [float((w + v[i]) @ h[i]) + b for i in range(5)]
    assert head(features, labels).flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_conditional_step_moves_every_parameter():
    g, d = generator(classes=3), discriminator(classes=3)
    before = [p.detach().clone() for p in (*g.parameters(), *d.parameters())]
    gac_of(g, d, penalty="r1+r2").step(torch.randn(4, *SHAPE), labels=torch.tensor([0, 1, 2, 1]))
    assert all(not torch.equal(a, b) for a, b in zip(before, (*g.parameters(), *d.parameters()), strict=True))


def test_a_class_changes_the_sample_and_no_other():
    g = generator(classes=3).eval()
    z = torch.randn(2, 5)
    one, other = g(z, labels=torch.tensor([0, 1])), g(z, labels=torch.tensor([0, 2]))
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1])


@pytest.mark.parametrize("make", [generator, discriminator])
def test_labels_and_classes_go_together(make):
    x = torch.randn(2, 5) if make is generator else torch.randn(2, *SHAPE)
    with pytest.raises(UsageError, match=r"^a network with classes needs labels; pass labels="):
        make(classes=3)(x)
    with pytest.raises(UsageError, match=r"^labels were passed to a network without classes"):
        make()(x, labels=torch.tensor([0, 1]))


# The adapter


def test_options_go_through_a_recipe_and_a_folder(tmp_path):
    arguments = {"sample_shape": list(SHAPE), "latent_size": 5, "width": 4, "depth": 2, "output": "sigmoid"}
    options = {"backbone": "test_resnet", "pretrained": False, "frozen": True, "resolution": 32, "mixing": True}
    recipe = Recipe(**json.loads(json.dumps({"adapter": "timm", "arguments": {**arguments, **options}})))
    g, d = recipe.generator(), recipe.discriminator()
    gac_of(g, d).step(torch.rand(4, *SHAPE))
    for folder, network in (("generator", g), ("discriminator", d)):
        save_network(tmp_path / folder, network, recipe)
    z, x = torch.randn(2, 5), torch.rand(2, *SHAPE)
    assert torch.equal(load_generator(tmp_path)(z), g.eval()(z))
    assert torch.equal(load_discriminator(tmp_path)(x), d.eval()(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_never_reads_from_the_device(host_reads, frozen):
    g, d = generator(), discriminator("test_resnet", frozen=frozen)
    optimizers = (ConjugateGradient(net.parameters(), 1e-3) for net in (g, d))
    gac = GAC(g, d, *optimizers, penalty="r1+r2")
    gac.step(torch.randn(4, *SHAPE))  # the first step checks once
    with host_reads() as reads:
        gac.step(torch.randn(4, *SHAPE))
    assert reads.seen == []


# One line for every mistake


def test_an_unknown_backbone_gets_near_names():
    with pytest.raises(
        UsageError, match=r"^timm has no backbone 'resnet81'; near names: .*resnet18.*\(timm\.list_"
    ) as e:
        discriminator("resnet81")
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match=r"near names: resnet18, convnext_atto"):
        discriminator("qqqq")


def test_an_unknown_tag_of_weights_is_refused():
    with pytest.raises(UsageError, match=r"^timm cannot make a backbone of 'test_resnet\.nosuch' .*\(Invalid pretr"):
        discriminator("test_resnet.nosuch", pretrained=True)


class Featureless(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()


@pytest.fixture
def featureless(monkeypatch):
    """A model in timm's registry that has no feature maps to give."""
    name = "gac_featureless"

    def gac_featureless(pretrained=False, **options):
        return build_model_with_cfg(Featureless, name, pretrained, pretrained_cfg={"url": ""}, **options)

    gac_featureless.__module__ = "gac_featureless_module"
    monkeypatch.setitem(sys.modules, gac_featureless.__module__, type("", (), {"__all__": []}))
    registry = timm.models._registry
    for table in ("_model_entrypoints", "_module_to_models", "_model_to_module"):
        monkeypatch.setattr(registry, table, getattr(registry, table).copy())
    register_model(gac_featureless)
    return name


def test_a_model_without_feature_maps_is_refused(featureless):
    with pytest.raises(UsageError, match=r"^timm cannot make a backbone of 'gac_featureless' .*for example resnet18"):
        create_backbone(featureless)


def test_a_resolution_that_the_backbone_cannot_take_is_refused():
    with pytest.raises(UsageError, match=r"^timm's backbone 'halonet_h1' does not run on 64x64 pixels \(.+\); pass "):
        discriminator("halonet_h1", resolution=64)


def test_samples_of_two_channels_are_refused():
    with pytest.raises(UsageError, match=r"see 1 or 3 channels, and the samples have 2$"):
        discriminator(shape=(2, 16, 16))


def test_an_unknown_range_is_refused():
    with pytest.raises(UsageError, match=r"^unknown output 'relu'; choose one of: tanh, sigmoid$"):
        discriminator(output="relu")


def test_a_size_that_the_generator_cannot_double_to_is_refused():
    with pytest.raises(UsageError, match=r"doubles a map 3 times, which 12x16 does not allow; pass another"):
        SkipGenerator((1, 12, 16), 5, 4, 3, "tanh")


def test_weights_that_cannot_be_fetched_get_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"^the weights of timm's 'test_resnet' are not in the cache .*pretrained=f"
    ) as e:
        discriminator("test_resnet", pretrained=True)
    assert "\n" not in str(e.value)


# timm's optimizers and schedulers

NEEDS_CUDA = ["bnb*", "fused*"]
NEEDS_SECOND_ORDER_BACKWARD = ["adahessian"]
COMPILES = ["kron*"]  # half a minute of torch.compile each, and a package more


def vectors() -> tuple[nn.Module, nn.Module]:
    return (
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
    )


@pytest.mark.parametrize(
    "name",
    [
        *list_optimizers(exclude_filters=[*NEEDS_CUDA, *NEEDS_SECOND_ORDER_BACKWARD, *COMPILES, *OPTIMIZER_NAMES]),
        "lookahead_adam",
    ],
)
def test_timm_s_optimizers_move_both_networks(name):
    g, d = vectors()
    gac = GAC(*(g, d), *(create_optimizer_v2(net, name, lr=1e-3, weight_decay=0.01) for net in (g, d)), latent=3)
    before = [p.detach().clone() for p in (*g.parameters(), *d.parameters())]
    for _ in range(2):  # ADOPT only measures in its first
        gac.step(torch.randn(8, 4))
    after = [*g.parameters(), *d.parameters()]
    assert all(torch.isfinite(p).all() for p in after)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_timm_s_adam_is_the_adam_that_gac_has_always_had():
    torch.manual_seed(3)
    g, d = vectors()
    torch.manual_seed(3)
    g2, d2 = vectors()
    ours = GAC(g, d, *(torch.optim.Adam(net.parameters(), 1e-2) for net in (g, d)))
    theirs = GAC(g2, d2, *(create_optimizer_v2(net, "adam", lr=1e-2) for net in (g2, d2)))
    for _ in range(3):
        real, z = torch.randn(8, 4), torch.randn(8, 3)
        ours.step(real, z)
        theirs.step(real, z)
    assert all(torch.equal(a, b) for a, b in zip(g.parameters(), g2.parameters(), strict=True))


RATE, STEPS = 0.2, 10
RATES = {
    "cosine": lambda t: RATE / 2 * (1 + math.cos(math.pi * t / STEPS)),
    "tanh": lambda t: RATE / 2 * (1 - math.tanh(-7 * (1 - t / STEPS) + 3 * t / STEPS)),
    "poly": lambda t: RATE * (1 - t / STEPS) ** 0.5,
    "step": lambda t: RATE * 0.5 ** (t // 3),
    "multistep": lambda t: RATE * 0.5 ** ((t + 1 >= 2) + (t + 1 >= 5)),  # timm counts from 1 here
}
"""Closed forms of timm's schedules over 10 updates, `decay_rate` 0.5."""


@pytest.mark.parametrize("sched", RATES)
def test_timm_s_schedulers_drive_the_step(sched):
    """With u = g and no conjugacy a step is -rate * g: the rate is read off the parameters."""
    g, d = vectors()
    optimizers = (
        ConjugateGradient(g.parameters(), RATE, rule="none", metric="identity"),
        create_optimizer_v2(d, "momentum", lr=RATE, momentum=0.0),
    )
    schedulers = [
        create_scheduler_v2(
            optimizer,
            sched,
            num_epochs=STEPS,
            decay_epochs=3,
            decay_milestones=[2, 5],
            decay_rate=0.5,
            step_on_epochs=False,
            updates_per_epoch=1,
        )[0]
        for optimizer in optimizers
    ]
    gac = GAC(g, d, *optimizers, latent=3)
    for update in range(5):
        for scheduler in schedulers:
            scheduler.step_update(update)
        before = [p.detach().clone() for p in (*g.parameters(), *d.parameters())]
        gac.step(torch.randn(8, 4))
        for old, new in zip(before, (*g.parameters(), *d.parameters()), strict=True):
            torch.testing.assert_close(old - new, RATES[sched](update) * new.grad, rtol=1e-3, atol=1e-6)


# GAC in timm's registry


@pytest.fixture
def registered():
    """The names in timm's registry for one test."""
    register()
    yield
    for name in OPTIMIZER_NAMES:
        default_registry._optimizers.pop(name)


def test_importing_the_adapter_registers_nothing():
    spec = importlib.util.spec_from_file_location("another_timm_backbone", timm_backbone.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert set(OPTIMIZER_NAMES) & set(list_optimizers()) == set()


def test_registering_twice_changes_nothing_and_warns_of_nothing(registered, caplog):
    before = dict(default_registry._optimizers)
    with caplog.at_level(logging.WARNING):
        register()
    assert default_registry._optimizers == before
    assert caplog.records == []


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_timm_s_factory_makes_the_optimizer_that_the_class_makes(registered, name):
    """Also with several groups, the direction is one vector over all of them."""
    torch.manual_seed(4)
    g, d = vectors()
    torch.manual_seed(4)
    g2, d2 = vectors()
    settings = {"rule": "hs", "metric": "identity", "beta_max": 2.0}

    def layers(net):
        return [{"params": layer.parameters()} for layer in (net[0], net[2])]

    theirs = create_optimizer_v2(g, name, lr=0.05, param_group_fn=layers, **settings)
    assert isinstance(theirs, ConjugateGradient)
    assert len(theirs.param_groups) == 2
    ours = ConjugateGradient(g2.parameters(), 0.05, **settings)
    games = [
        GAC(g, d, theirs, torch.optim.SGD(d.parameters(), 0.1)),
        GAC(g2, d2, ours, torch.optim.SGD(d2.parameters(), 0.1)),
    ]
    for _ in range(4):
        real, z = torch.randn(8, 4), torch.randn(8, 3)
        for game in games:
            stats = game.step(real, z)
    assert float(stats["beta"]) != 0
    for a, b in zip(g.parameters(), g2.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_layer_decay_scales_the_rates(registered):
    optimizer = create_optimizer_v2(timm.create_model("test_convnext"), "gac", lr=0.1, layer_decay=0.5)
    scheduler, _ = create_scheduler_v2(optimizer, "step", decay_epochs=10)
    scheduler.step(0)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
    assert len({group["lr"] for group in optimizer.param_groups}) > 1


def test_a_timm_without_a_registry_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim._optim_factory", None)
    with pytest.raises(UsageError, match=r"^timm \S+ has no registry of optimizers; pip install 'timm>=1\.0\.12'$"):
        register()


@pytest.mark.parametrize(
    "make",
    [
        lambda net: create_optimizer_v2(net, "gac", lr=0.1, weight_decay=0.05),
        lambda net: create_optimizer_v2(net.parameters(), "gac", lr=0.1, weight_decay=0.05),
        lambda net: create_optimizer_v2([{"params": net.parameters(), "weight_decay": 0.05}], "gac", lr=0.1),
    ],
    ids=["model", "parameters", "group"],
)
def test_a_weight_decay_is_refused(registered, make):
    with pytest.raises(UsageError, match=r"^ConjugateGradient has no weight decay, got 0\.05; pass weight_decay=0,"):
        make(vectors()[0])


def test_betas_are_refused_and_not_dropped(registered):
    with pytest.raises(UsageError, match=r"^ConjugateGradient has no betas, got \(0\.0, 0\.9\); pass beta2="):
        create_optimizer_v2(vectors()[0], "gac", lr=0.1, betas=(0.0, 0.9))
