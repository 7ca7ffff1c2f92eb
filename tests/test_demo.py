"""The demo: what it computes, the files of a Space, and the page as a visitor's browser shows it."""

import ast
import base64
import io
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import adapter_samples
import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from PIL import Image as Picture
from PIL import ImageSequence

from gac_plugin.cli import main
from gac_plugin.demo import FRAME_MS, IN_TURN, Model, animation, figure, grid
from gac_plugin.errors import UsageError
from gac_plugin.training.data import codec_of
from gac_plugin.training.generate import generate
from gac_plugin.training.hub import load_discriminator, load_generator, save_network
from gac_plugin.training.space import SPACE_SDK, space_files

CLASSES = 3
PATIENCE = 30_000
"""Milliseconds until something must have happened on the page."""


def save(folder: Path, name: str, classes: int = 0, judged: bool = True) -> Path:
    """A run's networks, with fresh weights, and a discriminator of strong opinions."""
    recipe = adapter_samples.recipe(name, classes)
    torch.manual_seed(4)
    save_network(folder / "generator", recipe.generator(), recipe)
    if judged:
        discriminator = recipe.discriminator()
        for parameter in discriminator.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        save_network(folder / "discriminator", discriminator, recipe)
    return folder


def read(source: str) -> Picture.Image:
    """The picture in a data URL."""
    return Picture.open(io.BytesIO(base64.b64decode(source.split(",")[1])))


def duration(source: str) -> int:
    """Milliseconds that an animation takes; it may hold equal frames as one."""
    with read(source) as moving:
        frames = ImageSequence.Iterator(moving)
        return sum((frame.load(), frame.info["duration"])[1] for frame in frames)


@pytest.fixture
def model(tmp_path) -> Model:
    return Model.load(save(tmp_path, "mlp", CLASSES))


@pytest.mark.parametrize(("name", "classes"), [("mlp", 0), ("mlp", CLASSES), ("text", 0), ("speech", CLASSES)])
def test_samples_are_bit_for_bit_those_of_gac_sample(tmp_path, name, classes):
    model = Model.load(save(tmp_path, name, classes))
    suffix = model.codec.suffixes[0]
    for label in (IN_TURN, *range(classes)):
        flags = [] if label == IN_TURN else ["--label", str(label)]
        theirs, ours = tmp_path / f"theirs{suffix}", tmp_path / f"ours{suffix}"
        assert main(["sample", str(tmp_path), "--n", "7", "--seed", "11", "--out", str(theirs), *flags]) == 0
        model.codec.write(ours, model.sample(11, 7, label, 0.0))
        assert ours.read_bytes() == theirs.read_bytes()
        assert not torch.equal(model.sample(11, 7, label, 0.0), model.sample(12, 7, label, 0.0))


def test_truncation_is_that_of_gac_sample(model):
    expected = generate(model.generator, model.recipe, 5, seed=2, truncation=0.5)
    assert torch.equal(model.sample(2, 5, IN_TURN, 0.5), expected)


def test_refinement_starts_from_the_samples_and_raises_the_discriminators_score(model, tmp_path):
    before, after, report = model.refine(5, 2, 6, 1, 0.0)
    assert torch.equal(before, model.sample(2, 6, 1, 0.0))
    assert not torch.equal(before, after)
    latents = torch.randn(6, model.recipe.latent_size, generator=torch.Generator().manual_seed(2))
    labels = torch.ones(6, dtype=torch.int64)
    with torch.no_grad():
        samples = load_generator(tmp_path)(latents, labels=labels)
        score = load_discriminator(tmp_path)(samples, labels=labels)[:, 0]
    assert report.logit_before.numpy() == pytest.approx(score.numpy(), abs=1e-6)
    assert (report.logit_after > report.logit_before).all()
    assert torch.equal(model.refine(0, 2, 6, 1, 0.0)[1], before)


