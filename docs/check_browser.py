"""Check a built site in a browser: `python -m docs.check_browser OUT`. It prints what is wrong.

Headless Chromium opens the pages at the width of a phone and of a screen, light and dark. The
contrast of text must be that of WCAG AA, pages must not scroll sideways, nothing may be loaded from
elsewhere, and the search must find a function by its name.
"""

from __future__ import annotations

import functools
import http.server
import json
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"),
    "--disable-dev-shm-usage",
)
WIDTHS, THEMES = (400, 1400), ("light", "dark")
SAMPLE = 4  # pages of the reference to check; one template makes all of them
SECONDS = 900
HERE = pathlib.Path(__file__).resolve().parent


class Handler(http.server.SimpleHTTPRequestHandler):
    """A server of the site and of the page that checks it; that page posts what it has found."""

    def __init__(self, found: queue.Queue[Any], *args: Any, **kwargs: Any) -> None:
        self.found = found
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """Serve a file of the site, or the page that checks it."""
        if not self.path.startswith("/__look"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write((HERE / "look.html").read_bytes())

    def do_POST(self) -> None:
        """Receive what the page has found."""
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def pages(folder: pathlib.Path) -> list[str]:
    """Return the pages to check: all that people wrote, and some of the reference."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.html"))
    made = [name for name in names if name.startswith("api/generated/")]
    others = [
        n for n in names if not n.startswith(("api/generated/", "_static/", "paper/", "sequel/"))
    ]
    return [*others, *made[:: max(1, len(made) // SAMPLE)]]


def look(folder: pathlib.Path, names: list[str]) -> list[str]:
    """Open the pages in a browser and return what is wrong with them."""
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        sys.stdout.write("no Chromium here: nothing was checked\n")
        return []
    found: queue.Queue[Any] = queue.Queue()
    handler = functools.partial(Handler, found, directory=str(folder))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = json.dumps({"pages": names, "widths": WIDTHS, "themes": THEMES})
        address = f"http://127.0.0.1:{server.server_port}/__look#{asked}"
        command = [browser, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        with subprocess.Popen([*command, address], stderr=subprocess.DEVNULL) as process:
            try:
                return list(found.get(timeout=SECONDS))
            except queue.Empty:
                return [f"the browser has not answered in {SECONDS} seconds"]
            finally:
                process.terminate()
                server.shutdown()


def main() -> int:
    """Check the site in the folder that the command line names."""
    folder = pathlib.Path(sys.argv[1]).resolve()
    faults = look(folder, sys.argv[2:] or pages(folder))
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
