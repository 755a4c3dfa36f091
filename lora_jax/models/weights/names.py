"""The tables of tensor names, by the `model_type` of a Hugging Face folder and by a config."""

from lora_jax.models.config import BertConfig, StoredConfig, VitConfig
from lora_jax.models.weights.decoder_names import GEMMA, GPT2, MIXTRAL, PHI3, QWEN3_MOE
from lora_jax.models.weights.decoder_names import LLAMA as LLAMA
from lora_jax.models.weights.encoder_names import BERT as BERT
from lora_jax.models.weights.encoder_names import DEBERTA, DISTILBERT, MODERNBERT, VIT
from lora_jax.models.weights.encoder_names import ROBERTA as ROBERTA
from lora_jax.models.weights.tensor_names import TensorName as TensorName
from lora_jax.models.weights.tensor_names import TensorNames as TensorNames

HF = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "deberta-v2": DEBERTA,
    "distilbert": DISTILBERT,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "modernbert": MODERNBERT,
    "vit": VIT,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": QWEN3_MOE,
}
GGUF = {"llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}


def table_of(config: StoredConfig) -> TensorNames:
    """Return the table of names of the family that has these options.

    Args:
      config: the config of the model.
    """
    if isinstance(config, VitConfig):
        return VIT
    if isinstance(config, BertConfig):
        if config.pre_norm is not None:
            return MODERNBERT
        if config.relative is not None:
            return DEBERTA
        if config.head_activation == "relu":
            return DISTILBERT
        return ROBERTA if config.position_offset else BERT
    if config.positions == "learned":
        return GPT2
    if config.post_norms:
        return GEMMA
    if config.fused:
        return PHI3
    if config.num_experts:
        return QWEN3_MOE if config.qk_norm else MIXTRAL
    return LLAMA