@pytest.mark.parametrize("folder", ["alone", "run/generator"])
def test_without_a_discriminator_there_is_nothing_to_refine(tmp_path, folder):
    save(tmp_path / "alone", "mlp", judged=False)
    save(tmp_path / "run", "mlp")
    assert Model.load(tmp_path / folder).discriminator is None
    assert Model.load(tmp_path / "run").discriminator is not None


def test_a_walk_leads_from_one_seeds_samples_to_anothers(model):
    frames = model.walk(9, 5, 3, 4, IN_TURN, 0.0)
    assert [frame.shape for frame in frames] == [(4, 3, 16, 16)] * 5
    for frame, seed in ((frames[0], 3), (frames[-1], 9)):
        difference = frame.int() - model.sample(seed, 4, IN_TURN, 0.0).int()
        assert difference.abs().max() <= 1  # the batch is another one, and so is the order of sums
    assert len(model.walk(9, 2, 3, 64, IN_TURN, 0.0)[0]) == 16


@pytest.mark.parametrize("name", ["text", "speech"])
def test_a_walk_through_any_medium_is_pictures(tmp_path, name):
    model = Model.load(save(tmp_path, name))
    frames = model.walk(1, 3, 0, 4, IN_TURN, 0.0)
    assert len(frames) == 3
    assert all(frame.dtype == torch.uint8 and frame.dim() == 4 and len(frame) == 4 for frame in frames)


@pytest.mark.parametrize("count", [2, 3, 30])
def test_an_animation_goes_there_and_back(count):
    frames = [torch.full((1, 3, 2, 2), 5 * index, dtype=torch.uint8) for index in range(count)]
    source = re.search(r'src="(data:image/webp;base64,[^"]+)"', figure(animation(frames), "a walk"))[1]
    with read(source) as moving:
        assert moving.n_frames == 2 * count - 2
        colours = []
        for index in range(moving.n_frames):
            moving.seek(index)
            colours.append(moving.convert("RGB").getpixel((1, 1))[0])
    assert colours == [5 * index for index in [*range(count), *range(count - 2, 0, -1)]]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_pixel_in_a_frame(channels):
    pixels = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    sheet = np.array(grid(pixels))
    expected = np.full((2 * 5 + 1, 3 * 7 + 1, 4), (128, 128, 128, 96))
    for index in range(5):
        row, column = divmod(index, 3)
        tile = expected[5 * row + 1 : 5 * row + 5, 7 * column + 1 : 7 * column + 7]
        tile[..., :3] = pixels[index].expand(3, 4, 6).permute(1, 2, 0).numpy()
        tile[..., 3] = 255
    assert (sheet == expected).all()


