"""Letters by straight-through Gumbel-softmax, the text codec, and the figures of generated text."""

import json
import math
from collections import Counter

import pytest
import torch
from PIL import Image as Picture
from scipy.spatial import distance

from gac_plugin import GAC, ConjugateGradient, GradientPenalty, UsageError
from gac_plugin.adapters.text import (
    TextCodec,
    TextDiscriminator,
    TextGenerator,
    adapter,
    fit,
    jensen_shannon,
    load,
    ngrams,
    straight_through,
)

NAMES = ["anna", "bob", "eve"]
SHAPE = (4, 6)


def arguments(**other):
    return {"sample_shape": list(SHAPE), "latent_size": 5, "width": 8, "depth": 2, "output": "tanh", **other}


@pytest.fixture
def codec() -> TextCodec:
    return fit(NAMES, {})


def encode(codec, texts):
    return torch.stack([codec.encode(text) for text in texts])


def softmax_pullback(a, covector, temperature):
    """c^T (diag(p) - p p^T) / temperature with p = softmax(a / temperature), row by row, written out."""
    rows = []
    for row, c in zip(a.flatten(0, -2).tolist(), covector.flatten(0, -2).tolist(), strict=True):
        weights = [math.exp(value / temperature) for value in row]
        p = [weight / sum(weights) for weight in weights]
        mean = sum(c_v * p_v for c_v, p_v in zip(c, p, strict=True))
        rows.append([p_v * (c_v - mean) / temperature for c_v, p_v in zip(c, p, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).reshape(a.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_letters_are_exactly_one_hot(dtype):
    logits = torch.randn(50, *SHAPE, dtype=dtype)
    letters = straight_through(logits)
    assert letters.dtype == dtype
    assert set(letters.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(letters.sum(-1), torch.ones(50, 4, dtype=dtype))
    assert torch.equal(letters.argmax(-1), logits.argmax(-1))


def test_letters_are_chosen_without_a_read_on_the_host(host_reads):
    generator, z = TextGenerator(**arguments(noise=1.0)), torch.randn(3, 5)
    with host_reads() as reads:
        generator(z)
    assert reads.seen == []


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_gradient_is_that_of_the_softmax(noise, temperature):
    logits = torch.randn(3, *SHAPE, dtype=torch.float64, requires_grad=True)
    covector = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.manual_seed(1)
    straight_through(logits, noise, temperature).backward(covector)
    torch.manual_seed(1)
    a = logits.detach() - noise * torch.empty(3, *SHAPE, dtype=torch.float64).exponential_().log()
    torch.testing.assert_close(logits.grad, softmax_pullback(a, covector, temperature), rtol=1e-10, atol=1e-12)


def test_noisy_letters_are_draws_from_the_softmax():
    logits, count = torch.tensor([0.0, 1.0, -1.0, 2.0]), 40_000
    shares = straight_through(logits.expand(count, 4), noise=1.0).mean(0)
    for share, p in zip(shares.tolist(), logits.softmax(0).tolist(), strict=True):
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / count))


def test_the_noise_is_there_in_training_alone():
    generator, z = TextGenerator(**arguments(noise=1.0)), torch.randn(30, 5)
    assert not torch.equal(generator(z), generator(z))
    generator.eval()
    assert torch.equal(generator(z), generator(z))
    plain = TextGenerator(**arguments())
    assert torch.equal(plain(z), plain(z))


@pytest.mark.parametrize("options", [{"noise": -1.0}, {"noise": math.inf}, {"temperature": 0.0}])
def test_a_generator_refuses_options_out_of_range(options):
    name, value = next(iter(options.items()))
    with pytest.raises(UsageError, match=rf"the {name} of the text generator .*, got {value}"):
        TextGenerator(**arguments(**options))


@pytest.mark.parametrize("network", [TextGenerator, TextDiscriminator])
def test_samples_that_are_no_text_are_refused(network):
    with pytest.raises(UsageError, match=r"shape \(positions, letters\), and the data's are \(1, 28, 28\)"):
        network(**{**arguments(), "sample_shape": [1, 28, 28]})


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("schedule", ["fresh", "fused"])
def test_a_step_of_each_network_moves_that_network_alone(schedule, classes):
    labels = {"labels": torch.randint(classes, (7,))} if classes else {}
    generator = adapter.generator(**arguments(classes=classes))
    discriminator = adapter.discriminator(**arguments(classes=classes))
    gac = GAC(
        generator,
        discriminator,
        ConjugateGradient(generator.parameters(), 1e-2, rule="none"),
        torch.optim.Adam(discriminator.parameters(), 1e-2),
        penalty=GradientPenalty(1.0, 1.0, 1),
        schedule=schedule,
    )
    real = straight_through(torch.randn(7, *SHAPE))

    def moved(step):
        before = [[p.clone() for p in network.parameters()] for network in (generator, discriminator)]
        step()
        return [
            [not torch.equal(p, old) for p, old in zip(network.parameters(), olds, strict=True)]
            for network, olds in zip((generator, discriminator), before, strict=True)
        ]

    def every(network, answer):
        return [answer] * len(list(network.parameters()))

    fake = generator(torch.randn(7, 5), **labels)
    of_d = moved(lambda: gac.discriminator_step(real, fake, **labels))
    of_g = moved(lambda: gac.generator_step(fake, **labels))
    of_both = moved(lambda: gac.step(real, **labels))
    assert of_d == [every(generator, False), every(discriminator, True)]
    assert of_g == [every(generator, True), every(discriminator, False)]
    assert of_both == [every(generator, True), every(discriminator, True)]
    assert gac.cotangent(real, **labels).shape == (7, *SHAPE)


def test_labels_reach_both_networks():
    generator, discriminator = TextGenerator(**arguments(classes=2)), TextDiscriminator(**arguments(classes=2))
    torch.nn.init.normal_(discriminator.classes.weight)
    z, zeros = torch.randn(40, 5), torch.zeros(40, dtype=torch.int64)
    assert not torch.equal(generator(z, labels=zeros), generator(z, labels=zeros + 1))
    x = generator(z, labels=zeros)
    hidden = discriminator.layers(x.transpose(1, 2))
    difference = hidden @ (discriminator.classes.weight[1] - discriminator.classes.weight[0])
    answers = [discriminator(x, labels=labels)[:, 0] for labels in (zeros, zeros + 1)]
    torch.testing.assert_close(answers[1] - answers[0], difference, rtol=1e-4, atol=1e-5)


def test_a_small_vocabulary_is_learnt(codec):
    shape = {**arguments(), "sample_shape": list(codec.sample_shape), "width": 16}
    generator, discriminator = TextGenerator(**shape), TextDiscriminator(**shape)
    gac = GAC(
        generator,
        discriminator,
        ConjugateGradient(generator.parameters(), 2e-3, rule="none"),
        torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.0, 0.99)),
        penalty=GradientPenalty(),
    )
    real = codec.to_samples(encode(codec, NAMES)).repeat(16, 1, 1)
    for _ in range(400):
        gac.step(real)
    generator.eval()
    made = Counter(codec.texts(codec.to_stored(generator(torch.randn(600, 5)))))
    assert sum(made[name] for name in NAMES) >= 480
    assert all(made[name] >= 80 for name in NAMES)


