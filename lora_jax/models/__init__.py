"""Plain Flax models without any LoRA code, and the loaders of their published weights."""

from lora_jax.errors import ModelConfigError as ModelConfigError
from lora_jax.errors import ModelError as ModelError
from lora_jax.errors import WeightsError as WeightsError
from lora_jax.models.bert import Bert as Bert
from lora_jax.models.bert import BertClassifier as BertClassifier
from lora_jax.models.config import BertConfig as BertConfig
from lora_jax.models.config import DecoderConfig as DecoderConfig
from lora_jax.models.config import Disentangled as Disentangled
from lora_jax.models.config import LayersConfig as LayersConfig
from lora_jax.models.config import LongRope as LongRope
from lora_jax.models.config import PreNorm as PreNorm
from lora_jax.models.config import TextModelConfig as TextModelConfig
from lora_jax.models.config import VitConfig as VitConfig
from lora_jax.models.decoder import DecoderClassifier as DecoderClassifier
from lora_jax.models.decoder import DecoderModel as DecoderModel
from lora_jax.models.hf_names import hf_names as hf_names
from lora_jax.models.vit import Vit as Vit
from lora_jax.models.vit import VitClassifier as VitClassifier
from lora_jax.models.weights.source import MINILM as MINILM
from lora_jax.models.weights.source import SMOLLM2 as SMOLLM2
from lora_jax.models.weights.source import Source as Source
from lora_jax.models.weights.source import open as open
from lora_jax.models.weights.stored import Head as Head
from lora_jax.models.weights.stored import classifier as classifier
from lora_jax.models.weights.stored import shapes as shapes
