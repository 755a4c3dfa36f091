"""Optional dependencies: what each extra installs, and the error for what is missing.

The transform needs five libraries. Training, reports and some file formats need more, which
`pip install 'lora-jax[train]'` and the like bring.
"""

import importlib.util

# Extra -> the modules that it installs, by the names they are imported under.
EXTRAS = {
    "train": ("array_record", "filelock", "grain", "matplotlib", "rich", "tensorboardX")
    + ("safetensors", "tensorflow_datasets", "tokenizers", "tyro"),
    "images": ("PIL",),
    "report": ("jinja2", "matplotlib"),
    "gguf": ("gguf",),
    "hub": ("huggingface_hub",),
}


class MissingExtraError(ImportError):
    """A library that an extra brings is not installed; the message gives the pip command."""


def require(extra: str, user: str, *modules: str) -> None:
    """Raise `MissingExtraError` unless the modules that an extra brings are installed.

    Args:
      extra: a key of `EXTRAS`.
      user: what needs it, for the message: "lora_jax.training".
      *modules: those of the extra that are needed; none named: all.
    """
    wanted = modules or EXTRAS[extra]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{user} needs {', '.join(missing)}, which the extra {extra!r} installs:\n"
            f"    pip install 'lora-jax[{extra}]'"
        )
