"""A jitted function that reports how long each of its compilations took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


class Compiled:
    """A jitted function that times its first call for each batch shape, which compiles."""

    def __init__(
        self, function: Callable[..., Any], report: Callable[[float], None], **options: Any
    ) -> None:
        """Jit `function` with `options`; `report` gets the seconds of each compilation."""
        self._call, self._report, self._seen = jax.jit(function, **options), report, set[Any]()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function; its last argument is the batch."""
        shapes = tuple((name, value.shape) for name, value in sorted(arguments[-1].items()))
        if shapes in self._seen:
            return self._call(*arguments)
        self._seen.add(shapes)
        start = time.monotonic()
        out = self._call(*arguments)
        self._report(time.monotonic() - start)
        return out
