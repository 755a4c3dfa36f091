"""The page in a browser: drawn, silent, alone, and as wide as the window and no wider."""

from __future__ import annotations

import html
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from tests.report import left
from tests.report.conftest import Written

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000", "--disable-dev-shm-usage"),
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")

# A window cannot be as narrow as a phone, a frame can. The copy of the page in it may run scripts.
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


@pytest.mark.parametrize("which", ["solo", "sweep"])
@pytest.mark.parametrize("width", [400, 1400])
def test_all_is_drawn_and_nothing_wider_than_the_window(
    written: Written, which: str, width: int, tmp_path: pathlib.Path
) -> None:
    """Red: no `overflow-x` of `.table`, or `min-width: 30rem` for `.panel`, in report.css."""
    page = getattr(written, which) / "report/report.html"
    found = measured(page, width, tmp_path)
    assert found["width"] == width
    assert found["scrolls"] <= width
    assert found["loaded"] == []
    assert len(found["sizes"]) == len(left.page(page).alternatives)
    for size in found["sizes"]:
        assert min(size) > 80
    assert min(found["scales"]) > 0.6  # of points: letters of 10 points stay above 8 pixels
    assert max(found["tables"]) <= width


@pytest.mark.parametrize("which", ["solo", "sweep"])
def test_it_opens_without_a_word_and_without_a_request(
    written: Written, which: str, tmp_path: pathlib.Path
) -> None:
    """The page's own policy forbids every load, and the console says so of one that is tried.

    Red: `<img src="http://localhost/x.png">` in report.html.j2.
    """
    page, shot = getattr(written, which) / "report/report.html", tmp_path / "shot.png"
    net = tmp_path / "net.json"
    size = ("--window-size=1400,2000", f"--screenshot={shot}", f"--log-net-log={net}")
    found = browse(tmp_path / "profile", *size, page.as_uri())
    assert "CONSOLE" not in found.stderr
    pixels = matplotlib.image.imread(shot)
    assert pixels.shape[:2] == (2000, 1400)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    asked = set(re.findall(r'"url":"([a-z-]+:)', net.read_text()))
    assert asked <= {"file:", "data:", "chrome:", "about:"}
