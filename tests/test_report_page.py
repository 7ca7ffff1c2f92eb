"""The page of a report as a browser shows it: no requests, the slider, both colour schemes, a phone, no scripts."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image as Picture

from gac_plugin.training.report import write_reports

STEPS = (10, 20, 40)


def run(folder: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """A run under way whose pictures are as bright as their step, with a finding, alarms and an evaluation."""
    (folder / "samples").mkdir(parents=True)
    (folder / "maps").mkdir()
    (folder / "config.json").write_text(json.dumps({"steps": 100, "dataset": "a/" + "very" * 40 + "long name"}))
    lines = [
        {
            "step": step,
            "loss_d": 1.0,
            "loss_g": 0.1 * step,
            "update": 10.0**-step,
            "frechet": 90 / step,
            "diversity": 0.01,
        }
        for step in range(1, steps[-1] + 1)
    ]
    lines[-1]["alarms"] = ["collapsed"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {
        "frechet": 2.0,
        "floor": 1.0,
        "recall": 0.5,
        "floors": {"recall": 0.9},
        "intervals": {"recall": [0.4, 0.6]},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"features": "the" + "longest" * 30}))
    (folder / "memorisation.json").write_text(json.dumps({"verdict": "memorises: all", "memorises": True}))
    Picture.new("L", (820, 110), 99).save(folder / "memorisation.png")
    for step in steps:
        Picture.new("L", (300, 300), step).save(folder / "samples" / f"step-{step:07d}.png")
        Picture.new("L", (500, 300), step).save(folder / "maps" / f"step-{step:07d}.png")
    return folder


def page_of(*folders: Path, running: bool = False) -> Path:
    """Their report; those that do not run have ended long ago."""
    for folder in folders:
        os.utime(folder / "metrics.jsonl", None if running else (0, 0))
    return write_reports(folders)[-1]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the page needs a browser: no Chromium is installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return page_of(run(tmp_path_factory.mktemp("alone") / "run"))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return page_of(run(folder / "first"), run(folder / "second", (15, 20, 60)))


@pytest.fixture
def visit(browser):
    """Opens pages that ask for nothing but themselves and say nothing on the console."""
    asked, said, windows = [], [], []

    def visit(file: Path, width: int = 1280, clock: bool = False, **options):
        window = browser.new_context(viewport={"width": width, "height": 900}, **options)
        windows.append(window)
        page = window.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        if clock:
            page.clock.install()
        page.goto(file.as_uri())
        return page

    yield visit
    for window in windows:
        window.close()
    assert {url[:5] for url in asked} <= {"file:", "data:"}
    assert len({url for url in asked if url.startswith("file:")}) == 1
    assert said == []


def shown(page) -> list[str]:
    """The steps of the stages that are seen."""
    return page.eval_on_selector_all(".stage", "all => all.filter(e => e.checkVisibility()).map(e => e.dataset.step)")


def brightness(page, selector: str) -> int:
    """The grey of a picture on the page."""
    return page.eval_on_selector(
        selector,
        """async image => {
            await image.decode();
            const canvas = document.createElement("canvas"), paint = canvas.getContext("2d");
            paint.drawImage(image, 0, 0);
            return paint.getImageData(9, 9, 1, 1).data[0];
        }""",
    )


def test_the_slider_moves_by_keyboard_and_says_the_step(alone, visit):
    page = visit(alone)
    slider = page.get_by_role("slider", name="Step of training")
    assert shown(page) == ["40"]
    for key, step in (("Home", 10), ("ArrowRight", 20), ("ArrowRight", 40), ("ArrowLeft", 20), ("End", 40)):
        slider.press(key)
        assert shown(page) == [str(step)]
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
        assert page.locator("#step").inner_text() == f"step {step}"
        assert brightness(page, ".stage.current img") == step


def test_the_samples_can_be_played(alone, visit):
    page = visit(alone, clock=True)
    page.get_by_role("button", name="Play").click()
    seen = [shown(page)]
    for _ in range(2):
        page.clock.run_for(500)
        seen.append(shown(page))
    assert seen == [["10"], ["20"], ["40"]]
    assert page.get_by_role("button", name="Play").is_visible(), "it has stopped at the end"


def test_the_slider_moves_all_runs_to_the_same_step(together, visit):
    page = visit(together)
    slider = page.get_by_role("slider", name="Step of training")
    seen = []
    slider.press("Home")
    for _ in range(5):
        seen.append((page.locator("#step").inner_text(), *shown(page)))
        slider.press("ArrowRight")
    assert seen == [
        ("step 10", "10", "15"),
        ("step 15", "10", "15"),
        ("step 20", "20", "20"),
        ("step 40", "40", "20"),
        ("step 60", "40", "60"),
    ]
    styles = page.eval_on_selector_all(
        ".chart:first-child polyline",
        "all => all.map(e => { const s = getComputedStyle(e); return [s.stroke, s.strokeDasharray]; })",
    )
    assert len(styles) == 2
    assert all(a != b for a, b in zip(*styles, strict=True)), "their own colour and their own dashes"


CONTRASTS = """() => {
    const luminance = text => {
        const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = element => {
        for (let e = element; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return colour;
        }
    };
    const found = [];
    const compare = (element, colour, least) => {
        const [a, b] = [luminance(colour), luminance(ground(element))].sort((x, y) => y - x);
        found.push([element.tagName + "." + (element.getAttribute("class") || ""), (a + 0.05) / (b + 0.05), least]);
    };
    for (const element of document.querySelectorAll("body *")) {
        const text = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!element.checkVisibility() || !text || element.closest("title, desc, script")) continue;
        const style = getComputedStyle(element);
        compare(element, element instanceof SVGElement ? style.fill : style.color, 4.5);
    }
    for (const line of document.querySelectorAll("polyline")) compare(line, getComputedStyle(line).stroke, 3);
    for (const mark of document.querySelectorAll(".mark")) compare(mark, getComputedStyle(mark).fill, 3);
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_both_colour_schemes(together, visit, scheme):
    page = visit(together, color_scheme=scheme)
    page.eval_on_selector_all("details", "all => all.forEach(e => { e.open = true; })")
    ground = [int(v) for v in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))]
    assert (max(ground) < 60) if scheme == "dark" else (min(ground) > 240)
    found = page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [case for case in found if case[1] < case[2]] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_line_colours_stand_out(alone, visit, scheme):
    page = visit(alone, color_scheme=scheme)
    page.eval_on_selector(
        ".chart:first-child svg",
        "svg => { for (let n = 0; n < 6; n++) "
        "svg.insertAdjacentHTML('beforeend', `<polyline class='line l${n}' points='1,1 9,9'/>`); }",
    )
    found = page.evaluate(CONTRASTS)
    assert [case for case in found if case[1] < case[2]] == []
    assert len({case[0] for case in found if case[0].startswith("polyline.line")}) == 6


