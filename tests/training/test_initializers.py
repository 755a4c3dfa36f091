"""The first values of the adapters of a run."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np

import lora_jax
from tests.training.runs import SMALL, run


def test_a_run_begins_as_its_config_says(tmp_path: pathlib.Path) -> None:
    """The adapters of a run begin with the values that the config's method draws.

    With a learning rate near zero, `a` at the end equals `a` at the beginning.
    """
    still = ("--optimizer.learning-rate", "1e-30", "--steps", "1", "--lora.init")
    found = {}
    for name in ("uniform", "orthogonal"):
        run(tmp_path / name, *SMALL, *still, name)
        folder = tmp_path / name / "adapters/last"
        layout, adapters, _ = lora_jax.restore(folder)
        target = layout.targets[0]
        key = jax.random.key(0)
        wanted = lora_jax.init(key, layout, method=name)
        np.testing.assert_allclose(adapters[target.path].a, wanted[target.path].a, atol=1e-6)
        found[name] = np.asarray(adapters[target.path].a)
        assert json.loads((tmp_path / name / "config.json").read_text())["lora"]["init"] == name
    assert not np.allclose(found["orthogonal"], found["uniform"])
