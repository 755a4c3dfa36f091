"""The methods that LoRA is compared with, for the built-in models. Each one is a `Method`.

Full fine-tuning, the top layers, BitFit and the head alone are patterns of base parameters. Adapter
layers and prefixes have parameters of their own, in a small tree under the key `EXTRA`; the model
is not modified, but its calls are intercepted. docs/methods.md describes the methods and their
sources.
"""

from lora_jax.baselines.bottleneck import Bottleneck as Bottleneck
from lora_jax.baselines.methods import EXTRA as EXTRA
from lora_jax.baselines.methods import NONE as NONE
from lora_jax.baselines.methods import Method as Method
from lora_jax.baselines.methods import adapter_drop as adapter_drop
from lora_jax.baselines.methods import bitfit as bitfit
from lora_jax.baselines.methods import full as full
from lora_jax.baselines.methods import head as head
from lora_jax.baselines.methods import houlsby as houlsby
from lora_jax.baselines.methods import lin as lin
from lora_jax.baselines.methods import pfeiffer as pfeiffer
from lora_jax.baselines.methods import prefix_embedding as prefix_embedding
from lora_jax.baselines.methods import prefix_layer as prefix_layer
from lora_jax.baselines.methods import top_layers as top_layers
from lora_jax.baselines.prefix import Prefix as Prefix
from lora_jax.baselines.saved import check_lora as check_lora
from lora_jax.baselines.sites import HEAD as HEAD
