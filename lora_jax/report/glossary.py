"""Explain the words of a report that not every reader knows."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator

from lora_jax.errors import LoraError
from lora_jax.report.document import (
    Figure,
    Glossary,
    Note,
    Paragraph,
    Report,
    Section,
    Table,
    Term,
)

PAGE = "glossary.html"  # of the documentation site; a term's anchor there is the one in the report

# name -> (meaning, other forms of the name)
_KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "adapter": (
        "The parameters that LoRA trains for a weight W: two small matrices A and B for each "
        "adapted matrix. The model computes with W + ΔW, and W itself does not change.",
        ("adapters",),
    ),
    "ΔW": (
        "The update, which training adds to a weight W: (alpha/r) B A for LoRA, where r is the "
        "rank.",
        ("update",),
    ),
    "rank": (
        "The inner size r of the product B A. An adapter of a matrix with n inputs and m outputs "
        "has r (n + m) numbers, instead of n m.",
        ("ranks", "r"),
    ),
    "alpha": ("The update is scaled by alpha / rank, unless the settings say otherwise.", ()),
    "base": ("The pretrained model, whose weights stay as they are.", ()),
    "trained in full": (
        "Parameters of the model that are trained directly and have no adapter, such as a new "
        "classification head.",
        (),
    ),
    "full checkpoint": (
        "All parameters of the model, which would have to be saved if there were no adapters.",
        (),
    ),
    "best adapter": (
        "The adapter of the step with the best score on the validation split. The test split "
        "plays no part in this choice.",
        (),
    ),
    "merged - unmerged": (
        "The largest difference between the outputs of the model with W + ΔW in place of W and "
        "the outputs with the adapter. It comes from rounding, so it should be small.",
        (),
    ),
    "singular values": (
        "The factors by which a matrix stretches its principal directions, which are orthogonal. "
        "An update of rank r has r of them.",
        ("singular value", "σ₁"),
    ),
    "effective rank": (
        "The number of directions that an update uses: e to the entropy of its singular values, "
        "each divided by their sum. It is r if all are equal, and 1 if all but one are zero.",
        (),
    ),
    "Frobenius norm": (
        "The square root of the sum of the squares of all numbers of a matrix, written ‖ΔW‖.",
        ("Frobenius norms", "‖ΔW‖", "‖W‖"),
    ),
    "energy": (
        "The share of a matrix in the sum of all ‖ΔW‖².",
        (),
    ),
    "amplification factor": (
        "‖ΔW‖ divided by the norm of W in the directions of the update. It is large if the update "
        "strengthens directions that are weak in W (Table 7 of the LoRA paper).",
        ("factor",),
    ),
    "φ(i, j)": (
        "The part of the i most important directions of one adapter that is contained in the j "
        "most important directions of another: 0 if they are orthogonal, 1 if the smaller space "
        "is contained in the larger (figures 3 and 4 of the LoRA paper).",
        ("φ(1, 1)",),
    ),
    "seed": (
        "The number that determines all random choices: the first values of adapters and of a new "
        "head, dropout, and the order of the data.",
        (),
    ),
}


def with_glossary(report: Report, docs: str | None, out: pathlib.Path) -> Report:
    """Add a section that explains the words of a report, and to which they link.

    `docs` is the documentation site, a folder or a URL, to whose glossary the explanations link
    from the folder `out`. None: without these links, because a dead link is worse.
    """
    address = None if docs is None else _address(docs, out)
    texts = list(_texts(report))
    found: list[str] = []
    for _ in range(2):  # an explanation has words in it as well
        found = [name for name in _KNOWN if any(map(_term(name).pattern.search, texts))]
        texts += [_KNOWN[name][0] for name in found]
    terms = tuple(_term(name, address) for name in sorted(found, key=str.lower))
    section = Section("Words", (Glossary(terms),))
    return dataclasses.replace(report, sections=(*report.sections, section)) if terms else report


def known() -> tuple[Term, ...]:
    """Return every term that a report may explain."""
    return tuple(map(_term, _KNOWN))


def _term(name: str, address: str | None = None) -> Term:
    meaning, others = _KNOWN[name]
    link = None if address is None else f"{address}/{PAGE}#{anchor(name)}"
    return Term((name, *others), meaning, anchor(name), link)


def anchor(name: str) -> str:
    """Return the anchor of a term on its page.

    >>> anchor("effective rank"), anchor("merged - unmerged"), anchor("ΔW"), anchor("φ(i, j)")
    ('term-effective-rank', 'term-merged-unmerged', 'term-delta-w', 'term-phi-i-j')
    """
    latin = name.lower().replace("δ", "delta-").replace("φ", "phi-")
    return f"term-{'-'.join(re.findall('[a-z0-9]+', latin))}"


def _address(docs: str, out: pathlib.Path) -> str:
    folder = pathlib.Path(docs).expanduser()
    if folder.is_dir():
        if not (folder / PAGE).is_file():
            raise LoraError(
                f"--docs {docs}: the folder has no {PAGE}; give the folder that "
                "`python -m sphinx -b html docs FOLDER` has written"
            )
        way = os.path.relpath(folder.resolve(), out.resolve())  # works where both are moved
        return urllib.parse.quote(pathlib.Path(way).as_posix())
    if not re.match(r"https?://[^/\s]+", docs):
        raise LoraError(
            f"--docs {docs}: expected the address of the documentation, https://..., or a folder "
            "with its files"
        )
    return docs.rstrip("/")


def _texts(report: Report) -> Iterator[str]:
    """Return every text that may contain a link."""
    yield f"{report.verdict}\n{report.lead}"
    yield from (note.text for note in report.notes)
    yield from (f"{fact.label}\n{fact.note}" for fact in report.facts)
    for section in report.sections:
        for block in section.blocks:
            match block:
                case Paragraph() | Note():
                    yield block.text
                case Figure():
                    yield block.caption
                case Table():
                    yield block.caption
                    yield from block.columns
                    if block.columns[0] in block.texts:
                        yield from (row[0] for row in block.rows)
