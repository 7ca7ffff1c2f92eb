"""Windows of batches, clipping, and steps left out: against what they are for, worked out without them."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from gac_plugin import GAC, ConjugateGradient, GradientPenalty
from gac_plugin.errors import UsageError
from gac_plugin.update import Update, spread

PENALTY = GradientPenalty(0.5, 0.5, 2)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pair(tiny_generator, tiny_discriminator):
    return tiny_generator(), tiny_discriminator()


def make(pair, accelerator=None, **settings) -> GAC:
    """GAC on copies of the networks."""
    generator, discriminator = copy.deepcopy(pair)
    optimizers = (
        ConjugateGradient(generator.parameters(), 0.05, rule="pr+", metric="adam"),
        torch.optim.Adam(discriminator.parameters(), 0.01, betas=(0.0, 0.99)),
    )
    prepared = (generator, discriminator, *optimizers)
    if accelerator is not None:
        prepared = accelerator.prepare(*prepared)
    return GAC(*prepared, accelerator=accelerator, **settings)


def parameters(gac: GAC) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for net in (gac.generator, gac.discriminator) for p in net.parameters()])


@pytest.mark.parametrize("schedule", ["fresh", "fused"])
@pytest.mark.parametrize("loss", ["bce", "relativistic"])
def test_a_window_of_batches_is_one_step_on_all_of_them(pair, latents, schedule, loss):
    """The covectors of the whole window are those of the D that has seen the whole window."""
    whole = make(pair, loss=loss, schedule=schedule, penalty=PENALTY)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    parts = make(pair, accelerator, loss=loss, schedule=schedule, penalty=PENALTY)
    start = parameters(whole)
    for _ in range(5):
        real, z = 1 + torch.randn(16, 4, dtype=torch.float64), latents(16)
        expected = whole.step(real, z)
        for batch, (some_real, some_z) in enumerate(zip(real.chunk(4), z.chunk(4), strict=True)):
            with accelerator.accumulate(parts.generator, parts.discriminator):
                stats = parts.step(some_real, some_z)
            assert ("beta" in stats) == (batch == 3)
        assert ("penalty" in stats) == ("penalty" in expected), "a lazy penalty counts steps, not batches"
    torch.testing.assert_close(parameters(parts), parameters(whole), rtol=0, atol=1e-12)
    assert float((parameters(whole) - start).abs().max()) > 0.1


def test_the_stats_of_a_window_are_means(pair, latents):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts, whole = make(pair, accelerator), make(pair)
    real, z = torch.randn(8, 4, dtype=torch.float64), latents(8)
    expected = whole.step(real, z)
    for some_real, some_z in zip(real.chunk(2), z.chunk(2), strict=True):
        with accelerator.accumulate(parts.generator, parts.discriminator):
            stats = parts.step(some_real, some_z)
    torch.testing.assert_close(stats["loss_g"], expected["loss_g"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", ["fresh", "fused"])
def test_what_other_code_left_in_the_gradients_does_not_count(pair, latents, schedule):
    clean, littered = make(pair, schedule=schedule), make(pair, schedule=schedule)
    real, z = torch.randn(8, 4, dtype=torch.float64), latents(8)
    for _ in range(2):
        for network in (littered.generator, littered.discriminator):
            for parameter in network.parameters():
                parameter.grad = torch.full_like(parameter, 7.0)
        clean.step(real, z)
        littered.step(real, z)
    assert torch.equal(parameters(littered), parameters(clean))


def out_of_memory(parameter):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("schedule", ["fresh", "fused"])
@pytest.mark.parametrize("failing", ["generator", "discriminator"])
def test_the_gradients_of_a_step_that_failed_do_not_count(pair, latents, failing, schedule, accumulation):
    """Its error comes when one gradient has arrived; whoever catches it goes on with other batches."""
    batches = [(torch.randn(8, 4, dtype=torch.float64), latents(8)) for _ in range(accumulation)]
    ended = []
    for fails in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        gac = make(pair, accelerator, schedule=schedule)
        before = parameters(gac)

        def window(gac=gac, accelerator=accelerator):
            for real, z in batches:
                with accelerator.accumulate(gac.generator, gac.discriminator):
                    gac.step(real, z)

        if fails:
            parameter = next(getattr(gac, failing).parameters())
            hook = parameter.register_post_accumulate_grad_hook(out_of_memory)
            with pytest.raises(RuntimeError, match="out of memory"):
                window()
            hook.remove()
            accelerator.step = 0
            gac.generator.load_state_dict(pair[0].state_dict())
            gac.discriminator.load_state_dict(pair[1].state_dict())
            gac.discriminator_optimizer.optimizer.state.clear()
        window()
        ended.append(parameters(gac))
    assert torch.equal(*ended)
    assert not torch.equal(ended[0], before)


class Shifted(nn.Module):
    """G(z) = z + b"""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, z):
        return z + self.shift


class Product(Shifted):
    """D(x) = <w + b, x>, with the same b"""

    def __init__(self, shift):
        super().__init__(shift)
        self.weight = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))

    def forward(self, x):
        return x @ (self.weight + self.shift)


@pytest.mark.parametrize("schedule", ["fresh", "fused"])
def test_what_a_discriminator_leaves_in_a_parameter_that_the_generator_shares_does_not_count(schedule):
    shift = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    generator, discriminator = Shifted(shift), Product(shift)
    real, z = torch.randn(2, 5, 2, dtype=torch.float64)
    fake, before = z + shift.detach(), shift.detach().clone()
    stale = discriminator.weight.detach().clone()
    gac = GAC(
        generator,
        discriminator,
        torch.optim.SGD([shift], 0.1),
        torch.optim.SGD([discriminator.weight], 0.1),
        schedule=schedule,
    )
    gac.step(real, z)
    slope = before + (discriminator.weight.detach() if schedule == "fresh" else stale)
    # the gradient of -log D(G(z)) with D held: -(1 - D) dl/dx, and dG/db = 1
    expected = -(1 - torch.sigmoid(fake @ slope)).mean() * slope
    torch.testing.assert_close(shift.grad, expected, rtol=1e-12, atol=0)


def test_a_clipped_step_is_the_step_along_the_gradient_of_that_norm(pair, latents):
    real, z = torch.randn(8, 4, dtype=torch.float64), latents(8)
    free, clipped = make(pair, max_norm=1e9), make(pair, max_norm=0.01)
    free_stats, stats = free.step(real, z), clipped.step(real, z)
    gradient = torch.cat([p.grad.flatten() for p in free.discriminator.parameters()])
    short = torch.cat([p.grad.flatten() for p in clipped.discriminator.parameters()])
    torch.testing.assert_close(free_stats["norm_d"], gradient.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats["norm_d"], gradient.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(short, gradient * 0.01 / gradient.norm(), rtol=1e-4, atol=0)
    for network in (clipped.generator, clipped.discriminator):
        norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_a_bound_that_is_none_is_refused(pair, max_norm):
    with pytest.raises(UsageError, match="max_norm must be a number above 0, got"):
        make(pair, max_norm=max_norm)


@pytest.mark.parametrize("schedule", ["fresh", "fused"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(pair, latents, schedule, value):
    guarded, plain = (make(pair, schedule=schedule, skip_nonfinite=guard) for guard in (True, False))
    for step in range(6):
        real, z = torch.randn(8, 4, dtype=torch.float64), latents(8)
        if step == 3:
            real[5, 2] = value
        before = parameters(guarded)
        stats = guarded.step(real, z)
        if step == 3:
            assert torch.equal(parameters(guarded), before)
            assert "norm_g" not in stats
        else:
            plain.step(real, z)
            assert not torch.equal(parameters(guarded), before)
    assert guarded.skipped == 1
    assert torch.equal(parameters(guarded), parameters(plain))


def test_a_spoiled_generator_step_leaves_the_discriminator_s(pair, latents):
    """D's part is fine; the covectors are not."""
    gac = make(pair, skip_nonfinite=True)
    real, z = torch.randn(8, 4, dtype=torch.float64), latents(8)
    gac.step(real, z)
    before = [p.detach().clone() for p in gac.generator.parameters()]
    gac.discriminator_step(real, gac.generator(z))
    gac.generator_step(gac.generator(z) * torch.tensor(float("nan")))
    assert all(torch.equal(p, q) for p, q in zip(gac.generator.parameters(), before, strict=True))
    assert gac.skipped == 1
    gac.generator_step(gac.generator(z))
    assert not torch.equal(next(gac.generator.parameters()), before[0])


