"""The Hugging Face modules of the built-in models' parameters, for `lora_jax.exchange`."""

from lora_jax.hf_module import HfModule, HfNames
from lora_jax.models.config import BertConfig, BuiltInConfig, LlamaConfig
from lora_jax.models.weights.assemble import Head
from lora_jax.models.weights.names import BERT, LLAMA, ROBERTA, TensorName, TensorNames


def hf_names(config: BuiltInConfig, head: Head | None = None, root: str = "") -> HfNames:
    """Return `{path: module}` of every parameter that the model of `config` can have.

    Args:
      config: of the model; with `scan_layers` the paths are those of the stacked parameters.
      head: the classification head that the encoder was loaded with. With one the names are those
        of `...ForSequenceClassification`, without one those of the bare encoder.
      root: what stands before every path: "" for the tree that `load` gives, "params/" where it
        is inside of Flax's `{"params": ...}`.

    >>> from lora_jax.models import LlamaConfig
    >>> names = hf_names(LlamaConfig(8, 8, 2, 2, 2, 4, 8, 8))
    >>> names["layers_{layer}/attention/q/kernel"]
    'model.layers.{layer}.self_attn.q_proj.weight'
    """
    table = _table(config)
    rows = [(f"{root}bert/" if head else root, row) for row in table.rows]
    rows += [(root, row) for row in (table.heads[head.pooling] if head else ())]
    found: dict[str, str | HfModule] = {}
    for start, row in rows:
        path = start + (row.stacked_path if config.scan_layers else row.path)
        found[path] = _module(config, table, row, head)
    return found


def _table(config: BuiltInConfig) -> TensorNames:
    if not isinstance(config, BertConfig):
        return LLAMA
    return ROBERTA if config.position_offset else BERT


def _module(
    config: BuiltInConfig, table: TensorNames, row: TensorName, head: Head | None
) -> str | HfModule:
    top = row.hf.startswith(("classifier.", "lm_head."))  # the head, which is not in the encoder
    wrapped = head is not None or isinstance(config, LlamaConfig)
    name = table.prefix + row.hf if wrapped and not top else row.hf
    if row.path.endswith("embedding"):
        tied = "lm_head" if isinstance(config, LlamaConfig) and config.tied else ""
        return HfModule(name, layer="embedding", tied=tied)
    return name
