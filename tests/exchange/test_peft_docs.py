"""The code of docs/peft.md runs, in a process that has JAX and NumPy alone for it."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_page_runs(tmp_path: pathlib.Path) -> None:
    """Red: an example that is not true any more, or an exchange that imports an extra."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/peft.md").read_text(), re.M | re.S)
    end = "import sys; assert not {'safetensors', 'tokenizers', 'flax', 'optax'} & {*sys.modules}"
    (tmp_path / "page.py").write_text("\n".join([*blocks, end]))
    command, env = [sys.executable, "page.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=True, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "vLLM needs --max-lora-rank 8" in done.stdout