def test_a_caption_cannot_bring_markup_into_the_page():
    assert "<script" not in figure([Picture.new("RGBA", (1, 1))], '"><script>')


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.sample(-1, 4, IN_TURN, 0.0), "seed must be a whole number from 0 to 4294967295, got -1"),
        (lambda model: model.sample(2**32, 4, IN_TURN, 0.0), "seed must be a whole number .*, got 4294967296"),
        (lambda model: model.sample(0.5, 4, IN_TURN, 0.0), "seed must be a whole number .*, got 0.5"),
        (lambda model: model.sample(math.nan, 4, IN_TURN, 0.0), "seed must be a whole number .*, got nan"),
        (lambda model: model.sample(None, 4, IN_TURN, 0.0), "seed must be a whole number .*, got nothing"),
        (lambda model: model.sample("1", 4, IN_TURN, 0.0), "seed must be a whole number .*, got '1'"),
        (lambda model: model.sample(0, 0, IN_TURN, 0.0), "samples must be a whole number from 1 to 64, got 0"),
        (lambda model: model.sample(0, 65, IN_TURN, 0.0), "samples must be a whole number from 1 to 64, got 65"),
        (lambda model: model.sample(0, 4, CLASSES, 0.0), "class must be a whole number from -1 to 2, got 3"),
        (lambda model: model.sample(0, 4, IN_TURN, -1.0), "the truncation must be a positive number, got -1.0"),
        (lambda model: model.refine(51, 0, 4, IN_TURN, 0.0), "steps must be a whole number from 0 to 50, got 51"),
        (lambda model: model.walk(1, 61, 0, 4, IN_TURN, 0.0), "frames must be a whole number from 2 to 60, got 61"),
        (lambda model: model.walk(1, 1, 0, 4, IN_TURN, 0.0), "frames must be a whole number from 2 to 60, got 1"),
        (lambda model: model.walk(-1, 9, 0, 4, IN_TURN, 0.0), "seed must be a whole number .*, got -1"),
        (lambda model: model.walk(1, 9, 0, 65, IN_TURN, 0.0), "samples must be a whole number from 1 to 64, got 65"),
    ],
)
def test_a_visitors_mistake_is_told(model, call, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        call(model)


def test_without_gradio_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(save(tmp_path, "mlp"))]) == 2
    assert capsys.readouterr().err == "gac: error: the demo needs gradio; install it: pip install 'gac-plugin[demo]'\n"


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_is_none_is_told(port, capsys):
    assert main(["demo", "run", "--port", port]) == 2
    assert capsys.readouterr().err == f"gac: error: the port must be between 1 and 65535, got {port}\n"


def test_a_space_is_an_app_its_requirements_and_a_readme_that_the_hub_can_read():
    files = space_files("ada/digits-1.2")
    assert sorted(files) == ["README.md", "app.py", "requirements.txt"]
    literals = [node.value for node in ast.walk(ast.parse(files["app.py"])) if isinstance(node, ast.Constant)]
    assert literals[1:] == ["ada/digits-1.2"]
    assert re.fullmatch(rb"gac-plugin\[demo\]>=\d+\.\d+\.\d+\n", files["requirements.txt"])
    card = SpaceCard(files["README.md"].decode())
    facts = card.data.to_dict()
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts.pop("sdk_version"))
    assert facts == {
        "title": "Samples of digits-1.2",
        "emoji": "🎲",
        "colorFrom": "indigo",
        "colorTo": "purple",
        "sdk": SPACE_SDK,
        "app_file": "app.py",
        "models": ["ada/digits-1.2"],
        "pinned": False,
    }
    assert "ada/digits-1.2" in card.text


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "ada/x'); import os; ('", 'ada/x"', "ada/\nx", "../x", "ada/x y", "-a/b", "ada/x.git"]
)
def test_a_name_that_is_no_repositorys_never_gets_into_an_app(name):
    with pytest.raises(UsageError, match=r"is not the name of a repository; give USER/NAME"):
        space_files(name)


# the page, in a browser


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="the page needs the extra demo: pip install 'gac-plugin[demo]'")
    api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the page needs a browser: no Chromium is installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def serving(arguments: list[str], folder: Path) -> Iterator[str]:
    """Run a program of ours that serves a page; its address. What it says and whom it calls is in the folder."""
    watch = folder / "watch"
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(
        "import sys\n"
        f"calls = open({str(folder / 'calls')!r}, 'a', buffering=1)\n"
        "def note(event, values):\n"
        "    if event == 'socket.connect' and isinstance(values[1], tuple):\n"
        "        print(values[1][0], file=calls)\n"
        "    if event == 'socket.getaddrinfo':\n"
        "        print(values[0], file=calls)\n"
        "sys.addaudithook(note)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(watch), "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder)}
    with (folder / "log").open("w") as log:
        command = [sys.executable, *arguments]
        app = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline, shown = time.monotonic() + 60, None
        while shown is None:
            assert app.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "the page is not served after a minute"
            time.sleep(0.1)
            shown = re.search(r"is shown at (http://127\.0\.0\.1:\d+)/? ", (folder / "log").read_text())
        yield shown[1]
    finally:
        app.terminate()
        try:
            app.wait(10)
        except subprocess.TimeoutExpired:
            app.kill()
            app.wait(10)


