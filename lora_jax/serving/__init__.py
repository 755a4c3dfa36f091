"""Use adapters: from Python (`open`), and the code behind the commands `predict` and `generate`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_jax.system.extras import require

require("train", __name__)

if TYPE_CHECKING:
    from lora_jax.serving.server import Server


def open(
    run_or_base: str | pathlib.Path,
    adapters: Mapping[str, str | pathlib.Path] | None = None,
    *,
    slots: int = 8,
    batch_size: int = 8,
    max_tokens: int = 512,
    allow_other_base: bool = False,
) -> Server:
    """Open a base with adapters, to predict or to generate.

    Args:
      run_or_base: a run directory, whose base is opened, and whose adapter has the run's name; a
        folder of runs; or a base, in the form of model.reference in a config.
      adapters: more adapters of the base by their names. Each is a run directory or a folder that
        `lora_jax.save` wrote.
      slots: the largest number of adapters at a time, the ones to `add` included. Adapters that are
        added must fit into the shapes of the first ones: the largest rank of each target, and the
        widest head.
      batch_size: texts that are written, or classified, at the same time.
      max_tokens: the largest number of tokens of a prompt and its text together. Each text of a
        batch takes the memory of so many.
      allow_other_base: whether adapters may be for another base than the one that they were trained
        on.

    Returns:
      The server.

    Raises:
      LoraError: an adapter cannot be read, or is for another base, or the adapters cannot be mixed.

    >>> server = open("runs/reviews", {"topics": "runs/topics"})  # doctest: +SKIP
    >>> server.predict(["A warm film."], adapter="reviews")  # doctest: +SKIP
    """
    # Imported here, because the commands that serve nothing import this package too.
    from lora_jax.checkpoint import adapter_path
    from lora_jax.serving.served_adapters import BaseChoice
    from lora_jax.serving.server import Server

    first, is_run = str(run_or_base), adapter_path.is_there(str(run_or_base))
    given = [f"{name}={path}" for name, path in (adapters or {}).items()]
    base = BaseChoice(base=None if is_run else first, allow_other_base=allow_other_base)
    return Server(
        base.open([first, *given] if is_run else given),
        slots=slots,
        batch_size=batch_size,
        max_tokens=max_tokens,
        allow_other_base=allow_other_base,
    )
