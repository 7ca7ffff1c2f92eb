"""Speech: one-dimensional convolutional networks for short clips, and the codec of an audio column.

Like WaveGAN (Donahue et al. 2019) the generator makes a waveform by transposed convolutions. Unlike there, the last one
is a fixed bank of long windowed filters, which leaves no artefacts of its stride and makes the rest small enough for a
CPU, and the discriminator looks at the clip's spectrogram, by convolutions along time.
"""

import importlib
import math
import wave
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv_transpose1d, pad

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Adapter, Medium
from gac_plugin.training.files import write_grid, write_whole

WINDOW = 256
"""Samples in a frame of the generator."""
HOP = WINDOW // 4
"""Samples from one frame to the next, of the generator and of the discriminator."""
BANDS = WINDOW // 2 + 1
"""Frequencies in a frame of the generator, from 0 to half the sample rate."""
VIEW = WINDOW // 2
"""Samples in a frame of the discriminator's spectrogram: too few to resolve the harmonics of most voices."""
SWAY = 0.1
"""Half turns of a band for a phase of 1: few, so that pulses stay pulses while the bands are learned."""
QUIET = -6.0
"""Around this lies the loudness of a band before its sigmoid: 52 dB below the loudest possible tone."""
FLOOR = 0.005
"""Amplitude below which the discriminator tells nothing apart: 46 dB below the loudest possible tone."""
FEATURES = 128
"""Features on which the discriminator decides."""

PEAK = 0.9
"""Largest absolute sample of every clip, of 1."""
STEP = 1024
"""The default length is a multiple of it, so that the networks can halve it."""
SIDE, FRAME, RANGE = 64, 0.032, 70
"""Height and width of a picture; seconds, about, in a frame of its spectrogram; decibels from black to white."""
GAP = 0.1
"""Seconds of silence after each clip in a sound file."""
UNKNOWN_SIZE = 0x7FFF0000
"""Sizes in a WAV header from here on were written before the size was known."""