def test_stored_letters_are_numbers_in_the_sorted_alphabet(codec):
    assert codec == TextCodec("\0abenov", 4)
    assert codec.sample_shape == (4, 7)
    stored = encode(codec, NAMES)
    assert stored.dtype == torch.uint8
    assert stored.tolist() == [[1, 4, 4, 1], [2, 5, 2, 0], [3, 6, 3, 0]]


def test_a_round_trip_keeps_every_text(codec):
    stored = encode(codec, NAMES)
    samples = codec.to_samples(stored)
    assert samples.dtype == torch.float32
    assert samples.shape == (3, 4, 7)
    assert samples.sum() == 12
    assert all(samples[i, j, int(stored[i, j])] == 1 for i in range(3) for j in range(4))
    assert torch.equal(codec.to_stored(samples), stored)
    assert codec.to_stored(samples).dtype == torch.uint8
    assert codec.texts(stored) == NAMES
    assert [codec.texts(codec.encode(name.encode())[None]) for name in NAMES] == [[name] for name in NAMES]


def test_nothing_stands_behind_the_end_of_a_text(codec):
    samples = codec.to_samples(torch.tensor([[2, 0, 1, 4], [0, 0, 3, 3]]))
    assert codec.to_stored(samples).tolist() == [[2, 0, 0, 0], [0, 0, 0, 0]]
    assert codec.texts(codec.to_stored(samples)) == ["b", ""]


