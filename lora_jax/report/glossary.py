"""The words of a report that not every reader knows, and what they mean."""

from __future__ import annotations

import dataclasses
import pathlib
import re
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
        "The numbers that LoRA trains in place of a weight W: two small matrices A and B for each "
        "adapted matrix. The model computes with W + ΔW, and W itself does not change.",
        ("adapters",),
    ),
    "ΔW": (
        "The update, which is what training adds to a weight W: (alpha/r) B A for LoRA, where r is "
        "the rank.",
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
        "Parameters of the model that are trained themselves and have no adapter, such as a new "
        "classification head.",
        (),
    ),
    "full checkpoint": (
        "All parameters of the model: what would have to be kept without adapters.",
        (),
    ),
    "best adapter": (
        "The adapter after the step at which the number that was chosen for it was best on the "
        "validation split. The test split has no say in it.",
        (),
    ),
    "merged - unmerged": (
        "The largest difference between the outputs of the model with W + ΔW in the place of W, "
        "and those with the adapter. Rounding makes it, so it should be small.",
        (),
    ),
    "singular values": (
        "The lengths by which a matrix stretches the directions that it keeps at right angles. An "
        "update of rank r has r of them.",
        ("singular value", "σ₁"),
    ),
    "effective rank": (
        "How many directions an update uses: e to the entropy of its singular values' shares of "
        "their sum. It is r where all r are equal, and 1 where one is all.",
        (),
    ),
    "Frobenius norm": (
        "The square root of the sum of the squares of all numbers of a matrix, written ‖ΔW‖.",
        ("Frobenius norms", "‖ΔW‖", "‖W‖"),
    ),
    "energy": ("The share that a matrix has in the sum of all ‖ΔW‖².", ()),
    "amplification factor": (
        "‖ΔW‖ over the norm of what W does in the directions of the update. It is large where the "
        "update makes strong what W does only weakly (Table 7 of the LoRA paper).",
        ("factor",),
    ),
    "φ(i, j)": (
        "The part of the i most important directions of one adapter that lies in the j most "
        "important of another: 0 where they are orthogonal, 1 where the smaller space is a part of "
        "the larger (figures 3 and 4 of the LoRA paper).",
        ("φ(1, 1)",),
    ),
    "seed": (
        "The number that random choices begin from: the first values of adapters and of a new "
        "head, dropout, and the order of the data.",
        (),
    ),
}


def with_glossary(report: Report, docs: str | None) -> Report:
    """Add a section that explains the words of a report.

    Args:
      report: of which each such word will be a link to its explanation.
      docs: the address of the documentation site, a folder or a URL, to whose glossary the
        explanations link. None: they link nowhere, since a link that may be dead is worse.

    Raises:
      LoraError: `docs` is a folder without a glossary, or neither a folder nor a URL.
    """
    address = None if docs is None else _address(docs)
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
    """Return where a term is on its page.

    >>> anchor("effective rank"), anchor("merged - unmerged"), anchor("ΔW"), anchor("φ(i, j)")
    ('term-effective-rank', 'term-merged-unmerged', 'term-delta-w', 'term-phi-i-j')
    """
    latin = name.lower().replace("δ", "delta-").replace("φ", "phi-")
    return f"term-{'-'.join(re.findall('[a-z0-9]+', latin))}"


def _address(docs: str) -> str:
    folder = pathlib.Path(docs).expanduser()
    if folder.is_dir():
        if not (folder / PAGE).is_file():
            raise LoraError(
                f"--docs {docs}: the folder has no {PAGE}; give the folder that "
                "`python -m sphinx -b html docs FOLDER` has written"
            )
        return folder.resolve().as_uri()
    if not re.match(r"https?://[^/\s]+", docs):
        raise LoraError(
            f"--docs {docs}: expected the address of the documentation, https://..., or a folder "
            "that holds it"
        )
    return docs.rstrip("/")


def _texts(report: Report) -> Iterator[str]:
    """All that may have a link in it."""
    yield report.lead
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
