"""Warn of a public name without a page. With `-W` the build fails."""

from __future__ import annotations

import importlib
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

from docs import public

LOG = logging.getLogger(__name__)


def check(app: Sphinx, env: Any) -> None:
    """Compare the objects that the pages describe with the names that the package exports.

    A value that is exported twice (`lora_jax.dropout` is `lora_jax.multi.dropout`) needs one page.
    """
    described = set(env.domaindata["py"]["objects"])
    values = [value for name in described if (value := _value(name)) is not None]
    for name, value in public.names().items():
        if name not in described and not any(value is other for other in values):
            LOG.warning("%s is public and has no page: add it to a table in docs/api", name)


def _value(name: str) -> object | None:
    """Return what a dotted name stands for, or None for a member of a class."""
    module, _, last = name.rpartition(".")
    try:
        return vars(importlib.import_module(module)).get(last)
    except ImportError:
        return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the check."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
