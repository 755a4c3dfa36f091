"""Reading and writing of JSONL."""

from __future__ import annotations

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from lora_jax.errors import LoraError
from lora_jax.serving import jsonl


def file(folder: pathlib.Path, content: bytes) -> str:
    path = folder / "in.jsonl"
    path.write_bytes(content)
    return str(path)


def test_objects_come_with_their_places(tmp_path: pathlib.Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\n\n  \n{"b": "\xc3\xa9"}'
    path = file(tmp_path, content)
    found = list(jsonl.read(path))
    assert [line.value for line in found] == [{"a": 1}, {"b": "é"}]
    assert [line.where for line in found] == [f"{path}, line 1", f"{path}, line 4"]
    assert sum(line.size for line in found) == len(content) - len(b"\n  \n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text", r"line 2 is not JSON: Expecting value.*\n.*one on each line"),
        (b'{"text": "a"', "line 2 is not JSON"),
        (b'["a"]', "line 2 holds a list, expected an object"),
        (b'{"x": NaN}', "line 2: NaN is not a number that JSON has"),
        (b'{"x": "\xff"}', "line 2 is not UTF-8"),
        (b'{"x": "\\uD800"}', "line 2 holds half a character"),
        (b"[" * 100_000, "line 2 is (nested too deeply|not JSON)"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    content: bytes, said: str, tmp_path: pathlib.Path
) -> None:
    """The lines before the bad one are returned first."""
    reader = jsonl.read(file(tmp_path, b'{"good": "\\ud83d\\ude00"}\n' + content + b"\n"))
    assert next(reader).value == {"good": "\N{GRINNING FACE}"}
    with pytest.raises(jsonl.LineError, match=said):
        next(reader)


def test_a_field_that_is_missing_or_of_another_kind(tmp_path: pathlib.Path) -> None:
    line = next(jsonl.read(file(tmp_path, b'{"text": 5}')))
    assert (line.get("text", int), line.get("n", int, 7)) == (5, 7)
    with pytest.raises(jsonl.LineError, match=r"line 1 has no field 'n'; its fields: 'text'"):
        line.get("n", int)
    with pytest.raises(jsonl.LineError, match=r"line 1: 'text' is 5, expected a str"):
        line.get("text", str)


def test_a_full_disk_is_named() -> None:
    said = "/dev/full cannot be written: No space left"
    with pytest.raises(LoraError, match=said), jsonl.Writer("/dev/full") as writer:
        writer.write([{"a": 1}])


def test_what_is_written_is_read_again(tmp_path: pathlib.Path) -> None:
    values: list[dict[str, Any]] = [{"a": "é\n\u2028", "b": [1.5, None]}, {}, {"c": True}]
    path = tmp_path / "out.jsonl"
    with jsonl.Writer(str(path)) as writer:
        writer.write(values[:2])
        assert path.read_text().count("\n") == 2  # lines are written at once, not at the end
        writer.write(values[2:])
    assert [line.value for line in jsonl.read(str(path))] == values


def test_an_error_before_the_first_line_loses_nothing(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(file(tmp_path, b'{"a": 1}\n'))
    with pytest.raises(RuntimeError), jsonl.Writer(str(path)):
        raise RuntimeError
    assert path.read_bytes() == b'{"a": 1}\n'
    with jsonl.Writer(str(path)) as writer:
        writer.write([{"b": 2}])
        writer.write([{"c": 3}])
    assert path.read_bytes() == b'{"b": 2}\n{"c": 3}\n'
    with jsonl.Writer(str(path)):
        pass
    assert path.read_bytes() == b""


def test_stdin_and_stdout(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"a": 1}\n3\n')))
    reader = jsonl.read("-")
    with jsonl.Writer("-", reading="-") as writer:
        writer.write([next(reader).value])
    assert capsys.readouterr().out == '{"a": 1}\n'
    with pytest.raises(jsonl.LineError, match="stdin, line 2 holds a number"):
        next(reader)


def test_a_file_is_not_read_and_written_at_once(tmp_path: pathlib.Path) -> None:
    path = file(tmp_path, b'{"a": 1}\n')
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(jsonl.LineError, match="read and written at once; give another file"):
        jsonl.Writer(str(tmp_path / "link"), reading=path)
    assert pathlib.Path(path).read_bytes() == b'{"a": 1}\n'


def test_a_killed_writer_leaves_whole_lines(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.jsonl"
    program = (
        "import itertools\nfrom lora_jax.serving import jsonl\n"
        f"with jsonl.Writer({str(out)!r}) as writer:\n"
        "    for i in itertools.count(): writer.write([{'i': i, 'text': 'x' * 200}])\n"
    )
    root = pathlib.Path(jsonl.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    while not (out.exists() and out.stat().st_size > 20_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = out.read_text()
    assert text.endswith("\n")
    assert [json.loads(row)["i"] for row in text.splitlines()] == list(range(text.count("\n")))


def test_order_waits_for_the_first_alone() -> None:
    given = iter([(2, "c"), (0, "a"), (1, "b"), (3, "d")])
    ordered = jsonl.in_order(given)
    assert next(ordered) == "a"
    assert next(given) == (1, "b")  # no more was taken than needed
