"""Pictures of cotangent maps, drawn with Pillow: overlays in two colours, rows of letters, bars, and sheets of tiles.

The two colours are orange and blue, which people with any of the usual kinds of colour blindness tell apart, on a dark
ground, where both are brighter than what lies below. Full colour is the strongest change, no colour none.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gac_plugin.training.files import write_whole

LESS, MORE = (70, 170, 255), (255, 140, 30)
"""Blue and orange."""
GROUND, INK, FAINT = (24, 24, 28), (236, 236, 236), (150, 150, 156)
TILE, GAP, SEAM, TEXT = 112, 10, 3, 13
"""Pixels: the longer side of a picture, about; between tiles; within a tile; and the height of letters."""
CELL = (15, 19)
"""Pixels of a letter's cell."""


def overlay(base: Tensor, change: Tensor) -> Tensor:
    """A picture in dark grey with the change that is wanted in colour over it.

        out = (1 - |v|) grey + |v| colour,   colour = MORE where v > 0, LESS where v < 0

    Args:
        base: uint8, shape (N, C, H, W).
        change: v in [-1, 1], shape (N, H, W).

    Returns:
        uint8, shape (N, 3, H, W).
    """
    grey = 30 + base.float().mean(dim=1, keepdim=True) * (110 / 255)
    more, less = (torch.tensor(colour).view(1, 3, 1, 1) for colour in (MORE, LESS))
    v = change[:, None]
    return ((1 - v.abs()) * grey + v.abs() * torch.where(v > 0, more, less)).round().to(torch.uint8)


def pictures(pixels: Tensor) -> list[Image.Image]:
    """uint8 (N, C, H, W) -> pictures enlarged to about `TILE` pixels, each pixel a square."""
    factor = max(1, round(TILE / max(pixels.shape[2:])))
    images = (Image.fromarray(image) for image in pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    return [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]


def letters(rows: Sequence[Sequence[str]], strengths: Sequence[float]) -> Image.Image:
    """Rows of letters below each other, position by position, on `MORE` as strong as each position's strength.

    Args:
        rows: of equal length L.
        strengths: in [0, 1], L of them; they colour the last row.
    """
    width, height = CELL
    image = Image.new("RGB", (width * len(strengths), height * len(rows)), GROUND)
    draw = ImageDraw.Draw(image)
    for index, strength in enumerate(strengths):
        colour = tuple(round((1 - strength) * a + strength * b) for a, b in zip(GROUND, MORE, strict=True))
        draw.rectangle((index * width, height * (len(rows) - 1), (index + 1) * width - 2, height * len(rows)), colour)
        for number, row in enumerate(rows):
            ink = GROUND if number == len(rows) - 1 and strength > 0.5 else INK
            place = (index * width + width // 2, number * height + height // 2)
            draw.text(place, row[index], ink, _font(), anchor="mm")
    return image


def stacked(*images: Image.Image) -> Image.Image:
    """Pictures below each other, with a thin gap between them."""
    height = sum(image.height + SEAM for image in images) - SEAM
    whole = Image.new("RGB", (max(image.width for image in images), height), GROUND)
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height + SEAM
    return whole


def write_sheet(
    path: Path, tiles: Sequence[tuple[Image.Image, str]], columns: int, title: str, legend: tuple[str, str] | None
) -> None:
    """Tiles with captions in rows, below a title and a legend of the two colours.

    Args:
        path: whole or not at all; see `write_whole`.
        tiles: pictures of one size, each with a short caption.
        columns: tiles in a row.
        title: one line.
        legend: what `LESS` and `MORE` mean; None for no legend.
    """
    line = TEXT + 6
    width, height = tiles[0][0].width + GAP, tiles[0][0].height + line + GAP
    rows = -(-len(tiles) // columns)
    captions = [title] + ([f"{legend[0]}  ", f"  {legend[1]}"] if legend else [])
    needed = max(round(_font().getlength(title)), sum(round(_font().getlength(text)) for text in captions[1:]) + 120)
    top = GAP + line * (2 if legend else 1) + GAP
    image = Image.new("RGB", (max(columns * width + GAP, needed + 2 * GAP), top + rows * height), GROUND)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, _font())
    if legend:
        _draw_legend(image, draw, (GAP, GAP + line), legend)
    for index, (tile, caption) in enumerate(tiles):
        row, column = divmod(index, columns)
        x, y = GAP + column * width, top + row * height
        image.paste(tile, (x, y))
        draw.text((x, y + tile.height + 2), caption, FAINT, _font())
    write_whole(path, lambda temporary: image.save(temporary))


def write_bars(path: Path, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> None:
    """Groups of horizontal bars, each group with a title and on its own scale from 0.

    Args:
        path: whole or not at all; see `write_whole`.
        groups: titles, and bars as names and values of at least 0.
    """
    line, length = TEXT + 6, 360
    bars = [bar for _, group in groups for bar in group]
    left = GAP + max(round(_font().getlength(name)) for name, _ in bars) + GAP
    titles = max(round(_font().getlength(title)) for title, _ in groups)
    size = max(left + length + 90, titles + 2 * GAP), GAP + sum((len(group) + 2) * line for _, group in groups)
    image = Image.new("RGB", size, GROUND)
    draw, y = ImageDraw.Draw(image), GAP
    for title, group in groups:
        draw.text((GAP, y), title, INK, _font())
        y += line
        largest = max(value for _, value in group) or 1.0
        for name, value in group:
            draw.text((GAP, y), name, FAINT, _font())
            draw.rectangle((left, y + 2, left + round(length * value / largest), y + TEXT), MORE)
            draw.text((left + round(length * value / largest) + GAP, y), f"{value:.3g}", INK, _font())
            y += line
        y += line
    write_whole(path, lambda temporary: image.save(temporary))


def _draw_legend(
    image: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], legend: tuple[str, str]
) -> None:
    x, y = place
    draw.text((x, y), legend[0], INK, _font())
    x += round(_font().getlength(legend[0])) + GAP
    ramp = torch.linspace(-1, 1, 100).expand(1, TEXT, 100)
    strip = overlay(torch.full((1, 1, TEXT, 100), 128, dtype=torch.uint8), ramp)[0].permute(1, 2, 0).numpy()
    image.paste(Image.fromarray(np.ascontiguousarray(strip)), (x, y + 2))
    draw.text((x + 100 + GAP, y), legend[1], INK, _font())


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)
