"""LoRA for JAX: adapters are a plain pytree, applied by a transformation over frozen parameters.

layout   = lora_jax.resolve(spec, f, params, x)
adapters = lora_jax.init(key, layout)
g        = lora_jax.adapt(layout, f)          # g(params, adapters, x)
merged   = lora_jax.merge(layout, params, adapters)
"""

from lora_jax import frozen as frozen
from lora_jax import paths as paths
from lora_jax.adapters import Factors as Factors
from lora_jax.adapters import count as count
from lora_jax.adapters import init as init
from lora_jax.checkpoint import restore as restore
from lora_jax.checkpoint import save as save
from lora_jax.combine import combine as combine
from lora_jax.combine import truncate as truncate
from lora_jax.errors import LoraError as LoraError
from lora_jax.experts import Mixture as Mixture
from lora_jax.experts import Routed as Routed
from lora_jax.experts import init_router as init_router
from lora_jax.experts import mix as mix
from lora_jax.experts import route as route
from lora_jax.fingerprint import fingerprint as fingerprint
from lora_jax.gate import Load as Load
from lora_jax.gate import gates as gates
from lora_jax.layout import Layout as Layout
from lora_jax.layout import Target as Target
from lora_jax.layout import resolve as resolve
from lora_jax.merge import merge as merge
from lora_jax.nnx import from_nnx as from_nnx
from lora_jax.sharding import partition_specs as partition_specs
from lora_jax.spec import LoraSpec as LoraSpec
from lora_jax.spec import Rule as Rule
from lora_jax.stacked import BASE as BASE
from lora_jax.stacked import Scaled as Scaled
from lora_jax.stacked import Selection as Selection
from lora_jax.stacked import Stack as Stack
from lora_jax.stacked import pad as pad
from lora_jax.stacked import put as put
from lora_jax.stacked import select as select
from lora_jax.stacked import stack as stack
from lora_jax.stacked import union as union
from lora_jax.stacked import unpad as unpad
from lora_jax.stacked import unstack as unstack
from lora_jax.transform import adapt as adapt
from lora_jax.usage import balance as balance
from lora_jax.usage import load as load
