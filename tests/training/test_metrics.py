"""The record of a run: its lines on disk, its events, and a full disk."""

from __future__ import annotations

import gc
import pathlib
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lora_jax.errors import LoraError
from lora_jax.training import metrics


def test_what_is_synced_is_in_the_file(tmp_path: pathlib.Path) -> None:
    record = metrics.Record(tmp_path)
    record.write({"step": 1, "loss": 0.5})
    length = record.sync()
    assert length == (tmp_path / "metrics.jsonl").stat().st_size > 0
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 0.5}]
    record.close()


def test_the_events_hold_what_the_record_does(tmp_path: pathlib.Path) -> None:
    record = metrics.Record(tmp_path, step=4)
    record.write({"step": 5, "loss": 0.5, "gradient_norm": None})
    record.write({"step": 5, "split": "test", "accuracy": 0.25})
    record.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    found = [
        (event.step, value.tag, value.simple_value)
        for event in events(file)
        for value in event.summary.value
    ]
    assert found == [(5, "train/loss", 0.5), (5, "test/accuracy", 0.25)]
    assert [e.step for e in events(file) if e.session_log.status == SessionLog.START] == [5]


def events(file: pathlib.Path) -> list[Event]:
    """Return the events of a file; a record is its length, a checksum, bytes, a checksum."""
    raw, found = file.read_bytes(), []
    while raw:
        (size,) = struct.unpack("<Q", raw[:8])
        found.append(Event.FromString(raw[12 : 12 + size]))
        raw = raw[16 + size :]
    return found


@pytest.mark.parametrize("which", ["_file", "events"])
def test_a_full_disk_is_one_error_that_names_the_folder(
    which: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A full disk is one error that names the folder, and stderr stays empty."""
    record = metrics.Record(tmp_path)
    full = open("/dev/full", "wb")  # noqa: SIM115  closed by the record
    if which == "_file":
        record._file.close()
        record._file = full
    else:
        record._loggers[0]._writer._writer.close()
        record._loggers[0]._writer._writer = full
    line = {"step": 1, **{f"loss{i}": 1.0 for i in range(1000)}}
    with pytest.raises(LoraError, match=rf"{tmp_path.name}: .* No space left .* Make room"):
        record.write(line)
    with pytest.raises(LoraError, match="cannot be written"):
        record.close()
    assert full.closed
    del record, full
    gc.collect()
    assert capfd.readouterr().err == ""
