"""The Hugging Face modules of the built-in models' parameters, for `lora_jax.exchange`."""

from lora_jax.models.config import DecoderConfig, StoredConfig, VitConfig
from lora_jax.models.hf_module import HfModule, HfNames
from lora_jax.models.weights.encoder_names import BERT
from lora_jax.models.weights.families import table_of
from lora_jax.models.weights.stored import Head
from lora_jax.models.weights.tensor_names import TensorName

# transformers 5 names the modules of ViT differently from its files; PEFT's files use these names.
_VIT_MODULES = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def hf_names(config: StoredConfig, head: Head | None = None, root: str = "") -> HfNames:
    """Return `{path: module}` of every parameter of a model that belongs to a module.

    Args:
      config: the config of the model; with `scan_layers` the paths are of stacked parameters.
      head: the classification head that the model was loaded with. With a head the names are
        as in `...ForSequenceClassification`, without it as in the bare encoder, or as in
        `...ForCausalLM`.
      root: a prefix of every path: "" for the tree that `load` returns, "params/" if it is inside
        Flax's `{"params": ...}`.

    >>> from lora_jax.models import DecoderConfig
    >>> sizes = dict(vocab_size=8, hidden_size=8, num_layers=2, num_heads=2, mlp_size=8)
    >>> names = hf_names(DecoderConfig(**sizes, num_kv_heads=2, head_dim=4, max_positions=8))
    >>> names["layers_{layer}/attention/q/kernel"]
    'model.layers.{layer}.self_attn.q_proj.weight'
    """
    table = table_of(config)
    rows = [(f"{root}{config.root}/" if head else root, row) for row in table.rows]
    rows += [(root, row) for row in (table.heads[head.pooling] if head else ())]
    found: dict[str, str | HfModule | tuple[HfModule, ...]] = {}
    for start, row in rows:
        if not row.hf.endswith((".weight", ".bias")):
            continue  # an array without a module of its own cannot be adapted or saved
        path = start + (row.stacked_path if config.scan_layers else row.path)
        found[path] = _module(config, row, head)
        name = hf_prefix(config, row, head) + row.hf
        if isinstance(config, VitConfig) and _module_name(name) != name:
            found[path] = (HfModule(_module_name(name)), HfModule(name))  # the first one is written
        if row.of_experts and (both := _of_all_experts(config, row)).name != name:
            found[path] = (HfModule(name), both)
    return found


def _of_all_experts(config: StoredConfig, row: TensorName) -> HfModule:
    """Return the part of the parameter of all experts, as PEFT's target_parameters names it."""
    assert isinstance(config, DecoderConfig)
    start, size = "model.layers.{layer}.mlp.experts.{expert}", config.mlp_size
    rows = {"gate": (0, size), "up": (size, size)}.get(row.path.split("/")[-2])
    name = f"{start}.{'gate_up' if rows else 'down'}_proj.weight"
    return HfModule(name, layer="experts", rows=rows)


def _module_name(name: str) -> str:
    """Return the name in transformers 5 of a tensor of ViT."""
    for old, new in _VIT_MODULES.items():
        name = name.replace(old, new)
    return name


def hf_prefix(config: StoredConfig, row: TensorName, head: Head | None = None) -> str:
    """Return the prefix of the Hugging Face name of a tensor; see `hf_names`."""
    table = table_of(config)
    of_head = row.path.startswith("classifier/") and not (
        table is BERT and row.hf.startswith("pooler.")  # for BERT it is inside the encoder
    )
    outside = of_head or row.hf.startswith("lm_head.")
    wrapped = head is not None or isinstance(config, DecoderConfig)
    return table.prefix if wrapped and not outside else ""


def _module(config: StoredConfig, row: TensorName, head: Head | None) -> str | HfModule:
    name = hf_prefix(config, row, head) + row.hf
    if row.path.endswith("embedding"):
        is_tied = (
            isinstance(config, DecoderConfig) and config.tied and row.path.startswith("embed/")
        )
        return HfModule(name, layer="embedding", tied="lm_head" if is_tied else "")
    if row.in_out:
        return HfModule(name, transposed=False)
    return name
