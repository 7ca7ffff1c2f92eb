"""A page on which visitors try a saved generator: samples, refinement, latent walks. `gac demo`, and a Space's app."""

import base64
import html
import importlib
import io
import secrets
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as Picture
from torch import Tensor, nn

from gac_plugin.errors import UsageError
from gac_plugin.protocols import Codec
from gac_plugin.refine import Refined, refine
from gac_plugin.training.data import codec_of
from gac_plugin.training.generate import class_labels, draw_latents, render, slerp
from gac_plugin.training.hub import judge_folder, load_discriminator, load_generator, network_folder, read_recipe
from gac_plugin.training.networks import Recipe

if TYPE_CHECKING:
    import gradio

MOST_SAMPLES, MOST_STEPS, MOST_FRAMES, MOST_SEED = 64, 50, 60, 2**32 - 1
WALKERS, FRAME_MS = 16, 80
HEARD = 16
"""How many of the samples are played or written out."""
IN_TURN = -1
"""The choice of a class that means all of them in turn."""
TRUNCATIONS = {"off": 0.0, "2": 2.0, "1": 1.0, "0.5": 0.5}
FRAME = "#80808060"
WIDTH = 600
"""Pixels of the screen that a grid of small pictures is enlarged to, at most."""
FONTS = ("Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
FONTS_MONO = ("Consolas", "Menlo", "monospace")
COLOURS = {
    "body_background_fill": "*neutral_50",
    "block_title_background_fill": "none",
    "block_title_padding": "0",
    "block_title_text_color": "*body_text_color",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
}
STYLE = """
.heading h1 { margin: 0.5rem 0 0; font-size: 1.9rem; overflow-wrap: anywhere; }
.heading p { margin: 0.25rem 0 0; opacity: 0.75; }
.samples figure { margin: 0; }
.samples img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 4px; }
.samples img.small { image-rendering: pixelated; }
.samples figcaption { margin-top: 0.5rem; text-align: center; text-wrap: balance; opacity: 0.75; }
"""


@dataclass(frozen=True)
class Player:
    """How samples that are not pictures are shown beside their pictures.

    Attributes:
        component: gradio -> the component.
        value: what the codec writes to a file -> the component's value.
    """

    component: Callable[[Any], Any]
    value: Callable[[bytes], Any]


PLAYERS = {
    ".wav": Player(
        lambda gr: gr.Audio(label="One after the other", interactive=False, buttons=["download"]), lambda data: data
    ),
    ".txt": Player(lambda gr: gr.Textbox(label="Texts", lines=HEARD, interactive=False), lambda data: data.decode()),
}


@dataclass(frozen=True)
class Model:
    """A saved generator, its codec and, if it was saved too, its discriminator; every input is checked.

    Inputs of the methods: `seed` of the latents; `count` of samples; `label`, a class or `IN_TURN`; `truncation`, a
    bound on the latents or 0 for none. A mistake in one of them is a `UsageError`.
    """

    name: str
    recipe: Recipe
    codec: Codec
    generator: nn.Module
    discriminator: nn.Module | None

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> "Model":
        """The model of a run folder, of a folder with a saved generator, or on the Hub; see `load_generator`."""
        folder = network_folder(path, "generator", revision)
        recipe, judge = read_recipe(folder), _judge_folder(path, revision)
        return cls(
            str(path),
            recipe,
            codec_of(recipe),
            load_generator(folder).requires_grad_(False),
            None if judge in (None, folder) else load_discriminator(judge).requires_grad_(False),
        )

    def sample(self, seed: float, count: float, label: int, truncation: float) -> Tensor:
        """What `gac sample` writes for the same seed, as the codec stores it."""
        return render(self.generator, self.codec, *self._draw(seed, count, label, truncation))

    def refine(
        self, steps: float, seed: float, count: float, label: int, truncation: float
    ) -> tuple[Tensor, Tensor, Refined]:
        """The samples before and after so many steps of `gac_plugin.refine`, as stored, and what the steps did."""
        assert self.discriminator is not None
        steps = whole("steps", steps, 0, MOST_STEPS)
        latents, labels = self._draw(seed, count, label, truncation)
        conditions: dict[str, Any] = {} if labels is None else {"labels": labels}
        reports: list[Refined] = []
        refined = refine(self.generator, self.discriminator, latents, steps, report=reports.append, **conditions)
        before, after = (render(self.generator, self.codec, z, labels) for z in (latents, refined))
        return before, after, reports[0]

    def walk(
        self, end_seed: float, frames: float, seed: float, count: float, label: int, truncation: float
    ) -> list[Tensor]:
        """Pictures uint8 (n, C, H, W) of the way from one seed's samples to another's: one entry for each frame.

        At most `WALKERS` samples walk at a time.
        """
        frames = whole("frames", frames, 2, MOST_FRAMES)
        count = min(whole("samples", count, 1, MOST_SAMPLES), WALKERS)
        start, labels = self._draw(seed, count, label, truncation)
        end, _ = self._draw(end_seed, count, label, truncation)
        latents = slerp(start, end, frames).flatten(0, 1)
        stored = render(self.generator, self.codec, latents, None if labels is None else labels.repeat(frames))
        return list(self.codec.pictures(stored).split(count))

    def _draw(self, seed: float, count: float, label: int, truncation: float) -> tuple[Tensor, Tensor | None]:
        seed, count = whole("seed", seed, 0, MOST_SEED), whole("samples", count, 1, MOST_SAMPLES)
        label = whole("class", label, IN_TURN, self.recipe.classes - 1)
        latents = draw_latents(self.recipe, count, seed, truncation or None)
        return latents, class_labels(self.recipe, count, None if label == IN_TURN else label)


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A number that a visitor typed in.

    Raises:
        UsageError: it is missing, not whole, or out of bounds.
    """
    if not isinstance(value, (int, float)) or not least <= value <= most or value != int(value):
        found = "nothing" if value is None else repr(value)
        raise UsageError(f"{name} must be a whole number from {least} to {most}, got {found}")
    return int(value)


def grid(pixels: Tensor) -> Picture.Image:
    """Images uint8 (N, C, H, W) side by side in an RGBA picture, pixel for pixel, framed by half-transparent grey."""
    count, channels, height, width = pixels.shape
    columns = int((count - 1) ** 0.5) + 1
    gap = max(1, max(height, width) // 28)
    size = columns * (width + gap) + gap, -(-count // columns) * (height + gap) + gap
    sheet = Picture.new("RGBA", size, FRAME)
    for index, image in enumerate(pixels.cpu().permute(0, 2, 3, 1).numpy()):
        row, column = divmod(index, columns)
        tile = Picture.fromarray(image[..., 0] if channels == 1 else image)
        sheet.paste(tile.convert("RGBA"), (column * (width + gap) + gap, row * (height + gap) + gap))
    return sheet


def animation(frames: Sequence[Tensor]) -> list[Picture.Image]:
    """Grids of a walk's frames there and back, so that they can be shown in a loop: 2 N - 2 of them for N frames."""
    there = [grid(frame) for frame in frames]
    return there + there[-2:0:-1]


def figure(pictures: Sequence[Picture.Image], caption: str) -> str:
    """HTML of a picture, or of an animation, that holds its pixels itself; small ones are enlarged to sharp squares."""
    kind, data = ("webp" if len(pictures) > 1 else "png"), io.BytesIO()
    moving = {"save_all": True, "append_images": pictures[1:], "duration": FRAME_MS, "loop": 0, "lossless": True}
    pictures[0].save(data, kind, **(moving if len(pictures) > 1 else {}))
    width, height = pictures[0].size
    factor = max(1, WIDTH // max(width, height))
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    text, small = html.escape(caption), ' class="small"' if factor > 1 else ""
    image = f'<img src="{source}"{small} width="{factor * width}" height="{factor * height}" alt="{text}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def demo(model: str | Path, revision: str | None = None) -> "gradio.Blocks":
    """The page of a saved generator: samples, refinement if its discriminator was saved too, and latent walks.

    Args:
        model: run folder, folder of a saved generator, or "user/name" on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: gradio is not installed, or there is no such generator; see `load_generator`.
    """
    gr, shown = _gradio(), Model.load(model, revision)
    with gr.Blocks(title=f"{shown.name} - GAC", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(_heading(shown), elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                draw = _latent_inputs(gr, shown.recipe.classes)
                another = gr.Button("Another seed", size="sm")
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Samples"):
                    show = _sample_tab(gr, shown, draw, page)
                if shown.discriminator is not None:
                    with gr.Tab("Refine"):
                        _refine_tab(gr, shown, draw)
                with gr.Tab("Latent walk"):
                    _walk_tab(gr, shown, draw)
        another.click(lambda: secrets.randbelow(1_000_000), outputs=draw[0]).then(**show)
    return page


def serve(
    model: str | Path, host: str | None = None, port: int | None = None, revision: str | None = None
) -> tuple["gradio.Blocks", str]:
    """Serve the page in threads. It is loaded from its server alone, and nothing is told to anybody else.

    Args:
        model, revision: see `demo`.
        host: address to listen on; by default what a Space asks for, and 127.0.0.1 elsewhere.
        port: by default the first one that is free from 7860 on.

    Returns:
        The page, whose `close()` ends it, and its address.

    Raises:
        UsageError: see `demo`; or the port is taken or not a port.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(f"the port must be between 1 and 65535, got {port}")
    page = demo(model, revision)
    theme = _gradio().themes.Soft(font=FONTS, font_mono=FONTS_MONO).set(**COLOURS)
    look: dict[str, Any] = {"theme": theme, "css": STYLE, "footer_links": [], "run_history": False}
    listen: dict[str, Any] = {"server_name": host, "server_port": port, "share": False, "ssr_mode": False}
    try:
        _, address, _ = page.launch(**listen, **look, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UsageError(f"cannot listen on port {port or '7860 or the next ones'}; choose one that is free") from error
    return page, address


def launch(model: str | Path, host: str | None = None, port: int | None = None, revision: str | None = None) -> None:
    """Serve the page until Ctrl-C; see `serve`."""
    page, address = serve(model, host, port, revision)
    sys.stdout.write(f"{model} is shown at {address} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    page.block_thread()


def _latent_inputs(gr: Any, classes: int) -> list[Any]:
    """Components of the inputs that the methods of `Model` have in common, in their order."""
    return [
        gr.Number(0, label="Seed", precision=0),
        gr.Slider(1, MOST_SAMPLES, 16, step=1, label="How many samples"),
        gr.Dropdown(
            [("all in turn", IN_TURN), *((str(label), label) for label in range(classes))],
            value=IN_TURN,
            label="Class",
            visible=bool(classes),
        ),
        gr.Radio(
            list(TRUNCATIONS.items()),
            value=TRUNCATIONS["off"],
            label="Truncation",
            info="Smaller: more typical, less varied",
        ),
    ]


def _sample_tab(gr: Any, model: Model, draw: Sequence[Any], page: Any) -> dict[str, Any]:
    """Samples of the seed, shown as soon as the page is; returns the event, for other triggers of it."""
    button = gr.Button("Draw samples", variant="primary")
    view = _view(gr, model.codec)

    def sample(seed: float, count: float, label: int, truncation: float) -> dict[Any, Any]:
        return _filled(view, model.codec, model.sample(seed, count, label, truncation), f"Samples of seed {seed}")

    event = {**_event(gr, sample), "inputs": draw, "outputs": view}
    gr.on([page.load, button.click, draw[0].submit], **event)
    return event


def _refine_tab(gr: Any, model: Model, draw: Sequence[Any]) -> None:
    gr.Markdown(
        "Each latent climbs to where the discriminator finds its sample more real. "
        "It stays near its start, so more steps do no harm."
    )
    steps = gr.Slider(0, MOST_STEPS, 20, step=1, label="Steps")
    button = gr.Button("Refine", variant="primary")
    with gr.Row():
        with gr.Column(min_width=240):
            before = _view(gr, model.codec)
        with gr.Column(min_width=240):
            after = _view(gr, model.codec)

    def refined(steps: float, seed: float, count: float, label: int, truncation: float) -> dict[Any, Any]:
        first, last, report = model.refine(steps, seed, count, label, truncation)
        scores = [f"mean logit of D {logit.mean():.2f}" for logit in (report.logit_before, report.logit_after)]
        return {
            **_filled(before, model.codec, first, f"Before: {scores[0]}"),
            **_filled(after, model.codec, last, f"After: {scores[1]} (latents moved by {report.moved.mean():.2f})"),
        }

    button.click(**_event(gr, refined), inputs=[steps, *draw], outputs=[*before, *after])


def _walk_tab(gr: Any, model: Model, draw: Sequence[Any]) -> None:
    gr.Markdown(f"From the samples of the seed to those of another one and back, at most {WALKERS} side by side.")
    with gr.Row():
        end = gr.Number(1, label="To seed", precision=0, min_width=120)
        frames = gr.Slider(2, MOST_FRAMES, 30, step=1, label="Frames", scale=2, min_width=180)
    button = gr.Button("Walk", variant="primary")
    view = gr.HTML(elem_classes="samples")

    def walk(end: float, frames: float, seed: float, count: float, label: int, truncation: float) -> str:
        pictures = animation(model.walk(end, frames, seed, count, label, truncation))
        return figure(pictures, f"From seed {seed} to seed {end} in {frames} frames, and back")

    button.click(**_event(gr, walk), inputs=[end, frames, *draw], outputs=view)


def _view(gr: Any, codec: Codec) -> list[Any]:
    """Components that show samples: a player where they are sound or text, and their pictures."""
    player = PLAYERS.get(codec.suffixes[0])
    players = [player.component(gr)] if player else []
    return [*players, gr.HTML(elem_classes="samples")]


def _filled(view: Sequence[Any], codec: Codec, stored: Tensor, caption: str) -> dict[Any, Any]:
    """Values of a view's components."""
    values: list[Any] = []
    suffix = codec.suffixes[0]
    if suffix in PLAYERS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"samples{suffix}")
            codec.write(path, stored[:HEARD])
            values.append(PLAYERS[suffix].value(path.read_bytes()))
    pictures = figure([grid(codec.pictures(stored))], caption)
    return dict(zip(view, [*values, pictures], strict=True))


def _event(gr: Any, answer: Callable[..., Any]) -> dict[str, Any]:
    """A listener that works on one visitor's wish at a time, and tells a mistake on the page."""

    @wraps(answer)
    def told(*inputs: Any) -> Any:
        try:
            return answer(*inputs)
        except UsageError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return {"fn": told, "concurrency_limit": 1, "concurrency_id": "model"}


def _heading(model: Model) -> str:
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, model.codec.sample_shape))
    classes = f", {model.recipe.classes} classes" if model.recipe.classes else ""
    return (
        f"<h1>{html.escape(model.name)}</h1><p>A GAN trained along the discriminator's conjugate gradient direction: "
        f"samples of {shape}{classes}. The same seed gives the same samples.</p>"
    )


def _judge_folder(path: str | Path, revision: str | None) -> Path | None:
    """The folder of the discriminator that was saved with a generator; None, or the generator's own, if none was."""
    try:
        return judge_folder(path, revision)
    except UsageError:
        return None


def _gradio() -> Any:
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise UsageError("the demo needs gradio; install it: pip install 'gac-plugin[demo]'") from error
