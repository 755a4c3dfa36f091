"""The record of a run: what is on disk, and when."""

from __future__ import annotations

import pathlib

from lora_jax.training import metrics


def test_what_is_synced_is_in_the_file(tmp_path: pathlib.Path) -> None:
    """A checkpoint counts on that length, whatever kills the process then. Red without `flush`."""
    record = metrics.Record(tmp_path)
    record.write({"step": 1, "loss": 0.5})
    length = record.sync()
    assert length == (tmp_path / "metrics.jsonl").stat().st_size > 0
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 0.5}]
    record.close()
