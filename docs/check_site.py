"""Check a built site: `python -m docs.check_site OUT`. It prints what is wrong, and exits with 1.

Every page must have a title, one heading of the first level, headings in order, texts for its
pictures, and no broken link. It must load nothing from outside, and weigh less than a megabyte with
all that it loads. The search index must have every page.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

from bs4 import BeautifulSoup

MOST_BYTES = 1_000_000
HEAVY = {
    "paper/report.html",
    "paper.html",
    "sequel/report.html",
    "genindex.html",
}  # reports, with their figures in one file and their tables; the index of all names
FOREIGN_PAGES = {"paper/report.html", "sequel/report.html"}  # not made by Sphinx
LOADED = {"script": "src", "link": "href", "img": "src", "source": "srcset", "iframe": "src"}


class Site:
    """The files of a build, with each page parsed once."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder.resolve()
        names = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.html"))
        self.names = sorted(n for n in names if not n.startswith("_static/"))
        self.pages = {n: self._read(n) for n in self.names if n not in FOREIGN_PAGES}
        self.anchors = {
            n: {tag["id"] for tag in page.find_all(id=True)} for n, page in self.pages.items()
        }

    def _read(self, name: str) -> Any:
        return BeautifulSoup((self.folder / name).read_text(), "html.parser")

    def target(self, page: str, url: str) -> tuple[pathlib.Path, str] | None:
        """Return the file and the anchor of a link, or None for a link that leads outside."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme or parts.netloc:
            return None
        path = urllib.parse.unquote(parts.path)
        file = (self.folder / page).parent / path if path else self.folder / page
        return file.resolve(), urllib.parse.unquote(parts.fragment)


def headings(page: Any) -> Iterator[str]:
    """Yield what is wrong with the title and the headings."""
    if not (page.title and page.title.get_text(strip=True)):
        yield "no title"
    article = page.find("article") or page
    levels = [int(tag.name[1]) for tag in article.find_all(["h1", "h2", "h3", "h4", "h5", "h6"])]
    if levels.count(1) != 1:
        yield f"{levels.count(1)} headings of the first level"
    for before, after in itertools.pairwise(levels):
        if after > before + 1:
            yield f"a heading of level {after} below one of level {before}"


def pictures(page: Any) -> Iterator[str]:
    """Yield the pictures without a text."""
    for tag in page.find_all("img"):
        if not (tag.get("alt") or "").strip():
            yield f"no text for {tag.get('src')}"


def links(site: Site, name: str) -> Iterator[str]:
    """Yield the links inside the site that lead nowhere."""
    for tag in site.pages[name].find_all("a", href=True):
        found = site.target(name, tag["href"])
        if found is None:
            continue
        file, anchor = found
        if not file.is_file():
            yield f"a broken link: {tag['href']}"
            continue
        inside = file.relative_to(site.folder).as_posix()
        if anchor and inside in site.anchors and anchor not in site.anchors[inside]:
            yield f"a link to an anchor that is not there: {tag['href']}"


def loads(site: Site, name: str) -> Iterator[str]:
    """Yield what a page loads from outside, and its weight if that is too much."""
    files = {site.folder / name}
    for tag in site.pages[name].find_all(list(LOADED)):
        if tag.name == "link" and not {"stylesheet", "icon", "preload"} & set(tag.get("rel", [])):
            continue
        url = tag.get(LOADED[tag.name])
        if not url or url.startswith("data:"):
            continue
        found = site.target(name, url)
        if found is None:
            yield f"loads {url}"
        elif not found[0].is_file():
            yield f"loads {url}, which is not there"
        else:
            files.add(found[0])
    size = sum(file.stat().st_size for file in files)
    if size > MOST_BYTES and name not in HEAVY:
        yield f"weighs {size:,} bytes"


def search(site: Site) -> Iterator[str]:
    """Yield the pages that the search index lacks."""
    text = (site.folder / "searchindex.js").read_text()
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    indexed = {f"{name}.html" for name in index["docnames"]}
    for name in set(site.pages) - indexed - {"genindex.html", "search.html", "py-modindex.html"}:
        yield f"{name}: not in the search index"


def faults(folder: pathlib.Path) -> list[str]:
    """Return everything that is wrong with the site in a folder."""
    site = Site(folder)
    found = []
    for name, page in site.pages.items():
        every = (*headings(page), *pictures(page), *links(site, name), *loads(site, name))
        found += [f"{name}: {fault}" for fault in every]
    return [*found, *search(site)]


def main() -> int:
    """Check the folder that the command line names."""
    found = faults(pathlib.Path(sys.argv[1]))
    sys.stdout.write("".join(f"{fault}\n" for fault in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
