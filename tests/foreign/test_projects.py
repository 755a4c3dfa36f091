"""docs/projects: each section is a project, whose model and adapters keep the laws.

A section defines `f`, `params`, `args`, `layout` and `names`, and `plain` if PEFT takes a part of
the layout alone. Its blocks run with the output that the page shows, on the real package or on a
small copy of its structure in `copies`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax.exchange import peft
from tests import laws
from tests.docs import pages
from tests.docs.test_pages import imported
from tests.test_transform import assert_close

pytestmark = pytest.mark.filterwarnings("default")  # other people's warnings

PAGES = [name for name in pages.names() if name.startswith("projects/")]
CASES = [(name, title) for name in PAGES for title in pages.sections(name) if title]
IDS = [f"{name.removeprefix('projects/')}: {title}" for name, title in CASES]
each = pytest.mark.parametrize(("name", "title"), CASES, ids=IDS)
OTHERS = {"haiku", "diffrax", "equinox", "e3nn_jax"}

# In bfloat16 one rounding changes another, so the law of these is tested on the float32 model.
IN_FLOAT32: dict[str, Callable[[], Any]] = {
    "AlphaGenome": lambda: copy("alphagenome").transformed("float32").apply,
}


def copy(name: str) -> Any:
    return importlib.import_module(f"tests.foreign.copies.{name}")


@functools.cache
def run(name: str, title: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return pages.run(name, ["", title])


def section(name: str, title: str) -> dict[str, Any]:
    """The names that the section defines; the test is skipped if a package is missing."""
    code = "\n".join(
        b.code for b in pages.blocks(name) if b.language == "python" and b.section in ("", title)
    )
    copies = {f"tests.foreign.copies.{name}" for name in re.findall(r"copies import (\w+)", code)}
    for package in (imported(code) & OTHERS) | copies:  # a copy may import its package
        pytest.importorskip(package, exc_type=ImportError)
    return run(name, title)


@pytest.mark.few(2)
@each
def test_adapt_equals_merge(name: str, title: str) -> None:
    page = section(name, title)
    f = IN_FLOAT32.get(title, lambda: page["f"])()
    laws.assert_adapt_equals_merge(page["layout"], f, page["params"], *page["args"], tolerance=1e-4)


@pytest.mark.few(2)
@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_step_0_is_the_base_bit_for_bit(name: str, title: str, dtype: str) -> None:
    page = section(name, title)
    half = lambda x: x.astype(dtype) if laws.is_float(x) else x  # noqa: E731
    params, args = jax.tree.map(half, (page["params"], page["args"]))
    adapters = lora_jax.init(jax.random.key(0), page["layout"])
    got = jax.jit(lora_jax.adapt(page["layout"], page["f"]))(params, adapters, *args)
    want = jax.jit(page["f"])(params, *args)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.few(2)
@each
def test_a_saved_adapter_is_restored(name: str, title: str, tmp_path: pathlib.Path) -> None:
    page = section(name, title)
    adapters = laws.drawn_adapters(page["layout"])
    identity = lora_jax.fingerprint(page["params"])
    lora_jax.save(tmp_path / "saved", (page["layout"], adapters), fingerprint=identity)
    again = lora_jax.restore(tmp_path / "saved", params=page["params"])
    assert again.layout == page["layout"]
    jax.tree.map(np.testing.assert_array_equal, again.parameters, adapters)


@pytest.mark.few(2)
@each
def test_an_adapter_goes_to_peft_and_back(name: str, title: str, tmp_path: pathlib.Path) -> None:
    page = section(name, title)
    layout, call = page.get("plain", page["layout"]), (page["f"], page["params"], *page["args"])
    adapters = laws.drawn_adapters(layout)
    peft.save(tmp_path, page["names"], (layout, adapters), base="org/name")
    again = peft.load(tmp_path, page["names"], *call)
    got = lora_jax.merge(again.layout, page["params"], again.parameters)
    want = lora_jax.merge(layout, page["params"], adapters)
    assert_close(got, want, 2e-6)
    changes = jax.tree.map(lambda w, before: jnp.sum((w - before) ** 2), want, page["params"])
    assert_close(energy(tmp_path), sum(jax.tree.leaves(changes)), 1e-4)


def energy(folder: pathlib.Path) -> np.ndarray:
    """The sum of squares of all updates in a PEFT folder, by PEFT's formula."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    total = 0.0
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        patterns, module = settings["alpha_pattern"].items(), key.removesuffix(".lora_A.weight")
        own = (x for name, x in patterns if re.fullmatch(rf"(.*\.)?({name})", module))
        scale = next(own, settings["lora_alpha"]) / len(a)
        total += np.sum((scale * b.reshape(-1, len(a)) @ a.reshape(len(a), -1)) ** 2)
    return np.float32(total)
