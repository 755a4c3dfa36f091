"""Many adapters: stacked, selected by number or mixed in one batch, swapped, and combined."""

from lora_jax.multi.activated import activated as activated
from lora_jax.multi.activated import invoked as invoked
from lora_jax.multi.combine import combine as combine
from lora_jax.multi.combine import truncate as truncate
from lora_jax.multi.dropout import Dropout as Dropout
from lora_jax.multi.dropout import dropout as dropout
from lora_jax.multi.selected import Stack as Stack
from lora_jax.multi.stack import BASE as BASE
from lora_jax.multi.stack import Scaled as Scaled
from lora_jax.multi.stack import Selection as Selection
from lora_jax.multi.stack import pad as pad
from lora_jax.multi.stack import put as put
from lora_jax.multi.stack import select as select
from lora_jax.multi.stack import stack as stack
from lora_jax.multi.stack import union as union
from lora_jax.multi.stack import unpad as unpad
from lora_jax.multi.stack import unstack as unstack