def test_the_count_of_steps_left_out_goes_on_from_the_state(pair, latents):
    gac = make(pair, skip_nonfinite=True)
    gac.step(torch.randn(8, 4, dtype=torch.float64), latents(8))
    gac.step(torch.full((8, 4), float("nan"), dtype=torch.float64), latents(8))
    other = make(pair)
    other.load_state_dict(gac.state_dict())
    assert other.skipped == 1
    assert other.state_dict() == gac.state_dict()


@pytest.mark.parametrize("value", [2.0, -0.5, 0.0])
def test_spreading_changes_nothing_of_a_finite_loss(value):
    x = torch.tensor(value, requires_grad=True)
    loss = spread(x.exp())
    assert torch.equal(loss, x.detach().exp())
    assert torch.equal(torch.autograd.grad(loss, x)[0], x.detach().exp())


def test_spreading_makes_a_finite_gradient_of_an_infinite_loss_not_a_number():
    x = torch.tensor([float("inf"), 1.0], requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(x.sum(), x)[0]).all()
    assert torch.isnan(torch.autograd.grad(spread(x.sum()), x)[0]).all()


class Scaler:
    """A gradient scaler that is told which steps to find fault with, as accelerate presents it."""

    def __init__(self, faults: list[bool]) -> None:
        self.faults, self.unscaled = faults, 0
        self.scaler, self.sync_gradients, self.step_was_skipped = self, True, False
        self.param_groups = [{"params": [nn.Parameter(torch.ones(2))]}]
        self.param_groups[0]["params"][0].grad = torch.ones(2)

    def unscale_gradients(self, optimizer: "Scaler") -> None:
        self.unscaled += 1

    def step(self) -> None:
        self.step_was_skipped = self.faults.pop(0)

    def zero_grad(self) -> None:
        pass


def test_a_gradient_scaler_decides_by_itself_and_is_always_asked():
    """It lowers its scale only when it is asked to step."""
    scaler = Scaler([True, False, True])
    update = Update(scaler, scaler, skip_nonfinite=True)
    left_out = []
    for _ in range(3):
        update.begin()
        update.finish()
        left_out.append(update.left_out)
    assert left_out == [True, False, True]
    assert (update.skipped, scaler.unscaled, scaler.faults) == (2, 3, [])