def test_pictures_show_letters_over_positions(codec):
    pictures = codec.pictures(encode(codec, ["eve"]))
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (1, 1, 7, 4)
    assert [tuple(place) for place in pictures[0, 0].nonzero().tolist()] == [(0, 3), (3, 0), (3, 2), (6, 1)]
    assert int(pictures.max()) == 255


def test_a_codec_comes_back_from_json(codec):
    assert load(json.loads(json.dumps(codec.to_json()))) == codec


def test_letters_are_characters_of_any_script():
    codec = fit(["Łódź", "東京", "🙂"], {})
    assert codec.texts(encode(codec, ["東京", "🙂Łó"])) == ["東京", "🙂Łó"]


def test_longer_texts_are_cut_off(codec):
    assert codec.texts(encode(codec, ["annabeve"])) == ["anna"]
    short = fit([*NAMES, "x" * 300], {"length": 3})
    assert short.length == 3
    assert short.texts(encode(short, ["anna"])) == ["ann"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, r"the cell holds None and no text"),
        (3.5, r"the cell holds 3\.5 and no text"),
        ("", r"the text is empty"),
        (b"eve\xff", r"not UTF-8: byte 0xff at position 3"),
        ("ev\0e", r"has the character '\\x00', which no text may hold"),
        ("ev\udce9", r"has the character '\\udce9', which no text may hold"),
    ],
)
def test_cells_that_are_no_text_are_refused_in_one_line(codec, cell, message):
    for read in (codec.encode, lambda cell: fit([cell], {})):
        with pytest.raises(UsageError, match=message) as error:
            read(cell)
        assert "\n" not in str(error.value)


def test_cells_that_cannot_be_read_say_nothing_of_the_others():
    assert fit([None, *NAMES, b"eve\xff"], {}) == fit(NAMES, {})


def test_a_letter_that_training_did_not_have_is_refused(codec):
    with pytest.raises(UsageError, match=r"the text 'bøb' has the letter 'ø', which does not occur in the training"):
        codec.encode("bøb")


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([], {}, r"holds no text"),
        (["a" * 257], {}, r"longest text has 257 letters.*--options length=256"),
        (NAMES, {"length": 0}, r"length must be a whole number above 0, got 0"),
        (NAMES, {"length": "four"}, r"length must be a whole number above 0, got 'four'"),
        (NAMES, {"length": True}, r"length must be a whole number above 0, got True"),
        (NAMES, {"lenght": 3}, r"unknown option of the adapter 'text' 'lenght' \(did you mean 'length'\?\)"),
        ([None, None], {}, r"^row 1 of the training split: the cell holds None"),
        (["".join(map(chr, range(0x4E00, 0x4E80))), "".join(map(chr, range(0x4E80, 0x4F00)))], {}, r"256 different"),
    ],
)
def test_texts_that_no_codec_fits_are_refused_in_one_line(cells, options, message):
    with pytest.raises(UsageError, match=message) as error:
        fit(cells, options)
    assert "\n" not in str(error.value)


def test_the_largest_alphabet_fits():
    codec = fit([chr(0x4E00 + i) for i in range(255)], {})
    stored = encode(codec, [chr(0x4E00 + 254)])
    assert stored.tolist() == [[255]]
    assert torch.equal(codec.to_stored(codec.to_samples(stored)), stored)


