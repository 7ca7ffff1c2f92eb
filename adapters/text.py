"""Text, one letter at a time: a generator of one-hot letters by straight-through Gumbel-softmax, and the codec.

A sample is a matrix (L, V), one row for each position, one column for each letter, 1 at the letter that stands there.
One-hot letters are an orthonormal embedding of the alphabet, so a covector is a matrix of the same shape: how much D
wants each letter at each position.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gac_plugin.errors import UsageError, resolve
from gac_plugin.protocols import Adapter, Medium
from gac_plugin.training.files import write_grid, write_whole

KERNEL = 5
"""Letters that one convolution sees."""
END = "\0"
"""The letter number 0: it stands after the last letter of a text, up to the length of the sample."""
MOST_LETTERS = 256
"""Letters of the largest alphabet, `END` among them: as many as uint8 holds."""
LONGEST = 256
"""Letters of the longest sample that is made without being asked for."""
GUMBEL_SPREAD = math.pi / math.sqrt(6)
"""Standard deviation of Gumbel noise."""


def straight_through(logits: Tensor, noise: float = 0.0, temperature: float = 1.0) -> Tensor:
    """One-hot letters that are differentiated as if they were probabilities.

        y = onehot(argmax_v a_v),  a = l + noise g,  g ~ Gumbel(0, 1)        dy/dl := d softmax(a / temperature) / dl

    With noise 1 the letters are draws from softmax(l). Sources: Jang et al. 2017 (Gumbel-softmax), Bengio et al. 2013
    (straight-through).

    Args:
        logits: l, shape (..., V).
        noise: factor of the Gumbel noise; 0 takes the likeliest letter.
        temperature: above 0; the lower, the fewer letters share a covector.

    Returns:
        Shape (..., V): exactly one 1 in each row, the rest exactly 0.
    """
    if noise:
        logits = logits - noise * torch.empty_like(logits).exponential_().log()
    soft = (logits / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the bracket is exactly 0


class TextGenerator(nn.Module):
    """latent -> `depth` convolutions over positions with LeakyReLU 0.2, plus a linear map of the latent -> letters.

    The linear map starts with logits as far apart as Gumbel noise would draw them. So the generator begins with letters
    of all kinds, as with noise, and yet a latent says all there is to say about its text; left to the convolutions
    alone it begins with one text for all latents, and finds the others slowly.

    Args:
        sample_shape: (L, V), positions and letters.
        latent_size: size of a latent; also `nz`, torch-mimicry's name for it.
        width: channels of the hidden layers.
        depth: number of hidden convolutions.
        output: not used, letters are 0 or 1.
        classes: number of class labels that go in beside the latents; 0 for none.
        noise, temperature: of `straight_through`; the noise is there in training mode alone.

    Raises:
        UsageError: the samples are no text, the noise is negative, or the temperature not above 0.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str,
        classes: int = 0,
        noise: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= noise < math.inf:
            raise UsageError(f"the noise of the text generator must be a number of at least 0, got {noise}")
        if not 0 < temperature < math.inf:
            raise UsageError(f"the temperature of the text generator must be a number above 0, got {temperature}")
        positions, letters = _positions_and_letters(sample_shape)
        self.nz, self.noise, self.temperature = latent_size, noise, temperature
        self.classes = nn.Embedding(classes, latent_size) if classes else None
        size = 2 * latent_size if classes else latent_size
        self.first = nn.Sequential(
            nn.Linear(size, width * positions), nn.Unflatten(1, (width, positions)), nn.LeakyReLU(0.2)
        )
        self.layers = nn.Sequential(*_convolutions([width] * (depth + 1)), nn.Conv1d(width, letters, 1))
        direct = nn.Linear(size, letters * positions, bias=False)
        nn.init.normal_(direct.weight, std=GUMBEL_SPREAD / math.sqrt(size))
        self.direct = nn.Sequential(direct, nn.Unflatten(1, (letters, positions)))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, latent_size), and labels (B,) where there are classes -> one-hot letters (B, L, V)."""
        if self.classes is not None:
            z = torch.cat([z, self.classes(labels)], dim=1)
        logits = self.layers(self.first(z)) + self.direct(z)
        return straight_through(logits.transpose(1, 2), self.noise if self.training else 0.0, self.temperature)


class TextDiscriminator(nn.Module):
    """one-hot letters -> `depth` convolutions over positions with LeakyReLU 0.2 -> one logit.

    The first convolution is linear in the letters: it embeds them. With classes the logit has a term for each,
    <e_y, h> of the last layer h (projection, Miyato & Koyama 2018). The arguments are those of the generator.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        latent_size: int,
        width: int,
        depth: int,
        output: str,
        classes: int = 0,
        noise: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        positions, letters = _positions_and_letters(sample_shape)
        self.layers = nn.Sequential(*_convolutions([letters] + [width] * depth), nn.Flatten())
        self.logit = nn.Linear(width * positions, 1)
        self.classes = nn.Embedding(classes, width * positions) if classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """One-hot letters (B, L, V), and labels (B,) where there are classes -> logits (B, 1)."""
        hidden = self.layers(x.transpose(1, 2))
        if self.classes is None:
            return self.logit(hidden)
        return self.logit(hidden) + (self.classes(labels) * hidden).sum(dim=1, keepdim=True)


