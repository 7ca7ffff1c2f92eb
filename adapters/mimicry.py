"""torch-mimicry (Lee & Town 2020, arXiv:2005.02494): GAC in its networks, networks of ours under its Trainer.

`GACGenerator` puts GAC into any generator with the package's interface. `ResidualGenerator` and
`ResidualDiscriminator` have that interface themselves; they are what `gac train --adapter mimicry` uses.
`convert_checkpoint` and `read_checkpoint` take its checkpoints without unpickling code. Nothing here imports the
package.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, relu
from torch.nn.utils.parametrizations import spectral_norm

from gac_plugin.cotangent import frozen, pullback
from gac_plugin.errors import UsageError, resolve
from gac_plugin.losses import LOSSES
from gac_plugin.protocols import Adapter
from gac_plugin.training.files import write_whole
from gac_plugin.training.packing import pack, unpack

ENTRIES = ("model_state_dict", "optimizer_state_dict", "global_step")
"""What one of the package's checkpoints holds."""
SAFETENSORS = ".safetensors"


class MetricLog(Protocol):
    """Where a train_step of the package's interface puts its figures: torch_mimicry.training.MetricLog."""

    def add_metric(self, name: str, value: Any, group: str | None = None, precision: int = 4) -> None: ...


class GACGenerator:
    """GAC's generator step in a network with torch-mimicry's interface, before which it stands among the bases:

        class Generator(GACGenerator, sngan.SNGANGenerator32): ...

    The discriminator's train_step draws its generated batch from this network, which keeps the graph behind it. The
    generator's own train_step follows as it is, with every term of its loss, but at those samples and with the updated
    discriminator frozen, so that its backward pass ends at the samples. Where it calls its optimizer,

        d loss / dx_i = -c_i / B        theta.grad = sum_i J_i^T d loss / dx_i        x_i = G(z_i)

    and the optimizer steps, `ConjugateGradient` for the method in full. One forward pass of G and D's parameter
    gradients are saved in each step. Without a batch of the discriminator's at hand, the network draws its own.
    """

    _drawn: tuple[Tensor, Any] | None = None
    _given: tuple[Tensor, Any] | None = None

    def generate_images(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's own; within its train_step, the samples of the discriminator's last step."""
        if self._given is not None:
            return self._given[0]
        samples = super().generate_images(*args, **kwargs)  # type: ignore[misc]
        self._remember(samples, None)
        return samples

    def generate_images_with_labels(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The conditional network's own; within its train_step, the samples of the discriminator's last step."""
        if self._given is not None:
            return self._given
        samples, labels = super().generate_images_with_labels(*args, **kwargs)  # type: ignore[misc]
        self._remember(samples, labels)
        return samples, labels

    def train_step(
        self,
        real_batch: tuple[Tensor, Tensor],
        netD: nn.Module,  # noqa: N803
        optG: torch.optim.Optimizer,  # noqa: N803
        log_data: MetricLog,
        scaler: Any = None,
        **options: Any,
    ) -> MetricLog:
        """One step of the generator; the arguments are those of the package.

        Raises:
            UsageError: a gradient scaler is given, or the network's train_step does not take its samples from
                generate_images.
        """
        if scaler is not None:
            raise UsageError("GACGenerator's train_step takes no gradient scaler; pass amp=False to Trainer")
        step = super().train_step  # type: ignore[misc]
        drawn, self._drawn = self._drawn, None
        try:
            with frozen(netD):
                if drawn is None:
                    return step(real_batch=real_batch, netD=netD, optG=optG, log_data=log_data, **options)
                samples, labels = drawn
                leaf = samples.detach().requires_grad_(True)
                self._given = leaf, labels
                ascent = _Ascent(optG, samples, leaf)
                return step(real_batch=real_batch, netD=netD, optG=ascent, log_data=log_data, **options)
        finally:
            self._drawn = self._given = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the network, or what is pickled of it, has no batch at hand: its graph belongs to this one."""
        return {**self.__dict__, "_drawn": None}

    def _remember(self, samples: Tensor, labels: Any) -> None:
        if samples.requires_grad:
            self._drawn = samples, labels


class _Ascent:
    """The generator's optimizer, whose step first pulls the covectors that wait at the samples back through G."""

    def __init__(self, optimizer: torch.optim.Optimizer, samples: Tensor, leaf: Tensor) -> None:
        self.optimizer = optimizer
        self.samples = samples
        self.leaf = leaf

    def step(self) -> None:
        if self.leaf.grad is None:
            raise UsageError(
                "the generator's train_step does not use the samples of its own generate_images; draw them there, or "
                "leave GACGenerator out"
            )
        pullback(self.samples, self.leaf.grad)
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of the package (.pth) or of this file (.safetensors), on the CPU.

    Args:
        path: a file. A .pth is read with `weights_only=True`: a pickle that holds code is refused, not run.

    Returns:
        `model_state_dict`, `optimizer_state_dict` (None where there was no optimizer) and `global_step`.

    Raises:
        UsageError: the file cannot be read, or is no checkpoint.
    """
    path = Path(path)
    read = _read_safetensors if path.suffix == SAFETENSORS else _read_pickle
    try:
        state = read(path)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # anything may stand there
        raise UsageError(
            f"{path} is damaged, or holds more than tensors, numbers and text, which could run code and is not loaded "
            f"({type(error).__name__})"
        ) from error
    missing = [entry for entry in ENTRIES if not isinstance(state, Mapping) or entry not in state]
    if missing:
        raise UsageError(f"{path} is no torch-mimicry checkpoint: it lacks {', '.join(missing)}")
    return {entry: state[entry] for entry in ENTRIES}


def convert_checkpoint(path: str | Path, folder: str | Path) -> Path:
    """Write a checkpoint of the package as safetensors; `read_checkpoint` gives back every value of it.

    Args:
        path: made by the package's save_checkpoint, for example log/checkpoints/netG/netG_100000_steps.pth.
        folder: made if missing.

    Returns:
        The file: the name is the old one with the suffix .safetensors, and the tensors in it are called
        model_state_dict.NAME and optimizer_state_dict.state.INDEX.NAME.

    Raises:
        UsageError: see `read_checkpoint`; or the file cannot be written.
    """
    target = Path(folder) / Path(path).with_suffix(SAFETENSORS).name
    _write_safetensors(target, read_checkpoint(path))
    return target


def _read_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return unpack(json.loads((file.metadata() or {}).get("checkpoint", "{}")), tensors)


def _write_safetensors(path: Path, state: Mapping[str, Any]) -> None:
    tree, tensors = pack(dict(state), path.name)
    copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "checkpoint": json.dumps(tree)}
    write_whole(path, lambda temporary: save_file(copies, temporary, metadata))


class _Network(nn.Module):
    """What torch-mimicry asks of both networks.

    Args:
        classes: number of classes; 0 for a network without labels. `num_classes` is the package's name for it.
        loss_type: a name in `LOSSES`.
    """

    def __init__(self, classes: int, loss_type: str) -> None:
        super().__init__()
        self.num_classes = classes
        self.loss_type = loss_type
        self._loss = resolve(loss_type, LOSSES, "loss")
        if self._loss.paired:
            raise UsageError(f"the loss {loss_type!r} pairs real with generated samples, torch-mimicry's steps do not")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def count_params(self) -> tuple[int, int]:
        """Number of parameters, and of those that train."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)

    def save_checkpoint(
        self,
        directory: str | Path,
        global_step: int,
        optimizer: torch.optim.Optimizer | None = None,
        name: str | None = None,
    ) -> None:
        """Write weights, optimizer and step to `directory`/`name`.safetensors, by default netG_STEP_steps.safetensors.

        Raises:
            UsageError: it cannot be written.
        """
        directory = Path(directory)
        file = Path(name or f"{directory.name}_{global_step}_steps").with_suffix(SAFETENSORS)
        optimizer_state = None if optimizer is None else optimizer.state_dict()
        _write_safetensors(
            directory / file, dict(zip(ENTRIES, (self.state_dict(), optimizer_state, global_step), strict=True))
        )

    def restore_checkpoint(self, ckpt_file: str | Path, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Take over what `save_checkpoint`, here or in the package, wrote; returns the step.

        Raises:
            UsageError: see `read_checkpoint`; or the weights or the optimizer's state do not fit.
        """
        state = read_checkpoint(ckpt_file)
        if optimizer is not None and state["optimizer_state_dict"] is None:
            raise UsageError(f"the checkpoint {ckpt_file} holds no state of an optimizer; pass optimizer=None")
        try:
            self.load_state_dict(state["model_state_dict"])
            if optimizer is not None:
                optimizer.load_state_dict(state["optimizer_state_dict"])
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UsageError(f"the checkpoint {ckpt_file} does not fit: {reason}") from error
        return state["global_step"]


class PlainResidualGenerator(_Network):
    """latent -> coarse map -> `depth` residual blocks that double it -> image.

    Shaped like SNGAN's (Miyato et al. 2018). Its norms take each sample by itself, where SNGAN's take the batch. With
    classes, scale and shift after each norm are those of the sample's class (Dumoulin et al. 2017). The train_step is
    the textbook's: new samples, and a backward pass through both networks.

    Args:
        sample_shape: (C, H, W), H and W divisible by 2^depth.
        latent_size: size of a latent; `nz` for the package.
        width: channels of every hidden map.
        depth: number of doublings.
        output: "tanh" for samples in [-1, 1], "sigmoid" for [0, 1].
        classes: number of classes; 0 for none.
        loss_type: a name in `LOSSES`, for train_step alone.

    Raises:
        UsageError: H or W is not divisible by 2^depth, or the loss is unknown or pairs samples.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str,
        classes: int = 0,
        loss_type: str = "hinge",
    ) -> None:
        super().__init__(classes, loss_type)
        height, columns = _coarsest(sample_shape, depth)
        self.nz = latent_size
        self.coarse = nn.Sequential(
            nn.Linear(latent_size, width * height * columns), nn.Unflatten(1, (width, height, columns))
        )
        self.blocks = nn.ModuleList(_Doubling(width, classes) for _ in range(depth))
        self.norm = _Norm(width, classes)
        self.to_image = nn.Conv2d(width, sample_shape[0], 3, padding=1)
        self.squash = torch.sigmoid if output == "sigmoid" else torch.tanh

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, latent_size), labels int64 (B,) -> samples (B, C, H, W); labels are drawn where they lack."""
        if labels is None:
            labels = self._labels(z.shape[0], z.device)
        h = self.coarse(z)
        for block in self.blocks:
            h = block(h, labels)
        return self.squash(self.to_image(relu(self.norm(h, labels))))

    def generate_images(self, num_images: int, c: int | None = None, device: torch.device | None = None) -> Tensor:
        """`num_images` samples of new latents, of class `c` or of classes drawn for them."""
        return self._draw(num_images, c, device or self.device)[0]

    def generate_images_with_labels(
        self, num_images: int, c: int | None = None, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """`generate_images`, and the labels of the samples."""
        return self._draw(num_images, c, device or self.device)

    def compute_gan_loss(self, output: Tensor) -> Tensor:
        """The generator's mean loss at D's logits of generated samples, 0-dimensional."""
        return self._loss.generator(output, output).mean()

    def train_step(
        self,
        real_batch: tuple[Tensor, Tensor],
        netD: nn.Module,  # noqa: N803
        optG: torch.optim.Optimizer,  # noqa: N803
        log_data: MetricLog,
        **options: Any,
    ) -> MetricLog:
        """One step of the generator at as many samples as `real_batch` has; logs errG."""
        self.zero_grad()
        count = real_batch[0].shape[0]
        if self.num_classes:
            loss = self.compute_gan_loss(netD(*self.generate_images_with_labels(count)))
        else:
            loss = self.compute_gan_loss(netD(self.generate_images(count)))
        loss.backward()
        optG.step()
        log_data.add_metric("errG", loss.detach(), group="loss")
        return log_data

    def _draw(self, count: int, c: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        labels = self._labels(count, device) if c is None else torch.full((count,), c, device=device)
        return self(torch.randn(count, self.nz, device=device), labels), labels

    def _labels(self, count: int, device: torch.device) -> Tensor:
        if self.num_classes:
            return torch.randint(self.num_classes, (count,), device=device)
        return torch.zeros(count, dtype=torch.int64, device=device)


class ResidualGenerator(GACGenerator, PlainResidualGenerator):
    """`PlainResidualGenerator` with GAC's generator step."""


