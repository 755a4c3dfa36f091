"""Time and memory of a large file of conversations, and what packing is worth.

    python -m experiments.conversations --out words
    python -m benchmarks.chat_lines words/conversations.jsonl [--lines 1000000]

Writes the conversations over and over, with a number in each, into a file of the temporary folder,
and opens it as a run does. The first table has the seconds to
open it and to the first batch, the tokens read a second, the seconds to continue at a batch, and
the most memory of the process. The second compares packed rows with one conversation in a row, of
128 tokens and 8 rows a batch: the batches of an epoch.
"""

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import commands, common
from lora_jax import models
from lora_jax.data import DataConfig, language_modelling
from lora_jax.training.causal_lm import words_of

BATCHES = 50


def lines(given: Path, count: int) -> Iterator[str]:
    """Yield `count` lines with the conversations of a file."""
    some = [json.loads(line) for line in given.read_text().splitlines()]
    for number in range(count):
        first, *rest = some[number % len(some)]["messages"]
        first = {**first, "content": f"{first['content']} ({number})"}
        yield json.dumps({"messages": [first, *rest]}) + "\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lines", type=int, default=1_000_000)
    asked = parser.parse_args()
    count = asked.lines
    words = words_of(models.open(models.SMOLLM2))()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        with path.open("w") as file:
            file.writelines(lines(asked.file, count))
        config, began = DataConfig(str(path), max_length=512), time.monotonic()
        batches = language_modelling(
            config, words, "train", 8, shuffle=True, epochs=None, set_apart=True
        )
        rows = [("bytes", f"{path.stat().st_size:,}"), ("opened", _since(began))]
        iterator, began = batches.iterator(), time.monotonic()
        next(iterator)
        rows.append(("first batch", _since(began)))
        began = time.monotonic()
        read = sum(int((next(iterator)["segment_ids"] > 0).sum()) for _ in range(BATCHES))
        rows.append(("tokens a second", f"{read / (time.monotonic() - began):,.0f}"))
        state, expected = iterator.get_state(), next(iterator)
        began, other = time.monotonic(), batches.iterator()
        other.set_state(state)
        found = next(other)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        rows.append((f"continued at batch {BATCHES + 1}", _since(began)))
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(("most memory", f"{most / 1e6:,.0f} MB"))
        packed = dataclasses.replace(config, max_length=128, train_limit=4_000)
        epochs = [
            language_modelling(dataclasses.replace(packed, pack=pack), words, "train", 8).facts()
            for pack in (True, False)
        ]
    print(f"{common.hardware()}; {commands.load()}\n")
    print(common.table(["", f"{count:,} lines"], rows))
    print(f"batches of an epoch of 4,000: {epochs[0].batches} packed, {epochs[1].batches} not")


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"


if __name__ == "__main__":
    main()