class SpeechGenerator(nn.Module):
    """latent, label -> coarse frames -> `depth` times four times as many -> loudness and phase of bands -> samples.

        x[n] = tanh sum_m f_m[n - m HOP]
        f_m[j] = w[j] sum_k sigmoid(a[k, m] + QUIET) cos(2 pi k j / WINDOW + pi (k + SWAY p[k, m])),  0 <= j < WINDOW

    where w is half a Hann window, and a, p are what the convolutions make. Where p is 0 all bands meet in the middle of
    their frame: a pulse, as a voice has them, with the spectrum a, and frames that do not change make a steady voice of
    one pulse in HOP samples. The convolutions describe slow changes and never have to oscillate.

    Args:
        sample_shape: (1, T), T divisible by 64 * 4^depth.
        latent_size: size of a latent; also `nz`, torch-mimicry's name for it.
        width: channels of the finest frames, 64 samples apart; each coarser level has twice as many.
        depth: number of times that the frame rate is quadrupled.
        output: "tanh"; silence is 0, in the middle of the range, and "sigmoid" has it at the edge.
        classes: number of labels; 0 for unconditional.

    Raises:
        UsageError: T is not divisible, or another output.
    """

    filters: Tensor

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str = "tanh",
        classes: int = 0,
    ) -> None:
        super().__init__()
        if output != "tanh":
            raise UsageError(
                f"speech samples lie in [-1, 1], which output {output!r} does not make; pass --output tanh"
            )
        frames, channels = _coarsest(sample_shape, width, depth)
        self.nz = latent_size
        self.label = nn.Embedding(classes, latent_size) if classes else None
        inputs = 2 * latent_size if classes else latent_size
        self.coarse = nn.Sequential(nn.Linear(inputs, channels * frames), nn.Unflatten(1, (channels, frames)))
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [
                nn.LeakyReLU(0.2),
                nn.ConvTranspose1d(channels, channels // 2, 12, stride=4, padding=4),
                nn.LeakyReLU(0.2),
                nn.Conv1d(channels // 2, channels // 2, 5, padding=2),
            ]
            channels //= 2
        self.finer = nn.Sequential(*layers, nn.LeakyReLU(0.2))
        self.bands = nn.Conv1d(width, 2 * BANDS, 3, padding=1)
        self.apply(_keep_scale)

        k, j = torch.arange(BANDS)[:, None], torch.arange(WINDOW)
        angle = 2 * math.pi / WINDOW * (k * (j + WINDOW // 2) % WINDOW)
        window = torch.hann_window(WINDOW) / 2  # windows a quarter apart add up to 2
        filters = torch.cat([window * angle.cos(), -window * angle.sin()])[:, None]
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, latent_size), labels int64 (B,) if there are classes -> samples (B, 1, T)."""
        if self.label is not None:
            z = torch.cat([z, self.label(labels)], dim=1)
        loudness, phase = self.bands(self.finer(self.coarse(z))).chunk(2, dim=1)
        amplitude, angle = torch.sigmoid(loudness + QUIET), math.pi * SWAY * phase
        frames = torch.cat([amplitude * angle.cos(), amplitude * angle.sin()], dim=1)
        return torch.tanh(conv_transpose1d(frames, self.filters, stride=HOP, padding=(WINDOW - HOP) // 2))


class SpeechDiscriminator(nn.Module):
    """samples -> loudness in time and frequency -> halvings in time by strided convolution -> one logit.

        l = <w + e_y, h(x)> + b        e_y: embedding of the label, the projection of Miyato and Koyama 2018

    The convolutions run along time, with the frequencies as channels. The frames are short, so that what counts is the
    shape of the spectrum and how it changes, which is what tells words apart, and not the pitch. The arguments are
    those of the generator; two halvings stand against each of its quadruplings.
    """

    window: Tensor

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str = "tanh",
        classes: int = 0,
    ) -> None:
        super().__init__()
        frames, widest = _coarsest(sample_shape, width, depth)
        channels = width
        layers: list[nn.Module] = [nn.Conv1d(VIEW // 2 + 1, channels, 5, padding=2)]
        for _ in range(2 * depth):
            wider = min(2 * channels, widest)
            layers += [nn.LeakyReLU(0.2), nn.Conv1d(channels, wider, 5, stride=2, padding=2)]
            channels = wider
        layers += [nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(channels * frames, FEATURES), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.logit = nn.Linear(FEATURES, 1)
        self.apply(_keep_scale)
        self.label = None
        if classes:
            self.label = nn.Embedding(classes, FEATURES)
            nn.init.normal_(self.label.weight, std=FEATURES**-0.5)
        self.register_buffer("window", torch.hann_window(VIEW), persistent=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples (B, 1, T), labels int64 (B,) if there are classes -> logits (B, 1)."""
        # a copy of the window: DDP writes buffers anew in each forward pass, also those that a graph still needs
        power = spectrogram(x[:, 0], self.window.clone(), HOP)[..., :-1]
        # from silence to the loudest tone: log FLOOR^2 to 0, brought to [-1, 1]
        features = self.features(1 - (power + FLOOR**2).log() / math.log(FLOOR))
        logits = self.logit(features)
        if self.label is None:
            return logits
        return logits + (self.label(labels) * features).sum(dim=1, keepdim=True)


def spectrogram(x: Tensor, window: Tensor, hop: int) -> Tensor:
    """Power in time and frequency, |STFT|^2: 1 for the loudest possible tone, that of amplitude 1.

    Args:
        x: samples, shape (B, T); silence is put around them.
        window: shape (N,).
        hop: samples from one frame to the next.

    Returns:
        Shape (B, N / 2 + 1, T // hop + 1): bin k is the frequency k / N times the sample rate, frame m is around the
        sample m hop.
    """
    spectrum = torch.stft(x, len(window), hop, window=window, pad_mode="constant", return_complex=True)
    # a tone of amplitude 1 gives sum(window) / 2
    return torch.view_as_real(spectrum).square().sum(-1) / (window.sum() / 2) ** 2


def _coarsest(sample_shape: Sequence[int], width: int, depth: int) -> tuple[int, int]:
    """Number of the coarsest frames, and their channels."""
    channels, length = sample_shape
    if channels != 1 or length % (HOP * 4**depth):
        raise UsageError(
            f"the speech networks make samples of shape (1, T) with T divisible by {HOP * 4**depth}, got "
            f"{tuple(sample_shape)}; pass another --depth, or --options length=T"
        )
    return length // (HOP * 4**depth), width << depth


def _keep_scale(layer: nn.Module) -> None:
    """Weights that keep the scale of what passes through (He et al. 2015); torch's own shrink it in every layer."""
    if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight, a=0.2)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class SpeechCodec:
    """Clips of one length and rate as 16-bit samples; see `gac_plugin.protocols.Codec`.

    A clip is mixed down to one channel. Of a longer one the stretch of `length` samples with the most energy is kept, a
    shorter one gets silence on both sides. Then it is scaled to the peak `PEAK`: how far the speaker stood from the
    microphone is nothing to learn.

    Attributes:
        sample_rate: samples a second, of the files that are read and of those that are written.
        length: T, samples in a clip.
    """

    sample_rate: int
    length: int

    suffixes: ClassVar[tuple[str, ...]] = (".wav", ".png")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(1, T)"""
        return (1, self.length)

    def encode(self, cell: Any) -> Tensor:
        """An undecoded cell of an audio column -> int16, shape (1, T).

        Raises:
            UsageError: no audio in the cell, a file that is damaged or of another sample rate, a clip that is empty,
                silent, or not finite.
        """
        samples, rate = _decode(cell)
        if rate != self.sample_rate:
            raise UsageError(
                f"{rate} samples a second where {self.sample_rate} are wanted; bring all clips to one rate, or pass "
                f"--options sample_rate={rate}"
            )
        if len(samples) == 0:
            raise UsageError("the clip is empty; remove the row")
        if not samples.isfinite().all():
            raise UsageError("the clip holds samples that are not finite; repair it or remove the row")
        clip = self._fitted(samples)
        if not clip.any():
            raise UsageError(f"the clip is silent, all its {len(samples)} samples are 0; remove the row")
        return self.to_stored(clip / clip.abs().max() * PEAK)[None]

    def to_samples(self, stored: Tensor) -> Tensor:
        """int16 (B, 1, T) -> float32 (B, 1, T) in [-1, 1)."""
        return stored.float() / 2**15

    def to_stored(self, samples: Tensor) -> Tensor:
        """The way back, exact for what `to_samples` made; what is outside [-1, 1) is cut off."""
        return (samples * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)

    def pictures(self, stored: Tensor) -> Tensor:
        """Spectrograms: int16 (B, 1, T) -> uint8 (B, 1, 64, 64).

        Low frequencies are at the bottom, half the sample rate at the top. A step of grey is a step in decibels, white
        the loudest possible tone, black what lies `RANGE` dB below or deeper.
        """
        frame = 2 ** max(7, round(math.log2(FRAME * self.sample_rate)))
        window = torch.hann_window(frame, device=stored.device)
        power = spectrogram(self.to_samples(stored)[:, 0], window, max(1, self.length // SIDE))
        # without the constant part, bin 0, and the last frame, which is around the clip's end
        bands = adaptive_avg_pool2d(power[:, None, 1:, :-1], (SIDE, SIDE))
        decibels = 10 * bands.clamp_min(1e-12).log10()
        return (255 * (1 + decibels / RANGE)).round().clamp(0, 255).to(torch.uint8).flip(2)

    def write(self, path: Path, stored: Tensor, columns: int | None = None) -> None:
        """Clips int16 (B, 1, T) as one file: .wav, one after the other with a gap of silence, or .png, spectrograms.

        Args:
            path: its suffix says which.
            stored: the clips.
            columns: spectrograms in a row of the picture.

        Raises:
            UsageError: another suffix, or the file cannot be written.
        """
        suffix = path.suffix.lower()
        if suffix not in self.suffixes:
            raise UsageError(f"clips are written to {' or '.join(self.suffixes)} files, got {path.name!r}")
        if suffix == ".png":
            write_grid(path, self.pictures(stored), columns)
        else:
            gap = round(GAP * self.sample_rate)
            sound = pad(stored[:, 0], (0, gap)).flatten().cpu().numpy().astype("<i2").tobytes()
            write_whole(path, lambda temporary: _write_wav(temporary, sound, self.sample_rate))

    def figures(self, train: Tensor, test: Tensor, generated: Tensor) -> dict[str, float]:
        """None of its own: the Frechet distance and the share of recognised clips come from `pictures`."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """Names and values of its fields."""
        return asdict(self)

    def _fitted(self, samples: Tensor) -> Tensor:
        """T samples of a clip of any length."""
        missing = self.length - len(samples)
        if missing >= 0:
            return pad(samples, (missing // 2, missing - missing // 2))
        energy = pad(samples.double().square().cumsum(0), (1, 0))
        start = int((energy[self.length :] - energy[: -self.length]).argmax())
        return samples[start : start + self.length]


def fit_codec(cells: Iterable[Any], options: Mapping[str, Any]) -> SpeechCodec:
    """The codec for a column: the rate of its first clip, and a length that holds three quarters of the clips whole.

    Args:
        cells: undecoded, of the training split.
        options: `sample_rate` and `length` take the place of what the clips say.

    Clips that cannot be read are passed over; whoever encodes them counts them.

    Raises:
        UsageError: there are no clips, none can be read, or an option is not a whole number above 0.
    """
    given = {name: _whole(name, options[name]) for name in ("sample_rate", "length") if name in options}
    if len(given) == 2:
        return SpeechCodec(**given)
    mistake = UsageError("the audio column holds no clips; choose another split or data set")
    clips = []
    for row, cell in enumerate(cells):
        try:
            clips.append(_header(row, cell))
        except UsageError as error:
            mistake = error
    if not clips:
        raise mistake
    lengths = sorted(frames for frames, _ in clips)
    enough = lengths[math.ceil(0.75 * len(lengths)) - 1]
    return SpeechCodec(**{"sample_rate": clips[0][1], "length": STEP * max(1, math.ceil(enough / STEP)), **given})


def load_codec(values: Mapping[str, Any]) -> SpeechCodec:
    """The codec whose `to_json` gave the values."""
    return SpeechCodec(**values)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a whole number above 0, got {value!r}")
    return value


def _header(row: int, cell: Any) -> tuple[int, int]:
    """Number of samples in the clip of a row, and samples a second."""
    soundfile = _soundfile()
    try:
        info = soundfile.info(BytesIO(_file(cell)))
    except soundfile.LibsndfileError as error:
        raise UsageError(f"row {row}: {_unreadable(error)}") from error
    except UsageError as error:
        raise UsageError(f"row {row}: {error}") from error
    return info.frames, info.samplerate


def _decode(cell: Any) -> tuple[Tensor, int]:
    """The clip in a cell in one channel, float32 (N,), and its samples a second."""
    soundfile = _soundfile()
    data = _file(cell)
    try:
        channels, rate = soundfile.read(BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UsageError(_unreadable(error)) from error
    declared = int.from_bytes(data[4:8], "little") + 8
    if data[:4] == b"RIFF" and len(data) < declared < UNKNOWN_SIZE:  # libsndfile reads what there is without a word
        raise UsageError(f"the file ends after {len(data)} of {declared} bytes; copy it again, or remove the row")
    return torch.from_numpy(channels.mean(axis=1)), rate


def _file(cell: Any) -> bytes:
    """The audio file in a cell."""
    parts = cell if isinstance(cell, Mapping) else {}
    if parts.get("bytes") is not None:
        return parts["bytes"]
    if not parts.get("path"):
        raise UsageError("there is no audio; remove the row")
    try:
        return Path(parts["path"]).read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {parts['path']}: {error.strerror}; put the file there or remove the row"
        ) from error


def _unreadable(error: Any) -> str:
    return f"not a sound file, or a damaged one ({error.error_string.rstrip('.')}); repair it or remove the row"


def _write_wav(path: Path, sound: bytes, sample_rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(sound)


def _soundfile() -> ModuleType:
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError) as error:  # OSError: the library libsndfile behind it is missing
        raise UsageError("reading sound files needs soundfile; install it: pip install 'gac-plugin[speech]'") from error


adapter = Adapter(
    "speech",
    SpeechGenerator,
    SpeechDiscriminator,
    "one-dimensional convolutions for short clips of an audio column",
    medium=Medium("Audio", fit_codec, load_codec, options=("sample_rate", "length")),
    width=32,
)