class ResidualDiscriminator(_Network):
    """image -> `depth` residual blocks that halve it, one that does not -> one logit.

    No norm of features; all weights are divided by their spectral norm (Miyato et al. 2018). With classes, the logit
    gains the inner product of the features with the class's embedding (Miyato & Koyama 2018). The arguments are those
    of the generator.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str,
        classes: int = 0,
        loss_type: str = "hinge",
    ) -> None:
        super().__init__(classes, loss_type)
        _coarsest(sample_shape, depth)
        self.from_image = spectral_norm(nn.Conv2d(sample_shape[0], width, 3, padding=1))
        self.blocks = nn.Sequential(*(_Halving(width, halve=level < depth) for level in range(depth + 1)))
        self.logit = spectral_norm(nn.Linear(width, 1))
        self.projection = spectral_norm(nn.Embedding(classes, width)) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples (B, C, H, W), and labels int64 (B,) where there are classes -> logits (B, 1)."""
        features = relu(self.blocks(self.from_image(x))).sum((2, 3))
        logits = self.logit(features)
        if self.projection is None:
            return logits
        return logits + (self.projection(labels) * features).sum(1, keepdim=True)

    def compute_gan_loss(self, output_real: Tensor, output_fake: Tensor) -> Tensor:
        """The discriminator's mean loss at its logits, 0-dimensional."""
        return self._loss.discriminator(output_real, output_fake).mean()

    def train_step(
        self,
        real_batch: tuple[Tensor, Tensor],
        netG: Any,  # noqa: N803
        optD: torch.optim.Optimizer,  # noqa: N803
        log_data: MetricLog,
        **options: Any,
    ) -> MetricLog:
        """One step of the discriminator on a real and a generated batch; logs errD, D(x) and D(G(z))."""
        self.zero_grad()
        real, labels = real_batch
        if self.num_classes:
            fake, fake_labels = netG.generate_images_with_labels(real.shape[0], device=self.device)
            real_logits, fake_logits = self(real, labels), self(fake.detach(), fake_labels)
        else:
            fake = netG.generate_images(real.shape[0], device=self.device)
            real_logits, fake_logits = self(real), self(fake.detach())
        loss = self.compute_gan_loss(real_logits, fake_logits)
        loss.backward()
        optD.step()
        log_data.add_metric("errD", loss.detach(), group="loss")
        log_data.add_metric("D(x)", torch.sigmoid(real_logits.detach()).mean(), group="prob")
        log_data.add_metric("D(G(z))", torch.sigmoid(fake_logits.detach()).mean(), group="prob")
        return log_data


