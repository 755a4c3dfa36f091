"""A report explains its words, and links to a site only if the site's address is given."""

from __future__ import annotations

import pathlib
import re

import pytest

from lora_jax.errors import LoraError
from lora_jax.report import glossary, render
from lora_jax.report.document import Fact, Glossary, Paragraph, Report, Section, Table

ROOT = pathlib.Path(__file__).parents[2]
REPORT = Report(
    "run",
    "a <b>",
    "rank 4 on lora.rank",
    (Fact("adapter on disk", "4"),),
    (
        Section(
            "One",
            (
                Paragraph("The effective rank & the energy of the update."),
                Table("σ₁", ("what", "rank"), (("trained in full", "rank"),), ("what",)),
            ),
        ),
    ),
)


OUT = pathlib.Path("report")


def explained(report: Report) -> dict[str, str | None]:
    return {term.names[0]: term.link for term in report.terms}


def test_each_word_is_explained_in_the_page_and_linked_to_there() -> None:
    made = glossary.with_glossary(REPORT, None, OUT)
    page = render.html(made, {})
    words = {"rank", "adapter", "effective rank", "energy", "ΔW", "singular values"}
    assert words | {"trained in full"} <= set(explained(made))
    assert "seed" not in explained(made) and set(explained(made).values()) == {None}
    links = re.findall(r'<a class="term" href="#([^"]*)">([^<]*)</a>', page)
    assert {at for at, _ in links} <= set(re.findall(r'<li id="([^"]*)"', page))
    assert ("term-effective-rank", "effective rank") in links
    assert ("term-trained-in-full", "trained in full") in links
    assert '<a class="term" href="#term-rank">rank</a> 4 on lora.rank' in page
    assert "</a> &amp; the <a" in page and "a &lt;b&gt;" in page
    assert not [x for x in re.findall(r'href="([^"]*)"', page) if not x.startswith(("#", "data:"))]
    assert "- **effective rank**: The number of directions" in render.markdown(made)


def test_a_report_without_such_words_has_no_glossary() -> None:
    empty = Report("run", "a", "nothing", (), (Section("One", (Paragraph("None."),)),))
    assert glossary.with_glossary(empty, None, OUT) == empty


def test_links_to_the_site_are_those_that_are_asked_for(tmp_path: pathlib.Path) -> None:
    made = glossary.with_glossary(REPORT, "https://example.org/docs/", OUT)
    assert explained(made)["rank"] == "https://example.org/docs/glossary.html#term-rank"
    assert '<a href="https://example.org/docs/glossary.html#term-rank">More on rank</a>' in (
        render.html(made, {})
    )
    assert "[More on rank](https://example.org/docs/glossary.html#term-rank)" in (
        render.markdown(made)
    )
    with pytest.raises(LoraError, match=r"has no glossary\.html"):
        glossary.with_glossary(REPORT, str(tmp_path), tmp_path / "runs" / "report")
    (tmp_path / "glossary.html").touch()
    of_folder = glossary.with_glossary(REPORT, str(tmp_path), tmp_path / "runs" / "report")
    assert explained(of_folder)["rank"] == "../../glossary.html#term-rank"  # no path of a machine
    for wrong in ("javascript:alert(1)", "docs/none", "https://"):
        with pytest.raises(LoraError, match=r"expected the address"):
            glossary.with_glossary(REPORT, wrong, OUT)


def test_words_have_anchors_of_their_own() -> None:
    """Each word has its own anchor; the site's glossary has the same list (docs/conf.py)."""
    assert len({term.anchor for term in glossary.known()}) == len(glossary.known())


def test_explanations_are_one_block() -> None:
    made = glossary.with_glossary(REPORT, None, OUT)
    assert [type(b) for b in made.sections[-1].blocks] == [Glossary]