@pytest.fixture(scope="module")
def space(browser, tmp_path_factory):
    """The files of a Space run as a Space runs them, in a folder where the model is; the address and the folder."""
    folder = tmp_path_factory.mktemp("space")
    save(folder / "ada" / "digits", "mlp", CLASSES)
    for name, content in space_files("ada/digits").items():
        (folder / name).write_bytes(content)
    with serving(["app.py"], folder) as address:
        yield address, folder


class Visitor:
    """A browser's window, and what its visitor does."""

    def __init__(self, browser) -> None:
        self.page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.hosts: set[str | None] = set()
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))

    def open(self, address: str) -> str:
        """Open the page; the samples that it shows at once."""
        self.page.goto(address)
        return self.picture()

    def picture(self, other_than: str = "", index: int = 0) -> str:
        """The source of a picture on the page, as soon as it is there and another one than before."""
        self.page.wait_for_function(
            """([index, old]) => {
                const shown = [...document.querySelectorAll('.samples img')].filter(image => image.checkVisibility());
                return shown.length > index && shown[index].naturalWidth > 0 && shown[index].src !== old;
            }""",
            arg=[index, other_than],
        )
        return self.page.locator(".samples img:visible").nth(index).get_attribute("src")

    def set(self, label: str, value: str) -> None:
        """Type into a field."""
        self.page.get_by_label(label, exact=True).locator("visible=true").first.fill(value)

    def choose_class(self, name: str) -> None:
        """Choose from the list of classes."""
        self.page.get_by_label("Class").click()
        self.page.get_by_role("option", name=name, exact=True).click()

    def press(self, name: str, role: str = "button") -> None:
        """Press a button, or open a tab."""
        self.page.get_by_role(role, name=name, exact=True).click()


@pytest.fixture
def visitor(browser):
    """A visitor whose page loads from this machine alone, and without an error."""
    made = Visitor(browser)
    yield made
    made.page.context.close()
    assert made.errors == []
    assert made.hosts - {None} == {"127.0.0.1"}  # None: data


def test_the_page_shows_what_gac_sample_makes(space, visitor):
    address, folder = space
    first = visitor.open(address)
    generator = load_generator(folder / "ada" / "digits")
    recipe = adapter_samples.recipe("mlp", CLASSES)
    codec = codec_of(recipe)

    def expected(count: int, seed: int, **options) -> np.ndarray:
        return np.array(grid(codec.pictures(generate(generator, recipe, count, seed, **options))))

    assert (np.array(read(first)) == expected(16, 0)).all()
    visitor.set("Seed", "7")
    visitor.press("Draw samples")
    seventh = visitor.picture(other_than=first)
    assert (np.array(read(seventh)) == expected(16, 7)).all()
    visitor.set("Seed", "0")
    visitor.press("Draw samples")
    assert visitor.picture(other_than=seventh) == first
    visitor.choose_class("2")
    visitor.press("Draw samples")
    second_class = visitor.picture(other_than=first)
    assert (np.array(read(second_class)) == expected(16, 0, labels=torch.full((16,), 2))).all()
    visitor.page.get_by_label("0.5").check()
    visitor.press("Draw samples")
    truncated = visitor.picture(other_than=second_class)
    assert (np.array(read(truncated)) == expected(16, 0, labels=torch.full((16,), 2), truncation=0.5)).all()
    visitor.press("Another seed")
    assert visitor.picture(other_than=truncated) not in (first, second_class)
    assert visitor.page.get_by_label("Seed", exact=True).input_value() != "0"


