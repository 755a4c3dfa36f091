"""Time `lora-jax generate` from a cold start to the first token, with and without kept programs.

    python -m benchmarks.first_token
    python -m benchmarks.first_token --python .venv-torch/bin/python

Each run is a new process that opens SmolLM2 from a folder in float32, reads a short prompt and
writes one token. "kept programs" is the cache of compiled programs that commands have by default
(system/program_cache.py). A run that is not counted fills it. --python names an interpreter with
torch and transformers, which then do the same. All sides run in turns, and the numbers are medians.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile

import jax

from benchmarks import commands, common
from benchmarks.exported_model import exported

PROMPT = "Once upon a time"
THEIRS = """
import sys, transformers
folder, prompt = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=1)[0]))
"""


def sides(python: str | None, scratch: pathlib.Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Return name -> command and environment variables."""
    folder = str(exported(scratch))
    command = [sys.executable, "-m", "lora_jax", "generate", "--base", folder]
    command += ["--prompt", PROMPT, "--max-new-tokens", "1"]
    found = {
        "lora-jax, no kept programs": (command, {"JAX_ENABLE_COMPILATION_CACHE": "false"}),
        "lora-jax, kept programs": (command, {}),
    }
    if python is not None:
        theirs = [python, "-c", THEIRS, folder, PROMPT]
        found["transformers"] = (theirs, {"PYTHONPATH": ""})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds from a cold start to the first token.")
    parser.add_argument("--python", help="an interpreter with torch and transformers")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        runs = sides(args.python, pathlib.Path(scratch))
        for command, variables in runs.values():  # fills the caches, also that of files
            commands.spent(command, variables)
        taken: dict[str, list[commands.Spent]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                taken[name].append(commands.spent(*run))
    table = []
    for name, each in taken.items():
        seconds = statistics.median(x.seconds for x in each)
        processor = statistics.median(x.processor for x in each)
        table.append((name, f"{seconds:.1f}", f"{processor:.1f}"))
    print(f"{common.hardware()}; {commands.load()}", end="\n\n")
    print(common.table(("", "s", "CPU s"), table))


if __name__ == "__main__":
    main()
