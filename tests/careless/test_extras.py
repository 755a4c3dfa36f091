"""Every command says which extra to install when a library of one is missing."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

import pytest

import train  # noqa: F401  the modules that tests share, before a library is missing
from lora_jax.system.extras import EXTRAS

COMMANDS = {
    "train": "train --config configs/own_model.py",
    "show": "show no-model",
    "predict": "predict --adapter no-run --text a",
    "generate": "generate --adapter no-run --prompt a",
    "export": "export no-run --format peft --out {here}/out",
    "import": "import no-folder --out {here}/out",
    "report": "report no-run",
}
CASES = [(module, "train", COMMANDS["predict"]) for module in EXTRAS["train"]]
CASES += [("tokenizers", "train", words) for name, words in COMMANDS.items() if name != "predict"]
CASES += [
    ("PIL", "images", "train --config configs/vit_images.py"),
    ("gguf", "gguf", "show {here}/m.gguf"),
    ("gguf", "gguf", "generate --base {here}/m.gguf --prompt a"),
    ("gguf", "gguf", "predict --adapter {run} --base {here}/m.gguf --text a"),
    ("gguf", "gguf", "train --model.reference {here}/m.gguf"),
    ("huggingface_hub", "hub", "show hub:no/model"),
    ("huggingface_hub", "hub", "generate --base hub:no/model --prompt a"),
    ("huggingface_hub", "hub", "train --model.reference hub:no/model"),
]
RUN = pathlib.Path(__file__).parents[1] / "formats" / "v1"


# Extra -> the modules that ask for it when they are imported; the others ask when it is needed.
ASKING = {
    "train": ("lora_jax", "train"),
    "images": ("lora_jax.data.images", "lora_jax.data.image_", "lora_jax.training.image"),
}


def forget(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the modules whose names begin so be imported again, until the test ends."""
    for name in [name for name in sys.modules if name.startswith(names)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def kept() -> Iterator[None]:
    """Give the other tests the modules back that they know, and no second ones."""
    before = dict(sys.modules)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] in ("lora_jax", "train")]:
        del sys.modules[name]
    sys.modules |= {n: m for n, m in before.items() if n.partition(".")[0] in ("lora_jax", "train")}


@pytest.mark.few(8)
@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("module", "extra", "words"),
    CASES,
    ids=lambda x: x.partition(" ")[0] if isinstance(x, str) else x,
)
def test_a_missing_library_names_its_extra(
    module: str,
    extra: str,
    words: str,
    kept: None,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    forget(monkeypatch, *ASKING.get(extra, ()), f"{module}.")
    monkeypatch.setitem(sys.modules, module, None)
    from lora_jax import __main__ as package

    try:
        status = package.main(words.format(here=tmp_path, run=RUN).split())
    except SystemExit as end:
        status = end.code  # of train, which ends the process
    said = capsys.readouterr().err
    assert status == 1, said
    # A thread of an earlier test in this process may have printed a line before.
    assert "Traceback" not in said and module in said.partition("error: ")[2], said
    assert f"pip install 'lora-jax[{extra}]'" in said
