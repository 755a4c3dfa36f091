"""The methods that LoRA is compared with, for the built-in models. Each one is a `Method`.

Full fine-tuning, the top layers, BitFit and the head alone are patterns of base parameters. Adapter
layers and prefixes have parameters of their own, in a small tree under the key `EXTRA`; the model
is not modified, but its calls are intercepted. docs/methods.md describes the methods and their
sources.
"""

from experiments.methods.bottleneck import Bottleneck as Bottleneck
from experiments.methods.method import Method as Method
from experiments.methods.method import adapter_drop as adapter_drop
from experiments.methods.method import bitfit as bitfit
from experiments.methods.method import full as full
from experiments.methods.method import head as head
from experiments.methods.method import houlsby as houlsby
from experiments.methods.method import lin as lin
from experiments.methods.method import pfeiffer as pfeiffer
from experiments.methods.method import prefix_embedding as prefix_embedding
from experiments.methods.method import prefix_layer as prefix_layer
from experiments.methods.method import top_layers as top_layers
from experiments.methods.prefix import Prefix as Prefix
from lora_jax.checkpoint.saved_adapter import EXTRA as EXTRA
from lora_jax.training.method import LORA as LORA
