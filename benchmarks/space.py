"""The picture of the demo page: `python benchmarks/space.py RUN` serves a run and photographs it with Chromium.

Needs the extra `demo`, playwright (pip install playwright) and Chromium.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from gac_plugin.demo import serve

TABS = {"Samples": "Draw samples", "Refine": "Refine", "Latent walk": "Walk"}
PATIENCE = 60_000
"""Milliseconds until a picture must have appeared."""


def main() -> None:
    """Open a tab, press its button, and keep what the page then looks like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder, with its discriminator")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "plots" / "space.png", metavar="FILE")
    parser.add_argument("--tab", default="Refine", choices=TABS)
    parser.add_argument("--width", type=int, default=1200, metavar="PIXELS")
    parser.add_argument("--dark", action="store_true", help="as in a browser set to dark")
    parser.add_argument("--chromium", default=shutil.which("chromium"), metavar="FILE")
    arguments = parser.parse_args()
    page, address = serve(arguments.run, "127.0.0.1")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
            view = browser.new_page(
                viewport={"width": arguments.width, "height": 640},
                color_scheme="dark" if arguments.dark else "light",
            )
            view.goto(address)
            view.locator("img:visible").first.wait_for(timeout=PATIENCE)
            view.get_by_role("tab", name=arguments.tab).click()
            view.get_by_role("button", name=TABS[arguments.tab], exact=True).click()
            view.locator("img:visible").last.wait_for(timeout=PATIENCE)
            view.mouse.move(0, 0)
            view.wait_for_timeout(1000)  # the button's and the tab's transitions
            view.screenshot(path=arguments.out, full_page=True)
            browser.close()
    finally:
        page.close()
    print(f"{arguments.tab} of {arguments.run} in {arguments.out}")


if __name__ == "__main__":
    main()
