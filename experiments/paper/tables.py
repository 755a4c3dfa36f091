"""A table of the report as text for a terminal."""

from __future__ import annotations

from lora_jax.report.document import Table


def plain(table: Table) -> str:
    """Columns side by side under the caption, as wide as what is in them.

    >>> print(plain(Table("Sizes.", ("name", "n"), (("a", "1"), ("bc", "1,000")), ("name",))))
    Sizes.
    <BLANKLINE>
    name      n
    a         1
    bc    1,000
    """
    lines = (table.columns, *table.rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    left = [name in table.texts for name in table.columns]

    def row(cells: tuple[str, ...]) -> str:
        places = zip(cells, widths, left, strict=True)
        return "  ".join(c.ljust(w) if first else c.rjust(w) for c, w, first in places).rstrip()

    return "\n".join([table.caption, "", *map(row, lines)])
