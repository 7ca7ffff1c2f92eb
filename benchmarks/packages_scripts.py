"""The scripts of benchmarks/packages.py: published packages as they are, and with GAC in them.

A script trains so many steps and returns the losses that the package's own trainer counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pandas as pd
import torch
from sklearn.datasets import load_digits, load_wine
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, interpolate
from torch.optim import Adam
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

Losses = list[tuple[float, float]]
"""(discriminator's, generator's) of each step, as the script's own trainer counts them."""

LATENT, BATCH, RATE, BETAS = 64, 16, 2e-4, (0.5, 0.999)


def digits(number: int = 1797) -> Tensor:
    """Handwritten digits in [0, 1], enlarged: (number, 1, 32, 32)."""
    images = torch.from_numpy(load_digits().images[:number]).float()[:, None] / 16
    return interpolate(images, size=32, mode="bilinear")


# ---- lightweight-gan: its Trainer, one call of `train` for each step


class WithoutGPU(TorchFunctionMode):
    """Keeps on the CPU what code sends to a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def lightweight_trainer() -> Iterator[Any]:
    """The Trainer on digits, one at a time, since it asks for an NVIDIA GPU and does without one here."""
    with mock.patch("torch.cuda.is_available", return_value=True):  # asserted at import
        from lightweight_gan import Trainer

    with WithoutGPU():
        trainer = Trainer(image_size=32, latent_dim=LATENT, fmap_max=32, greyscale=True, batch_size=1, use_aim=False)
        trainer.loader = iter(DataLoader(digits(), shuffle=True))
        trainer.init_GAN()
        trainer.steps = 4  # past the pictures and the checkpoint of step 0
        yield trainer


def lightweight_gan_before(steps: int) -> Losses:
    losses = []
    with lightweight_trainer() as trainer:
        for _ in range(steps):
            trainer.train()
            losses.append((trainer.d_loss, trainer.g_loss))
    return losses


def lightweight_gan_optimizer(steps: int) -> Losses:
    from gac_plugin import ConjugateGradient

    losses = []
    with lightweight_trainer() as trainer:
        trainer.GAN.G_opt = ConjugateGradient(trainer.GAN.G.parameters(), 2e-4, "pr+", "adam", beta2=0.9)
        for _ in range(steps):
            trainer.train()
            losses.append((trainer.d_loss, trainer.g_loss))
    return losses


def lightweight_gan_step(steps: int) -> Losses:
    from gac_plugin import GAC, GradientPenalty

    losses = []
    with lightweight_trainer() as trainer:
        gan, heads = trainer.GAN, lambda out: torch.cat([out[0], out[1].flatten(1)], dim=1)
        gac = GAC(gan.G, gan.D_aug, gan.G_opt, gan.D_opt, "hinge", penalty=GradientPenalty(2.5, 2.5), logits=heads)
        for _ in range(steps):
            stats = gac.step(next(trainer.loader), torch.randn(1, LATENT))
            losses.append((stats["loss_d"].item(), stats["loss_g"].item()))
    return losses


# ---- ctgan: its `fit` on 178 wines with 13 measurements and their cultivar; an epoch is one step


def wines() -> pd.DataFrame:
    return load_wine(as_frame=True).frame


def ctgan_before(steps: int) -> Losses:
    from ctgan import CTGAN

    model = CTGAN(epochs=steps, enable_gpu=False)
    model.fit(wines(), ["target"])
    return model.loss_values[["Discriminator Loss", "Generator Loss"]].to_numpy().tolist()


def ctgan_step(steps: int) -> Losses:
    from gac_plugin.adapters.tables import GACCTGAN as CTGAN

    model = CTGAN(epochs=steps, enable_gpu=False)
    model.fit(wines(), ["target"])
    return model.loss_values[["Discriminator Loss", "Generator Loss"]].to_numpy().tolist()


# ---- MONAI: its GanTrainer, an engine of pytorch-ignite; the discriminator ends in a sigmoid


def monai_networks() -> tuple[Any, Any]:
    from monai.networks.nets import Discriminator, Generator

    return Generator((LATENT,), (32, 8, 8), (16, 1), (2, 2)), Discriminator((1, 32, 32), (16, 32, 64), (2, 2, 2))


def monai_losses(discriminator: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The generator's of generated samples, the discriminator's of generated and real ones."""

    def entropy(samples: Tensor, target: float) -> Tensor:
        answer = discriminator(samples)
        return binary_cross_entropy(answer, torch.full_like(answer, target))

    return lambda fake: entropy(fake, 1), lambda fake, real: entropy(real, 1) + entropy(fake.detach(), 0)


def monai_settings(steps: int) -> dict[str, Any]:
    """One epoch of `steps` batches."""
    images: Any = [{"reals": image} for image in digits(steps * BATCH)]
    loader = DataLoader(images, batch_size=BATCH)
    return {"device": "cpu", "max_epochs": 1, "train_data_loader": loader, "decollate": False}


def losses_of(trainer: Any, discriminator: str, generator: str) -> Losses:
    """A list that grows by these two entries of the trainer's output at every iteration."""
    from ignite.engine import Events

    losses: Losses = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        losses.append((float(trainer.state.output[discriminator]), float(trainer.state.output[generator])))

    return losses


