"""The kinds of input that are fuzzed, by name."""

from __future__ import annotations

from lora_jax.errors import LoraError, ModelError
from lora_jax.system.console import USER_ERRORS
from tests.fuzz import adapters, imports, model_files, user_files
from tests.fuzz.kind import Kind

ADAPTER, MODEL = (LoraError,), (ModelError, FileNotFoundError)
KINDS = {
    "layout": Kind(adapters.make_layout, adapters.read_layout, ADAPTER, 240),
    "manifest": Kind(adapters.make_manifest, adapters.read_checkpoint, USER_ERRORS, 160),
    "orbax": Kind(adapters.make_orbax, adapters.read_orbax, ADAPTER, 80),
    "peft": Kind(adapters.make_peft, adapters.read_peft, ADAPTER, 160),
    "mlx": Kind(adapters.make_mlx, adapters.read_mlx, ADAPTER, 60),
    "import": Kind(imports.make_import, imports.read_import, USER_ERRORS, 60),
    "safetensors": Kind(model_files.make_safetensors, model_files.read_safetensors,
                        (LoraError, ModelError), 200),
    "folder": Kind(model_files.make_folder, model_files.read_folder, MODEL, 100),
    "config": Kind(model_files.make_config, model_files.read_config, MODEL, 250),
    "gguf": Kind(model_files.make_gguf, model_files.read_gguf, (*MODEL, LoraError), 200),
    "gguf-adapter": Kind(model_files.make_gguf_adapter, model_files.read_gguf_adapter,
                         ADAPTER, 80),
    "tokenizer": Kind(model_files.make_tokenizer, model_files.read_tokenizer,
                      (*MODEL, LoraError), 120),
    "data": Kind(user_files.make_data, user_files.read_data, ADAPTER, 140),
    "run": Kind(user_files.make_run, user_files.read_run, ADAPTER, 100),
    "line": Kind(user_files.make_line, user_files.read_line, (LoraError, SystemExit, OSError), 50),
}  # fmt: skip


assert sum(kind.cases for kind in KINDS.values()) == 2_000