@pytest.mark.parametrize("file", ["alone", "together"])
@pytest.mark.parametrize("scripts", [True, False])
def test_a_phone_shows_it_without_scrolling_sideways(request, visit, file, scripts):
    page = visit(request.getfixturevalue(file), width=390, java_script_enabled=scripts)
    if scripts:
        page.eval_on_selector_all("details", "all => all.forEach(e => { e.open = true; })")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    for element in page.locator("main > section, h1, h2, h3, .glance, .chart, .player, pre, .stages").all():
        box = element.bounding_box()
        assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 390)
    size = page.eval_on_selector(".chart text", "e => e.getBoundingClientRect().height")
    assert size >= 10, "labels can be read"


def test_without_scripts_everything_can_be_read(alone, visit):
    page = visit(alone, java_script_enabled=False)
    assert shown(page) == ["10", "20", "40"]
    assert not page.locator("#slider").is_visible()
    assert not page.locator(".copy").first.is_visible()
    page.locator("summary", has_text="All settings").click()
    assert page.locator("th code", has_text="--lr-generator").is_visible()
    page.locator("summary", has_text="The figures").first.click()
    assert page.get_by_role("cell", name="40", exact=True).first.is_visible()


def test_small_pictures_are_not_smoothed(alone, visit):
    page = visit(alone)
    styles = page.eval_on_selector_all(
        ".stage.current img", "all => all.map(e => [e.naturalWidth, getComputedStyle(e).imageRendering])"
    )
    assert styles == [[300, "pixelated"], [500, "auto"]]


def test_a_command_is_copied(alone, visit):
    page = visit(alone, permissions=["clipboard-read", "clipboard-write"])
    first = page.locator("#again ~ .command").first
    first.get_by_role("button", name="Copy").click()
    first.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == first.locator("code").inner_text()


def test_it_loads_itself_again_while_the_run_goes_on_and_keeps_the_slider(tmp_path, visit):
    folder = run(tmp_path / "run")
    page = visit(page_of(folder, running=True), clock=True)
    slider = page.get_by_role("slider", name="Step of training")
    slider.press("Home")
    slider.press("ArrowRight")
    shutil.copy(folder / "samples" / "step-0000010.png", folder / "samples" / "step-0000015.png")
    page_of(folder, running=True)
    page.clock.run_for(59_000)
    assert page.locator(".stage").count() == 3
    with page.expect_navigation():
        page.clock.run_for(1_000)
    assert page.locator(".stage").count() == 4
    assert shown(page) == ["20"]
    slider.press("End")
    (folder / "samples" / "step-0000040.png").rename(folder / "samples" / "step-0000050.png")
    page_of(folder)
    with page.expect_navigation():
        page.clock.run_for(60_000)
    assert shown(page) == ["50"], "at the end it follows the run"
    assert page.locator(".banner").count() == 0
    page.evaluate("window.mine = true")
    page.clock.run_for(200_000)
    assert page.evaluate("window.mine"), "a run that has ended is not loaded again"


def test_it_stops_loading_itself_when_nobody_has_written_it_for_long(tmp_path, visit):
    page = visit(page_of(run(tmp_path / "run"), running=True), clock=True)
    page.clock.run_for(59_000)
    page.evaluate("document.body.dataset.until = Date.now() / 1000 - 1")
    page.evaluate("window.mine = true")
    page.clock.run_for(200_000)
    assert page.evaluate("window.mine")


def test_it_can_be_printed(alone, visit):
    page = visit(alone, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#slider").is_visible()
    assert not page.locator("nav").is_visible()
    assert shown(page) == ["40"]
