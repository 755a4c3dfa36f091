"""Optional dependencies: the libraries that each extra installs, and the error for a missing one.

The transform needs five libraries. Training, reports and some file formats need more;
`pip install 'lora-jax[train]'` and the other extras install them.
"""

import importlib.util

# Extra -> the import names of the modules that it installs.
EXTRAS = {
    "train": ("array_record", "filelock", "grain", "jinja2", "matplotlib", "rich")
    + ("safetensors", "tensorboardX", "tensorflow_datasets", "tokenizers", "tyro"),
    "images": ("PIL",),
    "report": ("jinja2", "matplotlib"),
    "gguf": ("gguf",),
    "hub": ("huggingface_hub",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "plan-tpu": ("libtpu",),
    "plan-cuda": ("jax_cuda12_plugin", "nvidia"),
}


class MissingExtraError(ImportError):
    """A library that belongs to an extra is not installed. The message gives the pip command."""


def require(extra: str, user: str, *modules: str) -> None:
    """Raise `MissingExtraError` unless the modules of an extra, or only those given, are there.

    `user` is the name that the message gives to the code that needs them: "lora_jax.training".
    """
    if text := missing(extra, user, *modules):
        raise MissingExtraError(text)


def missing(extra: str, user: str, *modules: str) -> str:
    """Return the message of `require`, or "" if the modules are there."""
    found = [name for name in modules or EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if not found:
        return ""
    return (
        f"{user} needs {', '.join(found)}, which the extra {extra!r} installs:\n"
        f"    pip install 'lora-jax[{extra}]'"
    )
