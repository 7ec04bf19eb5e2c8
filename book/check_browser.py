"""Opens every page of a built book in headless Chromium; reports foreign requests, console messages and raw formulas.

    python book/check_browser.py book/_build/html

The pages are opened from file://, so that a request to any host counts as foreign. Needs chromium on the PATH.
Exit codes: 0 nothing found, 1 something found, 2 bad input.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no request leaves the machine, the browser's own included
    "--window-size=1400,2000",
    "--dump-dom",
    "--virtual-time-budget=10000",
    "--enable-logging=stderr",
)
CONSOLE = re.compile(r":CONSOLE[^\]]*\] (.*)")
HARMLESS = (
    '"[PST]: Changed to ',
    '"[PST]: Set focus on ',
    '"[PST]: Scrolled sidebar ',
    '"[togglebutton]: Adding ',
)  # the theme telling what it does
OWN = "not an origin"
PAGE_TIMEOUT_S = 120


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check_browser.py", description="open every page of a book in Chromium")
    parser.add_argument("html", type=Path, help="folder of the built book")
    html = parser.parse_args(argv).html.resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    pages = sorted(page for page in html.rglob("*.html") if "_static" not in page.parts)
    if browser is None or not pages:
        lacking = "no Chromium on the PATH: install it" if pages else f"no page in {html}: build the book first"
        print(f"error: {lacking}", file=sys.stderr)
        return 2
    found = 0
    for page in pages:
        problems = list(visit(browser, page))
        found += len(problems)
        print("\n  ".join([f"{page.relative_to(html)}: {len(problems) or 'no'} problem(s)", *problems]), flush=True)
    return 1 if found else 0


def visit(browser: str, page: Path) -> Iterator[str]:
    """What is wrong with a page as a reader's browser sees it."""
    with tempfile.TemporaryDirectory() as profile:
        log = Path(profile) / "net.json"
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--log-net-log={log}", page.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=PAGE_TIMEOUT_S)
        yield from (f"request: {url}" for url in requests(json.loads(log.read_text())))
    yield from (f"console: {text}" for text in CONSOLE.findall(shown.stderr) if not text.startswith(HARMLESS))
    if 'class="math' in shown.stdout and "<mjx-container" not in shown.stdout:
        yield "formulas are not typeset"


def requests(log: dict[str, Any]) -> list[str]:
    """Addresses on other hosts that the page asked for, from a net log of Chromium. What the browser asks for by itself
    (its updates, the time) has no origin as its initiator."""
    started = (event.get("params", {}) for event in log["events"])
    asked = {event["url"] for event in started if "url" in event and event.get("initiator", OWN) != OWN}
    return sorted(url for url in asked if url.startswith(("http:", "https:", "ws:", "wss:")))


if __name__ == "__main__":
    sys.exit(main())
