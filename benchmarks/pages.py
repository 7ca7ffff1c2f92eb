"""Pictures of the pages: `python benchmarks/pages.py demo RUN` and `python benchmarks/pages.py report RUN [RUN2 ...]`
photograph what `gac demo` and `gac report` show, with Chromium.

Needs playwright (pip install playwright) and Chromium; the demo also the extra `demo`.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from gac_plugin.demo import serve
from gac_plugin.training.report import write_reports

TABS = {"Samples": "Draw samples", "Refine": "Refine", "Latent walk": "Walk"}
PATIENCE = 60_000
"""Milliseconds until a picture must have appeared."""
PLOTS = Path(__file__).parent / "plots"


def photograph_demo(view: Page, run: str, tab: str, out: Path) -> None:
    """Open a tab, press its button, and keep what the page then looks like."""
    page, address = serve(run, "127.0.0.1")
    try:
        view.goto(address)
        view.locator("img:visible").first.wait_for(timeout=PATIENCE)
        view.get_by_role("tab", name=tab).click()
        view.get_by_role("button", name=TABS[tab], exact=True).click()
        view.locator("img:visible").last.wait_for(timeout=PATIENCE)
        view.mouse.move(0, 0)
        view.wait_for_timeout(1000)  # the button's and the tab's transitions
        view.screenshot(path=out, full_page=True)
    finally:
        page.close()


def photograph_report(view: Page, runs: list[str], out: Path) -> None:
    """The first screen of the report, from the figures at a glance to the first curves."""
    view.goto(write_reports([Path(run) for run in runs])[-1].resolve().as_uri())
    view.screenshot(
        path=out, full_page=True, clip={"x": 0, "y": 0, "width": view.viewport_size["width"], "height": 1620}
    )  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=("demo", "report"))
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder; of the demo one, with its discriminator")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: space.png or report.png in plots/)")
    parser.add_argument("--tab", default="Refine", choices=TABS, help="of the demo")
    parser.add_argument("--width", type=int, default=1200, metavar="PIXELS")
    parser.add_argument("--dark", action="store_true", help="as in a browser set to dark")
    parser.add_argument("--chromium", default=shutil.which("chromium"), metavar="FILE")
    arguments = parser.parse_args()
    out = arguments.out or PLOTS / ("space.png" if arguments.page == "demo" else "report.png")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        view = browser.new_page(
            viewport={"width": arguments.width, "height": 640}, color_scheme="dark" if arguments.dark else "light"
        )
        if arguments.page == "demo":
            photograph_demo(view, arguments.runs[0], arguments.tab, out)
        else:
            photograph_report(view, arguments.runs, out)
        browser.close()
    print(f"{arguments.page} of {', '.join(arguments.runs)} in {out}")


if __name__ == "__main__":
    main()
