"""LoRA for JAX: adapters are a plain pytree, applied by a transformation over frozen parameters.

layout   = lora_jax.resolve(spec, f, params, x)
adapters = lora_jax.init(key, layout)
g        = lora_jax.adapt(layout, f)          # g(params, adapters, x)
merged   = lora_jax.merge(layout, params, adapters)

`lora_jax.multi` serves many adapters at once, `lora_jax.moe` has mixtures and routers. Import the
other sub-modules by name: `from lora_jax import analysis`.
"""

from lora_jax import frozen as frozen
from lora_jax import multi as multi
from lora_jax import paths as paths
from lora_jax import updates as updates
from lora_jax.adapters import Adapter as Adapter
from lora_jax.adapters import count as count
from lora_jax.adapters import init as init
from lora_jax.adapters import merge as merge
from lora_jax.analysis.as_lora import PlainLora as PlainLora
from lora_jax.analysis.as_lora import as_lora as as_lora
from lora_jax.analysis.from_base import init_from_base as init_from_base
from lora_jax.analysis.from_inputs import init_from_inputs as init_from_inputs
from lora_jax.analysis.merge_error import merge_error as merge_error
from lora_jax.bases.quantise import dequantize as dequantize
from lora_jax.bases.quantise import quantize as quantize
from lora_jax.checkpoint import fingerprint as fingerprint
from lora_jax.checkpoint import restore as restore
from lora_jax.checkpoint import save as save
from lora_jax.errors import LoraError as LoraError
from lora_jax.foreign import from_equinox as from_equinox
from lora_jax.foreign import from_keras as from_keras
from lora_jax.foreign import from_nnx as from_nnx
from lora_jax.layout import Layout as Layout
from lora_jax.multi import moe as moe
from lora_jax.multi.dropout import dropout as dropout
from lora_jax.resolve import resolve as resolve
from lora_jax.sharding import partition_specs as partition_specs
from lora_jax.spec import LoraSpec as LoraSpec
from lora_jax.spec import Rule as Rule
from lora_jax.spec import Target as Target
from lora_jax.transform import adapt as adapt
from lora_jax.updates.factors import Factors as Factors

__version__ = "0.1.0"
