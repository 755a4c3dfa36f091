"""`print(layout)` of a large model has few lines, none of them long, and omits nothing."""

from __future__ import annotations

from lora_jax import Layout, Target, paths
from lora_jax.layout import Remark
from lora_jax.system import path_groups
from lora_jax.system.table import WIDTH

LAYERS = 40
NAMES = {"attention/query": (512, 512), "attention/value": (512, 512), "mlp/up": (512, 2048)}
WORDS = "model/a_long_name_of_a_tower/encoder/layers"


def large(deep: str = WORDS, kind: str = "lora", parts: tuple[tuple[int, int], ...] = ()) -> Layout:
    where = [(f"{deep}/{i}/{name}/kernel", x) for i in range(LAYERS) for name, x in NAMES.items()]
    targets = [
        Target(path, x, (), (0,), (1,), 8 if "/7/" in path else 4, 8.0, kind=kind, parts=parts)
        for path, x in where
    ]
    left = [
        Remark(
            f"{deep}/{i}/gate/kernel", (512, 4), f"`mul` takes it; Rule('{deep}/{i}/gate/kernel')"
        )
        for i in range(LAYERS)
    ]
    return Layout(tuple(targets), tuple(left))


def test_a_large_layout_is_a_few_short_lines() -> None:
    layout = large()
    text = str(layout)
    lines = text.splitlines()
    assert len(lines) < 20 and max(map(len, lines)) <= WIDTH
    together = "".join(line.strip() for line in lines)
    assert "layers/{0..6,8..39}/" in text and "layers/7/" in text
    assert "40 of 512x4" in together
    assert f"Rule('{WORDS}/{{0..39}}/gate/kernel')" in "".join(together.split())
    assert f"{layout.size:,}" in text and str(len(layout.targets)) in text
    of_groups = [line.split()[-1] for line in lines if line.startswith("model/")]
    assert sum(int(x.replace(",", "")) for x in of_groups) == layout.size


def test_long_columns_are_broken_and_lose_nothing() -> None:
    deep = "/".join(f"tower_{name}" for name in "abcdefghijklmn")
    parts = tuple((64 * i, 32) for i in range(8))
    text = str(large(deep, parts=parts))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(f"tower_{name}/" in text for name in "abcdefghijklmn")
    assert all(f"{start}:{start + 32}" in text for start, _ in parts)


def test_a_group_is_the_pattern_of_its_paths_and_of_no_other() -> None:
    alike = {f"a/{i}/{name}/w": (i < 2 or name == "v") for i in range(4) for name in "qvk"}
    alike |= {"a/0/q": True, "b": True, "a/1/q": True, "b/{x}": True, "b/{y}": True}
    found = path_groups.group(alike)
    assert sorted(path for group in found.values() for path in group) == sorted(alike)
    for pattern, group in found.items():
        assert len({alike[path] for path in group}) == 1
        if "{x}" not in pattern and "{y}" not in pattern:
            assert set(paths.matching(pattern, alike)) == set(group), pattern
    assert "b/{x}" in found and "b/{y}" in found
    assert len(found) == 7
