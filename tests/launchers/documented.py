"""The scripts of docs/pods.md, run here with a tiny config and fewer processes."""

from __future__ import annotations

import re
import sys

from tests.launchers.machine import ROOT

PYTHON = sys.executable
OWN = "--config configs/own_model.py"
SMALL = f"{OWN} --width 16 --batch-size 32 --evaluate-every 40 --processes.heartbeat-timeout 10"


def block(heading: str, language: str) -> str:
    text = (ROOT / "docs/pods.md").read_text().partition(f"\n## {heading}\n")[2]
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/pods.md has no block of {language} under {heading}"
    return found.group(1)


def changed(script: str, changes: dict[str, str]) -> str:
    """Replace texts of a script, each of which it must contain."""
    for old, new in changes.items():
        assert old in script, f"docs/pods.md does not say {old!r} any more:\n{script}"
        script = script.replace(old, new)
    return script