def monai_before(steps: int) -> Losses:
    from monai.engines import GanTrainer

    generator, discriminator = monai_networks()
    loss_g, loss_d = monai_losses(discriminator)
    optimizer_g = Adam(generator.parameters(), RATE, BETAS)
    optimizer_d = Adam(discriminator.parameters(), RATE, BETAS)
    trainer = GanTrainer(
        g_network=generator,
        g_optimizer=optimizer_g,
        g_loss_function=loss_g,
        d_network=discriminator,
        d_optimizer=optimizer_d,
        d_loss_function=loss_d,
        **monai_settings(steps),
    )
    losses = losses_of(trainer, "d_loss", "g_loss")
    trainer.run()
    return losses


def monai_optimizer(steps: int) -> Losses:
    from monai.engines import GanTrainer

    from gac_plugin import ConjugateGradient

    generator, discriminator = monai_networks()
    loss_g, loss_d = monai_losses(discriminator)
    optimizer_g = ConjugateGradient(generator.parameters(), RATE, "pr+", "adam")
    optimizer_d = Adam(discriminator.parameters(), RATE, BETAS)
    trainer = GanTrainer(
        g_network=generator,
        g_optimizer=optimizer_g,
        g_loss_function=loss_g,
        d_network=discriminator,
        d_optimizer=optimizer_d,
        d_loss_function=loss_d,
        **monai_settings(steps),
    )
    losses = losses_of(trainer, "d_loss", "g_loss")
    trainer.run()
    return losses


def monai_step(steps: int) -> Losses:
    from monai.engines import GanTrainer

    from gac_plugin import GAC

    generator, discriminator = monai_networks()
    loss_g, loss_d = monai_losses(discriminator)
    optimizer_g = Adam(generator.parameters(), RATE, BETAS)
    optimizer_d = Adam(discriminator.parameters(), RATE, BETAS)
    gac = GAC(generator, discriminator, optimizer_g, optimizer_d, output="probability", latent=LATENT)
    trainer = GanTrainer(
        g_network=generator,
        g_optimizer=optimizer_g,
        g_loss_function=loss_g,
        d_network=discriminator,
        d_optimizer=optimizer_d,
        d_loss_function=loss_d,
        iteration_update=lambda engine, batch: gac.step(batch["reals"]),
        **monai_settings(steps),
    )
    losses = losses_of(trainer, "loss_d", "loss_g")
    trainer.run()
    return losses


# ---- torchgan: its Trainer on two loss objects, each of which trains one network


def torchgan_networks(optimizer: Any, **settings: Any) -> dict[str, Any]:
    """The Trainer's table of networks, with this optimizer for the generator."""
    from torchgan.models import DCGANDiscriminator, DCGANGenerator

    return {
        "generator": {
            "name": DCGANGenerator,
            "args": {"encoding_dims": LATENT, "out_channels": 1, "step_channels": 8},
            "optimizer": {"name": optimizer, "args": {"lr": RATE, **settings}},
        },
        "discriminator": {
            "name": DCGANDiscriminator,
            "args": {"in_channels": 1, "step_channels": 8},
            "optimizer": {"name": Adam, "args": {"lr": RATE, "betas": BETAS}},
        },
    }


def torchgan_batches(steps: int) -> Any:
    return DataLoader(TensorDataset(2 * digits(steps * BATCH) - 1, torch.zeros(steps * BATCH)), batch_size=BATCH)


def torchgan_losses(trainer: Any) -> Losses:
    """The curves that the Trainer keeps."""
    curves = trainer.logger.get_loss_viz().logs
    return list(zip(curves["MinimaxDiscriminatorLoss"], curves["MinimaxGeneratorLoss"], strict=True))


def torchgan_before(steps: int) -> Losses:
    from torchgan.losses import MinimaxDiscriminatorLoss, MinimaxGeneratorLoss
    from torchgan.trainer import Trainer

    networks = torchgan_networks(Adam, betas=BETAS)
    losses = [MinimaxGeneratorLoss(), MinimaxDiscriminatorLoss()]
    trainer = Trainer(networks, losses, device=torch.device("cpu"), epochs=1)
    trainer.logger.logger_end_epoch.clear()  # its pictures use an argument that torchvision has removed since
    trainer(torchgan_batches(steps))
    return torchgan_losses(trainer)


def torchgan_optimizer(steps: int) -> Losses:
    from torchgan.losses import MinimaxDiscriminatorLoss, MinimaxGeneratorLoss
    from torchgan.trainer import Trainer

    from gac_plugin import ConjugateGradient

    networks = torchgan_networks(ConjugateGradient, rule="pr+", metric="adam")
    losses = [MinimaxGeneratorLoss(), MinimaxDiscriminatorLoss()]
    trainer = Trainer(networks, losses, device=torch.device("cpu"), epochs=1)
    trainer.logger.logger_end_epoch.clear()  # its pictures use an argument that torchvision has removed since
    trainer(torchgan_batches(steps))
    return torchgan_losses(trainer)


SCRIPTS: dict[str, dict[str, Callable[[int], Losses]]] = {
    "lightweight-gan": {
        "before": lightweight_gan_before,
        "optimizer": lightweight_gan_optimizer,
        "step": lightweight_gan_step,
    },
    "ctgan": {"before": ctgan_before, "step": ctgan_step},
    "monai": {"before": monai_before, "optimizer": monai_optimizer, "step": monai_step},
    "torchgan": {
        "before": torchgan_before,
        "optimizer": torchgan_optimizer,
    },
}
"""By package, as the registry names it, and depth of the swap."""
