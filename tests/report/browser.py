"""Pages in a browser, if one is installed."""

from __future__ import annotations

import html
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # also requests of the browser's own
    *("--enable-logging=stderr", "--virtual-time-budget=2000", "--disable-dev-shm-usage"),
)
NEEDED = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")

# A frame can be as narrow as a phone, a window cannot. The page's copy in it may run scripts.
FRAME = """<!doctype html><title>frame</title>
<body style="margin: 0"><iframe id="frame" style="border: 0; width: {width}px; height: 900px"
srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
window.onload = () => {{
  const inner = document.getElementById("frame").contentWindow, page = inner.document;
  const sizes = [...page.querySelectorAll(".panel svg")].map(svg => {{
    const box = svg.getBoundingClientRect(), drawn = svg.getBBox();
    return [box.width, box.height, drawn.width, drawn.height];
  }});
  const small = [...page.querySelectorAll(".panel svg")].map(svg =>
    svg.getBoundingClientRect().width / svg.viewBox.baseVal.width);
  document.getElementById("found").textContent = JSON.stringify({{
    width: inner.innerWidth,
    scrolls: page.documentElement.scrollWidth,
    sizes: sizes,
    scales: small,
    tables: [...page.querySelectorAll(".table")].map(x => x.getBoundingClientRect().width),
    cut: [...page.querySelectorAll(".table")].filter(x => x.scrollWidth > x.clientWidth + 1)
      .map(x => x.getAttribute("aria-label")),
    loaded: inner.performance.getEntriesByType("resource").map(x => x.name),
  }});
}};
</script>
"""


def browse(profile: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)


def measured(page: pathlib.Path, width: int, folder: pathlib.Path) -> dict[str, Any]:
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(text)))
    found = browse(folder / "profile", "--window-size=1500,1000", "--dump-dom", frame.as_uri())
    written = re.search(r'<pre id="found">(.*?)</pre>', found.stdout, re.DOTALL)
    assert written is not None, found.stderr
    return json.loads(html.unescape(written[1]))


def opened(page: pathlib.Path, folder: pathlib.Path) -> tuple[str, list[str], pathlib.Path]:
    """Return the browser's messages, the origins of the page's requests, and a picture."""
    shot, net = folder / "shot.png", folder / "net.json"
    arguments = ("--window-size=1400,2000", f"--screenshot={shot}", f"--log-net-log={net}")
    found = browse(folder / "profile", *arguments, page.as_uri())
    asked = re.findall(r'"initiator":"([^"]*)"', net.read_text())
    return found.stderr, [one for one in asked if one != "not an origin"], shot
