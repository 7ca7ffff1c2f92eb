"""Speech: clips to samples and back, files that people hear and look at, and networks that a GAC step can train."""

import io
import json
import wave

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from gac_plugin import GAC, ConjugateGradient, GradientPenalty, UsageError
from gac_plugin.adapters import speech
from gac_plugin.adapters.speech import SpeechCodec, SpeechDiscriminator, SpeechGenerator, fit_codec, load_codec
from gac_plugin.training.files import GAP as TILE_GAP

soundfile = pytest.importorskip("soundfile", reason="needs the extra 'speech'")

RATE, LENGTH = 8000, 1024
CODEC = SpeechCodec(RATE, LENGTH)
NETWORK = {"sample_shape": [1, LENGTH], "latent_size": 5, "width": 4, "depth": 2, "output": "tanh"}


def tone(frequency: float, samples: int = LENGTH, amplitude: float = 0.5, rate: int = RATE) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(samples) / rate)


def cell(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> dict:
    """The samples as an undecoded cell of an audio column."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.stack([CODEC.encode(cell(tone(frequency))) for frequency in (300, 700, 1500)])


# ---- the codec


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_clip_is_its_own_samples_at_the_common_peak(kind):
    written = np.round(2**13 * tone(440)).astype(np.int16)
    stored = CODEC.encode(cell(written, kind=kind))
    assert stored.dtype == torch.int16
    assert stored.shape == CODEC.sample_shape == (1, LENGTH)
    expected = written * (0.9 * 2**15 / np.abs(written).max())
    np.testing.assert_allclose(stored[0].numpy(), expected, atol=0.51)


def test_a_lossy_file_is_read_too():
    stored = CODEC.encode(cell(tone(440), kind="OGG"))
    correlation = np.corrcoef(stored[0].numpy(), tone(440))[0, 1]
    assert 0.98 < correlation <= 1


def test_every_stored_value_comes_back_from_its_sample():
    stored = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).reshape(64, 1, LENGTH)
    samples = CODEC.to_samples(stored)
    assert samples.dtype == torch.float32
    assert samples.min() == -1
    assert samples.max() == 1 - 2**-15
    assert torch.equal(CODEC.to_stored(samples), stored)


def test_the_faintest_clip_becomes_as_loud_as_any():
    faint = CODEC.encode(cell(1e-40 * np.ones(LENGTH), subtype="DOUBLE"))
    assert torch.equal(faint, torch.full((1, LENGTH), round(0.9 * 2**15), dtype=torch.int16))


def test_generated_samples_at_the_edge_of_the_range_do_not_wrap_around():
    assert CODEC.to_stored(torch.tensor([-1.5, -1.0, 1.0, 1.5])).tolist() == [-32768, -32768, 32767, 32767]


def test_channels_are_mixed():
    left, right = tone(300), tone(900, amplitude=0.3)
    mixed = CODEC.encode(cell(np.stack([left, right], axis=1), subtype="FLOAT"))
    assert torch.equal(mixed, CODEC.encode(cell((left + right) / 2, subtype="FLOAT")))


@pytest.mark.parametrize(("samples", "before"), [(LENGTH - 3, 1), (10, 507)])
def test_a_short_clip_gets_silence_on_both_sides(samples, before):
    stored = CODEC.encode(cell(np.full(samples, 0.5)))[0]
    assert torch.equal(stored.nonzero().flatten(), torch.arange(before, before + samples))


@pytest.mark.parametrize("start", [0, 700, 3000 - LENGTH])
def test_of_a_long_clip_the_loudest_stretch_is_kept(start):
    draw = np.random.default_rng(0)
    samples = 0.01 * draw.standard_normal(3000)
    samples[start : start + LENGTH] += draw.choice([-0.5, 0.5], LENGTH)
    expected = samples[start : start + LENGTH]
    stored = CODEC.encode(cell(samples, subtype="FLOAT"))[0].numpy()
    np.testing.assert_allclose(stored, expected * (0.9 * 2**15 / np.abs(expected).max()), atol=0.51)


def test_a_cell_may_name_a_file(tmp_path, clips):
    (tmp_path / "a.wav").write_bytes(cell(tone(300))["bytes"])
    assert torch.equal(CODEC.encode({"bytes": None, "path": str(tmp_path / "a.wav")}), clips[0])


WHOLE = cell(tone(440))["bytes"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (cell(tone(440), rate=16000), "16000 samples a second where 8000 are wanted; .*sample_rate=16000"),
        (cell(tone(440)[:0]), "the clip is empty; remove"),
        (cell(0 * tone(440)), "the clip is silent, all its 1024 samples are 0; remove"),
        (cell(np.full(LENGTH, np.nan), subtype="FLOAT"), "not finite; repair"),
        ({"bytes": b"seven", "path": None}, r"not a sound file, or a damaged one \(Format not recognised\); repair"),
        ({"bytes": b"", "path": None}, "not a sound file"),
        ({"bytes": WHOLE[:1000], "path": None}, f"the file ends after 1000 of {len(WHOLE)} bytes; copy it again"),
        ({"bytes": WHOLE[:30], "path": None}, "not a sound file, or a damaged one"),
        ({"bytes": None, "path": "/nowhere/a.wav"}, "cannot read /nowhere/a.wav: No such file or directory; put"),
        ({"bytes": None, "path": None}, "there is no audio; remove"),
        (None, "there is no audio; remove"),
    ],
)
def test_a_bad_clip_is_told_in_one_line(bad, message):
    with pytest.raises(UsageError, match=message) as told:
        CODEC.encode(bad)
    assert "\n" not in str(told.value)


def test_a_size_that_was_not_known_when_a_file_was_begun_is_no_damage(clips):
    begun = bytearray(cell(tone(300))["bytes"])
    begun[4:8] = begun[40:44] = b"\xff\xff\xff\xff"
    assert torch.equal(CODEC.encode({"bytes": bytes(begun), "path": None}), clips[0])


def test_without_soundfile_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(UsageError, match=r"needs soundfile; install it: pip install 'gac-plugin\[speech\]'"):
        CODEC.encode({"bytes": WHOLE, "path": None})


def test_the_codec_takes_its_rate_and_length_from_the_clips():
    cells = [cell(tone(300, samples, rate=16000), rate=16000) for samples in (2000, 500, 2049, 9000)]
    assert fit_codec(cells, {}) == SpeechCodec(16000, 3072), "three quarters of the clips are at most 2049 samples long"
    assert fit_codec(cells[:2], {}) == SpeechCodec(16000, 2048)
    assert fit_codec(cells[1:2], {}) == SpeechCodec(16000, 1024)


def test_options_take_the_place_of_what_the_clips_say():
    cells = [cell(tone(300))]
    assert fit_codec(cells, {"length": 512, "width": 3}) == SpeechCodec(8000, 512)
    assert fit_codec(cells, {"sample_rate": 16000}) == SpeechCodec(16000, 1024)
    assert fit_codec([], {"sample_rate": 16000, "length": 512}) == SpeechCodec(16000, 512)


def test_clips_that_cannot_be_read_say_nothing_of_the_others():
    whole = [cell(tone(300)), cell(tone(2049))]
    assert fit_codec([None, whole[0], {"bytes": b"seven"}, whole[1]], {}) == fit_codec(whole, {})


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([], {}, "holds no clips; choose another"),
        ([None, {"bytes": b"seven"}], {}, "row 1: not a sound file"),
        ([None], {}, "row 0: there is no audio"),
        ([], {"length": 0}, "length must be a whole number above 0, got 0"),
        ([], {"length": True}, "length must be a whole number above 0, got True"),
        ([], {"sample_rate": 8000.5}, "sample_rate must be a whole number above 0, got 8000.5"),
    ],
)
def test_a_column_that_gives_no_codec_is_refused(cells, options, message):
    with pytest.raises(UsageError, match=message):
        fit_codec(cells, options)


def test_the_codec_comes_back_from_json():
    assert load_codec(json.loads(json.dumps(CODEC.to_json()))) == CODEC


# ---- pictures and files


@pytest.mark.parametrize("frequency", [300.0, 1010.0, 2345.0, 3900.0])
def test_a_tone_is_a_line_at_its_frequency(frequency):
    codec = SpeechCodec(RATE, 4096)
    stored = codec.encode(cell(tone(frequency, 4096, amplitude=0.9)))
    picture = codec.pictures(stored[None])
    assert picture.dtype == torch.uint8
    assert picture.shape == (1, 1, 64, 64)
    # the frame around sample 2048, by the definition of the discrete Fourier transform
    frame = stored[0, 2048 - 128 : 2048 + 128].double().numpy() / 2**15
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(1, 129), np.arange(256)) / 256)
    power = np.abs(waves @ (window * frame) / 64) ** 2
    decibels = 10 * np.log10((power[0::2] + power[1::2]) / 2 + 1e-12)
    expected = np.clip(np.round(255 * (1 + decibels / 70)), 0, 255)
    column = picture[0, 0, :, 32].flip(0)
    np.testing.assert_allclose(column.numpy(), expected, atol=1)
    # a row holds bins 2j + 1 and 2j + 2, 31.25 Hz apart
    assert (31.25 * (2 * column.argmax() + 1.5) - frequency).abs() <= 31.25


@pytest.mark.parametrize(("rate", "length"), [(8000, 1024), (16000, 9000), (20, 63), (44100, 50)])
def test_pictures_have_one_size_whatever_the_clips(rate, length):
    stored = torch.randint(-(2**15), 2**15, (2, 1, length)).to(torch.int16)
    assert SpeechCodec(rate, length).pictures(stored).shape == (2, 1, 64, 64)


def test_silence_is_black_and_loudness_is_a_shade():
    loud = CODEC.encode(cell(tone(1000)))[None]
    assert CODEC.pictures(0 * loud).max() == 0
    # 7 dB down in amplitude is a tenth of the range of 70 dB
    shades = [CODEC.pictures(CODEC.to_stored(CODEC.to_samples(loud) * gain)).max() for gain in (1, 10 ** (-7 / 20))]
    assert abs(int(shades[0]) - int(shades[1]) - 25.5) <= 1


def test_a_sound_file_holds_the_clips_one_after_the_other(tmp_path, clips):
    CODEC.write(tmp_path / "new" / "clips.wav", clips)
    with wave.open(str(tmp_path / "new" / "clips.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
    sound, rate = soundfile.read(tmp_path / "new" / "clips.wav", dtype="int16")
    assert rate == RATE
    assert len(sound) == 3 * (LENGTH + 800), "a tenth of a second of silence after each"
    for stretch, clip in zip(sound.reshape(3, -1), clips, strict=True):
        np.testing.assert_array_equal(stretch[:LENGTH], clip[0].numpy())
        assert not stretch[LENGTH:].any()


def test_a_picture_shows_a_spectrogram_for_each_clip(tmp_path, clips):
    CODEC.write(tmp_path / "clips.png", clips, columns=3)
    with Picture.open(tmp_path / "clips.png") as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (64 + 2 * TILE_GAP, 3 * (64 + TILE_GAP) + TILE_GAP)
    np.testing.assert_array_equal(sheet[4:68, 4:68], CODEC.pictures(clips)[0, 0].numpy())


def test_another_suffix_is_refused(tmp_path, clips):
    with pytest.raises(UsageError, match=r"written to \.wav or \.png files, got 'clips\.mp3'"):
        CODEC.write(tmp_path / "clips.mp3", clips)
    assert list(tmp_path.iterdir()) == []


def test_a_sound_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, clips, monkeypatch):
    def fail(path, sound, sample_rate):
        path.write_bytes(sound[:100])
        raise OSError(28, "No space left on device")

    (tmp_path / "clips.wav").write_bytes(b"old")
    monkeypatch.setattr(speech, "_write_wav", fail)
    with pytest.raises(UsageError, match=r"cannot write .*clips\.wav: No space left on device"):
        CODEC.write(tmp_path / "clips.wav", clips)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("clips.wav", b"old")]


# ---- the networks


def networks(classes: int = 0) -> tuple[SpeechGenerator, SpeechDiscriminator]:
    return SpeechGenerator(**NETWORK, classes=classes), SpeechDiscriminator(**NETWORK, classes=classes)


def game(generator, discriminator, **settings) -> GAC:
    return GAC(
        generator,
        discriminator,
        ConjugateGradient(generator.parameters(), 1e-3, rule="none", metric="adam"),
        torch.optim.Adam(discriminator.parameters(), 1e-3),
        penalty=GradientPenalty(0.1, 0.1, 1),
        **settings,
    )


def copies(network) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def moved(network, before) -> set[str]:
    return {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize(("length", "depth"), [(LENGTH, 2), (1280, 1), (256, 1), (4096, 3)])
def test_shapes_are_those_of_the_contract(classes, length, depth):
    arguments = {**NETWORK, "sample_shape": [1, length], "depth": depth, "classes": classes}
    generator, discriminator = SpeechGenerator(**arguments), SpeechDiscriminator(**arguments)
    conditions = {"labels": torch.tensor([0, 1, 2, 2])} if classes else {}
    samples = generator(torch.randn(4, generator.nz), **conditions)
    assert samples.shape == (4, 1, length)
    assert samples.abs().max() <= 1
    assert discriminator(samples, **conditions).shape == (4, 1)


def test_a_label_changes_what_both_networks_say():
    generator, discriminator = networks(classes=2)
    z, x = torch.randn(1, 5), torch.randn(1, 1, LENGTH)
    for network, given in ((generator, z), (discriminator, x)):
        zero, one = (network(given, labels=torch.tensor([label])) for label in (0, 1))
        assert (zero - one).abs().max() > 1e-3


def still(generator: SpeechGenerator, loudness: torch.Tensor) -> np.ndarray:
    """What the generator plays, before its tanh, when all its frames are alike and have phase 0."""
    with torch.no_grad():
        generator.bands.weight.zero_()
        generator.bands.bias.copy_(torch.cat([loudness, torch.zeros_like(loudness)]))
        return torch.atanh(generator(torch.randn(1, 5)))[0, 0].double().numpy()


def test_frames_that_do_not_change_make_a_steady_voice_of_pulses():
    """One pulse in every hop, in the middle of its frame, each with the spectrum of the bands."""
    generator, _ = networks()
    sound = still(generator, torch.full((speech.BANDS,), 1.0))
    middle = sound[256 : LENGTH - 256]
    np.testing.assert_allclose(middle[64:], middle[:-64], atol=1e-4)
    peaks = np.flatnonzero(np.abs(middle) > 0.5 * np.abs(middle).max())
    assert len(np.unique(peaks % 64)) == 1, "one place in each hop"


@pytest.mark.parametrize("band", [4, 40, 100])
def test_a_band_that_the_frames_play_in_step_is_a_steady_tone(band):
    """Bands that turn whole times in a hop, k HOP / WINDOW, run on from frame to frame: a cosine of amplitude 1/2."""
    generator, _ = networks()
    loudness = torch.full((speech.BANDS,), -100.0)
    loudness[band] = -speech.QUIET  # an amplitude of 1/2
    sound = still(generator, loudness)
    n = np.arange(256, LENGTH - 256)
    # frame m starts at sample 64 m - 96, and its middle is where the cosine is at its height
    expected = 0.5 * np.cos(2 * np.pi * band * (n + 96 - 128) / 256)
    np.testing.assert_allclose(sound[n], expected, atol=1e-4)


@pytest.mark.parametrize("shape", [[1, LENGTH + 16], [2, LENGTH]])
def test_a_length_that_the_networks_cannot_divide_is_refused(shape):
    for network in (SpeechGenerator, SpeechDiscriminator):
        with pytest.raises(
            UsageError, match=r"T divisible by 1024, got \(.*; pass another --depth, or --options length"
        ):
            network(**{**NETWORK, "sample_shape": shape})


def test_a_range_without_negative_samples_is_refused():
    with pytest.raises(UsageError, match=r"output 'sigmoid' does not make; pass --output tanh"):
        SpeechGenerator(**{**NETWORK, "output": "sigmoid"})


@pytest.mark.parametrize("schedule", ["fresh", "fused"])
def test_one_step_moves_both_networks(clips, schedule):
    generator, discriminator = networks(classes=3)
    before = copies(generator), copies(discriminator)
    gac = game(generator, discriminator, schedule=schedule)
    stats = gac.step(CODEC.to_samples(clips), labels=torch.arange(3))
    assert all(torch.isfinite(value) for value in stats.values())
    assert stats["penalty"] > 0
    assert moved(generator, before[0]) == set(before[0])
    assert moved(discriminator, before[1]) == set(before[1])
    assert torch.equal(discriminator.window, torch.hann_window(speech.VIEW))


def test_each_part_of_a_step_moves_its_own_network_alone(clips):
    generator, discriminator = networks()
    gac = game(generator, discriminator)
    before = copies(generator), copies(discriminator)
    fake = generator(torch.randn(3, 5))
    gac.discriminator_step(CODEC.to_samples(clips), fake)
    assert moved(generator, before[0]) == set()
    assert moved(discriminator, before[1]) == set(before[1])
    before = copies(generator), copies(discriminator)
    gac.generator_step(fake)
    assert moved(generator, before[0]) == set(before[0])
    assert moved(discriminator, before[1]) == set()


def test_covectors_have_the_shape_of_the_samples_and_are_finite_in_silence(clips):
    gac = game(*networks())
    samples = torch.cat([CODEC.to_samples(clips), torch.zeros(1, 1, LENGTH)])
    covectors = gac.cotangent(samples)
    assert covectors.shape == samples.shape
    assert covectors.isfinite().all()
    gac.discriminator_step(samples, 0 * samples)
    assert all(p.grad.isfinite().all() for p in gac.discriminator.parameters())


def test_the_penalty_reaches_the_weights_through_the_spectrogram():
    """The derivative of the gradient's squared norm is that of finite differences."""
    discriminator = SpeechDiscriminator(**NETWORK).double()
    x = 0.1 * torch.randn(2, 1, LENGTH, dtype=torch.float64)

    def squared_norm() -> torch.Tensor:
        points = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
        return gradient.square().sum()

    weight = discriminator.features[0].weight
    squared_norm().backward()
    direction = torch.randn_like(weight)
    step = 1e-6
    with torch.no_grad():
        weight.add_(step * direction)
    ahead = squared_norm().item()
    with torch.no_grad():
        weight.sub_(2 * step * direction)
    behind = squared_norm().item()
    assert (weight.grad * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)