class _Norm(nn.Module):
    """Each sample to mean 0 and variance 1, then a scale and a shift for each channel, which a class has of its own."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, affine=False)
        self.scale = nn.Embedding(max(classes, 1), channels)
        self.shift = nn.Embedding(max(classes, 1), channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(x) * self.scale(labels)[:, :, None, None] + self.shift(labels)[:, :, None, None]


class _Doubling(nn.Module):
    """x up, plus two convolutions of it, each after a norm and a ReLU; (B, width, H, W) -> (B, width, 2H, 2W)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = _Norm(width, classes), _Norm(width, classes)
        self.conv_1, self.conv_2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.conv_1(_doubled(relu(self.norm_1(x, labels))))
        return _doubled(x) + self.conv_2(relu(self.norm_2(h, labels)))


class _Halving(nn.Module):
    """x, plus two convolutions of it, each after a ReLU, and then down; (B, width, H, W) -> (B, width, H/2, W/2)."""

    def __init__(self, width: int, halve: bool) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = (spectral_norm(nn.Conv2d(width, width, 3, padding=1)) for _ in range(2))
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.conv_2(relu(self.conv_1(relu(x))))
        return avg_pool2d(h, 2) if self.halve else h


def _doubled(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2, mode="nearest")


def _coarsest(sample_shape: Sequence[int], depth: int) -> tuple[int, int]:
    _, height, columns = sample_shape
    if height % 2**depth or columns % 2**depth:
        raise UsageError(
            f"the mimicry networks halve the image {depth} times, which {height}x{columns} does not allow; "
            "pass another --image-size or --depth"
        )
    return height >> depth, columns >> depth


adapter = Adapter(
    "mimicry",
    ResidualGenerator,
    ResidualDiscriminator,
    "residual networks shaped like SNGAN, with torch-mimicry's interface",
    width=32,
)