def _positions_and_letters(sample_shape: Sequence[int]) -> tuple[int, int]:
    if len(sample_shape) != 2:
        raise UsageError(
            f"the text networks make samples of shape (positions, letters), and the data's are {tuple(sample_shape)}; "
            "choose a data set with a column of text, or another --adapter"
        )
    positions, letters = sample_shape
    return positions, letters


def _convolutions(channels: Sequence[int]) -> list[nn.Module]:
    """Convolutions over positions that keep their number, LeakyReLU 0.2 after each."""
    pairs = ((nn.Conv1d(a, b, KERNEL, padding=KERNEL // 2), nn.LeakyReLU(0.2)) for a, b in pairwise(channels))
    return [layer for pair in pairs for layer in pair]


@dataclass(frozen=True)
class TextCodec:
    """Texts as rows of letter numbers, cut off at a length and filled up with `END`.

    Stored: uint8, shape (L,), numbers in `letters`. Sample: float32 one-hot, shape (L, V).

    Attributes:
        letters: `END`, and then the letters of the training split in the order of their code points.
        length: L, letters of a sample; what stands behind them in a longer text is left out.
    """

    letters: str
    length: int
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".png")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(L, V)"""
        return self.length, len(self.letters)

    def encode(self, cell: Any) -> Tensor:
        """A text (str, or UTF-8 bytes) -> its letter numbers, uint8, shape (L,).

        Raises:
            UsageError: see `read_text`; or a letter does not occur in the training split, so that the generator could
                never make it.
        """
        text = read_text(cell)[: self.length]
        unknown = sorted(set(text) - set(self.letters))
        if unknown:
            raise UsageError(
                f"the text {_shown(text)} has the letter {unknown[0]!r}, which does not occur in the training split; "
                "remove the row, or put such rows into the training split"
            )
        return torch.tensor([self.letters.index(letter) for letter in text.ljust(self.length, END)], dtype=torch.uint8)

    def to_samples(self, stored: Tensor) -> Tensor:
        """Letter numbers (B, L) -> one-hot letters, float32, shape (B, L, V)."""
        return one_hot(stored.long(), len(self.letters)).float()

    def to_stored(self, samples: Tensor) -> Tensor:
        """One-hot letters, or anything that is largest at the letter meant, (B, L, V) -> uint8, shape (B, L).

        A text ends at its first `END`; what a generator puts behind it is replaced by `END`.
        """
        stored = samples.argmax(-1)
        ended = (stored == 0).cumsum(dim=1) > 0
        return stored.masked_fill(ended, 0).to(torch.uint8)

    def pictures(self, stored: Tensor) -> Tensor:
        """The one-hot matrices, positions from left to right: uint8, 0 or 255, shape (B, 1, V, L)."""
        return (255 * self.to_samples(stored)).to(torch.uint8).transpose(1, 2).unsqueeze(1)

    def texts(self, stored: Tensor) -> list[str]:
        """Letter numbers (B, L) -> the texts."""
        return ["".join(self.letters[number] for number in row).rstrip(END) for row in stored.tolist()]

    def write(self, path: Path, stored: Tensor, columns: int | None = None) -> None:
        """Write texts, one a line in UTF-8 (.txt), or a grid of their one-hot matrices (.png), whole or not at all.

        Args:
            path: its suffix gives the format. In a .txt file, line breaks within a text stand as \\n.
            stored: shape (B, L).
            columns: pictures in a row of the grid.

        Raises:
            UsageError: another suffix, or the file cannot be written.
        """
        if path.suffix == ".png":
            write_grid(path, self.pictures(stored), columns)
        elif path.suffix == ".txt":
            lines = "".join("\\n".join(text.splitlines()) + "\n" for text in self.texts(stored))
            write_whole(path, lambda temporary: temporary.write_bytes(lines.encode()))  # type: ignore[arg-type]
        else:
            suffixes = ", ".join(self.suffixes)
            raise UsageError(f"cannot write text to {path.name!r}; its suffix must be one of: {suffixes}")

    def figures(self, train: Tensor, test: Tensor, generated: Tensor) -> dict[str, float]:
        """How new, how varied, and how like unseen text the generated texts are.

        Args:
            train, test, generated: stored, shapes (N, L), (M, L), (K, L).

        Returns:
            `uniqueness`: share of distinct texts among the generated ones. `novelty`: share of those distinct texts
            that do not stand in train. `js_bigrams`, `js_trigrams`: see `jensen_shannon`, of the generated texts from
            the held-out ones, which are the distinct texts of test that do not stand in train; `js_bigrams_floor`,
            `js_trigrams_floor`: the same of train, which is what learning the training split by heart gives. Without
            held-out texts, as where train stands for test, these four are left out.
        """
        known, made = self.texts(train), self.texts(generated)
        distinct, held_out = set(made), sorted(set(self.texts(test)) - set(known))
        figures = {
            "uniqueness": len(distinct) / len(made),
            "novelty": len(distinct - set(known)) / len(distinct),
        }
        for name, n in (("js_bigrams", 2), ("js_trigrams", 3)) if held_out else ():
            expected = ngrams(held_out, n)
            figures[name] = jensen_shannon(ngrams(made, n), expected)
            figures[f"{name}_floor"] = jensen_shannon(ngrams(known, n), expected)
        return figures

    def to_json(self) -> dict[str, Any]:
        """What `load` takes."""
        return {"letters": self.letters, "length": self.length}


def fit(cells: Iterable[Any], options: Mapping[str, Any]) -> TextCodec:
    """The codec whose letters are those of the training split.

    Args:
        cells: str, or UTF-8 bytes.
        options: `length`, where texts are to be cut off; the longest text by default.

    Cells that cannot be read are passed over; whoever encodes them counts them.

    Raises:
        UsageError: see `read_text`, if no cell can be read; there is no text, one is longer than `LONGEST` letters and
            no length is given, the length is not a whole number above 0, there are more than 255 letters, or an option
            is unknown.
    """
    for name in options:
        resolve(name, {"length": None}, "option of the adapter 'text'")
    letters: set[str] = set()
    longest = 0
    mistake = UsageError("the training split holds no text; choose another --split")
    for row, cell in enumerate(cells):
        try:
            text = read_text(cell)
        except UsageError as error:
            mistake = UsageError(f"row {row} of the training split: {error}")
            continue
        letters |= set(text)
        longest = max(longest, len(text))
    if not longest:
        raise mistake
    length = options.get("length")
    if length is None and longest > LONGEST:
        raise UsageError(
            f"the longest text has {longest} letters, and more than {LONGEST} are slow to train on; say where to cut "
            f"texts off, as in --options length={LONGEST}, or split them into lines"
        )
    if length is not None and (type(length) is not int or length < 1):
        raise UsageError(f"the option length must be a whole number above 0, got {length!r}")
    if len(letters) >= MOST_LETTERS:
        raise UsageError(
            f"the texts have {len(letters)} different letters, and at most {MOST_LETTERS - 1} fit; remove rare ones, "
            "or spell the texts in a smaller alphabet"
        )
    return TextCodec(END + "".join(sorted(letters)), length or longest)


def load(values: Mapping[str, Any]) -> TextCodec:
    """The codec that `TextCodec.to_json` describes."""
    return TextCodec(**values)


def read_text(cell: Any) -> str:
    """The text in a cell.

    Raises:
        UsageError: it is no text, empty, not UTF-8, or holds the character NUL, which marks the end of a text.
    """
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the text is not UTF-8: byte {cell[error.start]:#04x} at position {error.start}; "
                "convert the file to UTF-8, or remove the row"
            ) from error
    if not isinstance(cell, str):
        raise UsageError(f"the cell holds {cell!r} and no text; remove the row")
    if not cell:
        raise UsageError("the text is empty; remove the row")
    strange = next((letter for letter in cell if letter == END or "\ud800" <= letter <= "\udfff"), None)
    if strange is not None:
        raise UsageError(f"the text {_shown(cell)} has the character {strange!r}, which no text may hold; remove it")
    return cell


def ngrams(texts: Iterable[str], n: int) -> Counter[str]:
    """How often each run of n letters occurs, the start (n - 1 times) and the end of a text counted as letters."""
    counts: Counter[str] = Counter()
    for text in texts:
        marked = END * (n - 1) + text + END
        counts.update(marked[i : i + n] for i in range(len(marked) - n + 1))
    return counts


def jensen_shannon(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Distance of two distributions given by counts: 0 for equal ones, 1 where nothing occurs in both.

        sqrt(KL(p, m) / 2 + KL(q, m) / 2),  m = (p + q) / 2,  KL(p, m) = sum_i p_i log2(p_i / m_i)

    Source: Endres & Schindelin 2003; the logarithm is to base 2.
    """
    things = sorted(a.keys() | b.keys())
    p, q = (torch.tensor([float(counts.get(thing, 0)) for thing in things], dtype=torch.float64) for counts in (a, b))
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    divergences = torch.special.xlogy(p, p / middle).sum() + torch.special.xlogy(q, q / middle).sum()
    return math.sqrt(max(0.0, float(divergences) / 2 / math.log(2)))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


adapter = Adapter(
    "text",
    TextGenerator,
    TextDiscriminator,
    "letters by straight-through Gumbel-softmax, convolutions over positions",
    Medium("string", fit, load),
)
