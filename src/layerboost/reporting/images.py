"""The report's charts as PNG files, drawn by the Chromium of this machine from the page itself."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

from layerboost.errors import ConfigError, LayerboostError, first_line
from layerboost.files import new_folder

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Time limits: of the browser, in seconds, and of the page's own clock, in milliseconds.
TIMEOUT_S, PAGE_CLOCK_MS = 300, 60_000


def find_browser() -> str:
    """Return the path of Chromium or Chrome; raise ConfigError if neither is installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        do = "install chromium, or copy the run folder to a machine that has it and run `layerboost report --png` there"
        raise ConfigError("PNG figures are drawn by a browser, and none is installed", found=", ".join(BROWSERS), do=do)
    return browser


def browser_command(browser: str, profile: Path) -> list[str]:
    """Return the command of a headless browser that makes no requests of its own; `profile` is an empty directory."""
    command = [browser, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    # The sandbox refuses to run as root, as in most containers; the page is our own and loads nothing.
    return [*command, "--no-sandbox"] if os.geteuid() == 0 else command


def write_images(html: str, folder: Path) -> list[Path]:
    """Write each chart of a page made by `html_page` as `folder`/NAME.png, replacing the folder.

    Raise ConfigError without a browser and LayerboostError when it fails.
    """
    images = _draw(html, find_browser())
    with new_folder(folder) as new:
        for name, data in images.items():
            (new / f"{name.removeprefix('chart-')}.png").write_bytes(data)
    return sorted(folder.iterdir())


def _draw(html: str, browser: str) -> dict[str, bytes]:
    script = (Path(__file__).parent / "templates" / "images.js").read_text()
    # Plotly draws a chart for PNG through a blob.
    page = html.replace("img-src data:", "img-src data: blob:", 1).replace(
        "</body>", f"<script>{script}</script></body>"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        file = Path(work) / "page.html"
        file.write_text(page)
        command = browser_command(browser, Path(work) / "profile")
        command += [f"--virtual-time-budget={PAGE_CLOCK_MS}", "--dump-dom", file.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise LayerboostError(f"{browser} could not draw the figures", found=first_line(error)) from None
    match = re.search(r'<pre id="images">(.*?)</pre>', done.stdout, re.DOTALL)
    if not match:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise LayerboostError(f"{browser} could not draw the figures", found=said)
    images: dict[str, str] = json.loads(unescape(match[1]))
    return {name: base64.b64decode(url.partition(",")[2]) for name, url in images.items()}
