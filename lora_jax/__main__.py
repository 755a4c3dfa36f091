"""The command line of the package: `lora-jax COMMAND`, which is `python -m lora_jax COMMAND`.

    train       fine-tune a model, or plan it; the same program as train.py of the repository
    show        list a model's parameters, and which of them patterns match
    predict     classify texts or images with trained adapters
    generate    continue texts with trained adapters
    export      write a run as a merged model, or as an adapter of PEFT, llama.cpp or MLX
    import      convert a PEFT folder to a run
    report      write a page about a run, or compare many runs

`lora-jax COMMAND --help` lists the options of a command. All commands read two variables:

    LORA_JAX_KEEP_MEMORY    the share of the free memory that a process on a CPU may keep after it
                            was freed, to use it again: 0.5. Steps are faster, and the process may
                            hold twice as much memory. 0 returns all freed memory
    LORA_JAX_CACHE          the folder for models, data and compiled programs (lora_jax in
                            XDG_CACHE_HOME or ~/.cache)

Compiled programs are kept there, up to 512 MB, so that the next command starts sooner;
JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none.

The exit status is that of the command, or 2 if there is no command or an unknown one.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.errors import nearest
from lora_jax.system.extras import MissingExtraError

Command = Callable[[Sequence[str]], int]


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
        return COMMANDS[name](rest)
    except MissingExtraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _train(arguments: Sequence[str]) -> int:
    from lora_jax.training import processes

    train = _train_script()
    processes.end(lambda: train.main(arguments, "lora-jax train"))


def _train_script() -> Any:
    """Import train.py. The wheel has it inside the package, a checkout next to the package."""
    package = pathlib.Path(__file__).resolve().parent
    path = next(p for p in (package / "train.py", package.parent / "train.py") if p.is_file())
    spec = importlib.util.spec_from_file_location("train", path)
    assert spec is not None and spec.loader is not None  # the file exists
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def _command(name: str) -> Command:
    """Return a command, which imports its room, and so asks for its extra, when it is run."""

    def run(arguments: Sequence[str]) -> int:
        command: Any
        match name:
            case "show":
                from lora_jax.cli import show as command
            case "predict":
                from lora_jax.serving import predict as command
            case "generate":
                from lora_jax.serving import generate as command
            case "export":
                from lora_jax.cli import export as command
            case "import":
                from lora_jax.cli import import_ as command
            case _:
                from lora_jax.cli import report as command
        return int(command.main(arguments))

    return run


COMMANDS: dict[str, Command] = {"train": _train}
COMMANDS |= {n: _command(n) for n in ("show", "predict", "generate", "export", "report", "import")}

if __name__ == "__main__":
    sys.exit(main())
