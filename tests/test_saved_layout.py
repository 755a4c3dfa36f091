"""The layout as text: the table that is printed, and the formats that are read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lora_jax import Layout, LoraError, Target
from lora_jax.layout import Remark

LAYOUT = Layout(
    (
        Target("body/qkv", (64, 192), (), (0,), (1,), 4, 8.0, parts=((0, 64), (128, 64))),
        Target("body/up", (3, 64, 256), (0,), (1,), (2,), 4, 8.0, kind="dora"),
        Target("body/down", (256, 64), (), (0,), (1,), 4, 8.0, True, scaling="alpha/sqrt(r)"),
        Target("head/bias", (10,), (), (), (0,), 4, 8.0, kind="bias"),
    ),
    (Remark("head/kernel", (64, 10), "the output head"),),
)


def test_it_prints_kinds_and_what_is_left_out() -> None:
    assert str(LAYOUT) == (
        "path       shape     stack  in  out  kind                rank  scale  parameters\n"
        "body/qkv   64x192    -      0   1    lora[0:64,128:192]     4      2       1,024\n"
        "body/up    3x64x256  0      1   2    dora                   4      2       4,608\n"
        "body/down  256x64    -      0   1    lora folded            4      4       1,280\n"
        "head/bias  10        -      -   0    bias                   -      1          10\n"
        "total                                                                      6,922\n"
        "left out:\n"
        "  head/kernel  64x10  the output head"
    )
    plain = Layout((dataclasses.replace(LAYOUT["body/down"], fold=False),))
    assert str(plain).splitlines()[0].split() == (
        ["path", "shape", "stack", "in", "out", "rank", "scale", "parameters"]
    )


def test_it_is_read_back_with_what_is_left_out() -> None:
    found = Layout.from_json(LAYOUT.to_json())
    assert found == LAYOUT and hash(found) == hash(LAYOUT)
    assert found.left_out == LAYOUT.left_out
    assert Layout(LAYOUT.targets) == LAYOUT  # left-out parameters do not make layouts differ


def test_what_is_dequantised_is_printed_and_saved() -> None:
    embedding = Remark("embed", (1000, 64), "`gather` at model.py:31 (f) takes it")
    layout = Layout(LAYOUT.targets, LAYOUT.left_out, (embedding,))
    below = "dequantised:\n  embed  1000x64  `gather` at model.py:31 (f) takes it"
    assert str(layout) == f"{LAYOUT}\n{below}"
    found = Layout.from_json(layout.to_json())
    assert found == LAYOUT and found.dequantised == (embedding,)


def edited(change: Any) -> str:
    data = json.loads(LAYOUT.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(format=3),
            r"has format 3, which this lora_jax .* reads format 1",
        ),
        (lambda d: d.update(format=3, mesh=[]), r"format 3 and the field 'mesh'"),
        (lambda d: d["targets"][1].update(gate=1), r"format 1 and the field 'gate'"),
        (lambda d: d["left_out"][0].update(cure=""), r"and the field 'cure'"),
        (lambda d: d["targets"][1].update(kind="spin"), r"'body/up' has the kind of update 'spin'"),
        (lambda d: d["targets"][1].pop("kind"), "it has no 'kind'"),
        (lambda d: d.pop("targets"), "this is not a layout"),
        (lambda d: d["targets"].append(3), "this is not a target of a layout: 3"),
        (lambda d: d.update(format="1"), "has format '1'"),
    ],
)
def test_what_is_not_understood_is_named(change: Any, message: str) -> None:
    with pytest.raises(LoraError, match=message):
        Layout.from_json(edited(change))