def test_texts_are_written_one_a_line(tmp_path):
    codec = fit(["å\nb", "c"], {})
    codec.write(tmp_path / "new" / "texts.txt", encode(codec, ["å\nb", "c"]))
    assert (tmp_path / "new" / "texts.txt").read_bytes() == "å\\nb\nc\n".encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["texts.txt"]


def test_pictures_are_written_in_a_grid(codec, tmp_path):
    codec.write(tmp_path / "texts.png", encode(codec, NAMES), columns=3)
    with Picture.open(tmp_path / "texts.png") as picture:
        width, height = picture.size
    assert width > height


def test_other_files_are_refused(codec, tmp_path):
    with pytest.raises(UsageError, match=r"cannot write text to 'texts\.wav'.*\.txt, \.png"):
        codec.write(tmp_path / "texts.wav", encode(codec, NAMES))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write .*texts\.txt"):
        codec.write(tmp_path / "file" / "texts.txt", encode(codec, NAMES))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ngrams_count_the_start_and_the_end():
    assert ngrams(["aab", "b"], 2) == {"\0a": 1, "aa": 1, "ab": 1, "b\0": 2, "\0b": 1}
    assert ngrams(["ab"], 3) == {"\0\0a": 1, "\0ab": 1, "ab\0": 1}


def test_the_jensen_shannon_distance_is_scipy_s():
    a = {chr(97 + i): i * i for i in range(1, 20)}
    b = {chr(97 + i): 40 - i for i in range(5, 26)}
    things = sorted({*a, *b})
    expected = distance.jensenshannon([a.get(t, 0) for t in things], [b.get(t, 0) for t in things], base=2)
    assert jensen_shannon(a, b) == pytest.approx(expected, rel=1e-12)
    assert jensen_shannon(a, a) == pytest.approx(0, abs=1e-7)
    assert jensen_shannon({"x": 2}, {"y": 3}) == pytest.approx(1, rel=1e-12)


def test_figures_agree_with_counts_by_hand(codec):
    train = encode(codec, ["anna", "bob", "bob"])
    test = encode(codec, ["eve", "eve", "bob", "ann"])
    generated = encode(codec, ["bob", "eve", "eve", "nan", "anna"])
    figures = codec.figures(train, test, generated)
    assert figures["uniqueness"] == pytest.approx(4 / 5)
    assert figures["novelty"] == pytest.approx(2 / 4)
    # held out: "ann" and "eve", each once; start and end are "^" and "$"
    held = {"^a": 1, "an": 1, "nn": 1, "n$": 1, "^e": 1, "ev": 1, "ve": 1, "e$": 1}
    made = {"^b": 1, "bo": 1, "ob": 1, "b$": 1, "^e": 2, "ev": 2, "ve": 2, "e$": 2}
    made |= {"^n": 1, "na": 2, "an": 2, "n$": 1, "^a": 1, "nn": 1, "a$": 1}
    things = sorted({*held, *made})
    expected = distance.jensenshannon([made.get(t, 0) for t in things], [held.get(t, 0) for t in things], base=2)
    assert figures["js_bigrams"] == pytest.approx(expected, rel=1e-12)
    known = {"^a": 1, "an": 1, "nn": 1, "na": 1, "a$": 1, "^b": 2, "bo": 2, "ob": 2, "b$": 2}
    things = sorted({*held, *known})
    floor = distance.jensenshannon([known.get(t, 0) for t in things], [held.get(t, 0) for t in things], base=2)
    assert figures["js_bigrams_floor"] == pytest.approx(floor, rel=1e-12)
    assert set(figures) == {
        "uniqueness", "novelty", "js_bigrams", "js_bigrams_floor", "js_trigrams", "js_trigrams_floor",
    }  # fmt: skip
    assert figures["js_trigrams"] > figures["js_bigrams"]


def test_without_held_out_texts_there_are_no_distances(codec):
    train = encode(codec, NAMES)
    assert codec.figures(train, train, encode(codec, ["eve", "ab"])) == {"uniqueness": 1.0, "novelty": 0.5}
