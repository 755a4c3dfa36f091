"""`lora-jax show`: the tree has every parameter, with a mark if training would adapt it."""

from __future__ import annotations

import io
import pathlib
import re

import jax
import pytest
from rich.console import Console

import lora_jax
from lora_jax import LoraError, paths
from lora_jax.cli import show
from lora_jax.cli.parameter_tree import Branch, Leaf, tree
from lora_jax.cli.shaped_model import open_shaped
from lora_jax.cli.show import ShowOptions, run
from lora_jax.resolve import trace
from lora_jax.system.safetensors_reader import StoredTensor

MODELS = pathlib.Path(__file__).parent / "golden/golden_models"
ATTENTION = "**/attention/{q,v,query,value}/kernel"


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a tensor is read: for a large model, that takes minutes and all memory."""

    def read(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(StoredTensor, "part", read)


def shown(name: str, width: int = 80, encoding: str = "utf-8", **options: object) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, color_system=None)
    run(ShowOptions(str(MODELS / name), **options), console, Console(file=io.StringIO()))
    file.seek(0)
    return file.read()


def every(branches: tuple[Branch, ...], above: str = "") -> dict[str, Leaf]:
    """Pattern -> the parameter that stands for all parameters that match it."""
    found = {}
    for branch in branches:
        path = f"{above}{branch.name}"
        below = branch.below
        found |= {path: below} if isinstance(below, Leaf) else every(below, f"{path}/")
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "bert", "vit", "llama_nf4"])
def test_the_tree_holds_every_parameter_and_marks_what_is_adapted(name: str) -> None:
    model = open_shaped(str(MODELS / name), False)
    found = trace(model.apply, model.params, model.batch, train=False, key=None)
    layout = found.layout(lora_jax.LoraSpec(1, 1.0, ATTENTION))
    adapted = {t.path for t in layout.targets}
    leaves = show._leaves(model, found, adapted)
    branches = tree(leaves)
    assert sum(len(b.names) * b.size for b in branches) == sum(x.size for x in leaves.values())
    patterns = every(branches)
    assert len(patterns) < len(leaves)
    for path, leaf in leaves.items():
        (one,) = (pattern for pattern in patterns if paths.match(pattern, path))
        assert patterns[one] == leaf
    assert adapted == {path for path, leaf in leaves.items() if leaf.adapted}


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(("name", "scan"), [("modernbert", False), ("qwen3_moe", True)])
def test_lines_fit_the_terminal(name: str, scan: bool, width: int) -> None:
    text = shown(name, width, targets=("all-linear",), scan_layers=scan)
    of_tree = text.splitlines()[1:]  # the first line is the model's path, unchanged
    assert max(map(len, of_tree)) <= width
    assert "●" in text and "is above min(in, out)" in " ".join(text.split())


def test_the_roles_of_the_axes_and_the_numbers_by_rank() -> None:
    text = shown("qwen3_moe", 100, targets=(ATTENTION, "**/router/kernel@rank=2"), ranks=(1, 4))
    assert re.search(r"● .*router/kernel +12 in x 4 out +48", text)
    assert re.search(r"\n  .*down/kernel +4 experts x 6 in x 12 out +288", text)
    assert re.search(r"embed/embedding +19 in x 12 out +228 +embedding", text)
    assert re.search(r"lm_head/kernel .*output head", text)
    assert re.search(r"layers_\{0,1\} +2 equal +2 x 1,528", text)
    model = open_shaped(str(MODELS / "qwen3_moe"), False)
    for rank in (1, 4):
        spec = lora_jax.LoraSpec(rank, 1.0, (ATTENTION, lora_jax.Rule("**/router/kernel", rank=2)))
        layout = lora_jax.resolve(
            spec, model.apply, model.params, model.batch, train=False, key=None
        )
        count = lora_jax.count(jax.eval_shape(lambda x=layout: lora_jax.init(jax.random.key(0), x)))
        assert re.search(rf"\n +{rank} +{count:,} ", text)
    stacked = shown("qwen3_moe", 100, scan_layers=True)
    assert "2 layers x 4 experts x 6 in x 12 out" in stacked and "2 layers x 12 " in stacked
    assert "--targets all-linear" in stacked


def test_stored_codes_are_told_by_their_bits() -> None:
    assert re.search(r"down/kernel +12 in x 16 out +[0-9.]+ bits", shown("llama_nf4"))


def test_a_terminal_without_block_characters() -> None:
    assert re.search(r"\n\* .*`- kernel", shown("bert", encoding="ascii", targets=(ATTENTION,)))


def test_errors_tell_the_cure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoraError, match=r"lora.targets: cannot read 'rnk=4'"):
        shown("no_such_model", targets=("**@rnk=4",))
    with pytest.raises(LoraError, match=r"--ranks: rank must be an integer of at least 1, got 0"):
        shown("no_such_model", ranks=(4, 0))
    model = str(MODELS / "llama")
    assert show.main([model, "--targets", "**/attention/qq/kernel"]) == 1
    said = capsys.readouterr().err
    assert "'**/attention/qq/kernel' matches no parameter" in said
    assert "layers_0/attention/q/kernel" in said
    assert show.main([f"{model}_x"]) == 1
    assert "hub:organisation/name" in capsys.readouterr().err
