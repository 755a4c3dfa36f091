"""The command line of the package: `lora-jax COMMAND`, which is `python -m lora_jax COMMAND`.

    train       fine-tune a model, or plan it; the same program as train.py of the repository
                    lora-jax train --config mine.py --steps 100 --run-dir runs/mine
    show        list a model's parameters, and which of them patterns match
                    lora-jax show model.gguf --targets "**/attention/{q,v}/kernel"
    predict     classify texts or images with trained adapters
                    lora-jax predict --adapter runs/reviews --text "A warm, funny film."
    generate    continue texts with trained adapters, or talk to them
                    lora-jax generate --adapter runs/chat --prompt "What is LoRA?"
    report      write a page about a run, or compare many runs
                    lora-jax report runs/reviews
    export      write a run as a merged model, or as an adapter of PEFT, llama.cpp or MLX
                    lora-jax export runs/reviews --format peft --out adapter
    import      convert a PEFT folder to a run
                    lora-jax import adapter --base models/bert --out runs/imported

`lora-jax COMMAND --help` lists the options of a command. The exit status is that of the command,
or 2 if there is no command or an unknown one. All commands read these variables:

    LORA_JAX_CACHE          the folder for models, data and compiled programs (lora_jax in
                            XDG_CACHE_HOME or ~/.cache)
    LORA_JAX_KEEP_MEMORY    the share of the free memory that a process on a CPU may keep after it
                            was freed, to use it again: 0.5. Steps are faster, and the process may
                            hold twice as much memory. 0 returns all freed memory
    JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE
                            another folder for compiled programs, of which up to 512 MB are kept so
                            that the next command starts sooner; false keeps none
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lora_jax.errors import nearest
from lora_jax.system.extras import MissingExtraError

# Each module has a `main(arguments)`; it is imported, and asks for its extra, when it is run.
COMMANDS = {
    name: f"lora_jax.cli.{name}"
    for name in ("train", "show", "predict", "generate", "export", "report")
} | {"import": "lora_jax.cli.import_"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, and return its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}")
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        (other,) = nearest(name, COMMANDS, n=1)
        sys.stderr.write(f"error: no command {name!r}; nearest: {other!r}\n\n{__doc__}")
        return 2
    try:
        return int(importlib.import_module(COMMANDS[name]).main(rest))
    except MissingExtraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