def test_the_page_refines(space, visitor):
    samples = visitor.open(space[0])
    visitor.press("Refine", "tab")
    visitor.press("Refine")
    before, after = visitor.picture(index=0), visitor.picture(index=1)
    assert before == samples != after
    captions = visitor.page.locator("figcaption:visible").all_inner_texts()
    scores = [float(re.search(r"mean logit of D (-?\d+\.\d\d)", caption)[1]) for caption in captions]
    assert scores[1] > scores[0]
    assert re.search(r"moved by \d+\.\d\d", captions[1])


def test_the_page_walks(space, visitor):
    visitor.open(space[0])
    visitor.press("Latent walk", "tab")
    visitor.set("To seed", "5")
    visitor.press("Walk")
    assert duration(visitor.picture()) == 58 * FRAME_MS


def test_every_button_works(space, visitor):
    visitor.open(space[0])
    pressed = set()
    for tab in ("Samples", "Refine", "Latent walk"):
        visitor.press(tab, "tab")
        for button in visitor.page.get_by_role("button").locator("visible=true").all():
            button.click()
            pressed.add(button.get_attribute("aria-label") or button.inner_text())
            visitor.page.wait_for_timeout(100)  # until the page shows that it is at work
            visitor.page.wait_for_function("() => !document.querySelector('.generating, .progress-text')")
        visitor.picture()
    assert visitor.page.get_by_test_id("toast-body").count() == 0
    assert {"Draw samples", "Another seed", "Refine", "Walk"} <= pressed


def test_a_mistake_is_told_on_the_page_and_the_next_try_works(space, visitor):
    picture = visitor.open(space[0])
    for attempt, typed in enumerate(("-1", "99999999999", "")):
        visitor.set("Seed", typed)
        visitor.press("Draw samples")
        told = visitor.page.get_by_text(f"seed must be a whole number from 0 to 4294967295, got {typed or 'nothing'}")
        told.wait_for()
        assert "Traceback" not in visitor.page.content()
        visitor.set("Seed", str(5 + attempt))
        visitor.press("Draw samples")
        picture = visitor.picture(other_than=picture)


def test_a_phone_never_scrolls_sideways(space, visitor):
    visitor.page.set_viewport_size({"width": 360, "height": 740})
    visitor.open(space[0])
    for tab, button in (("Samples", "Draw samples"), ("Refine", "Refine"), ("Latent walk", "Walk")):
        visitor.press(tab, "tab")
        visitor.press(button)
        visitor.picture()
        assert visitor.page.evaluate("document.scrollingElement.scrollWidth") == 360
        for shown in visitor.page.locator("img, button, input, h1, p").locator("visible=true").all():
            box = shown.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360


@pytest.mark.parametrize("name", ["text", "speech"])
def test_gac_demo_writes_text_out_and_plays_sound(visitor, tmp_path, name):
    save(tmp_path / "run", name, judged=False)
    suffix = codec_of(adapter_samples.recipe(name)).suffixes[0]
    expected = tmp_path / f"expected{suffix}"
    assert main(["sample", str(tmp_path / "run"), "--n", "16", "--out", str(expected)]) == 0
    program = "import sys; from gac_plugin.cli import main; sys.exit(main())"
    with serving(["-c", program, "demo", "run"], tmp_path) as address:
        visitor.open(address)
        assert visitor.page.get_by_role("tab", name="Refine").count() == 0
        if name == "text":
            assert visitor.page.get_by_label("Texts").input_value() == expected.read_text()
        else:
            with visitor.page.expect_download() as download:
                visitor.page.get_by_label("Download").click()
            assert Path(download.value.path()).read_bytes() == expected.read_bytes()
        visitor.press("Latent walk", "tab")
        visitor.press("Walk")
        assert duration(visitor.picture()) == 58 * FRAME_MS


def test_the_server_asks_nobody_else(space):
    """Runs last: what the app's process has called for, from its start on."""
    calls = set((space[1] / "calls").read_text().split())
    assert calls
    assert calls <= {"127.0.0.1", "localhost", "::1", "0.0.0.0"}
    assert "Traceback" not in (space[1] / "log").read_text()
