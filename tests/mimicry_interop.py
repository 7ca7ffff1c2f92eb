"""What works together with the real torch-mimicry, as a program of its own: a line of JSON for each case, as it ends.

`python tests/mimicry_interop.py FOLDER`, with the package installed, with or without what it depends on.
"""

import json
import sys
from copy import deepcopy
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gac_plugin import GAC, ConjugateGradient
from gac_plugin.adapters.mimicry import (
    GACGenerator,
    ResidualDiscriminator,
    ResidualGenerator,
    convert_checkpoint,
    read_checkpoint,
)

SMALL = {
    "DCGAN": ("dcgan", {}),
    "SNGAN": ("sngan", {}),
    "WGANGP": ("wgan_gp", {}),
    "SSGAN": ("ssgan", {}),
    "InfoMaxGAN": ("infomax_gan", {}),
    "SAGAN": ("sagan", {"num_classes": 3}),
    "CGANPD": ("cgan_pd", {"num_classes": 3}),
}
"""The package's networks for 32 x 32 images, by the beginning of their names: where they are, and what they need."""


def stand_in(name: str, **contents: object) -> None:
    module = ModuleType(name)
    vars(module).update(contents, __spec__=ModuleSpec(name, None))
    sys.modules[name] = module


def import_package() -> ModuleType:
    """The package under the torch of today, without what its metrics alone use.

    torch 2 has no torch._six; TensorFlow crashes the process if it is loaded before triton.
    """
    stand_in("torch._six", PY3=True)
    stand_in("tensorboard.compat.notf")  # tensorboard's own way of being told to do without TensorFlow
    stand_in("tensorflow")
    stand_in("skimage", io=None)
    return import_module("torch_mimicry")


def networks(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A generator with GAC's step, the package's own with the same weights, and their discriminator; all small."""
    folder, options = SMALL[name]
    module = import_module(f"torch_mimicry.nets.{folder}.{folder}_32")
    kind = getattr(module, f"{name}Generator32")
    torch.manual_seed(0)
    plain = kind(nz=8, ngf=16, **options)
    generator = type(f"{name}WithGAC", (GACGenerator, kind), {})(nz=8, ngf=16, **options)
    generator.load_state_dict(plain.state_dict())
    return generator, plain, getattr(module, f"{name}Discriminator32")(ndf=16, **options)


def real_batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(size, 3, 32, 32) * 2 - 1, torch.arange(size) % 3


def sgd(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr)


def check_gradient(mmc: ModuleType, name: str, folder: Path) -> None:
    """GAC's gradient is that of the package's own step at the samples that D has just seen."""
    generator, plain, discriminator = networks(name)
    log = mmc.training.metric_log.MetricLog()
    batch = real_batch()
    torch.manual_seed(1)
    discriminator.train_step(batch, netG=generator, optD=sgd(discriminator, 0.01), log_data=log)
    before = deepcopy(discriminator.state_dict())
    *_, textbook = networks(name)
    textbook.load_state_dict(before)
    generator.train_step(batch, netD=discriminator, optG=sgd(generator, 0.0), log_data=log)
    torch.manual_seed(1)  # the same latents and labels
    plain.train_step(batch, netD=textbook, optG=sgd(plain, 0.0), log_data=log)
    for ours, theirs in zip(generator.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    trained = discriminator.named_parameters()
    assert all(torch.equal(value, before[key]) and value.requires_grad for key, value in trained)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*real_batch(24)), batch_size=8)


def trainer(mmc: ModuleType, generator: nn.Module, discriminator: nn.Module, folder: Path, steps: int):
    return mmc.training.Trainer(
        netD=discriminator,
        netG=generator,
        optD=torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.0, 0.9)),
        optG=ConjugateGradient(generator.parameters(), 2e-4, beta2=0.9),
        n_dis=2,
        num_steps=steps,
        lr_decay=None,
        dataloader=loader(),
        log_dir=str(folder),
        vis_steps=2,
        log_steps=1,
        save_steps=2,
        device=torch.device("cpu"),
    )


def finite_and_moved(network: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    state = network.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    return any(not torch.equal(state[key], before[key]) for key in before)


def check_trainer(mmc: ModuleType, name: str, folder: Path) -> None:
    """The unmodified Trainer trains, saves, and goes on from what it saved; the checkpoint converts."""
    generator, _, discriminator = networks(name)
    before = deepcopy(generator.state_dict())
    trainer(mmc, generator, discriminator, folder, 2).train()
    assert finite_and_moved(generator, before)
    saved = folder / "checkpoints" / "netG" / "netG_2_steps.pth"
    converted = read_checkpoint(convert_checkpoint(saved, folder))
    assert converted["global_step"] == 2
    fresh, _, fresh_discriminator = networks(name)
    fresh.load_state_dict(converted["model_state_dict"])
    assert all(torch.equal(value, generator.state_dict()[key]) for key, value in fresh.state_dict().items())
    again, _, _ = networks(name)
    (folder / "params.json").unlink()  # it refuses another num_steps
    trainer(mmc, again, fresh_discriminator, folder, 3).train()
    assert finite_and_moved(again, generator.state_dict())
    assert (folder / "checkpoints" / "netG" / "netG_3_steps.pth").is_file()


def check_loop(mmc: ModuleType, name: str, folder: Path) -> None:
    """The package's own networks in a loop of one's own."""
    _, generator, discriminator = networks(name)
    before = deepcopy(generator.state_dict())
    gac = GAC(
        generator,
        discriminator,
        ConjugateGradient(generator.parameters(), 2e-4),
        torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.0, 0.9)),
        loss={"ns": "bce"}.get(discriminator.loss_type, discriminator.loss_type),
        penalty="r1+r2" if name == "WGANGP" else None,
        logits=lambda answer: answer[0] if isinstance(answer, tuple) else answer,
    )
    for _ in range(2):
        real, labels = real_batch()
        stats = gac.step(real, **({"y": labels} if "num_classes" in SMALL[name][1] else {}))
        assert all(torch.isfinite(value) for value in stats.values())
    assert finite_and_moved(generator, before)


def check_ours(mmc: ModuleType, classes: int, folder: Path) -> None:
    """Our networks under the unmodified Trainer, which resumes them bit for bit."""

    def pair() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        arguments = {"sample_shape": (3, 32, 32), "latent_size": 8, "width": 8, "depth": 2, "output": "tanh"}
        return ResidualGenerator(**arguments, classes=classes), ResidualDiscriminator(**arguments, classes=classes)

    generator, discriminator = pair()
    trainer(mmc, generator, discriminator, folder, 2).train()
    names = sorted(path.name for path in (folder / "checkpoints").glob("*/*"))
    assert names == ["netD_2_steps.safetensors", "netG_2_steps.safetensors"]
    again, again_discriminator = pair()
    resumed = trainer(mmc, again, again_discriminator, folder, 2)
    resumed.train()
    for one, other in ((generator, again), (discriminator, again_discriminator)):
        assert all(torch.equal(value, one.state_dict()[key]) for key, value in other.state_dict().items())
    assert len(resumed.optG.state) == len(list(again.parameters()))


def main(folder: Path) -> None:
    mmc = import_package()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    cases = [(check, name) for name in SMALL for check in (check_gradient, check_trainer, check_loop)]
    for index, (check, case) in enumerate([*cases, (check_ours, 0), (check_ours, 3)]):
        place = folder / str(index)
        place.mkdir(parents=True)
        try:
            check(mmc, case, place)
            error = None
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        print("\n" + json.dumps({"case": f"{check.__name__[6:]}-{case}", "error": error}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
