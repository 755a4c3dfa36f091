"""Whole runs of methods on tiny random models: the parameters that change and are saved."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import lora_jax
from experiments.methods.config import MethodConfig, MethodTextConfig
from experiments.paper import counts
from lora_jax import paths
from lora_jax.checkpoint import adapter
from lora_jax.checkpoint.storage import orbax
from lora_jax.cli import predict
from lora_jax.data.config import DataConfig
from lora_jax.serving import served_adapters, text_classifier
from lora_jax.training import export, mesh, optimizer, step
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.classification import classification
from lora_jax.training.config import LoraConfig, MeshConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig
from lora_jax.training.workload import Workload
from tests.training import runs

# Orbax warns that it takes the sharding from the file; one CPU array has no other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

D, M, L, R, CLASSES = 16, 32, 2, 4, 3
HEAD = CLASSES * D + CLASSES


class Case(NamedTuple):
    """A method and the parameters that it trains.

    settings: the settings of the method.
    own: whether the method trains a path.
    count: the number of parameters that it trains, without a head; None for all.
    """

    settings: dict[str, int]
    own: Callable[[str], bool]
    count: int | None


def extra(path: str) -> bool:
    return path.startswith("extra/")


# The parameters that some methods train, written without patterns.
CASES = {
    "full": Case({}, lambda path: True, None),
    "bitfit": Case({}, lambda path: path.endswith("bias"), counts.biases(D, M, L)),
    "houlsby": Case(
        {"size": R},
        lambda path: extra(path) or "norm/" in path,
        counts.adapter(D, R, 2 * L, norms=2 * L + 1),
    ),
    "lin": Case({"size": R}, extra, counts.adapter(D, R, L, norms=L)),
    "prefix_layer": Case({"prefix": 3, "infix": 2}, extra, counts.prefix_layer(D, 5, L)),
}


def config_of(folder: pathlib.Path, method: MethodConfig, **changes: Any) -> MethodTextConfig:
    data = DataConfig(
        source=str(folder / "data/{split}.jsonl"),
        prompt="{text}",
        answer=" word1 word2 word3",
        eos="</s>",
        max_length=12,
        buckets=(),
        batch_size=16,
        eval_batch_size=40,
    )
    config = MethodTextConfig(
        workload=classification,
        model=ModelConfig(reference=str(folder / "roberta")),
        data=data,
        # Only LoRA uses these settings.
        lora=LoraConfig(rank=2, targets=("**/attention/{query,value}/kernel",)),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0),
        method=method,
        steps=4,
        evaluate_every=4,
    )
    return dataclasses.replace(config, **changes)


class Stepped(NamedTuple):
    """The result of three steps of a run; `start` has every parameter before them, by its path."""

    workload: Workload
    layout: lora_jax.Layout
    start: dict[str, np.ndarray]
    frozen: dict[str, Any]
    trained: Any


def stepped(config: TextConfig, devices: int = 1) -> Stepped:
    """Take three steps as train.py does, without its record."""
    grid = mesh.make(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(grid):
        workload, lora = config.workload(config), config.adaptation
        data = workload.train(mesh.shard_of(grid))
        rows = [next(data) for _ in range(3)]
        place = mesh.place(workload, config.mesh, grid, rows[0])
        params, key = workload.arrays(place.params), jax.random.key(0)
        layout = lora_jax.resolve(lora.spec, workload.apply, params, rows[0], train=True, key=key)
        assert lora.trainable is None
        base, frozen = lora_jax.frozen.split(params, workload.trainable)
        start = {path: np.array(x) for path, x in paths.flatten(params).items()}
        tx = optimizer.adamw(optimizer.hyper(config.optimizer, 3))
        state = step.create(layout, base, tx, key, place, lora.init)
        take = jax.jit(
            step.train_step(workload, layout, tx, "stop"), **step.compilation(state, place)
        )
        for batch in rows:
            state, metrics = take(state, frozen, place.batch(batch))
            assert metrics["finite"]
    return Stepped(workload, layout, start, paths.flatten(frozen), state.trained)


def check_moved(found: Stepped) -> None:
    """Assert that the base is bit-identical, and that all trained parameters have moved."""
    for path, x in found.frozen.items():
        np.testing.assert_array_equal(x, found.start[path])
    base = found.trained["base"]
    assert set(found.frozen) | set(base) == set(found.start)
    # A constant added to all keys of a row changes no attention, so a key's bias has no gradient.
    still = [p for p, x in base.items() if np.array_equal(x, found.start[p])]
    assert all(path.endswith("key/bias") for path in still)


def method_of(name: str) -> MethodConfig:
    return MethodConfig(name, **CASES[name].settings)


@pytest.fixture(scope="module")
def steps(folder: pathlib.Path) -> Callable[[str], Stepped]:
    """Return the result of `stepped` for a method, computed once."""

    @functools.cache
    def by(name: str) -> Stepped:
        config = config_of(folder, method_of(name))
        if name == "prefix_layer":  # also on a mesh that divides the weights
            return stepped(dataclasses.replace(config, mesh=MeshConfig(fsdp=2)), devices=2)
        return stepped(config)

    return by


@pytest.mark.parametrize("name", CASES)
def test_only_its_own_parameters_change(
    name: str, steps: Callable[[str], Stepped], tmp_path: pathlib.Path
) -> None:
    found = steps(name)
    check_moved(found)
    own = [x for path, x in found.trained["base"].items() if extra(path)]
    assert all(x.sharding.is_fully_replicated for x in own)
    expected = {p for p in found.start if p.startswith("classifier/") or CASES[name].own(p)}
    assert set(found.trained["base"]) == expected
    assert found.layout.targets == () and found.trained["adapters"] == {}
    count = CASES[name].count
    whole = lora_jax.count(found.trained["base"])
    assert whole == (sum(x.size for x in found.start.values()) if count is None else count + HEAD)
    about = found.workload.about
    export.save(tmp_path, "last", found.layout, found.trained, about=about)
    kept = lora_jax.restore(tmp_path / "adapters/last").trainable
    assert set(kept) == expected
    assert lora_jax.restore(tmp_path / "adapters/last")[1] == {}
    said = adapter.restore_about(tmp_path / "adapters/last")["method"]
    assert said == {"name": name, **CASES[name].settings}


def test_all_methods_begin_with_the_head_of_lora(folder: pathlib.Path) -> None:

    def head(method: MethodConfig) -> Any:
        common = classification(config_of(folder, method)).common
        assert common is not None
        return {p: x for p, x in common.fresh().items() if not extra(p)}

    lora = head(MethodConfig())
    for name in ("bitfit", "lin", "prefix_layer"):
        jax.tree.map(np.testing.assert_array_equal, head(method_of(name)), lora)


def test_a_decoder(folder: pathlib.Path) -> None:
    """A method trains a decoder too."""
    model = ModelConfig(reference=str(folder / "llama"))
    found = stepped(config_of(folder, method_of("houlsby"), workload=causal_lm, model=model))
    check_moved(found)
    count = counts.adapter(D, R, 2 * L, norms=2 * L + 1, per_norm=1)  # RMS norms have no bias
    assert lora_jax.count(found.trained["base"]) == count


def train_in(path: pathlib.Path, config: TextConfig) -> dict[str, Any]:
    return runs.train_in(path, config, jax.devices()[:1])


def test_a_whole_run(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run learns, its checkpoint holds the trained parameters and their Adam moments, and `lora-
    jax predict` refuses the export.
    """
    path = folder / "houlsby"
    config = config_of(folder, method_of("houlsby"), steps=12, evaluate_every=12)
    summary = train_in(path, config)
    count = CASES["houlsby"].count
    assert count is not None
    assert (summary["adapter_parameters"], summary["trainable_parameters"]) == (0, count + HEAD)
    before, after = summary["before"]["validation"], summary["after"]["validation"]
    assert after["loss"] < before["loss"]
    (newest,) = (path / "checkpoints").iterdir()
    state = paths.flatten(orbax().checkpointables_metadata(newest).metadata["state"])
    ends = [p.partition("base/")[2] for p in state if "base/" in p]
    kept = lora_jax.restore(path / "adapters/best").trainable
    assert sorted(ends) == sorted([*kept] * 3)
    others = [x.shape for p, x in state.items() if "base/" not in p]
    assert all(len(shape) == 0 or shape == (2,) for shape in others)  # counters, and the key

    assert predict.main(["--adapter", str(path), "--text", "word1 word2"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "trained by the method {'name': 'houlsby', 'size': 4}" in error
    assert "extra/bert/encoder/layer_0/attention/down/bias" in error


def test_exports_of_base_parameters_are_served(
    steps: Callable[[str], Stepped], tmp_path: pathlib.Path
) -> None:
    found = steps("bitfit")
    frozen = lora_jax.fingerprint(found.frozen)
    about = found.workload.about
    export.save(tmp_path, "best", found.layout, found.trained, frozen, about)
    served = served_adapters.BaseChoice().open([str(tmp_path)], "predict")
    texts = ["word1 word2 word3", "word4"]
    made = text_classifier.TextClassifier(served, batch_size=2)
    scores = dict(made.read(made.submit([0, 0], texts)))
    ids, mask = np.full((2, 12), 1, np.int32), np.zeros((2, 12), bool)
    for row, text in enumerate(texts):
        tokens = served.source.tokenizer().encode(text).ids
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    params: dict[str, Any] = {}
    for path, x in {**found.frozen, **found.trained["base"]}.items():
        *folders, name = path.split("/")
        branch = params
        for part in folders:
            branch = branch.setdefault(part, {})
        branch[name] = x
    apply = jax.jit(functools.partial(found.workload.apply, train=False, key=None))
    want = apply(params, {"input_ids": ids, "mask": mask})
    for row in range(2):
        np.testing.assert_allclose(scores[row], want[row], atol=1e-4)
